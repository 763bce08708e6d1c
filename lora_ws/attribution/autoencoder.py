"""A sparse autoencoder of activations: few codes of each, from which it can be rebuilt.

``z = relu(E x + b)``, ``x' = D z + c`` of standardised x, with columns of D of norm 1; the loss of
a row is the mean squared error of the numbers of x' plus ``l1`` times the sum of z.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from lora_ws.errors import ConfigError
from lora_ws.threads import flushed

# A held-out error that falls by less than this share does not count as falling.
_FALLS = 1e-4


@dataclass(frozen=True)
class AutoencoderSpec:
    """How a sparse autoencoder is trained.

    Attributes:
        hidden: how many codes.
        l1: weight of the sum of the codes in the loss.
        learning_rate: of Adam.
        batch: rows per step.
        held_out: share of the rows, or groups of rows, that training does not see.
        patience: epochs without a lower held-out error after which training ends.
        max_epochs: at which it ends anyway.
        seed: of start, order and held-out rows.
    """

    hidden: int = 512
    l1: float = 1e-3
    learning_rate: float = 1e-3
    batch: int = 128
    held_out: float = 0.2
    patience: int = 20
    max_epochs: int = 5000
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("hidden", "batch", "patience", "max_epochs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not 0 < self.held_out < 1:
            raise ConfigError(f"held_out: expected a share between 0 and 1, got {self.held_out}")


@dataclass(frozen=True, eq=False)
class SparseAutoencoder:
    """A trained autoencoder.

    Attributes:
        mean: of the activations.
        deviation: of the activations; 1 where they do not vary.
        encoder: E.
        threshold: b.
        decoder: D.
        offset: c.
        held_out_r2: of rows that training did not see, all numbers together.
        epochs: that led to it.
        spec: how it was trained.
    """

    mean: Float[Tensor, " width"]
    deviation: Float[Tensor, " width"]
    encoder: Float[Tensor, "hidden width"]
    threshold: Float[Tensor, " hidden"]
    decoder: Float[Tensor, "width hidden"]
    offset: Float[Tensor, " width"]
    held_out_r2: float
    epochs: int
    spec: AutoencoderSpec = field(default_factory=AutoencoderSpec)

    def encode(self, activations: Float[Tensor, "n width"]) -> Float[Tensor, "n hidden"]:
        """Codes of activations."""
        scaled = (activations - self.mean) / self.deviation
        return F.relu(F.linear(scaled, self.encoder, self.threshold))

    def decode(self, codes: Float[Tensor, "n hidden"]) -> Float[Tensor, "n width"]:
        """Activations of codes."""
        return F.linear(codes, self.decoder, self.offset) * self.deviation + self.mean


class _Network(nn.Module):
    def __init__(self, width: int, hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        columns = F.normalize(torch.randn(width, hidden, generator=generator), dim=0)
        self.decoder = nn.Parameter(columns)
        self.encoder = nn.Parameter(columns.T.clone())
        self.threshold = nn.Parameter(torch.zeros(hidden))
        self.offset = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        codes = F.relu(F.linear(x, self.encoder, self.threshold))
        return codes, F.linear(codes, self.decoder, self.offset)


def fit_autoencoder(
    activations: Float[Tensor, "n width"],
    spec: AutoencoderSpec | None = None,
    *,
    groups: Sequence[int] | np.ndarray | None = None,
) -> SparseAutoencoder:
    """Train until the held-out error stops falling, and keep the best.

    Args:
        activations: one per row.
        spec: how.
        groups: which rows belong together, such as those of an image: they are held out together.

    Raises:
        ConfigError: too few rows or groups to hold some out, or numbers that are not finite.
    """
    spec = AutoencoderSpec() if spec is None else spec
    if activations.ndim != 2 or not bool(activations.isfinite().all()):
        raise ConfigError(
            f"activations: expected finite rows, got shape {list(activations.shape)} or NaN"
        )
    held = torch.from_numpy(_held_out(len(activations), groups, spec))
    x = activations.detach().float()
    mean, deviation = x[~held].mean(dim=0), x[~held].std(dim=0, correction=0)
    deviation = torch.where(deviation > 0, deviation, 1)
    scaled = (x - mean) / deviation
    network, epochs = _train(scaled[~held], scaled[held], spec)
    with torch.no_grad():
        error = (network(scaled[held])[1] - scaled[held]).square().sum()
        whole = (scaled[held] - scaled[held].mean(dim=0)).square().sum()
    return SparseAutoencoder(
        mean,
        deviation,
        network.encoder.detach(),
        network.threshold.detach(),
        network.decoder.detach(),
        network.offset.detach(),
        float(1 - error / whole),
        epochs,
        spec,
    )


@flushed()
def _train(seen: Tensor, held: Tensor, spec: AutoencoderSpec) -> tuple[_Network, int]:
    generator = torch.Generator().manual_seed(spec.seed)
    network = _Network(seen.shape[1], spec.hidden, generator)
    adam = torch.optim.Adam(network.parameters(), spec.learning_rate)
    best, lowest, since, found = copy.deepcopy(network), float("inf"), 0, 0
    for epoch in range(spec.max_epochs):
        for rows in torch.randperm(len(seen), generator=generator).split(spec.batch):
            codes, rebuilt = network(seen[rows])
            loss = F.mse_loss(rebuilt, seen[rows]) + spec.l1 * codes.sum(dim=1).mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
            with torch.no_grad():
                # Small codes on large columns would evade the penalty.
                network.decoder.copy_(F.normalize(network.decoder, dim=0))
        with torch.no_grad():
            error = float(F.mse_loss(network(held)[1], held))
        if error < lowest * (1 - _FALLS):
            best, lowest, since, found = copy.deepcopy(network), error, 0, epoch + 1
        else:
            since += 1
        if since == spec.patience:
            break
    return best, found


def _held_out(
    rows: int, groups: Sequence[int] | np.ndarray | None, spec: AutoencoderSpec
) -> Bool[np.ndarray, " n"]:
    """A share of the groups, at least one of them, and not all."""
    of = np.arange(rows) if groups is None else np.asarray(groups)
    if len(of) != rows:
        raise ConfigError(f"groups: expected {rows}, one per row, got {len(of)}")
    known = np.unique(of)
    count = max(1, round(spec.held_out * len(known)))
    if count >= len(known):
        raise ConfigError(
            f"expected more rows, or groups of them, to hold some out, got {len(known)}"
        )
    out = np.random.default_rng(spec.seed).choice(known, count, replace=False)
    return np.isin(of, out)

"""Weight2Token: singular vectors as tokens of ranks, then modules; as published, or corrected."""

from typing import Literal, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lora_ws.errors import ConfigError
from lora_ws.functional.canonical import Canonical, canonical_form
from lora_ws.models.base import Metanetwork, Symmetry
from lora_ws.models.factors import Factors, Shape
from lora_ws.models.inputs import InputSpec
from lora_ws.models.module import MetanetModule
from lora_ws.models.pooling import AttentionPool, ModuleEncoder
from lora_ws.models.spectra import START, Side, energy_shares, log_sizes, symmetries_of

Signs = Literal["random", "even", "canonical"]
QUERIES = 4
HEAD = 64
# Added to a score, it hides a token; finite, so that of none at all comes no NaN.
HIDDEN = -1e9


@final
class W2T(Metanetwork):
    """A token per rank, one attention layer among ranks, pooled to a token per module, and again.

    The token of a rank is made of u and v by two linear maps of its module's own, and scaled and
    shifted by its singular value. Mended are four faults of the published form: its sizes are
    z-scores over the ranks of a module, which rank 1 does not have and which hide how large an
    update is; here they are logarithms beside the training adapters' sizes, and beside the
    module's first. Ranks that are zero took part; here each counts by its share of the energy, so
    that padding changes nothing and what is small fades. And the sign, set by the largest entry of
    u, jumps where two are nearly equal; here it does not show, or is random in training.

    Args:
        side: ``both`` reads u and v; ``left`` u alone, as v is mostly noise where every adapter
            starts from a random A of its own.
        width: numbers per token, and of the embedding; a multiple of ``heads``.
        depth: layers of attention among modules.
        heads: attention heads of every layer.
        signs: common sign of u and v: ``even`` adds the tokens of both; ``random`` draws one in
            training, for each adapter, module and rank; ``canonical`` keeps that of the largest
            entry.
        dropout: of the attention layers.
        published: the published form: z-scores over ranks, canonical signs, every rank counted.

    Example:
        >>> from lora_ws.adapters import Layout
        >>> layout = Layout.known("tiny_sd_qv")
        >>> network = W2T(width=8, depth=1).build(InputSpec.of(layout), outputs=10)
        >>> network(torch.zeros(2, layout.size)).shape
        torch.Size([2, 10])
    """

    reads = "factors"

    def __init__(
        self,
        *,
        side: Side = "both",
        width: int = 128,
        depth: int = 2,
        heads: int = 4,
        signs: Signs = "even",
        dropout: float = 0.0,
        published: bool = False,
    ) -> None:
        self.side: Side = side
        self.width = width
        self.depth = depth
        self.heads = heads
        self.signs = signs
        self.dropout = dropout
        self.published = published

    @property
    def symmetries(self) -> frozenset[Symmetry]:  # type: ignore[override]
        """Of an update, and of neither of its signs where one side is read."""
        return symmetries_of(self.side)

    def build(self, inputs: InputSpec, outputs: int) -> "W2TModule":
        """Make the network.

        Raises:
            ConfigError: a width, depth, rate or name does not fit; or the published form is asked
                of modules of rank 1, or of other signs than canonical.
        """
        if min(self.width, self.depth, self.heads) < 1 or self.width % self.heads:
            raise ConfigError(
                f"{self}: expected depth and heads of at least 1, and width a multiple of heads"
            )
        if self.side not in ("left", "both") or self.signs not in ("random", "even", "canonical"):
            raise ConfigError(
                f"{self}: expected side left or both, and signs random, even or canonical"
            )
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"{self}: expected dropout from 0 to below 1")
        if self.published:
            self._check_published(inputs)
        return W2TModule(inputs, outputs, self)

    def _check_published(self, inputs: InputSpec) -> None:
        if self.signs != "canonical":
            raise ConfigError(
                f"signs: expected canonical with published, got {self.signs}; use signs=canonical"
            )
        ranks = sorted({layer.rank for layer in inputs.factors.layers})
        if len(ranks) > 1 or ranks[0] < 2:
            raise ConfigError(
                f"published: expected modules of one rank of at least 2, got {ranks}; this form "
                "divides by the standard deviation over the ranks of a module, which of one "
                "rank is NaN; with `published: false` W2T reads any rank"
            )


@final
class W2TModule(MetanetModule):
    """What `W2T` builds; its embedding is the average over modules."""

    def __init__(self, inputs: InputSpec, outputs: int, spec: W2T) -> None:
        super().__init__(inputs)
        width = spec.width
        self.signs, self.published = spec.signs, spec.published
        self.factors = Factors(inputs.factors)
        both = spec.side == "both"
        self.project = nn.ModuleList(Projections(s, width, both) for s in self.factors.shapes)
        self.fuse = Fuse(width, both, sizes=1 if spec.published else 2, gain=not spec.published)
        self.among_ranks = _encoder(spec, 1)
        self.pool = RankPool(width)
        self.places = nn.Parameter(torch.randn(len(inputs.factors.layers), width) * 0.02)
        self.norm = nn.LayerNorm(width)
        self.among_modules = _encoder(spec, spec.depth)
        self.average = AttentionPool(width)
        self.output = nn.Sequential(
            nn.Linear(width, HEAD), nn.LayerNorm(HEAD), nn.ReLU(), nn.Linear(HEAD, outputs)
        )

    def embed(self, rows: Float[Tensor, "adapters params"]) -> Float[Tensor, "adapters width"]:
        """Return the average over the tokens of modules."""
        # The published form reads sizes as they are.
        rows = rows if self.published else self.normalizer(rows)
        projected, values = self._canonical(rows)
        sizes, weights = (_published if self.published else _mended)(values)
        if self.signs == "random" and self.training:
            projected = projected * torch.where(torch.rand_like(values) < 0.5, -1, 1)[..., None]
        tokens = self.fuse(projected, sizes)
        if self.signs == "even":
            tokens = tokens + self.fuse(-projected, sizes)
        counted = None if self.published else weights.flatten(0, 1)
        mixed = self.among_ranks(tokens.flatten(0, 1), scores=counted)
        modules = self.pool(mixed.unflatten(0, tokens.shape[:2]), weights) + self.places
        return self.average(self.among_modules(self.norm(modules)))

    def head(self, embedding: Float[Tensor, "adapters width"]) -> Float[Tensor, "adapters outputs"]:
        """Return outputs."""
        return self.output(embedding)

    def _canonical(
        self, rows: Float[Tensor, "adapters params"]
    ) -> tuple[
        Float[Tensor, "adapters modules rank features"], Float[Tensor, "adapters modules rank"]
    ]:
        """Projected singular vectors and singular values, zeros where a module's rank is lower."""
        updates = [canonical_form(*pair) for pair in self.factors(rows)]
        rank = max(update.values.shape[-1] for update in updates)
        projected = [
            F.pad(project(update), (0, 0, 0, rank - update.values.shape[-1])).flatten(-2)
            for project, update in zip(self.project, updates, strict=True)
        ]
        values = [F.pad(u.values, (0, rank - u.values.shape[-1])) for u in updates]
        in_order = self.factors.in_order
        return in_order(projected).unflatten(-1, (rank, -1)), in_order(values)


@final
class Projections(nn.Module):
    """Linear maps of u, and of v where both are read, of each module's own, of a group."""

    def __init__(self, shape: Shape, width: int, both: bool) -> None:
        super().__init__()
        self.left = nn.Parameter(torch.randn(shape.modules, shape.outputs, width) * START)
        right = shape.modules, shape.inputs, width
        self.right = nn.Parameter(torch.randn(right) * START) if both else None

    def forward(self, update: Canonical) -> Float[Tensor, "adapters modules rank features"]:
        """Return what is read side by side."""
        left = torch.einsum("...mxr,mxh->...mrh", update.left, self.left)
        if self.right is None:
            return left
        right = torch.einsum("...mxr,mxh->...mrh", update.right, self.right)
        return torch.cat([left, right], -1)


@final
class Fuse(nn.Module):
    """One token of the projections of u and v, scaled and shifted by its size (FiLM)."""

    def __init__(self, width: int, both: bool, *, sizes: int, gain: float) -> None:
        super().__init__()
        self.sides = nn.ModuleList(nn.LayerNorm(width) for _ in range(1 + both))
        self.linear = nn.Linear(len(self.sides) * width, width)
        self.film = nn.Linear(sizes, 2 * width)
        # Where training saw rank 1 alone, sizes beside the first say nothing about others.
        nn.init.zeros_(self.film.weight[:, 1:])
        self.gain = nn.Parameter(torch.tensor(float(gain)))
        self.norm = nn.LayerNorm(width)

    def forward(
        self,
        projected: Float[Tensor, "adapters modules rank features"],
        sizes: Float[Tensor, "adapters modules rank sizes"],
    ) -> Float[Tensor, "adapters modules rank width"]:
        """Return the tokens."""
        parts = projected.chunk(len(self.sides), -1)
        read = [norm(part).relu() for norm, part in zip(self.sides, parts, strict=True)]
        scale, shift = self.film(sizes).chunk(2, -1)
        token = self.linear(torch.cat(read, -1)) * (1 + self.gain * scale.tanh())
        return F.gelu(self.norm(token + self.gain * shift))


@final
class RankPool(nn.Module):
    """Averages over ranks by learned queries, made one token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(width, QUERIES) / width**0.5)
        self.linear = nn.Linear(QUERIES * width, width)
        self.norm = nn.LayerNorm(width)

    def forward(
        self,
        tokens: Float[Tensor, "adapters modules rank width"],
        weights: Float[Tensor, "adapters modules rank"],
    ) -> Float[Tensor, "adapters modules width"]:
        """Return a token per module; weights are added to the scores of each rank."""
        shares = (tokens @ self.queries + weights[..., None]).softmax(-2)
        return F.gelu(self.norm(self.linear((shares.mT @ tokens).flatten(-2))))


Sizes = tuple[Float[Tensor, "adapters modules rank sizes"], Float[Tensor, "adapters modules rank"]]


def _mended(values: Float[Tensor, "adapters modules rank"]) -> Sizes:
    """Logarithms of sizes, beside the training adapters' and the module's first; energy shares."""
    first = values[..., :1]
    ratios = values / torch.where(first > 0, first, 1)
    shares = energy_shares(values)
    weights = torch.where(shares > 0, torch.where(shares > 0, shares, 1).log(), HIDDEN)
    return torch.stack([log_sizes(values), log_sizes(ratios)], -1), weights


def _published(values: Float[Tensor, "adapters modules rank"]) -> Sizes:
    """z-scores over ranks, and half the size as a score."""
    sizes = values.log1p()
    centred = sizes - sizes.mean(-1, keepdim=True)
    return (centred / sizes.std(-1, keepdim=True))[..., None], sizes / 2


def _encoder(spec: W2T, depth: int) -> ModuleEncoder:
    return ModuleEncoder(
        spec.width,
        depth=depth,
        heads=spec.heads,
        feedforward=4 * spec.width,
        dropout=spec.dropout,
    )

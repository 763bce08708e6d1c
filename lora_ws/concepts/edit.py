"""Edits of a few weights: chosen by scores, undone bit by bit, kept in a file."""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_ws.concepts.scores import Scores
from lora_ws.concepts.spec import Per
from lora_ws.errors import ConfigError, DataError


@dataclass(frozen=True, eq=False)
class SparseEdit:
    """Weights that are set to zero.

    Attributes:
        indices: name of a weight -> flat positions in it.
        before: name -> old values at these positions.
        facts: metadata, as text.
    """

    indices: dict[str, Tensor]
    before: dict[str, Tensor]
    facts: dict[str, str] = field(default_factory=dict)

    @property
    def changed(self) -> int:
        """How many weights."""
        return sum(map(len, self.indices.values()))

    @contextmanager
    def applied(self, unet: nn.Module) -> Iterator[None]:
        """Set the weights to zero until the block ends, however it ends.

        Raises:
            ConfigError: the model lacks a weight, or other numbers stand there: another base.
        """
        weights = self._of(unet)
        try:
            for name, at in self.indices.items():
                weights[name].data.view(-1)[at] = 0
            yield
        finally:
            for name, at in self.indices.items():
                weights[name].data.view(-1)[at] = self.before[name].to(weights[name])

    def apply(self, unet: nn.Module) -> None:
        """Set the weights to zero for good.

        Raises:
            ConfigError: see `applied`.
        """
        weights = self._of(unet)
        for name, at in self.indices.items():
            weights[name].data.view(-1)[at] = 0

    def save(self, file: Path) -> Path:
        """Write places and old values, 12 bytes per weight."""
        tensors = {f"{name}.indices": at.int() for name, at in self.indices.items()}
        tensors |= {f"{name}.before": values for name, values in self.before.items()}
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, file, {"lora_ws_edit": json.dumps(self.facts)})
        return file

    @classmethod
    def load(cls, file: Path) -> "SparseEdit":
        """Read an edit.

        Raises:
            DataError: the file is none.
        """
        try:
            with safe_open(file, "pt") as opened:
                facts = json.loads((opened.metadata() or {})["lora_ws_edit"])
                keys = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise DataError(f"{file}: expected an edit of a concept ({error!r})") from error
        names = [key.removesuffix(".indices") for key in keys if key.endswith(".indices")]
        indices = {name: keys[f"{name}.indices"].long() for name in names}
        return cls(indices, {name: keys[f"{name}.before"] for name in names}, facts)

    def _of(self, unet: nn.Module) -> dict[str, nn.Parameter]:
        weights = dict(unet.named_parameters())
        for name, at in self.indices.items():
            flat = weights[name].detach().flatten() if name in weights else torch.empty(0)
            fits = not len(at) or int(at.max()) < len(flat)
            if not fits or not torch.equal(flat[at], self.before[name].to(flat)):
                raise ConfigError(
                    f"`{name}`: expected the weights that the edit was made for; apply it to the "
                    "same base, once"
                )
        return weights


def choose(
    scores: Scores, weights: Mapping[str, nn.Parameter], budget: float, per: Per = "matrix"
) -> SparseEdit:
    """The weights with the highest positive scores.

    Args:
        scores: of the weights; turn the sign to choose what works against a concept.
        weights: by name.
        budget: share of the weights of each row, of each matrix, or of all, rounded down; with the
            released 0.001 per row, rows of fewer than 1000 inputs are left alone.
        per: what the share is of.

    Raises:
        ConfigError: the budget is no share.
    """
    if not 0 < budget <= 1:
        raise ConfigError(f"budget: expected a share above 0 and up to 1, got {budget:g}")
    found: dict[str, Tensor] = {}
    if per == "global":
        joined = torch.cat([score.flatten() for score in scores.values()])
        mask = _best(joined[None], math.floor(budget * joined.numel()))[0]
        parts = mask.split([score.numel() for score in scores.values()])
        found = dict(zip(scores, parts, strict=True))
    else:
        for name, score in scores.items():
            rows = score.flatten(1) if per == "row" else score.reshape(1, -1)
            found[name] = _best(rows, math.floor(budget * rows.shape[1])).flatten()
    return _edit({name: mask.nonzero()[:, 0] for name, mask in found.items()}, weights)


def random_control(edit: SparseEdit, weights: Mapping[str, nn.Parameter], seed: int) -> SparseEdit:
    """As many weights of each matrix, drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {
        name: torch.randperm(weights[name].numel(), generator=generator)[: len(at)].sort().values
        for name, at in edit.indices.items()
    }
    return _edit(drawn, weights)


def magnitude_control(edit: SparseEdit, weights: Mapping[str, nn.Parameter]) -> SparseEdit:
    """As many weights of each matrix, the largest."""
    largest = {
        name: weights[name].detach().abs().flatten().topk(len(at)).indices.sort().values
        for name, at in edit.indices.items()
    }
    return _edit(largest, weights)


def _best(rows: Tensor, count: int) -> Tensor:
    """Where the highest positive numbers of each row are."""
    mask = torch.zeros_like(rows, dtype=torch.bool)
    if count:
        mask.scatter_(1, rows.topk(count, dim=1).indices, True)
    return mask & (rows > 0)


def _edit(indices: dict[str, Tensor], weights: Mapping[str, nn.Parameter]) -> SparseEdit:
    kept = {name: at for name, at in indices.items() if len(at)}
    before = {name: weights[name].detach().flatten()[at].clone() for name, at in kept.items()}
    return SparseEdit(kept, before)

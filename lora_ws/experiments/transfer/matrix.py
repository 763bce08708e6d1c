"""Who reads what: a matrix of hits, trained on by tested on, and what it loses away from home."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float

from lora_ws.experiments.transfer.spec import TransferRecord, TransferSpec

Trained = tuple[str, ...]


@dataclass(frozen=True)
class Matrix:
    """One reader on the zoos of one factor.

    Attributes:
        zoos: names, in the order of the factor's values.
        hits: (what it was trained on, the zoo that it was tested on) -> for each photo set whether
            its class was named; absent where it cannot read.
    """

    zoos: Trained
    hits: Mapping[tuple[Trained, str], Bool[np.ndarray, " sets"]]

    def share(self, trained: Trained, tested: str) -> float | None:
        """Accuracy in percent; None where it cannot read."""
        found = self.hits.get((trained, tested))
        return None if found is None else 100 * float(found.mean())

    def others(self, tested: str) -> Trained:
        """All zoos but one."""
        return tuple(name for name in self.zoos if name != tested)

    @cached_property
    def pairs(self) -> list[tuple[str, str]]:
        """Trained on, tested on: pairs of different zoos that it reads."""
        return [
            (trained, tested)
            for trained in self.zoos
            for tested in self.zoos
            if trained != tested and ((trained,), tested) in self.hits
        ]

    @property
    def home(self) -> float:
        """Mean accuracy in percent, trained and tested on the same zoo."""
        return 100 * float(np.mean([self.hits[(zoo,), zoo] for zoo in self.zoos]))

    @property
    def gaps(self) -> Float[np.ndarray, " sets"] | None:
        """For each photo set, accuracy on another zoo less that of who was trained on that zoo.

        The mean over all pairs of different zoos; None where no pair is read.
        """
        return self._mean([((trained,), tested) for trained, tested in self.pairs])

    @property
    def left_out(self) -> Float[np.ndarray, " sets"] | None:
        """The same of who was trained on all other zoos; None of two zoos or where not read."""
        if len(self.zoos) < 3:
            return None
        return self._mean([(self.others(zoo), zoo) for zoo in self.zoos])

    @property
    def mixed(self) -> Float[np.ndarray, " sets"] | None:
        """The same of who was trained on all zoos, as many adapters as of one."""
        return self._mean([(self.zoos, zoo) for zoo in self.zoos])

    @property
    def worst(self) -> tuple[str, str] | None:
        """Trained on, tested on: the pair that loses most."""
        losses = {pair: self._gap(((pair[0],), pair[1])).mean() for pair in self.pairs}
        return min(losses, key=lambda pair: losses[pair]) if losses else None

    def _gap(self, cell: tuple[Trained, str]) -> Float[np.ndarray, " sets"]:
        return self.hits[cell].astype(float) - self.hits[(cell[1],), cell[1]]

    def _mean(self, cells: Sequence[tuple[Trained, str]]) -> Float[np.ndarray, " sets"] | None:
        found = [self._gap(cell) for cell in cells if cell in self.hits]
        return np.mean(found, axis=0) if found else None


def matrices(
    spec: TransferSpec, records: Iterable[TransferRecord]
) -> dict[tuple[str, str], Matrix]:
    """Reader, factor -> its matrix: the folds of every cell one after the other.

    Args:
        spec: names the zoos of each factor.
        records: of all folds.
    """
    parts: dict[str, dict[tuple[Trained, str], dict[int, str]]] = {}
    for one in records:
        for tested, hits in one.hits.items():
            cells = parts.setdefault(one.reader, {})
            cells.setdefault((tuple(one.trained), tested), {})[one.fold] = hits
    found = {}
    for reader, cells in parts.items():
        whole = {
            cell: np.array([bit == "1" for fold in sorted(folds) for bit in folds[fold]])
            for cell, folds in cells.items()
        }
        for factor in spec.factors:
            zoos = spec.zoos(factor)
            own = {c: h for c, h in whole.items() if set(c[0]) <= set(zoos) and c[1] in zoos}
            found[reader, factor] = Matrix(zoos, own)
    return found

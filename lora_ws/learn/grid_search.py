"""Experiments with choices to make: every candidate is fitted, validation rows choose."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from lora_ws.config import to_plain
from lora_ws.learn.choose import best, candidates
from lora_ws.learn.features import Prepared, prepare
from lora_ws.learn.result import Fitted
from lora_ws.learn.spec import ExperimentSpec


@dataclass
class GridSearch:
    """Fits the candidates of an experiment; those of one representation share its features.

    Attributes:
        spec: the experiment.
        prepared: its data; those of candidates with other representations are made once.
    """

    spec: ExperimentSpec
    prepared: Prepared
    _made: dict[str, Prepared] = field(default_factory=dict)

    def fit_best(self, seed: int, fit: Callable[[ExperimentSpec, Prepared, int], Fitted]) -> Fitted:
        """Fit all candidates, and keep the one that does best on the validation rows.

        Args:
            seed: of all of them.
            fit: fits one.

        Returns:
            The best by `Task.selects`, the first of equals; its record has the experiment's name
            and says what was chosen.
        """
        options = candidates(self.spec)
        fitted = [fit(option.spec, self._data(option.spec), seed) for option in options]
        chosen = best([one.record.val[self.spec.kind.selects] for one in fitted])
        seconds = sum(one.record.seconds for one in fitted)
        record = replace(
            fitted[chosen].record,
            name=self.spec.name,
            chosen=options[chosen].values,
            seconds=seconds,
        )
        return fitted[chosen]._replace(record=record)

    def _data(self, spec: ExperimentSpec) -> Prepared:
        key = _rows_of(spec)
        if key == _rows_of(self.spec):
            return self.prepared
        if key not in self._made:
            data = self.prepared.adapters, self.prepared.subset
            self._made[key] = prepare(spec, data)
        return self._made[key]


def _rows_of(spec: ExperimentSpec) -> str:
    """What decides the rows that a network sees."""
    return json.dumps(to_plain([spec.representation, spec.reads_factors]))

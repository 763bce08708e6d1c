"""Hyper-parameter search with Optuna over any experiment: validation rows judge, test rows wait."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lora_ws.config import to_plain
from lora_ws.errors import TrainingError
from lora_ws.learn.choose import with_values
from lora_ws.learn.features import Prepared, prepare
from lora_ws.learn.run import fit_seeds, run
from lora_ws.learn.run_folder import folder_for
from lora_ws.learn.spec import ExperimentSpec, identity
from lora_ws.learn.tune_spec import TuneSpec
from lora_ws.report.records import RunRecord

if TYPE_CHECKING:
    from optuna import Study, Trial

STUDY, BEST = "study.db", "best"


class Tuned(NamedTuple):
    """What a search found.

    Attributes:
        study: all trials; their values are what `Task.selects` says, the mean over seeds.
        values: the best settings, by dotted key.
        spec: the experiment with them.
        folder: of its run.
        records: of its seeds, whose test rows were measured once.
    """

    study: "Study"
    values: dict[str, Any]
    spec: ExperimentSpec
    folder: Path
    records: list[RunRecord]


def tune(spec: TuneSpec, out: Path) -> Tuned:
    """Try settings until there are enough, and run the best; another call goes on.

    The trials stand in ``out/study.db``; another experiment or search is another study in it.

    Args:
        spec: what to search.
        out: folder of the search; made if missing.

    Raises:
        ConfigError: a key is not one of the experiment's.
        TrainingError: no trial could be trained.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    out.mkdir(parents=True, exist_ok=True)
    asked = json.dumps([identity(spec.experiment()), spec.seeds, to_plain(spec.search)])
    study = optuna.create_study(
        study_name=sha256(asked.encode()).hexdigest()[:16],
        storage=f"sqlite:///{out / STUDY}",
        direction="maximize",
        load_if_exists=True,
    )
    done = [trial for trial in study.trials if trial.state.is_finished()]
    # A study that goes on draws what it has not drawn.
    study.sampler = optuna.samplers.TPESampler(seed=len(study.trials))
    objective = _Objective(spec)
    study.optimize(objective, max(spec.trials - len(done), 0), catch=(TrainingError,))
    if not any(trial.value is not None for trial in study.trials):
        raise TrainingError("no trial could be trained; search other values")
    values = {key: json.loads(text) for key, text in study.best_trial.user_attrs.items()}
    best = with_values(spec.experiment(), values, "search")
    folder = folder_for(best, out / BEST)
    return Tuned(study, values, best, folder, run(best, folder))


@dataclass
class _Objective:
    """How good settings are on the validation rows; representations that repeat are made once."""

    spec: TuneSpec
    made: dict[str, Prepared] = field(default_factory=dict)

    def __call__(self, trial: "Trial") -> float:
        values = {key: suggest(trial, key, domain) for key, domain in self.spec.search.items()}
        for key, value in values.items():
            trial.set_user_attr(key, json.dumps(value))
        spec = with_values(self.spec.experiment(), values, "search")
        key = json.dumps(to_plain([spec.representation, spec.reads_factors]))
        if key not in self.made:
            self.made[key] = prepare(spec)
        fitted = fit_seeds(spec, self.made[key], range(spec.seeds))
        return float(np.mean([one.record.val[spec.kind.selects] for one in fitted]))


def suggest(trial: "Trial", key: str, domain: Any) -> Any:
    """Draw a value of a key.

    Args:
        trial: draws.
        key: dotted, also the name of the parameter in the study.
        domain: values, or the ends of a range.
    """
    if isinstance(domain, Mapping):
        whole = all(isinstance(domain[end], int) for end in ("low", "high"))
        draw = trial.suggest_int if whole else trial.suggest_float
        return draw(key, **domain)
    # Optuna keeps words and numbers, not lists.
    return json.loads(trial.suggest_categorical(key, [json.dumps(value) for value in domain]))

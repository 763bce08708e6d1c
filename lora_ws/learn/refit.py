"""A finished seed, fitted again on training and validation rows, with out-of-fold confidence.

Validation rows choose, and then train too: one row in eight more. What calibrates is then the
outputs of each row from a fit without its fold, featurizer included. A kernel's rows are as wide
as there are training rows, and standardised rows grow with the root of their width: outputs of
folds are brought to the width of the whole.
"""

import time
from dataclasses import replace
from math import log, sqrt

import numpy as np
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

from lora_ws.bundle.confidence import NetworkOutputs
from lora_ws.learn.calibration import HeldOut, class_directions, run_rows
from lora_ws.learn.estimators import fit_network, network_outputs
from lora_ws.learn.features import Prepared, refit_features
from lora_ws.learn.result import Fitted, Job
from lora_ws.threads import threads

FOLDS = 5


def refit(fitted: Fitted) -> Fitted:
    """Fit the estimator of a finished seed again, on training and validation rows.

    Args:
        fitted: a seed of an estimator of scikit-learn; its validation metrics stay in the record.

    Raises:
        ConfigError: a fold lacks a class.
    """
    (spec, prepared, seed), start = fitted.job, time.perf_counter()
    rows = np.sort(np.concatenate([prepared.split.train, prepared.split.val]))
    with threads(spec.trainer.threads):
        whole = refit_features(spec, prepared, rows)
        network = fit_network(spec, whole, seed)
        outputs, truth = network_outputs(network, whole, "test")
        job = Job(spec, whole, seed)
        held = out_of_fold(job, rows) if whole.task.gives_probabilities else None
    test = whole.task.measure(lambda _: (whole.task.predict(outputs), truth), "test")
    record = replace(
        fitted.record,
        refit=True,
        n_train=len(rows),
        dim=whole.features.shape[1],
        test=test.values,
        confusion=test.confusion,
        seconds=fitted.record.seconds + time.perf_counter() - start,
    )
    return Fitted(job, record, network, fitted.history, test, held)


def out_of_fold(job: Job, rows: np.ndarray) -> HeldOut:
    """Outputs of each row from a fit without its fold; rows of one group share a fold."""
    spec, whole, seed = job
    outputs, labels = [], []
    for train, asked in folds(whole, rows):
        part = refit_features(spec, whole, rows[train])
        network = fit_network(spec, part, seed)
        bare = class_directions(part, network)
        found, truth = run_rows(bare, part, network, rows[asked])
        growth = whole.features.shape[1] / part.features.shape[1]
        outputs.append(
            found._replace(
                alignment=sqrt(growth) * found.alignment, log_norm=found.log_norm + log(growth) / 2
            )
        )
        labels.append(truth)
    return HeldOut(NetworkOutputs.join(outputs), np.concatenate(labels))


def folds(whole: Prepared, rows: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Choose places among the rows to train on and to ask, for each fold."""
    labels, group = whole.labels[rows], whole.adapters.card.split.group
    groups = whole.adapters.column(group)[rows] if group else np.arange(len(rows))
    kind = StratifiedGroupKFold if whole.task.stratifies else GroupKFold
    return list(kind(FOLDS, shuffle=True, random_state=0).split(rows, labels, groups))

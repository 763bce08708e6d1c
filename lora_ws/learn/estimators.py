"""Classifiers and regressors that scikit-learn fits, as finished seeds like any other."""

import time

import torch
from sklearn.base import is_regressor
from torch import Tensor

from lora_ws.collection import Split
from lora_ws.learn.features import Prepared
from lora_ws.learn.result import Fitted, Job, make_record
from lora_ws.learn.spec import ExperimentSpec
from lora_ws.memory import BLOCK_BYTES, blocks
from lora_ws.models import MetanetModule, Metanetwork
from lora_ws.threads import threads

ENGINE = "scikit-learn-cpu"
ROWS_AT_ONCE = 1024


def fit_estimator_seed(spec: ExperimentSpec, prepared: Prepared, seed: int) -> Fitted:
    """Fit an estimator on the training rows, and measure it on the test rows once.

    Args:
        spec: whose model is a classifier or regressor of scikit-learn.
        prepared: the data as the seed sees them.
        seed: of what the estimator draws.

    Raises:
        ConfigError: the estimator cannot be fitted.
    """
    start, task = time.perf_counter(), prepared.task
    with threads(spec.trainer.threads):
        network = fit_network(spec, prepared, seed)
        outputs = {part: network_outputs(network, prepared, part) for part in Split._fields}

    def parts(part: str) -> tuple[Tensor, Tensor]:
        found, truth = outputs[part]
        return task.predict(found), truth

    train_loss, val_loss = (
        float(task.loss(*outputs[part])) / len(outputs[part][1]) for part in ("train", "val")
    )
    val, test = task.measure(parts, "val"), task.measure(parts, "test")
    quality = {f"val_{task.quality}": val.values[task.quality]}
    history = [{"epoch": 1, "train_loss": train_loss, "val_loss": val_loss, **quality}]
    seconds = time.perf_counter() - start
    job = Job(spec, prepared, seed)
    record = make_record(job, history, val, test, engine=ENGINE, seconds=seconds)
    return Fitted(job, record, network, history, test)


def fit_network(spec: ExperimentSpec, prepared: Prepared, seed: int) -> MetanetModule:
    """Fit the estimator of a spec on the training rows alone.

    Raises:
        ConfigError: it cannot be fitted.
    """
    # Here, because it loads much of scikit-learn.
    from lora_ws.models.estimators import fit_estimator

    model, labels = spec.model, prepared.labels
    assert not isinstance(model, Metanetwork)
    targets = prepared.task.numbers(labels) if is_regressor(model) else labels
    return fit_estimator(
        model,
        prepared.normalizer,
        prepared.features,
        targets,
        prepared.split.train,
        prepared.task.outputs,
        seed,
    )


@torch.inference_mode()
def network_outputs(network: MetanetModule, prepared: Prepared, part: str) -> tuple[Tensor, Tensor]:
    """Outputs and targets of a part."""
    rows = getattr(prepared.split, part)
    width = 4 * prepared.features.shape[1]
    parts = blocks(len(rows), width, most=min(BLOCK_BYTES, ROWS_AT_ONCE * width))
    found = torch.cat([network(torch.as_tensor(prepared.features[rows[one]])) for one in parts])
    return found, torch.from_numpy(prepared.labels[rows])

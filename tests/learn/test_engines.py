"""Each engine takes the steps of the written-out loop: optimizer, schedule, early stopping."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from reference_loop import Trained, train_alone
from tolerances import EXACT

from lora_ws.collection import AdapterSet
from lora_ws.errors import ConfigError
from lora_ws.featurizers import StatsFlatVec
from lora_ws.learn.batched import fit_batched
from lora_ws.learn.engine import engine_of
from lora_ws.learn.features import prepare
from lora_ws.learn.module import LoraModule
from lora_ws.learn.result import Fitted, Job
from lora_ws.learn.run import fit_seed
from lora_ws.learn.spec import ExperimentSpec, FitSpec, TrainerSpec
from lora_ws.learn.tasks import Regression
from lora_ws.models import MLP

# Rates that fall several times, and patience that ends before max_epochs.
PLATEAUS = FitSpec(lr=0.03, max_epochs=60, patience=9, lr_patience=1, lr_factor=0.3)
FITS = {
    "plateaus": PLATEAUS,
    "adamw": replace(PLATEAUS, optimizer="adamw", weight_decay=0.1),
    "decay in the gradient": replace(PLATEAUS, weight_decay=0.01),
    "warm-up, then plateaus": replace(PLATEAUS, warmup=2.5),
    "warm-up and cosine": FitSpec(lr=0.02, max_epochs=9, schedule="cosine", warmup=3),
    "constant": FitSpec(lr=0.02, max_epochs=6, schedule="constant"),
    "clipped": replace(PLATEAUS, grad_clip=0.5, max_epochs=12),
    "averaged": replace(PLATEAUS, ema=0.9),
}
CASES = [*((name, "classification") for name in FITS), ("plateaus", "regression")]
# What the other engine is quickly tested with.
SLOW_ALONE = ("adamw", "decay in the gradient", "warm-up, then plateaus")
SLOW_STACKED = ("clipped", "constant", "warm-up and cosine")
UNSTACKED = {"averaged": FITS["averaged"], "last": replace(PLATEAUS, weights="last")}


def cases(slow: tuple[str, ...]) -> list[Any]:
    """All, of which some are marked."""
    marks = {name: [pytest.mark.slow] * (name in slow) for name in FITS}
    return [pytest.param(*case, marks=marks[case[0]], id="-".join(case)) for case in CASES]


@pytest.fixture(autouse=True)
def wide() -> Iterator[None]:
    """In float64, where what is the same loop is the same to many digits."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def job(make_zoo: Callable[..., AdapterSet], tmp_path: Path) -> Callable[..., Job]:
    zoo = make_zoo(n=60)
    count = np.random.default_rng(0).integers(4, 16, len(zoo))
    rows = zoo.rows.append_column("count", pa.array(count))
    store = str(replace(zoo, rows=rows).save(tmp_path / "store"))

    def make(fit: FitSpec, task: str = "classification") -> Job:
        spec = ExperimentSpec(
            store,
            task=task,
            label="count" if task == "regression" else None,
            featurizer=StatsFlatVec(),
            model=MLP(hidden=(8, 6)),
            fit=fit,
            trainer=TrainerSpec("cpu"),
        )
        prepared = prepare(spec)
        features = torch.as_tensor(prepared.features).double()
        prepared = replace(prepared, features=features)
        if task == "regression":
            labels = prepared.labels.astype(float)
            fitted = Regression().fit(labels[prepared.split.train])
            prepared = replace(prepared, labels=labels, task=fitted)
        return Job(spec, prepared, 3)

    return make


def check(fitted: Fitted, job: Job) -> Trained:
    expected = train_alone(job)
    losses = [entry["val_loss"] for entry in fitted.history]
    assert len(losses) == len(expected.losses)
    np.testing.assert_allclose(losses, expected.losses, rtol=EXACT)
    for name, value in fitted.network.state_dict().items():
        torch.testing.assert_close(value, expected.best[name], rtol=EXACT, atol=EXACT)
    return expected


@pytest.mark.parametrize(("name", "task"), cases(SLOW_ALONE))
def test_lightning_takes_the_steps_of_the_loop(
    job: Callable[..., Job], name: str, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = FITS[name]
    made, rates = job(fit, task), []
    end = LoraModule.on_train_epoch_end

    def note(self: LoraModule) -> None:
        rates.append(self.optimizers(use_pl_optimizer=False).param_groups[0]["lr"])  # type: ignore[union-attr]
        end(self)

    monkeypatch.setattr(LoraModule, "on_train_epoch_end", note)
    expected = check(fit_seed(*made), made)
    np.testing.assert_allclose(rates, expected.rates, rtol=EXACT)
    assert fit.schedule == "constant" or fit.grad_clip or len(set(rates)) > 2


@pytest.mark.parametrize(
    ("name", "task"), [case for case in cases(SLOW_STACKED) if case.values[0] not in UNSTACKED]
)
def test_the_stack_takes_the_steps_of_the_loop(
    job: Callable[..., Job], name: str, task: str
) -> None:
    made = job(FITS[name], task)
    batched = replace(made.spec, trainer=TrainerSpec("cpu", engine="batched"))
    jobs = [made._replace(spec=batched, seed=seed) for seed in (3, 4)]
    for fitted, one in zip(fit_batched(jobs), jobs, strict=True):
        check(fitted, one)


@pytest.mark.parametrize("fit", UNSTACKED.values(), ids=UNSTACKED)
def test_the_stack_refuses_what_it_does_not_do(
    fit: FitSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=rf"one-by-one with fit\.{fit.changed[0]}="):
        ExperimentSpec(fit=fit, trainer=TrainerSpec(engine="batched"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert engine_of(ExperimentSpec(fit=fit)) == "one-by-one"

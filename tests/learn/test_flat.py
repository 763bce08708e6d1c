"""Written-out training of the MLP: equal to autograd for every task, and left where it must be."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from tolerances import EXACT
from torch import nn

from lora_ws.adapters import Layout
from lora_ws.collection import AdapterSet
from lora_ws.featurizers import StatsFlatVec
from lora_ws.learn.augment import Augment, ModuleDropout
from lora_ws.learn.callbacks import KeepBest
from lora_ws.learn.flat import FlatMLP
from lora_ws.learn.run import run_one
from lora_ws.learn.spec import ExperimentSpec, FitSpec, TrainerSpec
from lora_ws.learn.tasks import Classification, Embedding, MultiLabel, Regression, Task
from lora_ws.learn.trainer import flattens, make_trainer
from lora_ws.models import MLP, DeepSets, InputSpec
from lora_ws.models.mlp_module import MLPModule

LAYOUT = Layout.known("tiny_sd_qv")
NUMBERS = np.random.default_rng(0)
CLASSES = NUMBERS.integers(0, 3, 12)
LABELS = NUMBERS.integers(0, 2, (12, 4)).astype(float)
TASKS = {
    "classification": (Classification().fit(CLASSES, ("a", "b", "c")), CLASSES),
    "multilabel": (MultiLabel().fit(LABELS, tuple("abcd")), LABELS),
    "weighted": (MultiLabel(pos_weight=True).fit(LABELS, tuple("abcd")), LABELS),
    "regression": (Regression().fit(LABELS[:, 0] + 3), LABELS[:, 0] + 3),
    "embedding": (Embedding(width=5).fit(CLASSES[:, None], ("a", "b", "c")), CLASSES[:, None]),
}


def network(outputs: int, dtype: torch.dtype = torch.float64) -> MLPModule:
    torch.manual_seed(1)
    made = MLP(hidden=(9, 6)).build(InputSpec(7), outputs).to(dtype)
    made.normalizer.load_state_dict({"mean": torch.full((7,), 0.3), "scale": torch.full((7,), 2.0)})
    return made


@pytest.mark.parametrize(("task", "targets"), TASKS.values(), ids=TASKS)
def test_the_loss_of_every_task_has_the_gradients_of_autograd(
    task: Task, targets: np.ndarray
) -> None:
    rows, wanted = torch.randn(12, 7, dtype=torch.float64), torch.from_numpy(targets)
    one, other = network(task.outputs), network(task.outputs)
    loss = task.loss(one(rows), wanted) / 12
    loss.backward()
    flat = FlatMLP(other)
    flat.backward(rows, lambda outputs: task.loss(outputs, wanted))
    # Gradients of the batch before are written over.
    found = flat.backward(rows, lambda outputs: task.loss(outputs, wanted) / 12)
    torch.testing.assert_close(found, loss.detach(), rtol=EXACT, atol=EXACT)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_a_step_of_the_vector_is_a_step_of_the_network(kind: type, decay: float) -> None:
    rows, one, other = torch.randn(12, 7, dtype=torch.float64), network(3), network(3)
    flat = FlatMLP(other)
    single = kind(one.parameters(), 0.1, weight_decay=decay)
    fused = kind([flat.weights], 0.1, weight_decay=decay, fused=True)
    for _ in range(3):
        single.zero_grad()
        one(rows).square().sum().backward()
        nn.utils.clip_grad_norm_(one.parameters(), 0.5)
        single.step()
        flat.backward(rows, lambda outputs: outputs.square().sum())
        nn.utils.clip_grad_norm_([flat.weights], 0.5)
        fused.step()
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=EXACT, atol=EXACT)


def test_the_state_stays_what_it_was() -> None:
    plain, flattened = network(3), network(3)
    flat = FlatMLP(flattened)
    state = flattened.state_dict()
    assert list(state) == list(plain.state_dict())
    saved = load(save(state))
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(saved[name], value, rtol=0, atol=0)
    flattened.load_state_dict({name: value + 1 for name, value in state.items()})
    expected = torch.cat([value.flatten() for value in plain.parameters()]) + 1
    torch.testing.assert_close(flat.weights.detach(), expected, rtol=0, atol=0)


class Looks(L.Callback):
    """A callback that looks into the step."""

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Do nothing."""


def refuses(
    trainer: TrainerSpec, caplog: pytest.LogCaptureFixture, augment: Augment | None = None
) -> str:
    """What is said, without the beginning; empty where gradients are written out."""
    made = make_trainer(ExperimentSpec(trainer=trainer), KeepBest(), None)
    caplog.clear()
    with caplog.at_level(logging.INFO, "lora_ws"):
        flat = flattens(network(3), made, augment)
    assert flat == (not caplog.messages)
    return "".join(caplog.messages).partition(": ")[2]


@pytest.mark.slow
def test_what_may_look_into_a_step_leaves_it_to_autograd(
    caplog: pytest.LogCaptureFixture,
) -> None:
    cpu = TrainerSpec("cpu")
    assert refuses(cpu, caplog) == ""
    harmless = ("LearningRateMonitor", "ModelSummary", "Timer")
    assert refuses(replace(cpu, callbacks=harmless), caplog) == ""
    assert refuses(replace(cpu, precision="bf16-mixed"), caplog) == "precision bf16-mixed"
    assert refuses(replace(cpu, callbacks=(f"{__name__}.Looks",)), caplog) == "the callback Looks"
    noise = Augment([ModuleDropout()], LAYOUT)
    assert refuses(cpu, caplog, noise) == "augmentation"
    trainer = make_trainer(ExperimentSpec(trainer=cpu), KeepBest(), None)
    assert not flattens(DeepSets().build(InputSpec.of(LAYOUT), 3), trainer)
    frozen = network(3)
    next(frozen.parameters()).requires_grad_(False)
    assert not flattens(frozen, trainer)


@pytest.mark.slow
def test_both_ways_train_alike(make_zoo: Callable[..., AdapterSet], tmp_path: Path) -> None:
    spec = ExperimentSpec(
        str(make_zoo(n=60).save(tmp_path / "store")),
        featurizer=StatsFlatVec(),
        model=MLP(hidden=(16,)),
        fit=FitSpec(max_epochs=3, grad_clip=1.0, weight_decay=0.01),
    )
    looked = TrainerSpec("cpu", callbacks=(f"{__name__}.Looks",))
    flat, auto = (run_one(replace(spec, trainer=t), 0) for t in (TrainerSpec("cpu"), looked))
    assert (flat.epochs, flat.engine) == (auto.epochs, auto.engine)
    assert flat.val_loss == pytest.approx(auto.val_loss, rel=1e-4)

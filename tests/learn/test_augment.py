"""Augmentations change training rows alone, as often as they say, and resume where they were."""

from collections.abc import Callable
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from tolerances import EXACT
from torch import Tensor

from lora_ws.adapters import LayerSpec, Layout
from lora_ws.collection import AdapterSet
from lora_ws.config import load_spec, to_plain
from lora_ws.errors import ConfigError
from lora_ws.featurizers import StatsLayer
from lora_ws.learn.augment import (
    Augment,
    Augmentation,
    FactorNoise,
    GaugeScramble,
    Mixup,
    ModuleDropout,
    Pairs,
    RankOrder,
    RankTruncation,
    Rounding,
    ScaleJitter,
    SignFlips,
)
from lora_ws.learn.callbacks import KeepBest
from lora_ws.learn.module import LoraModule
from lora_ws.learn.run import run
from lora_ws.learn.spec import ExperimentSpec, FitSpec, TrainerSpec
from lora_ws.learn.tasks import task_of
from lora_ws.models import DeepSets, InputSpec
from lora_ws.models.factors import Factors

ALL: list[Augmentation] = [
    FactorNoise(),
    GaugeScramble(),
    ModuleDropout(share=0.5),
    RankOrder(),
    RankTruncation(),
    Rounding(),
    ScaleJitter(),
    SignFlips(),
]
EACH = pytest.mark.parametrize("kind", ALL, ids=lambda one: type(one).__name__)
SAME_UPDATE = (GaugeScramble, RankOrder, SignFlips)
LAYOUT = Layout.from_layers(
    [
        LayerSpec("a", 6, 5, 2),
        LayerSpec("b", 4, 7, 2),
        LayerSpec("c", 6, 5, 2),
        LayerSpec("d", 6, 5, 3),
    ]
)


def draw(n: int) -> Tensor:
    return torch.randn(n, LAYOUT.size, generator=torch.Generator().manual_seed(0)).double()


def updates(rows: Tensor) -> np.ndarray:
    found = []
    for layer, down, up in LAYOUT.pairs():
        a = rows[:, down].reshape(-1, *layer.down_shape).numpy()
        b = rows[:, up].reshape(-1, *layer.up_shape).numpy()
        found.append((b @ a).reshape(len(rows), -1))
    return np.concatenate(found, 1)


def with_probability(kind: Augmentation, probability: float) -> Augmentation:
    return type(kind)(**{**kind.get_params(), "probability": probability})


def test_factors_go_back_where_they_came_from() -> None:
    factors, rows = Factors(LAYOUT), draw(3)
    assert torch.equal(factors.to_rows(factors(rows)), rows)


@EACH
def test_adapters_are_changed_as_often_as_said(kind: Augmentation) -> None:
    torch.manual_seed(0)
    rows = draw(400)
    before = rows.clone()
    for probability in (0.0, 0.3, 1.0):
        found = Augment([with_probability(kind, probability)], LAYOUT)(rows)
        changed = float((found != rows).any(1).double().mean())
        # Shuffling ranks leaves each of three modules of rank 2 alone half of the time; one in
        # sixteen has all modules dropped or none.
        sees = {RankOrder: 1 - 1 / 48, ModuleDropout: 15 / 16, SignFlips: 1 - 2**-9}
        share = probability * sees.get(type(kind), 1.0)
        # Five standard errors.
        assert abs(changed - share) <= 5 * np.sqrt(share * (1 - share) / len(rows))
    assert torch.equal(rows, before)


@EACH
def test_only_other_splits_keep_the_update(kind: Augmentation) -> None:
    torch.manual_seed(0)
    rows = draw(20)
    found = Augment([with_probability(kind, 1.0)], LAYOUT)(rows)
    apart = np.abs(updates(found) - updates(rows)).max()
    assert (apart < 1e-12) == isinstance(kind, SAME_UPDATE)


def test_jitter_scales_all_modules_of_an_adapter_alike() -> None:
    torch.manual_seed(0)
    rows = draw(5)
    ratio = updates(Augment([ScaleJitter(size=0.5)], LAYOUT)(rows)) / updates(rows)
    np.testing.assert_allclose(ratio, ratio[:, :1].repeat(ratio.shape[1], 1), rtol=1e-9)
    assert len(set(ratio[:, 0].round(9))) == 5


class Watched(Augmentation):
    """Counts the adapters that pass."""

    seen: list[int] = []  # noqa: RUF012 - shared on purpose

    def __init__(self, *, probability: float = 1.0) -> None:
        self.probability = probability

    def change(self, pairs: Pairs) -> Pairs:
        self.seen.append(len(pairs[0].up))
        return pairs


@pytest.fixture
def store(make_zoo: Callable[..., AdapterSet], tmp_path: Path) -> str:
    return str(make_zoo(n=60).save(tmp_path / "store"))


def experiment(store: str, *augment: Augmentation, every: int = 0) -> ExperimentSpec:
    fit = FitSpec(max_epochs=3, batch_size=16, optimizer="adamw", schedule="cosine", ema=0.9)
    trainer = TrainerSpec(accelerator="cpu", checkpoint_every=every)
    model = DeepSets(width=4, probes=2)
    return ExperimentSpec(store, model=model, augment=augment, fit=fit, seeds=1, trainer=trainer)


def test_training_rows_alone_are_changed(store: str, tmp_path: Path) -> None:
    Watched.seen.clear()
    (record,) = run(experiment(store, Watched()), tmp_path / "run", full=False)
    assert sum(Watched.seen) == record.epochs * record.n_train


@pytest.mark.slow
def test_draws_go_on_where_a_run_was_cut(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout in the network as well."""
    augment = (FactorNoise(size=0.3), ModuleDropout(probability=0.5))
    whole = run(experiment(store, *augment), tmp_path / "whole")
    note = KeepBest.on_validation_end

    def stop(self: KeepBest, trainer: L.Trainer, module: LoraModule) -> None:
        if trainer.current_epoch == 2:
            raise KeyboardInterrupt
        note(self, trainer, module)

    spec = experiment(store, *augment, every=1)
    with monkeypatch.context() as patch:
        patch.setattr(KeepBest, "on_validation_end", stop)
        with pytest.raises(KeyboardInterrupt):
            run(spec, tmp_path / "cut")
    assert list((tmp_path / "cut" / "seed-0").glob("*.ckpt"))
    again = run(spec, tmp_path / "cut")
    assert [r.timeless() for r in again] == [r.timeless() for r in whole]
    plain = run(experiment(store), tmp_path / "plain", full=False)
    assert plain[0].val_loss != whole[0].val_loss


def test_a_recipe_names_augmentations(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "model: DeepSets\naugment:\n- class_path: FactorNoise\n  init_args: {size: 0.1}\n"
        "- SignFlips\n",
        encoding="utf-8",
    )
    spec = load_spec(ExperimentSpec, file)
    assert [type(one) for one in spec.augment] == [FactorNoise, SignFlips]
    assert to_plain(spec)["augment"][0]["init_args"] == {"size": 0.1, "probability": 1.0}


def test_what_makes_no_sense_is_refused(store: str) -> None:
    with pytest.raises(ConfigError, match="augment: expected a network that reads factors"):
        ExperimentSpec(store, featurizer=StatsLayer(), augment=(SignFlips(),))
    with pytest.raises(ConfigError, match=r"probability from 0 to 1, got 2.* of SignFlips"):
        Augment([SignFlips(probability=2.0)], LAYOUT)
    with pytest.raises(
        ConfigError, match=r"trainer\.engine: expected auto or one-by-one with augm"
    ):
        ExperimentSpec(
            store,
            model=DeepSets(),
            augment=(SignFlips(),),
            trainer=TrainerSpec(engine="batched"),
        )


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_mixup_shares_embeddings_and_losses(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the shares drawn, the loss of a mixed pair is that of both targets, row by row."""
    rows, classes = draw(5), torch.tensor([0, 2, 1, 1, 0])
    targets = classes if task == "classification" else classes.double()
    kind = task_of(task).fit(targets.numpy(), ("x", "y", "z"))
    network = DeepSets(width=4).build(InputSpec.of(LAYOUT), kind.outputs).double().eval()
    shares, others = torch.tensor([1.0, 0.25, 0.5, 0.0, 0.75]), torch.tensor([3, 0, 2, 1, 4])
    monkeypatch.setattr(Mixup, "draw", lambda self, count: (shares, others))
    module = LoraModule(network, kind, FitSpec(), Augment([Mixup()], LAYOUT))
    expected = 0.0
    with torch.no_grad():
        found = float(module._loss(rows, targets))
        made = network.embed(rows)
        for row, (share, other) in enumerate(zip(shares.tolist(), others.tolist(), strict=True)):
            outputs = network.head(share * made[[row]] + (1 - share) * made[[other]])
            for weight, place in ((share, row), (1 - share, other)):
                expected += weight * float(kind.loss(outputs, targets[[place]]))
    assert found == pytest.approx(expected, rel=EXACT)


def test_mixup_draws_as_often_as_it_says() -> None:
    torch.manual_seed(0)
    shares, others = Mixup(alpha=0.5, probability=0.25).draw(4000)
    mixed = shares < 1
    assert abs(float(mixed.double().mean()) - 0.25) < 4 * (0.25 * 0.75 / 4000) ** 0.5
    # Beta(a, a): mean 1/2, variance 1 / (4 (2a + 1)).
    own = shares[mixed].double()
    assert abs(float(own.mean()) - 0.5) < 4 * (0.125 / len(own)) ** 0.5
    assert sorted(others.tolist()) == list(range(4000))


def test_mixup_that_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected no Mixup with task=embedding"):
        ExperimentSpec(task="embedding", model=DeepSets(), augment=(Mixup(),))
    with pytest.raises(ConfigError, match="expected alpha above 0, got 0"):
        Mixup(alpha=0).draw(3)
    with pytest.raises(ConfigError, match="expected one Mixup at most, got 2"):
        Augment([Mixup(), Mixup()], LAYOUT)

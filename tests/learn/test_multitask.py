"""Several tasks on one network: each as it is alone, and in one bundle."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from scipy.special import expit
from scipy.special import softmax as scipy_softmax
from tolerances import EXACT, rounding

from lora_ws.bundle import Bundle
from lora_ws.bundle.confidence import Prediction
from lora_ws.bundle.heads import Answer
from lora_ws.collection import AdapterSet
from lora_ws.config import load_spec, to_plain
from lora_ws.errors import ConfigError, DataError
from lora_ws.featurizers import FlatVec
from lora_ws.learn.features import prepare
from lora_ws.learn.pack import make_bundle
from lora_ws.learn.run import fit_seed
from lora_ws.learn.spec import ExperimentSpec, FitSpec, TrainerSpec
from lora_ws.learn.tasks import Classification, Embedding, MultiLabel, MultiTask, Regression, Task
from lora_ws.learn.tasks.zero_shot import ZeroShot
from lora_ws.models import MLP

COLUMNS: dict[str, Task | str] = {
    "category_label": "classification",
    "traits": MultiLabel(pos_weight=True),
    "size": "regression",
}
ALONE: dict[str, Task] = {
    "category_label": Classification(),
    "traits": MultiLabel(pos_weight=True),
    "size": Regression(),
}
Make = Callable[..., ExperimentSpec]


@pytest.fixture
def make(make_zoo: Callable[..., AdapterSet], tmp_path: Path) -> Make:
    """An experiment on adapters with a class, labels and a number."""

    def spec_of(tasks: dict[str, Task | str] | None, classes: int = 3) -> ExperimentSpec:
        adapters = make_zoo(n=max(60, 12 * classes), classes=classes)
        codes, names = adapters.labels()
        traits = [[names[code], *(["even"] if code % 2 == 0 else [])] for code in codes]
        rows = adapters.rows.append_column("traits", pa.array(traits))
        rows = rows.append_column("size", pa.array(4.0 * codes + np.arange(len(codes)) % 7))
        store = tmp_path / "store"
        if not store.exists():
            replace(adapters, rows=rows).save(store)
        return ExperimentSpec(
            str(store),
            task=MultiTask(tasks=tasks),
            featurizer=FlatVec(),
            model=MLP(hidden=(16,)),
            fit=FitSpec(lr=5e-4, max_epochs=8),
            trainer=TrainerSpec("cpu"),
            seeds=1,
        )

    return spec_of


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_losses_and_metrics_are_those_of_the_tasks_alone(make: Make, classes: int) -> None:
    spec = make(COLUMNS, classes)
    prepared = prepare(spec)
    task, split = prepared.task, prepared.split
    outputs = torch.randn(len(prepared.labels), task.outputs).double()
    targets = torch.from_numpy(prepared.labels)
    start, losses, values = 0, [], {}
    for column, alone in ALONE.items():
        label, names = alone.read(prepared.adapters, column)
        fitted = alone.fit(label[split.train], names)
        own, truth = outputs[:, start : start + fitted.outputs], torch.from_numpy(label)
        start += fitted.outputs
        losses.append(fitted.loss(own, truth, "none"))
        held = {p: (fitted.predict(own[rows]), truth[rows]) for p, rows in split._asdict().items()}
        found = fitted.measure(held.__getitem__, "test").values
        values |= {f"{column}.{name}": value for name, value in found.items()}
    assert start == task.outputs
    torch.testing.assert_close(task.loss(outputs, targets, "none"), sum(losses), rtol=EXACT, atol=0)
    parts = {p: (task.predict(outputs[r]), targets[r]) for p, r in split._asdict().items()}
    measured = task.measure(parts.__getitem__, "test")
    chosen = [values[f"{column}.{alone.selects}"] for column, alone in ALONE.items()]
    assert measured.values == pytest.approx({**values, "mean_over_tasks": np.mean(chosen)})
    assert np.sum(measured.confusion) == len(split.test)


def test_a_bundle_answers_every_task(make: Make, tmp_path: Path) -> None:
    spec = make(COLUMNS)
    prepared = prepare(spec)
    fitted = fit_seed(spec, prepared, 0)
    bundle = Bundle.load(make_bundle(fitted).save(tmp_path / "bundle"))
    assert [head.name for head in bundle.heads] == ["traits", "size"]
    rows = np.asarray(prepared.adapters.weights[prepared.split.test])
    with torch.inference_mode():
        outputs = fitted.network(torch.from_numpy(rows)).double().numpy()
    held = bundle.confidence.calibration
    assert held is not None
    bound = rounding(600)
    first = scipy_softmax(outputs[:, :3] / held.temperature, axis=1)
    np.testing.assert_allclose(bundle.predict_proba(rows), first, rtol=bound, atol=bound)
    traits = bundle.heads[0]
    shares = expit(outputs[:, 3:7] / traits.temperature)
    sizes = prepared.adapters.targets("size")[prepared.split.train]
    numbers = outputs[:, 7] * sizes.std() + sizes.mean()
    predictions = bundle.predict_batch(rows)
    for k, prediction in enumerate(predictions):
        said, number = prediction.answers["traits"], prediction.answers["size"]
        expected = dict(zip(traits.classes, shares[k], strict=True))
        assert said.probabilities == pytest.approx(expected, rel=1e-4, abs=bound)
        least = zip(traits.classes, traits.thresholds, strict=True)
        apply = {name for name, threshold in least if expected[name] >= threshold}
        assert set(said.labels) == apply
        assert number.value == pytest.approx(numbers[k], rel=1e-4)
        if prediction.reason:
            assert said.label is number.label is None
        else:
            assert number.label == f"{number.value:.3g}"
            assert said.label == (", ".join(said.labels) or "none of the labels")
        plain = json.loads(json.dumps(prediction.to_dict()))
        assert Prediction.from_dict(plain) == prediction
        assert isinstance(Prediction.from_dict(plain).answers["size"], Answer)
    assert any(prediction.label for prediction in predictions)
    (unread,) = bundle.predict_batch(np.full_like(rows[:1], np.nan))
    assert unread.reason == "not-finite"
    assert unread.answers["size"].label is None
    card = bundle.model_card()
    assert "`size`: a number" in card
    assert f"| size.mae | {fitted.record.test['size.mae']:.2f} |" in card
    errors = np.abs(numbers - prepared.adapters.targets("size")[prepared.split.test])
    assert errors.mean() == pytest.approx(fitted.record.test["size.mae"], rel=1e-4)


def test_a_first_task_without_probabilities_has_no_bundle(make: Make) -> None:
    spec = make({"size": "regression", "category_label": "classification"})
    with pytest.raises(ConfigError, match="a bundle holds probabilities; a regression has none"):
        make_bundle(fit_seed(spec, prepare(spec), 0))


def test_tasks_are_written_as_yaml(make: Make, tmp_path: Path) -> None:
    file = tmp_path / "several.yaml"
    file.write_text(
        "task:\n  class_path: MultiTask\n  init_args:\n    tasks:\n"
        "      category_label: classification\n"
        "      traits: {class_path: MultiLabel, init_args: {pos_weight: true}}\n"
        "      size: regression\n",
        encoding="utf-8",
    )
    read = load_spec(ExperimentSpec, file)
    assert to_plain(read.task) == to_plain(make(COLUMNS).task)
    assert list(prepare(make(read.task.tasks)).task.heads[1].task.classes)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (None, r"task\.tasks: expected a task for each column, such as .*, got none"),
        ({"size": "embedding"}, r"task\.tasks\.size: expected one of classification, .*got embedd"),
        ({"size": Embedding()}, r"task\.tasks\.size: expected one of .*, got embedding"),
        ({"size": ZeroShot()}, r"task\.tasks\.size: expected one of .*, got zero_shot"),
        ({"traits": "regression"}, "column `traits` .*expected finite numbers"),
        ({"sise": "regression"}, "no column `sise`, did you mean `size`"),
    ],
)
def test_tasks_that_do_not_fit_are_refused(
    make: Make, tasks: dict[str, Task | str] | None, message: str
) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        prepare(make(tasks))


def test_a_label_beside_the_columns_is_refused(make: Make) -> None:
    with pytest.raises(ConfigError, match="label: expected none with task=multitask"):
        prepare(replace(make(COLUMNS), label="size"))

"""Zero-shot by names: against plain numpy, from files of features to a bundle that is asked."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import average_precision_score
from tolerances import EXACT, rounding

from lora_ws.audit.text_search import ask_bundle
from lora_ws.bundle import Bundle
from lora_ws.collection import AdapterSet, Split
from lora_ws.config import load_spec, spec_files
from lora_ws.errors import ConfigError, DataError
from lora_ws.featurizers import FlatVec
from lora_ws.learn.features import Prepared, prepare
from lora_ws.learn.pack import make_bundle
from lora_ws.learn.result import Fitted
from lora_ws.learn.run import fit_seed
from lora_ws.learn.spec import ExperimentSpec, FitSpec, TrainerSpec
from lora_ws.learn.tasks import ZeroShot
from lora_ws.learn.tasks.text_features import read_features
from lora_ws.models import MLP, DeepSets, InputSpec
from lora_ws.models.text_head import MAX_SCALE, TextHead

NAMES = ("bear", "fish", "rose", "wolf")
Make = Callable[..., ExperimentSpec]


@pytest.fixture
def make(make_zoo: Callable[..., AdapterSet], tmp_path: Path) -> Make:
    """An experiment on adapters of four classes, with features of their names in a file."""

    def spec_of(features: np.ndarray | None = None, **given: Any) -> ExperimentSpec:
        adapters = make_zoo(n=60, classes=4)
        names = np.array(NAMES)[adapters.labels()[0]]
        rows = adapters.rows.append_column("word", pa.array(names))
        store = tmp_path / "store"
        if not store.exists():
            replace(adapters, rows=rows).save(store)
        if features is not None:
            np.save(tmp_path / "texts.npy", features)
            given["texts"] = tmp_path / "texts.npy"
        return ExperimentSpec(
            str(store),
            label="word",
            task=ZeroShot(**given),
            featurizer=FlatVec(),
            model=MLP(hidden=(16,)),
            fit=FitSpec(lr=1e-3, max_epochs=10),
            trainer=TrainerSpec("cpu"),
            seeds=1,
        )

    return spec_of


@pytest.mark.parametrize("texts", [3, 4, 10])
@pytest.mark.parametrize("temperature", [0.07, 1.0, 0.001])
def test_logits_are_cosines_of_plain_numpy(texts: int, temperature: float) -> None:
    rng = np.random.default_rng(texts)
    features, seen = rng.standard_normal((texts, 5)) + 3, np.arange(texts) != 1
    rows = torch.from_numpy(rng.standard_normal((6, 7)))
    spec = TextHead(network=MLP(hidden=(8,)), width=5, temperature=temperature)
    network = spec.build(InputSpec(7), texts).double().eval()
    network.set_texts(torch.from_numpy(features), torch.from_numpy(seen))
    z = network.trunk(rows).detach().numpy()
    t = features - features[seen].mean(axis=0)
    cosines = (z @ t.T) / np.linalg.norm(z, axis=1)[:, None] / np.linalg.norm(t, axis=1)
    # The temperature is kept in float32.
    expected = cosines * min(1 / temperature, MAX_SCALE)
    np.testing.assert_allclose(network(rows).detach(), expected, rtol=rounding(texts), atol=EXACT)
    assert network.log_scale.requires_grad
    np.testing.assert_array_equal(network.embed(rows).detach(), network.trunk.embed(rows).detach())


@pytest.mark.parametrize("projection", [1, 5, 8])
def test_features_go_through_a_learned_map(projection: int) -> None:
    rng = np.random.default_rng(projection)
    features, seen = rng.standard_normal((4, 5)) + 3, np.array([True, False, True, True])
    rows = torch.from_numpy(rng.standard_normal((6, 7)))
    spec = TextHead(network=MLP(hidden=(8,)), width=5, temperature=1.0, projection=projection)
    network = spec.build(InputSpec(7), 4).double().eval()
    network.set_texts(torch.from_numpy(features), torch.from_numpy(seen))
    assert network.project is not None
    weight = network.project.weight
    t = features - features[seen].mean(axis=0)
    t, z = t @ weight.detach().numpy().T, network.trunk(rows).detach().numpy()
    expected = z @ t.T / np.linalg.norm(z, axis=1)[:, None] / np.linalg.norm(t, axis=1)
    found = network(rows)
    np.testing.assert_allclose(found.detach(), expected, rtol=rounding(8), atol=EXACT)
    found.square().sum().backward()
    assert weight.grad is not None
    # Of one number a cosine is 1 or -1, whatever the map.
    assert (weight.grad.abs().max() > EXACT) == (projection > 1)


def test_a_projection_has_to_have_numbers() -> None:
    with pytest.raises(ConfigError, match="projection: expected at least 1, or none, got 0"):
        TextHead(network=MLP(), width=5, projection=0).build(InputSpec(7), 3)


def test_losses_and_metrics_are_those_of_loops() -> None:
    rng = np.random.default_rng(0)
    task = ZeroShot()
    task.classes_, task.seen_ = tuple("abcdef"), (True, False, True, True, False, True)
    outputs, truth = rng.standard_normal((40, 6)), rng.integers(0, 6, 40)
    losses, own, every = [], [], []
    for logits, true in zip(outputs, truth, strict=True):
        kind = [k for k in range(6) if task.seen_[k] == task.seen_[true]]
        shares = np.exp(logits[kind]) / np.exp(logits[kind]).sum()
        losses.append(-np.log(shares[kind.index(true)]))
        own.append(kind[int(shares.argmax())] == true)
        every.append(int(logits.argmax()) == true)
    y, x = torch.from_numpy(truth), torch.from_numpy(outputs)
    np.testing.assert_allclose(task.loss(x, y, "none"), losses, rtol=EXACT)
    np.testing.assert_array_equal(task.score(x, y), own)
    values = task.measure(lambda _: (task.predict(x), y), "test").values
    rows = np.array(task.seen_)[truth]
    seen, unseen = np.mean(np.array(every)[rows]), np.mean(np.array(every)[~rows])
    assert values == pytest.approx(
        {
            "accuracy": np.mean(own),
            "accuracy_seen": np.mean(np.array(own)[rows]),
            "chance_seen": 1 / 4,
            "generalised_seen": seen,
            "accuracy_unseen": np.mean(np.array(own)[~rows]),
            "chance_unseen": 1 / 2,
            "generalised_unseen": unseen,
            "generalised": 2 / (1 / seen + 1 / unseen),
        }
    )


def test_held_out_classes_are_test_rows_alone(make: Make) -> None:
    spec = make(np.eye(4), held_out=("rose",))
    prepared = prepare(spec)
    parts = prepared.split
    whole = prepare(make(np.eye(4))).split
    rose = prepared.labels == NAMES.index("rose")
    assert set(np.flatnonzero(rose)) < set(parts.test)
    assert sorted(np.concatenate(parts)) == sorted(np.concatenate(whole))
    np.testing.assert_array_equal(parts.train, [row for row in whole.train if not rose[row]])
    task = prepared.task
    assert isinstance(task, ZeroShot)
    assert task.seen_ == (True, True, False, True)


def test_a_class_is_found_that_no_training_row_shows(
    make_zoo: Callable[..., AdapterSet], tmp_path: Path
) -> None:
    """Names say where a class lies; a network learns the map from adapters to names."""
    adapters = make_zoo(n=240, signal=0.0, classes=6)
    labels, names = adapters.labels()
    angles = np.arange(6) * np.pi / 3
    features = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    weights = adapters.weights.copy()
    spread = np.random.default_rng(0).standard_normal((2, 200))
    weights[:, :200] += 2 * features[labels] @ spread
    store = str(replace(adapters, weights=weights).save(tmp_path / "store"))
    np.save(tmp_path / "texts.npy", features)
    task = ZeroShot(texts=tmp_path / "texts.npy", held_out=("class2", "class5"))
    spec = ExperimentSpec(
        store,
        task=task,
        featurizer=FlatVec(),
        matrices=("*down_blocks.0.attentions.0*attn1.to_q*",),
        model=MLP(hidden=(16,)),
        fit=FitSpec(lr=3e-3, max_epochs=30),
        trainer=TrainerSpec("cpu"),
    )
    record = fit_seed(spec, prepare(spec), 0).record
    assert len(names) == 6
    assert record.n_test > 80
    assert record.test["accuracy_unseen"] > 0.9
    assert record.test["chance_unseen"] == 0.5


def written(file: Path, names: list[str], features: np.ndarray) -> Path:
    if file.suffix == ".npz":
        np.savez(file, names=np.array(names), features=features)
    else:
        table = {"names": names, "features": features.tolist()}
        pq.write_table(pa.table(table), file)
    return file


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_files_with_names_leave_their_order_open(suffix: str, tmp_path: Path) -> None:
    features = np.random.default_rng(0).standard_normal((5, 3))
    file = written(tmp_path / f"texts{suffix}", ["wolf", "ant", "rose", "fish", "bear"], features)
    found = read_features(file, NAMES)
    np.testing.assert_array_equal(found, features[[4, 3, 2, 0]].astype(np.float32))
    with pytest.raises(ConfigError, match=r"has no features of `frog`"):
        read_features(file, (*NAMES, "frog"))


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (np.eye(3), r"expected features \[4, width\] in .*, a row for each name"),
        (np.ones(4), r"expected features \[4, width\] in .*got \[4\]"),
        (np.full((4, 2), np.nan), "expected finite numbers in"),
        (np.array([["a"]] * 4), "expected finite numbers in .*, got <U1"),
        (np.array([[{}]] * 4), "Object arrays cannot be loaded"),
    ],
)
def test_features_that_do_not_fit_are_refused(
    features: np.ndarray, message: str, tmp_path: Path
) -> None:
    np.save(tmp_path / "texts.npy", features)
    with pytest.raises(ConfigError, match=f"^task.texts: .*{message}"):
        read_features(tmp_path / "texts.npy", NAMES)


def test_files_that_hold_something_else_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", words=np.arange(3))
    (tmp_path / "cut.parquet").write_bytes(b"PAR1")
    pq.write_table(pa.table({"names": list(NAMES)}), tmp_path / "half.parquet")
    for name in ("other.npz", "cut.parquet", "half.parquet"):
        with pytest.raises(ConfigError, match=r"^task\.texts: expected `names` and `features`"):
            read_features(tmp_path / name, NAMES)
    ragged = pa.table({"names": list(NAMES), "features": [[1.0], [1.0, 2.0], [3.0], [4.0]]})
    pq.write_table(ragged, tmp_path / "ragged.parquet")
    for name in ("ragged.parquet", "no.npy", "texts.csv"):
        with pytest.raises(ConfigError, match=r"^task\.texts: expected"):
            read_features(tmp_path / name, NAMES)


def test_what_zero_shot_cannot_use_is_refused(make: Make) -> None:
    with pytest.raises(ConfigError, match=r"task\.held_out: no class `rise`, did you mean `rose`"):
        prepare(make(np.eye(4), held_out=("rise",)))
    with pytest.raises(DataError, match="training rows: expected adapters of two classes, got bea"):
        prepare(make(np.eye(4), held_out=NAMES[1:]))
    rows = prepare(make(np.eye(4)))
    spec = TextHead(network=MLP(hidden=(8,)), width=4, temperature=0.0)
    with pytest.raises(ConfigError, match="temperature: expected above 0, got 0"):
        spec.build(rows.inputs, 4)


def trained(spec: ExperimentSpec) -> tuple[Prepared, Fitted, Bundle]:
    prepared = prepare(spec)
    fitted = fit_seed(spec, prepared, 0)
    return prepared, fitted, make_bundle(fitted)


def test_a_bundle_is_asked_about_other_texts(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from lora_ws.diffusion import text_features

    rng = np.random.default_rng(1)
    held = {word: rng.standard_normal(8).astype(np.float32) for word in (*NAMES, "red fox", "ant")}
    asked_for: list[tuple[str, ...]] = []

    def encode(encoder: str, prompt: str, names: tuple[str, ...], device: str = "cpu") -> Any:
        asked_for.append((encoder, prompt, *names))
        return np.stack([held[name] for name in names])

    monkeypatch.setattr(text_features, "encode_names", encode)
    prepared, fitted, made = trained(make(held_out=("rose",)))
    bundle = Bundle.load(made.save(tmp_path / "bundle"))
    assert isinstance(bundle.model, TextHead)
    assert isinstance(bundle.model.network, MLP)
    rows = np.asarray(prepared.adapters.weights[prepared.split.test])
    known, name = ask_bundle(bundle, "a photo of a wolf")
    assert (known, name) == (bundle, "wolf")
    asked, name = ask_bundle(bundle, "a photo of a red fox")
    assert asked_for == [
        ("tiny-sd", "a photo of {}", *NAMES),
        ("tiny-sd", "a photo of {}", "red fox"),
    ]
    assert asked.classes == (name, *NAMES) == ("red fox", *NAMES)
    head = fitted.network
    z = head.trunk(torch.from_numpy(rows)).detach().numpy()  # type: ignore[operator, union-attr]
    t = np.stack([held[word] for word in asked.classes])
    t = t - np.stack([held[word] for word in ("bear", "fish", "wolf")]).mean(axis=0)
    cosines = (z @ t.T) / np.linalg.norm(z, axis=1)[:, None] / np.linalg.norm(t, axis=1)
    calibration = bundle.confidence.calibration
    assert calibration is not None
    logits = cosines * np.exp(float(head.log_scale)) / calibration.temperature  # type: ignore[arg-type]
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(asked.predict_proba(rows), shares, rtol=rounding(100))
    held["ant"] = np.ones(3, np.float32)
    with pytest.raises(ConfigError, match="text: expected 8 features, as the bundle was trained"):
        ask_bundle(bundle, "ant")


def test_bundles_without_texts_are_not_searched_with(make: Make) -> None:
    spec = make(np.eye(4))
    _, _, of_file = trained(spec)
    assert ask_bundle(of_file, "wolf")[1] == "wolf"
    with pytest.raises(ConfigError, match=r"features of a file, which has none of `fox`; expected"):
        ask_bundle(of_file, "fox")
    _, _, plain = trained(replace(spec, task="classification"))
    with pytest.raises(ConfigError, match="model: expected a bundle trained by task=zero_shot, go"):
        ask_bundle(plain, "wolf")


@pytest.mark.slow
def test_leaves_that_were_never_shown_are_told_apart() -> None:
    """The recipe in short: two leaves' names say more than chance of ten, and of class words."""
    recipe = load_spec(ExperimentSpec, spec_files("training")["tasks/zero_shot"])
    spec = replace(
        recipe,
        subset="per_adapter/constant",
        model=DeepSets(width=32, depth=1),
        fit=replace(recipe.fit, max_epochs=8),
    )
    prepared, fitted, bundle = trained(spec)
    assert isinstance(prepared.split, Split)
    # Of 100 rows and ten names, 20 % are four standard errors above chance.
    assert fitted.record.test["accuracy_unseen"] > 0.2
    rows = prepared.split.test
    reptile = prepared.adapters.column("category_label")[rows] == "reptile"
    found = []
    for word in ("tree", "flower", "vehicle"):
        truth = prepared.adapters.column("category_label")[rows] == word
        asked, name = ask_bundle(bundle, word)
        shares = asked.predict_proba(np.asarray(prepared.adapters.weights[rows]))
        found.append(average_precision_score(truth, shares[:, asked.classes.index(name)]))
    assert np.mean(found) > 2 * reptile.mean()
    with pytest.raises(ConfigError, match=re.escape("hold no `giraffe`")):
        ask_bundle(bundle, "giraffe")

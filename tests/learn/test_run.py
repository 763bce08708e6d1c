"""Experiments: signal is found, noise is not, seeds repeat, runs resume, folders explain."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import yaml
from filelock import FileLock
from scipy import stats
from sklearn import metrics as reference
from sklearn.preprocessing import StandardScaler
from tolerances import EXACT, rounding, terms_of
from warm import COMMAND, Warm

from lora_ws.cli import main
from lora_ws.collection import AdapterSet
from lora_ws.config import dump_yaml, load_spec, to_plain
from lora_ws.errors import ConfigError, DataError, Notice, TrainingError
from lora_ws.featurizers import FlatVec, FlatVecPCA, StatsFlatVec, StatsLayer
from lora_ws.learn.features import prepare
from lora_ws.learn.run import fit_seed, run, run_many, run_one
from lora_ws.learn.run_folder import folder_for
from lora_ws.learn.spec import ExperimentSpec, FitSpec, TrainerSpec
from lora_ws.memory import LIMIT
from lora_ws.models import MLP
from lora_ws.report.records import read_records
from lora_ws.report.tables import caption

SMALL = MLP(hidden=(32,))
FAST = FitSpec(lr=3e-3, max_epochs=12, patience=4)


@pytest.fixture
def spec(make_zoo: Callable[..., AdapterSet], tmp_path: Path) -> ExperimentSpec:
    store = make_zoo().save(tmp_path / "store")
    return ExperimentSpec(str(store), featurizer=StatsLayer(), model=SMALL, fit=FAST, seeds=2)


def store_of(zoo: AdapterSet, path: Path) -> str:
    return str(zoo.save(path))


def test_planted_signal_is_found(spec: ExperimentSpec) -> None:
    records = run_many(spec, [0, 1])
    assert all(record.test["accuracy"] > 0.6 for record in records)
    assert [record.seed for record in records] == [0, 1]


@pytest.mark.slow
def test_shuffled_labels_are_at_chance(make_zoo: Callable[..., AdapterSet], tmp_path: Path) -> None:
    zoo = make_zoo(n=400, signal=1.0)
    shuffled = np.random.default_rng(1).permutation(zoo.column("category_label"))
    index = zoo.rows.column_names.index("category_label")
    rows = zoo.rows.set_column(index, "category_label", [shuffled])
    store = store_of(replace(zoo, rows=rows), tmp_path / "shuffled")
    records = run_many(
        ExperimentSpec(store, featurizer=StatsLayer(), model=SMALL, fit=FAST), range(4)
    )
    # 80 test rows, 4 classes: 0.25 with a standard error of 0.05 for each seed.
    assert 0.1 < np.mean([record.test["accuracy"] for record in records]) < 0.4


@pytest.mark.slow
def test_no_signal_is_at_chance(make_zoo: Callable[..., AdapterSet], tmp_path: Path) -> None:
    store = store_of(make_zoo(n=400, signal=0.0), tmp_path / "noise")
    records = run_many(ExperimentSpec(store, featurizer=FlatVec(), model=SMALL, fit=FAST), range(3))
    assert 0.1 < np.mean([record.test["accuracy"] for record in records]) < 0.4


def test_equal_seeds_give_equal_records_and_others_differ(spec: ExperimentSpec) -> None:
    first, again, other = run_one(spec, 3), run_one(spec, 3), run_one(spec, 4)
    assert first.timeless() == again.timeless()
    assert first.val_loss != other.val_loss


def test_a_seed_does_not_depend_on_its_company(spec: ExperimentSpec) -> None:
    assert run_many(spec, [0, 1])[1].timeless() == run_one(spec, 1).timeless()


def test_metrics_equal_scikit_learn(spec: ExperimentSpec) -> None:
    prepared = prepare(spec)
    fitted = fit_seed(spec, prepared, 0)
    test = prepared.split.test
    features = np.asarray(prepared.features)
    scaler = StandardScaler().fit(features[prepared.split.train])
    scale = np.sqrt(scaler.var_ * len(prepared.split.train) / (len(prepared.split.train) - 1))
    np.testing.assert_allclose(prepared.normalizer.mean, scaler.mean_, rtol=rounding(4), atol=EXACT)
    np.testing.assert_allclose(
        prepared.normalizer.scale[scale > 0], scale[scale > 0], rtol=rounding(4)
    )
    logits = fitted.network(prepared.features[test]).detach()
    scores, truth = logits.softmax(1).numpy().astype(float), prepared.labels[test]
    scores /= scores.sum(1, keepdims=True)
    guess = scores.argmax(1)
    expected = {
        "accuracy": reference.accuracy_score(truth, guess),
        "auroc": reference.roc_auc_score(truth, scores, multi_class="ovr", average="macro"),
        "precision": reference.precision_score(truth, guess, average="macro", zero_division=0),
        "recall": reference.recall_score(truth, guess, average="macro"),
        "f1": reference.f1_score(truth, guess, average="macro"),
    }
    assert set(fitted.record.test) == set(expected)
    for name, value in expected.items():
        assert fitted.record.test[name] == pytest.approx(value, abs=rounding(len(test))), name
    matrix = reference.confusion_matrix(truth, guess)
    assert fitted.record.confusion == tuple(map(tuple, matrix.tolist()))


def with_numbers(zoo: AdapterSet, values: object, path: Path) -> ExperimentSpec:
    """Adapters with a column of numbers to tell."""
    store = store_of(replace(zoo, rows=zoo.rows.append_column("count", pa.array(values))), path)
    fit = FitSpec(lr=3e-3, max_epochs=40, patience=10)
    return ExperimentSpec(
        store, label="count", task="regression", featurizer=StatsLayer(), model=SMALL, fit=fit
    )


def test_a_regression_equals_scikit_learn(
    make_zoo: Callable[..., AdapterSet], tmp_path: Path
) -> None:
    zoo = make_zoo(n=200)
    truth = 100 + 7 * zoo.weights[:, 600:1200].std(axis=1)
    spec = with_numbers(zoo, truth, tmp_path / "numbers")
    prepared = prepare(spec)
    fitted = fit_seed(spec, prepared, 0)
    test = prepared.split.test
    guess = prepared.task.predict(fitted.network(prepared.features[test])).detach().numpy()
    expected = {
        "r2": reference.r2_score(truth[test], guess),
        "mae": reference.mean_absolute_error(truth[test], guess),
        "rmse": reference.root_mean_squared_error(truth[test], guess),
        "spearman": stats.spearmanr(truth[test], guess).statistic,
        "kendall": stats.kendalltau(truth[test], guess).statistic,
    }
    bound = rounding(len(test), size=float(truth.max()))
    assert fitted.record.test == pytest.approx(expected, abs=bound)
    assert expected["r2"] > 0.8
    assert (fitted.record.classes, fitted.record.confusion) == ((), ())


@pytest.mark.slow
def test_a_regression_of_shuffled_numbers_tells_nothing(
    make_zoo: Callable[..., AdapterSet], tmp_path: Path
) -> None:
    zoo = make_zoo(n=200)
    spec = with_numbers(zoo, zoo.weights[:, 600:1200].std(axis=1), tmp_path / "numbers")
    records = run_many(replace(spec, shuffle_labels=True), range(3))
    assert np.mean([record.test["r2"] for record in records]) < 0.2


def test_a_regression_runs_in_a_folder_without_a_bundle(
    make_zoo: Callable[..., AdapterSet], tmp_path: Path
) -> None:
    spec = with_numbers(make_zoo(), np.arange(120.0), tmp_path / "numbers")
    (record,) = run(replace(spec, seeds=1, fit=FAST), tmp_path / "run")
    assert read_records(tmp_path / "run" / "records.jsonl") == [record]
    assert (tmp_path / "run" / "curves.png").is_file()
    assert "a regression has none" in (tmp_path / "run" / "no_bundle.txt").read_text(
        encoding="utf-8"
    )


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (["many"] * 120, "expected finite numbers, got string"),
        ([float("nan")] + [1.0] * 119, "expected finite numbers"),
    ],
)
def test_labels_that_are_no_numbers(
    values: list, says: str, make_zoo: Callable[..., AdapterSet], tmp_path: Path
) -> None:
    spec = with_numbers(make_zoo(), values, tmp_path / "numbers")
    with pytest.raises(DataError, match=says):
        prepare(spec)


def test_rows_without_a_label_are_left_out_and_said(
    make_zoo: Callable[..., AdapterSet], tmp_path: Path
) -> None:
    spec = with_numbers(make_zoo(), [None, *np.arange(1.0, 120.0)], tmp_path / "numbers")
    with pytest.warns(Notice, match="1 rows without a `"):
        prepared = prepare(spec)
    np.testing.assert_array_equal(prepared.labels, np.arange(1, 120, dtype=np.float32))


def test_a_regression_needs_a_column() -> None:
    with pytest.raises(ConfigError, match="task=regression: expected `label`"):
        ExperimentSpec(task="regression")


def test_keys_of_the_last_version_still_count_and_say_so() -> None:
    with pytest.warns(FutureWarning, match=r"`fit\.hidden` is deprecated.*`model: MLP"):
        spec = ExperimentSpec(fit=FitSpec(hidden=(7, 5)))
    assert to_plain(spec) == to_plain(ExperimentSpec(model=MLP(hidden=(7, 5))))
    with pytest.warns(FutureWarning, match=r"`regression` is deprecated.*`task: regression`"):
        spec = ExperimentSpec(regression=True, label="n")
    assert to_plain(spec) == to_plain(ExperimentSpec(task="regression", label="n"))


@pytest.mark.slow
def test_a_folder_of_the_last_version_goes_on(spec: ExperimentSpec, tmp_path: Path) -> None:
    (first,) = run(replace(spec, seeds=1), tmp_path / "run")
    file = tmp_path / "run" / "config.yaml"
    held = yaml.safe_load(file.read_text(encoding="utf-8"))
    new = ("optimizer", "weight_decay", "schedule", "warmup", "grad_clip", "ema")
    held["fit"] = {k: v for k, v in held["fit"].items() if k not in new}
    held["fit"]["hidden"] = held.pop("model")["init_args"]["hidden"]
    del held["matrices"], held["task"]
    file.write_text(yaml.safe_dump({**held, "regression": False}), encoding="utf-8")
    assert run(spec, tmp_path / "run")[0] == first
    held["fit"]["hidden"] = [3]
    file.write_text(yaml.safe_dump(held), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"another `model.init_args`"):
        run(replace(spec, seeds=3), tmp_path / "run")


def test_best_weights_are_restored(spec: ExperimentSpec) -> None:
    """The validation loss of the classifier returned is the lowest of its history."""
    longer = replace(spec, fit=replace(FAST, max_epochs=40, lr=0.05))
    prepared = prepare(longer)
    fitted = fit_seed(longer, prepared, 0)
    rows = prepared.split.val
    logits = fitted.network(prepared.features[rows]).detach()
    scores = logits.double().softmax(1).numpy()
    loss = reference.log_loss(prepared.labels[rows], scores, labels=range(4))
    losses = [entry["val_loss"] for entry in fitted.history]
    bound = rounding(terms_of(fitted.network), size=float(logits.abs().max()))
    assert loss == pytest.approx(min(losses), abs=bound)
    assert min(losses) < losses[-1]
    assert fitted.record.best_epoch == 1 + int(np.argmin(losses))


def test_patience_stops_early(spec: ExperimentSpec) -> None:
    record = run_one(replace(spec, fit=replace(FAST, max_epochs=500, patience=3, lr=0.05)), 0)
    assert record.epochs - record.best_epoch == 3


def test_learning_rate_falls_at_plateaus(spec: ExperimentSpec) -> None:
    base = replace(FAST, max_epochs=30, patience=30, lr=0.05)
    last = {}
    for patience in (0, 100):
        longer = replace(spec, fit=replace(base, lr_patience=patience))
        last[patience] = fit_seed(longer, prepare(longer), 0).history[-1]["train_loss"]
    assert last[0] != last[100]


@pytest.mark.slow
def test_run_folder_explains_itself(spec: ExperimentSpec, tmp_path: Path) -> None:
    out = tmp_path / "run"
    records = run(spec, out)
    assert records == read_records(out / "records.jsonl")
    config = yaml.safe_load((out / "config.yaml").read_text(encoding="utf-8"))
    assert config["featurizer"]["class_path"] == "lora_ws.featurizers.StatsLayer"
    assert load_spec(ExperimentSpec, out / "config.yaml").fit == FAST
    assert json.loads((out / "versions.json").read_text(encoding="utf-8"))["torch"]
    for plot in ("curves.png", "confusion.png", "reliability.png"):
        assert (out / plot).read_bytes().startswith(b"\x89PNG")
    for seed in range(2):
        folder = out / f"seed-{seed}"
        curve = pd.read_csv(folder / "metrics.csv")
        assert len(curve) == records[seed].epochs
        assert {"train_loss", "val_loss", "val_accuracy"} <= set(curve.columns)
    assert (out / "bundle" / "bundle.json").is_file()


@pytest.mark.slow
def test_a_finished_seed_is_not_run_again(spec: ExperimentSpec, tmp_path: Path) -> None:
    first = run(replace(spec, seeds=1), tmp_path / "run")
    both = run(spec, tmp_path / "run")
    assert both[0] == first[0]  # the times too: it was read, not run
    assert [record.seed for record in both] == [0, 1]
    assert len((tmp_path / "run" / "records.jsonl").read_text(encoding="utf-8").splitlines()) == 2


@pytest.mark.slow
def test_half_a_record_is_run_again(spec: ExperimentSpec, tmp_path: Path) -> None:
    whole = run(spec, tmp_path / "run")
    file = tmp_path / "run" / "records.jsonl"
    file.write_text(file.read_text(encoding="utf-8")[:-40], encoding="utf-8")
    again = run(spec, tmp_path / "run")
    assert [r.timeless() for r in again] == [r.timeless() for r in whole]


@pytest.mark.slow
def test_another_experiment_in_the_folder_is_refused(spec: ExperimentSpec, tmp_path: Path) -> None:
    run(replace(spec, seeds=1), tmp_path / "run")
    other = replace(spec, fit=replace(FAST, lr=0.5))
    with pytest.raises(ConfigError, match=r"another `fit\.lr` \(0\.003, now 0\.5\).*--out"):
        run(other, tmp_path / "run")


@pytest.mark.slow
def test_changed_settings_get_a_folder_that_names_them(
    spec: ExperimentSpec, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, plain = tmp_path / "out", tmp_path / "plain.yaml"
    dump_yaml(replace(spec, seeds=1, fit=FitSpec(max_epochs=1)), plain)
    train = ["train", "--config", str(plain), "--out", str(out)]
    for flags in [], ["--fit.lr", "0.01"], [], ["--fit.lr", "0.01"]:
        assert main([*train, *flags]) == 0
    folders = {file.parent.name for file in out.glob("*/records.jsonl")}
    assert folders == {"StatsLayer", "StatsLayer-fit.lr=0.01"}
    assert len(read_records(out / "StatsLayer-fit.lr=0.01" / "records.jsonl")) == 1
    assert "other settings than" in capsys.readouterr().out
    table = (out / "table.md").read_text(encoding="utf-8")
    assert "| StatsLayer |" in table
    assert "| StatsLayer, fit.lr=0.01 |" in table
    held = load_spec(ExperimentSpec, out / "StatsLayer" / "config.yaml")
    assert folder_for(replace(held, seeds=9), out / "StatsLayer") == out / "StatsLayer"
    long = folder_for(replace(held, split="x" * 300), out / "StatsLayer").name
    assert long.startswith("StatsLayer-split=xxx")
    assert len(long) < 130


@pytest.mark.slow
def test_killed_run_resumes_to_identical_records(
    spec: ExperimentSpec, tmp_path: Path, warm_all: Warm
) -> None:
    spec = replace(spec, seeds=4, fit=replace(FAST, max_epochs=20, patience=20))
    expected = [record.timeless() for record in run(spec, tmp_path / "whole")]
    out = tmp_path / "killed" / "StatsLayer"
    config, records = tmp_path / "whole" / "config.yaml", out / "records.jsonl"
    # The file is there before its first line is.
    warm_all.start(COMMAND, "train", "--config", config, "--out", out.parent).kill(
        lambda: records.exists() and records.read_bytes().endswith(b"\n")
    )
    held = len(read_records(records))
    assert 1 <= held < 4
    assert [record.timeless() for record in run(spec, out)] == expected


def test_large_features_stay_mapped_and_give_the_same(
    spec: ExperimentSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    flat = replace(spec, featurizer=FlatVec())
    pca = replace(spec, featurizer=FlatVecPCA(n_components=5))
    small, scores = run_one(flat, 0).timeless(), np.asarray(prepare(pca).features)
    with monkeypatch.context() as blocks_are_small:
        blocks_are_small.setattr("lora_ws.learn.features.BLOCK_BYTES", 1000)
        assert isinstance(prepare(flat).features, np.ndarray)
        assert run_one(flat, 0).timeless() == small
    monkeypatch.setenv(LIMIT, str(3 << 20))
    mapped = prepare(flat)
    assert np.shares_memory(mapped.features, mapped.adapters.weights)
    assert run_one(flat, 0).timeless() == small
    # Sums over blocks of other sizes differ by rounding.
    blocks, width = np.asarray(prepare(pca).features), mapped.features.shape[1]
    atol = rounding(width, size=float(np.abs(scores).max()))
    np.testing.assert_allclose(blocks, scores, rtol=0, atol=atol)


@pytest.mark.slow
def test_third_party_transformer_by_dotted_path(
    spec: ExperimentSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "third_party.py").write_text(
        "import numpy as np\n"
        "from lora_ws import Featurizer\n"
        "class TheirNorms(Featurizer):\n"
        "    def __init__(self, *, layout=None, power: float = 2.0):\n"
        "        self.layout, self.power = layout, power\n"
        "    def _fit(self, rows): pass\n"
        "    def _transform(self, rows):\n"
        "        columns = [m.columns for m in self.layout.matrices]\n"
        "        parts = [np.linalg.norm(rows[:, c], axis=1) for c in columns]\n"
        "        return np.stack(parts, 1).astype(rows.dtype)\n"
        "    def _names(self): return [m.name for m in self.layout.matrices]\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path)
    args = ["train", "--dataset", spec.dataset, "--seeds", "1", "--out", str(tmp_path / "out")]
    args += ["--featurizer", "third_party.TheirNorms", "--featurizer.power", "2.0"]
    assert main([*args, "--fit.max_epochs", "5"]) == 0
    (record,) = read_records(tmp_path / "out" / "TheirNorms" / "records.jsonl")
    assert record.dim == 128
    assert record.test["accuracy"] > 0.5


def test_scikit_learn_transformer_is_a_representation(spec: ExperimentSpec) -> None:
    from sklearn.decomposition import TruncatedSVD

    record = run_one(replace(spec, featurizer=TruncatedSVD(n_components=4, random_state=0)), 0)
    assert record.dim == 4


def test_features_see_training_rows_only(
    make_zoo: Callable[..., AdapterSet], tmp_path: Path
) -> None:
    """Another test set leaves scaler and components as they are."""
    zoo = make_zoo()
    base = ExperimentSpec(store_of(zoo, tmp_path / "a"), featurizer=FlatVecPCA(n_components=3))
    one = prepare(base)
    changed = zoo.weights.copy()
    changed[one.split.test] *= 50
    other = store_of(replace(zoo, weights=changed), tmp_path / "b")
    two = prepare(replace(base, dataset=other))
    np.testing.assert_array_equal(one.featurizer.components_, two.featurizer.components_)
    np.testing.assert_array_equal(one.normalizer.mean, two.normalizer.mean)


@pytest.mark.slow
def test_wandb_offline_writes_a_run_for_each_seed(spec: ExperimentSpec, tmp_path: Path) -> None:
    asked = {"offline": True, "project": "mine", "entity": "me", "tags": ["a", "b"]}
    wandb = {"class_path": "WandbLogger", "init_args": asked}
    run(replace(spec, trainer=TrainerSpec(loggers=(wandb,))), tmp_path / "run")
    for seed in range(2):
        (home,) = (tmp_path / "run" / f"seed-{seed}" / "wandb").glob("offline-run-*")
        # As wandb's own list of runs has it.
        (file,) = home.glob("run-*.wandb")
        assert f"{spec.name} seed {seed}".encode() in file.read_bytes()


# A shell starts its background jobs with SIGINT ignored, and children inherit that.
HEED = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_training_is_no_success(
    spec: ExperimentSpec, tmp_path: Path, sent: signal.Signals, warm_all: Warm
) -> None:
    args = ["train", "--dataset", spec.dataset, "--out", tmp_path / "run", "--featurizer"]
    args += ["FlatVec", "--fit.max_epochs", "100000", "--fit.patience", "100000"]
    job = warm_all.start(HEED + COMMAND, *args)
    csv = tmp_path / "run" / "FlatVec" / "seed-0" / "metrics.csv"
    deadline = time.monotonic() + 90
    while not csv.exists() and not job.ended and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(job.pid, sent)
    status, said = job.wait()
    assert status == 1, said
    assert "run the same command again" in said
    assert not (tmp_path / "run" / "FlatVec" / "records.jsonl").exists()


@pytest.mark.slow
def test_other_data_under_the_same_folder_is_refused(
    spec: ExperimentSpec, make_zoo: Callable[..., AdapterSet], tmp_path: Path
) -> None:
    run(replace(spec, seeds=1), tmp_path / "run")
    shutil.rmtree(spec.dataset)
    make_zoo(seed=5).save(Path(spec.dataset))
    for seeds in (1, 2):
        with pytest.raises(ConfigError, match=r"other data.*--out"):
            run(replace(spec, seeds=seeds), tmp_path / "run")


def test_two_processes_in_one_folder_are_refused(spec: ExperimentSpec, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with (
        FileLock(tmp_path / "run" / ".lock"),
        pytest.raises(ConfigError, match="another process"),
    ):
        run(spec, tmp_path / "run")


@pytest.mark.slow
def test_a_failed_start_does_not_claim_the_folder(spec: ExperimentSpec, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        run(replace(spec, label="colour"), tmp_path / "run")
    assert len(run(spec, tmp_path / "run")) == 2


def test_a_diverged_run_says_so(spec: ExperimentSpec) -> None:
    with pytest.raises(TrainingError, match=r"lower fit\.lr"):
        run_one(replace(spec, featurizer=FlatVec(), fit=replace(FAST, lr=1e30)), 0)


@pytest.mark.slow
def test_transformers_that_look_at_labels_get_those_of_training_rows(
    spec: ExperimentSpec, tmp_path: Path
) -> None:
    from sklearn.feature_selection import SelectKBest

    record = run(replace(spec, featurizer=SelectKBest(k=30), seeds=1), tmp_path / "run")[0]
    assert record.dim == 30
    assert record.test["accuracy"] > 0.6


def test_unknown_subset_is_refused_by_name() -> None:
    spec = ExperimentSpec(subset="shard/class", featurizer=StatsFlatVec())
    with pytest.raises(DataError, match="shared/class"):
        prepare(spec)


def test_subset_of_a_collection_without_subsets_is_refused(spec: ExperimentSpec) -> None:
    with pytest.raises(DataError, match="has no subsets"):
        prepare(replace(spec, subset="x"))


@pytest.mark.parametrize(
    ("values", "flag"),
    [
        ({"lr": 0.0}, "fit.lr"),
        ({"ema": 1.0}, "fit.ema"),
        ({"grad_clip": 0.0}, "fit.grad_clip"),
        ({"weight_decay": -0.1}, "fit.weight_decay"),
        ({"warmup": -1.0}, "fit.warmup"),
        ({"batch_size": 0}, "fit.batch_size"),
        ({"lr_factor": 1.5}, "fit.lr_factor"),
    ],
)
def test_impossible_values_name_their_flag(values: dict[str, object], flag: str) -> None:
    with pytest.raises(ConfigError, match=flag):
        FitSpec(**values)  # type: ignore[arg-type]


def test_split_by_a_recorded_column(make_zoo, tmp_path: Path) -> None:
    zoo = make_zoo(n=120)
    own = np.repeat(["test", "val", "train"], [30, 10, 80])
    rows = zoo.rows.append_column("leaf_part", pa.array(own))
    store = replace(zoo, rows=rows).save(tmp_path / "store")
    spec = ExperimentSpec(
        str(store), split="leaf_part", featurizer=StatsFlatVec(), model=SMALL, fit=FAST
    )
    record = run_one(spec, 0)
    assert (record.n_train, record.n_val, record.n_test) == (80, 10, 30)
    assert record.split == "leaf_part"
    assert "split by leaf_part" in caption({"x": [record]})
    with pytest.raises(DataError, match="expected train, val and test"):
        run_one(replace(spec, split="category_label"), 0)


@pytest.mark.slow
def test_metadata_alone_is_a_control(make_zoo: Callable[..., AdapterSet], tmp_path: Path) -> None:
    zoo = make_zoo()
    column = pa.array(np.arange(len(zoo)) % 4, pa.int64())
    told = replace(zoo, rows=zoo.rows.append_column("num_images", column))
    spec = ExperimentSpec(
        store_of(told, tmp_path / "told"), metadata=("num_images",), model=SMALL, fit=FAST, seeds=1
    )
    (record,) = run(spec, tmp_path / "run")
    assert (record.representation, record.dim) == ("metadata", 1)
    assert record.test["accuracy"] > 0.6
    assert (tmp_path / "run" / "no_bundle.txt").is_file()


def test_shuffled_labels_keep_the_classes_and_lose_the_signal(spec: ExperimentSpec) -> None:
    records = run_many(replace(spec, shuffle_labels=True), range(4))
    # 24 test rows, 4 classes: 0.25 with a standard error of 0.09 for each seed.
    assert np.mean([record.test["accuracy"] for record in records]) < 0.45
    assert run_one(spec, 0).test["accuracy"] > 0.6
    assert len({record.confusion for record in records}) > 1


def test_first_rows_cut_each_part(spec: ExperimentSpec) -> None:
    split, cut = prepare(spec).split, prepare(replace(spec, first_rows=5)).split
    for whole, part in zip(split, cut, strict=True):
        np.testing.assert_array_equal(part, whole[:5])


@pytest.mark.slow
def test_last_weights_are_measured_where_asked(spec: ExperimentSpec) -> None:
    fit = replace(FAST, lr=0.05, max_epochs=30, patience=30)
    best = run_one(replace(spec, fit=fit), 0)
    last = run_one(replace(spec, fit=replace(fit, weights="last")), 0)
    assert (best.epochs, best.best_epoch) == (last.epochs, last.best_epoch)
    assert best.best_epoch < best.epochs
    assert (best.test, best.val) != (last.test, last.val)


def test_a_sweep_keeps_records_and_curves_only(spec: ExperimentSpec, tmp_path: Path) -> None:
    out = tmp_path / "run"
    records = run(spec, out, full=False)
    names = {path.name for path in out.iterdir()} - {".lock"}
    assert names == {"config.yaml", "versions.json", "records.jsonl", "curves.jsonl"}
    lines = [
        json.loads(line) for line in (out / "curves.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [len(line["curves"]) for line in lines] == [record.epochs for record in records]


@pytest.mark.slow
def test_records_of_another_version_are_refused(spec: ExperimentSpec, tmp_path: Path) -> None:
    run(replace(spec, seeds=1), tmp_path / "run")
    file = tmp_path / "run" / "records.jsonl"
    line = json.loads(file.read_text(encoding="utf-8"))
    del line["best_epoch"]
    file.write_text(json.dumps(line) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"another version of this library.*best_epoch"):
        run(spec, tmp_path / "run")
    assert json.loads(file.read_text(encoding="utf-8")) == line, "nothing is lost"

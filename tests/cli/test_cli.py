"""The command line as users meet it: exit codes, one-line errors, laziness."""

import json
import re
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.numpy import load_file, save_file
from tolerances import rounding
from torchmetrics.functional.classification import multiclass_calibration_error
from warm import COMMAND, Warm

import lora_ws
from lora_ws import cli
from lora_ws.audit.predict import PredictSpec, predict_files
from lora_ws.bundle import Bundle
from lora_ws.bundle.confidence import ABSTENTIONS
from lora_ws.cli import find_command, main
from lora_ws.collection import load

ROOT = Path(__file__).parents[2]
TRAIN = ["train", "--featurizer", "StatsFlatVec", "--subset", "shared/class", "--seeds", "1"]
TRAIN += ["--fit.max_epochs", "2"]


class Done(NamedTuple):
    """What a shell sees of a command."""

    returncode: int
    stdout: str
    stderr: str


def call(*args: str, cwd: Path | None = None) -> Done:
    """Run a command in a folder, in this process."""
    out, err = StringIO(), StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        patch.setenv("COLUMNS", "200")
        patch.chdir(cwd or Path.cwd())
        status = main(args)
    return Done(status, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    done = call(*TRAIN, "--out", "run", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "StatsFlatVec" in done.stdout
    return folder / "run"


def adapter_file(path: Path) -> Path:
    zoo = load("lora-ws-mini", subset="shared/class")
    save_file(
        {
            f"unet.{m.layer.name}.lora.{m.role}.weight": np.array(
                zoo.weights[0, m.columns].reshape(m.shape)
            )
            for m in zoo.layout.matrices
        },
        path,
    )
    return path


def test_help_lists_every_command_and_loads_nothing_heavy() -> None:
    script = (
        "import sys; from lora_ws.cli import main; code = main(['--help']); "
        "heavy = {'torch', 'lightning', 'numpy', 'wandb', 'jsonargparse'} & set(sys.modules); "
        "print('HEAVY', heavy); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, encoding="utf-8")
    assert done.returncode == 0
    assert "HEAVY set()" in done.stdout
    for command in ("data import", "featurize", "train", "evaluate", "predict"):
        assert command in done.stdout


@pytest.mark.slow
def test_importing_the_package_loads_neither_lightning_nor_wandb_nor_datasets(warm: Warm) -> None:
    script = (
        "import sys, lora_ws; lora_ws.StatsLayerDense; lora_ws.load; "
        "print({'lightning', 'wandb', 'datasets'} & set(sys.modules))"
    )
    assert warm.run(script).strip() == "set()"


def test_every_public_name_resolves() -> None:
    for name in lora_ws.__all__:
        assert getattr(lora_ws, name) is not None
    source = (ROOT / "lora_ws" / "__init__.py").read_text(encoding="utf-8")
    typed = source[source.index("TYPE_CHECKING:") : source.index("__version__ =")]
    words = set(re.findall(r"\b[A-Za-z_]+\b", typed))
    assert set(lora_ws.__all__) - {"__version__"} <= words
    with pytest.raises(AttributeError, match="no attribute `Flatvec`"):
        lora_ws.Flatvec  # noqa: B018


def test_help_of_a_group_lists_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["concepts", "--help"]) == 0
    said = capsys.readouterr().out
    assert re.findall(r"^  (concepts \w+)", said, re.MULTILINE) == [
        "concepts erase",
        "concepts amplify",
        "concepts apply",
    ]


def test_data_list_and_info() -> None:
    done = call("data", "list")
    assert "lora-ws-mini" in done.stdout
    done = call("data", "info", "lora-ws-mini")
    assert "per_adapter/class 500" in done.stdout
    assert "7072 in 64 layers" in done.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["trian"], "unknown command `trian`, did you mean `train`?"),
        (["data"], "`data` needs one of: list, info, import"),
        (["data", "imprt", "x"], "unknown command `data imprt`, did you mean `import`?"),
        (["zoo", "x"], "unknown command `zoo x`; expected one of base, build, merge"),
        (["study", "wieght-noise"], "no study `wieght-noise`, did you mean `weight-noise`?"),
        (["study", "?"], "no study `?`; expected one of weight-noise, noise-in-a"),
        (["train", "--sedes", "3"], "unknown flag `--sedes`, did you mean `--seeds`?"),
        (["train", "--seed", "3"], "unknown flag `--seed`, did you mean `--seeds`?"),
        (
            ["train", "--featurizer", "FlatVecPCA", "--featurizer.n_comp", "5"],
            "unknown option `n_comp` of FlatVecPCA, did you mean `n_components`?",
        ),
        (["completion", "tcsh"], "shell: expected bash or zsh or fish, got `tcsh`"),
        (["train", "--fit.lrr", "3"], "unknown flag `--fit.lrr`, did you mean `--fit.lr`?"),
        (["train", "--seeds", "many"], "--seeds: expected a whole number, got `many`"),
        (["train", "--seeds", "0"], "seeds: expected at least 1, got 0"),
        (["train", "--fit.lr", "-1"], "fit.lr: expected above 0"),
        (
            ["train", "--featurizer", "FlatVecPCA", "--featurizer.n_componets", "5"],
            "unknown option `n_componets` of FlatVecPCA, did you mean `n_components`?",
        ),
        (["train", "--featurizer", "StatsLayr"], "did you mean `StatsLayer`?"),
        (["train", "--dataset", "lora-ws-mni"], "did you mean `lora-ws-mini`?"),
        (["train", "--subset", "shard/class"], "shared/class"),
        (["train", "--label", "colour"], "no column `colour`"),
        (["train", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["data", "import", "nowhere"], "neither a folder nor a known collection"),
        (["search", "fish", "--index", "."], ".: expected adapter files, found none"),
        (["predict"], "missing: files; for example: lora-ws predict my_lora.safetensors"),
        (["push", "bundle", "me"], "unexpected argument `me`; for example: lora-ws push "),
        (["sweep", "--seeds", "1"], "featurizer: expected one representation, got none; name one"),
        (
            ["tune", "--search", "{fit.lr: [0.1]}"],
            "featurizer: expected one representation, got none",
        ),
        (["scan", "uploads", "--sidecars"], "--sidecars: expected a value, got none"),
        (["attribute", "--seed", "1.5"], "--seed: expected a whole number"),
        (["attribute", "--guidance_scale", "nan"], "--guidance_scale: expected a number"),
        (["predict", "x.safetensors", "--model", "nowhere"], "nowhere"),
        (["featurize", "--out", "x.csv"], ".parquet or .npz"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    args: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(args) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("lora-ws: ")
    assert message in line


@pytest.mark.slow
@pytest.mark.parametrize("module", ["lora_ws", "lora_ws.cli"])
def test_bad_input_in_a_process_of_its_own(module: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", module, "train", "--sedes", "3"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8")
    assert done.returncode == 2
    assert done.stderr == "lora-ws: unknown flag `--sedes`, did you mean `--seeds`?\n"


def test_a_place_that_cannot_be_written_is_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LORA_WS_CACHE", "/proc/nowhere")
    assert main(["data", "info", "lora-ws-mini"]) == 2
    assert "cannot use /proc/nowhere" in capsys.readouterr().err


def test_a_crash_is_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lora_ws.commands.data.card_names", lambda: 1 / 0)
    assert main(["data", "list"]) == 1
    assert "failed: ZeroDivisionError" in capsys.readouterr().err


@pytest.mark.slow
def test_a_single_experiment_keeps_the_others_of_its_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path), "--fit.max_epochs", "2", "--subset", "shared/class"]
    assert main(["train", "--featurizer", "StatsFlatVec", "--seeds", "2", *out]) == 0
    assert main(["train", "--featurizer", "FlatVecPCA", "--seeds", "1", *out]) == 0
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "| StatsFlatVec |" in table
    assert "| FlatVecPCA |" in table
    assert main(["train", "--featurizer", "StatsFlatVec", "--seeds", "1", *out]) == 0
    assert "seeds: 1 to 2" in (tmp_path / "table.md").read_text(encoding="utf-8")
    assert (
        yaml.safe_load((tmp_path / "StatsFlatVec" / "config.yaml").read_text(encoding="utf-8"))[
            "seeds"
        ]
        == 2
    )


def test_bundled_collections_cannot_be_replaced(capsys: pytest.CaptureFixture[str]) -> None:
    zoo_folder = str(ROOT / "lora_ws")
    assert main(["data", "import", zoo_folder, "--card", "lora-ws-mini"]) == 2
    assert "is bundled and stays as it is" in capsys.readouterr().err


def test_flags_may_have_dashes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    args = ["data", "import", str(tmp_path / "in"), "--out", str(tmp_path / "s")]
    assert main([*args, "--on-error", "skip"]) == 2
    assert "expected .parquet or .safetensors" in capsys.readouterr().err


def test_yaml_typo_names_file_and_nearest_key(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("sedes: 3\n", encoding="utf-8")
    done = call("train", "--config", "c.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert "unknown option `sedes`, did you mean `seeds`?" in done.stderr


def test_old_names_of_commands_and_flags_are_taken_with_a_notice(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert find_command(["components", "erase", "--base", "x"])[0] == "concepts erase"
    assert "`components erase` is `concepts erase` now" in capsys.readouterr().err
    new = {
        "--count": "--seeds",
        "--k": "--featurizer.n_components",
        "--way pca": "--way FlatVecPCA",
    }
    monkeypatch.setitem(cli.OLD_FLAGS, "train", new)
    args = ["--k=7", "--way", "pca", "--count", "3", "--way", "other", "--out=x"]
    assert find_command(["train", *args])[1] == [
        *("--way", "FlatVecPCA", "--seeds", "3", "--way", "other", "--out=x"),
        *("--featurizer.n_components", "7"),
    ]
    assert capsys.readouterr().err.splitlines() == [
        f"lora-ws: `{old}` is `{name}` now; the next release forgets it"
        for old, name in (
            ("--k", new["--k"]),
            ("--way pca", "--way FlatVecPCA"),
            ("--count", "--seeds"),
        )
    ]


def test_default_below_yaml_below_flag(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("seeds: 7\nfit: {lr: 0.5, batch_size: 4}\n", encoding="utf-8")
    done = call("train", "--config", "c.yaml", "--fit.lr", "0.25", "--print_config", cwd=tmp_path)
    assert done.returncode == 0
    config = yaml.safe_load(done.stdout)
    assert config["seeds"] == 7
    assert config["fit"]["lr"] == 0.25
    assert config["fit"]["batch_size"] == 4
    assert config["fit"]["max_epochs"] == 2000


def test_train_prints_a_table_and_leaves_a_folder(trained: Path) -> None:
    table = (trained / "table.md").read_text(encoding="utf-8")
    assert table.startswith("| Representation | Numbers | Accuracy |")
    assert "350/50/100" in table
    assert re.search(r"^\| chance \| – \| 10\.0 \| –", table, re.MULTILINE)
    assert re.search(r"^\| image oracle \| – \| 86\.0 \| –", table, re.MULTILINE)
    page = (trained / "report.html").read_text(encoding="utf-8")
    titles = re.findall(r"<h2>(.*?)</h2>", page)
    assert [title.split()[0] for title in titles] == ["Result", "Training", "Where", "Map", "Which"]
    assert page.count("data:image/png;base64,") == 5
    assert not re.search(r"(?:src|href)=\"(?!data:|#)", page), "it needs nothing beside it"
    assert (trained / "bundle" / "model.safetensors").is_file()
    assert (
        len((trained / "StatsFlatVec" / "records.jsonl").read_text(encoding="utf-8").splitlines())
        == 1
    )


def test_evaluate_repeats_the_test_accuracy_of_the_record(trained: Path) -> None:
    record = json.loads((trained / "StatsFlatVec" / "records.jsonl").read_text(encoding="utf-8"))
    done = call("evaluate", "--model", str(trained / "bundle"))
    assert done.returncode == 0, done.stderr
    accuracy = float(re.search(r"accuracy\s+([\d.]+)", done.stdout).group(1))  # type: ignore[union-attr]
    # Printed with two digits.
    assert accuracy == pytest.approx(100 * record["test"]["accuracy"], abs=0.01)


def test_evaluate_says_how_far_to_believe_the_classifier(trained: Path) -> None:
    bundle, zoo = Bundle.load(trained / "bundle"), load("lora-ws-mini", subset="shared/class")
    labels, names = zoo.labels()
    rows = zoo.split().test
    verdicts = bundle.predict_batch(zoo.weights[rows])
    truth = [names[label] for label in labels[rows]]
    said = [v.label == name for v, name in zip(verdicts, truth, strict=True) if v.label]
    place = torch.tensor([bundle.classes.index(name) for name in truth])
    values = torch.from_numpy(bundle.predict_proba(zoo.weights[rows]))
    error = multiclass_calibration_error(values, place, len(names), n_bins=15, norm="l1")
    done = call("evaluate", "--model", str(trained / "bundle"))
    for text, expected in (
        ("expected calibration error", float(error)),
        ("share abstained from", 1 - len(said) / len(verdicts)),
        ("accuracy of the answers", np.mean(said)),
    ):
        found = re.search(rf"{text}, %\s+([\d.]+)", done.stdout)
        assert found, done.stdout
        assert float(found.group(1)) == pytest.approx(100 * expected, abs=0.01), text


def test_predict_names_good_files_and_reports_bad_ones(trained: Path, tmp_path: Path) -> None:
    good = adapter_file(tmp_path / "good.safetensors")
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(good.read_bytes()[:1000])
    done = call(
        "predict", str(good), str(bad), "--model", str(trained / "bundle"), "--as_json", "true"
    )
    assert done.returncode == 1
    (line,) = done.stdout.splitlines()
    verdict = json.loads(line)
    probabilities = list(verdict["probabilities"].values())
    assert sum(probabilities) == pytest.approx(1, abs=rounding(len(probabilities)))
    assert verdict["confidence"] == max(verdict["probabilities"].values())
    assert verdict["label"] in (None, next(iter(verdict["probabilities"])))
    assert str(bad) in done.stderr
    found = list(predict_files([str(good), str(bad)], PredictSpec(str(trained / "bundle"))))
    assert found[0].verdict is not None
    assert found[0].verdict.probabilities == pytest.approx(verdict["probabilities"])
    assert (found[1].verdict, found[1].reason) == (None, "truncated")
    alone = call("predict", str(good), "--model", str(trained / "bundle"))
    assert alone.returncode == 0
    assert "good.safetensors" in alone.stdout


def test_predict_abstains_from_what_is_no_known_adapter(trained: Path, tmp_path: Path) -> None:
    known = load_file(adapter_file(tmp_path / "known.safetensors"))
    strange = tmp_path / "strange.safetensors"
    save_file({name: np.full_like(value, 1e4) for name, value in known.items()}, strange)
    args = ["predict", str(strange), "--model", str(trained / "bundle")]
    done = call(*args)
    assert done.returncode == 0
    assert "abstains: out-of-range" in done.stdout
    assert ABSTENTIONS["out-of-range"] in done.stdout
    verdict = json.loads(call(*args, "--as_json", "true").stdout)
    assert (verdict["label"], verdict["reason"]) == (None, "out-of-range")


@pytest.mark.parametrize("name", ["x.parquet", "x.npz"])
def test_featurize_writes_features_labels_and_parts(tmp_path: Path, name: str) -> None:
    out = tmp_path / name
    args = ["featurize", "--subset", "shared/class", "--featurizer", "StatsLayer"]
    done = call(*args, "--out", str(out))
    assert done.returncode == 0, done.stderr
    if name.endswith(".npz"):
        with np.load(out) as data:
            assert data["features"].shape == (500, 896)
            columns = {key: data[key].tolist() for key in data.files}
    else:
        table = pq.read_table(out)
        columns = {key: table[key].to_pylist() for key in table.column_names}
    adapters = load("lora-ws-mini", subset="shared/class")
    for key, name in (("source", "source"), ("sha256", "sha256"), ("group", "image_set")):
        assert columns[key] == [str(value) for value in adapters.column(name)]
    assert len(columns["label"]) == len(columns["part"]) == 500
    assert set(columns["part"]) == {"train", "val", "test"}


def test_import_then_train_on_own_files(tmp_path: Path) -> None:
    zoo = load("lora-ws-mini", subset="shared/class")
    for k in range(40):
        label = str(zoo.column("category_label")[k])
        folder = tmp_path / "mine" / label
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"unet.{m.layer.name}.lora.{m.role}.weight": np.array(
                zoo.weights[k, m.columns].reshape(m.shape)
            )
            for m in zoo.layout.matrices
        }
        save_file(tensors, folder / f"a{k}.safetensors")
    done = call("data", "import", "mine", "--out", "store", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "40 adapters" in done.stdout
    done = call("data", "info", "store", cwd=tmp_path)
    assert "64 layers" in done.stdout
    args = ["featurize", "--dataset", "store", "--featurizer", "StatsLayer"]
    assert main([*args, "--label", "colour", "--out", str(tmp_path / "x.npz")]) == 2


@pytest.mark.slow
def test_a_missing_extra_is_named(warm: Warm) -> None:
    absent = "import sys; sys.modules['diffusers'] = None\n"
    status, printed = warm.start(absent + COMMAND, "zoo", "build").wait()
    assert status == 2
    assert "pip install 'lora_ws[diffusion]'" in printed

"""Loggers, callbacks and precision of Lightning, as a spec names them."""

import csv
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from lora_ws.collection import AdapterSet
from lora_ws.config import load_spec, to_plain
from lora_ws.errors import ConfigError, DeprecatedName
from lora_ws.featurizers import StatsFlatVec
from lora_ws.learn.parts import make_callbacks, make_loggers
from lora_ws.learn.run import run, run_one
from lora_ws.learn.spec import ExperimentSpec, FitSpec, TrainerSpec
from lora_ws.learn.trainer_spec import Part
from lora_ws.models import MLP


@pytest.fixture
def spec(make_zoo: Callable[..., AdapterSet], tmp_path: Path) -> ExperimentSpec:
    store = str(make_zoo(n=60).save(tmp_path / "store"))
    parts = (StatsFlatVec(), MLP(hidden=(4,)), FitSpec(max_epochs=2))
    return ExperimentSpec(store, featurizer=parts[0], model=parts[1], fit=parts[2], seeds=1)


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as opened:
        return list(csv.DictReader(opened))


@pytest.mark.slow
def test_loggers_and_callbacks_of_a_yaml_file_take_part(
    spec: ExperimentSpec, tmp_path: Path
) -> None:
    second = {"save_dir": str(tmp_path / "logs"), "name": "mine", "version": "first"}
    plain = to_plain(spec)
    plain["trainer"] = {
        "loggers": [{"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": second}],
        "callbacks": ["LearningRateMonitor"],
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(plain), encoding="utf-8")
    read = load_spec(ExperimentSpec, tmp_path / "c.yaml")
    records = run(read, tmp_path / "run")
    assert records[0].timeless() == run_one(spec, 0).timeless()
    ours = rows(tmp_path / "run" / "seed-0" / "metrics.csv")
    theirs = rows(tmp_path / "logs" / "mine" / "first" / "metrics.csv")
    assert [line["val_loss"] for line in theirs] == [line["val_loss"] for line in ours]
    told = yaml.safe_load((tmp_path / "logs/mine/first/hparams.yaml").read_text("utf-8"))
    assert (told["fit"]["lr"], told["dataset"]) == (spec.fit.lr, spec.dataset)
    rates = [float(line["lr-Adam"]) for line in theirs if line["lr-Adam"]]
    assert rates
    assert set(rates) == {spec.fit.lr}
    assert load_spec(ExperimentSpec, tmp_path / "run" / "config.yaml").trainer == read.trainer


@pytest.mark.slow
def test_tensorboard_reads_the_curves_and_settings_of_a_run(
    spec: ExperimentSpec, tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    asked = replace(spec, trainer=TrainerSpec(loggers=("TensorBoardLogger",)))
    (record,) = run(asked, tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run" / "seed-0" / "tensorboard")).Reload()
    losses = [event.value for event in events.Scalars("val_loss")]
    ours = rows(tmp_path / "run" / "seed-0" / "metrics.csv")
    told = [float(line["val_loss"]) for line in ours if line["val_loss"]]
    assert losses == pytest.approx(told, rel=2**-20)
    assert min(losses) == pytest.approx(record.val_loss, rel=2**-20)
    settings = tmp_path / "run" / "seed-0" / "tensorboard" / "hparams.yaml"
    read = yaml.safe_load(settings.read_text(encoding="utf-8"))
    assert (read["fit"]["lr"], read["dataset"]) == (spec.fit.lr, spec.dataset)


def test_precision_is_part_of_the_engine(spec: ExperimentSpec) -> None:
    half = run_one(replace(spec, trainer=TrainerSpec(precision="bf16-mixed")), 0)
    whole = run_one(spec, 0)
    assert half.engine == f"{whole.engine}-bf16-mixed"
    assert half.val_loss == pytest.approx(whole.val_loss, rel=0.2)
    assert half.val_loss != whole.val_loss


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("WandLogger", "trainer.loggers: no class `WandLogger`, did you mean `WandbLogger`?"),
        (
            {"class_path": "CSVLogger", "init_args": {"tags": 1}},
            "trainer.loggers: CSVLogger: got an unexpected keyword",
        ),
        ("nowhere.Logger", "trainer.loggers: cannot load `nowhere.Logger`"),
        ("pathlib.Path", "trainer.loggers: expected a Logger of Lightning, got `pathlib.Path`"),
    ],
)
def test_what_is_wrong_with_a_logger_is_said(
    spec: ExperimentSpec, tmp_path: Path, part: Part, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        make_loggers(replace(spec, trainer=TrainerSpec(loggers=(part,))), tmp_path / "seed-0")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "package"), [("MLFlowLogger", "mlflow"), ("TensorBoardLogger", "tensorboard")]
)
def test_a_missing_package_is_named(
    spec: ExperimentSpec, tmp_path: Path, name: str, package: str
) -> None:
    asked = replace(spec, trainer=TrainerSpec(loggers=(name,)))
    if find_spec(package):
        assert type(make_loggers(asked, tmp_path / "seed-0")[1]).__name__ == name
        return
    with pytest.raises(ConfigError, match=rf"{name} needs {package}: pip install {package}"):
        make_loggers(asked, tmp_path / "seed-0")


def test_keys_of_a_part_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"trainer\.loggers: .*init_args, got name"):
        TrainerSpec(loggers=({"name": "WandbLogger"},))


def test_callbacks_are_made_anew_for_every_seed(spec: ExperimentSpec) -> None:
    asked = replace(spec, trainer=TrainerSpec(callbacks=("DeviceStatsMonitor",)))
    assert make_callbacks(asked)[0] is not make_callbacks(asked)[0]


def test_the_old_key_of_wandb_still_counts() -> None:
    with pytest.warns(DeprecatedName, match=r"trainer\.wandb"):
        old = TrainerSpec(wandb="offline")
    wandb = {"class_path": "WandbLogger", "init_args": {"offline": True}}
    assert old == TrainerSpec(loggers=(wandb,))
    assert TrainerSpec(wandb="off") == TrainerSpec()

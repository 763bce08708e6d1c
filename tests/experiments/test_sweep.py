"""Sweeps: the telling layer is found, shares join, kills are survived, wrong input is refused."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
from factories import record, small_zoo
from sklearn.preprocessing import StandardScaler
from warm import COMMAND, Warm

from lora_ws.cli import main
from lora_ws.errors import ConfigError
from lora_ws.experiments.layers.report import sweep_chart, sweep_grid, write_csv
from lora_ws.experiments.layers.spec import SweepSpec
from lora_ws.experiments.layers.sweep import Point, run_sweep, sweep_folder, top_points
from lora_ws.featurizers import FlatVec, StatsLayer
from lora_ws.learn.run import run_one
from lora_ws.learn.spec import ExperimentSpec, FitSpec, TrainerSpec
from lora_ws.models import MLP

SMALL = MLP(hidden=(16,))
FAST = FitSpec(lr=1e-2, max_epochs=8, patience=8)


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> SweepSpec:
    store = small_zoo().save(tmp_path_factory.mktemp("sweep") / "store")
    return SweepSpec(str(store), featurizer=FlatVec(), model=SMALL, fit=FAST, seeds=2, processes=1)


class Swept(NamedTuple):
    """All layers, in a folder that more may be added to."""

    folder: Path
    layers: list[Point]


@pytest.fixture(scope="module")
def swept(spec: SweepSpec, tmp_path_factory: pytest.TempPathFactory) -> Swept:
    folder = tmp_path_factory.mktemp("sweep") / "sweep"
    return Swept(folder, run_sweep(spec, folder))


@pytest.mark.slow
def test_the_layer_and_the_matrix_that_tell_are_found(spec: SweepSpec, swept: Swept):
    layers = swept.layers
    matrices = run_sweep(replace(spec, over="matrices", seeds=1), swept.folder)
    assert (len(layers), len(matrices)) == (4, 8)
    assert top_points(layers, 1)[0].name == "mid.attn2.to_v"
    assert top_points(matrices, 1)[0].name == "mid.attn2.to_v.up"
    assert [point.records[0].dim for point in layers] == [12, 11, 13, 12]
    left_out = run_sweep(replace(spec, over="all_but_top"), swept.folder)
    assert [point.name for point in left_out] == ["without-1", "without-2"]
    assert left_out[0].records[0].dim == 12 + 11 + 12
    assert left_out[0].summary("test").mean < layers[2].summary("test").mean - 0.2


@pytest.mark.slow
def test_a_point_is_the_experiment_of_that_layer_alone(spec: SweepSpec, swept: Swept):
    point = swept.layers[2]
    one = FlatVec(matrices=("mid.attn2.to_v",))
    alone = ExperimentSpec(spec.dataset, featurizer=one, model=SMALL, fit=FAST)
    assert point.records[1].timeless() == run_one(alone, 1).timeless()


def test_csv_and_table_say_what_the_records_say(swept: Swept, tmp_path: Path):
    points = swept.layers
    with write_csv(points, tmp_path / "layers.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    for row, point in zip(rows, points, strict=True):
        values = [record.test["accuracy"] for record in point.records]
        assert float(row["test_mean"]) == pytest.approx(sum(values) / 2, rel=1e-5)
        assert row["seeds"] == "2"
    assert rows[0]["kind"] == "self-attention q"
    grid = sweep_grid(points, 2)
    assert grid.rows[0][0].text == "mid.attn2.to_v"
    assert len(grid.rows) == 2
    assert sweep_chart(points, "layers", tmp_path / "layers.png").stat().st_size > 5000


def test_numbers_are_swept_by_their_first_metric(tmp_path: Path):
    plain = {"classes": (), "confusion": (), "task": "regression"}
    points = [
        Point(name, [record(0, val={"r2": value}, test={"r2": value - 1}, **plain)])
        for name, value in {"mid.attn2.to_q": 0.25, "mid.attn2.to_v": 0.75}.items()
    ]
    assert [point.name for point in top_points(points, 1)] == ["mid.attn2.to_v"]
    grid = sweep_grid(points, 2)
    assert [cell.text for cell in grid.rows[0][3:]] == ["0.750", "-0.250"]
    assert "best by validation R²; mean" in grid.caption
    assert "percent" not in grid.caption
    assert "largest class" not in grid.caption
    assert sweep_chart(points, "layers", tmp_path / "layers.png").stat().st_size > 5000


@pytest.mark.slow
def test_shares_of_a_job_array_make_the_whole(spec: SweepSpec, swept: Swept, tmp_path: Path):
    parts = [run_sweep(replace(spec, shard=f"{k}/2"), tmp_path / "parts") for k in range(2)]
    assert [len(part) for part in parts] == [2, 4]
    for one, other in zip(swept.layers, parts[1], strict=True):
        assert [r.timeless() for r in one.records] == [r.timeless() for r in other.records]


def test_a_sweep_of_the_batched_engine_trains_all_layers_together(
    spec: SweepSpec, swept: Swept, tmp_path: Path
):
    stacked = replace(spec, trainer=TrainerSpec("cpu", engine="batched"), seeds=1)
    run_sweep(stacked, tmp_path / "stacked")
    # A record that is there is kept, and what is missing is added.
    kept = (tmp_path / "stacked" / "layers" / "mid.attn2.to_v" / "records.jsonl").read_text(
        encoding="utf-8"
    )
    together = run_sweep(replace(stacked, seeds=2), tmp_path / "stacked")
    assert not (tmp_path / "stacked" / "layers" / ".state").exists()
    # Engines differ by what float32 rounds (test_engines compares them in float64): here, that each
    # record is of its layer and seed, whose loss is the nearest among all.
    losses = {(r.name, r.seed): r.val_loss for point in swept.layers for r in point.records}
    found = [one for point in together for one in point.records]
    assert [one.engine for one in found] == ["batched-cpu"] * 8
    for one in found:
        apart = {key: abs(loss - one.val_loss) for key, loss in losses.items()}
        assert min(apart, key=apart.__getitem__) == (one.name, one.seed)
    again = (tmp_path / "stacked" / "layers" / "mid.attn2.to_v" / "records.jsonl").read_text(
        encoding="utf-8"
    )
    assert again.startswith(kept)


def test_leaving_out_needs_a_sweep_first(spec: SweepSpec, tmp_path: Path):
    with pytest.raises(ConfigError, match="--over layers first"):
        run_sweep(replace(spec, over="all_but_top"), tmp_path / "sweep")


def test_a_representation_without_matrices_is_refused(spec: SweepSpec, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"takes `matrices`, got StandardScaler"):
        run_sweep(replace(spec, featurizer=StandardScaler()), tmp_path / "sweep")


def test_another_experiment_in_the_folder_is_refused(spec: SweepSpec, swept: Swept):
    other = replace(spec, featurizer=StatsLayer(), seeds=3)
    with pytest.raises(ConfigError, match="choose another --out"):
        run_sweep(other, swept.folder)
    faster = replace(spec, fit=replace(FAST, lr=0.5))
    assert sweep_folder(faster, swept.folder).name == "sweep-fit.lr=0.5"
    assert sweep_folder(replace(spec, over="matrices", seeds=9), swept.folder) == swept.folder
    assert sweep_folder(other, swept.folder / "none") == swept.folder / "none"


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_sweep_goes_on_and_doubles_nothing(
    processes: int, spec: SweepSpec, tmp_path: Path, warm_all: Warm
):
    out = tmp_path / "sweep"
    args = ["sweep", "--dataset", spec.dataset, "--featurizer", "FlatVec", "--seeds", "3"]
    args += ["--out", out, "--fit.max_epochs", "3"]
    args += ["--model", "MLP", "--model.hidden", "[16]", "--processes"]
    children: list[psutil.Process] = []
    job = warm_all.start(COMMAND, *args, processes)

    def begun() -> bool:
        children[:] = psutil.Process(job.pid).children(recursive=True)
        return any(file.read_bytes().endswith(b"\n") for file in out.rglob("records.jsonl"))

    job.kill(begun)
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive, "processes end with the one that started them"
    files = {file: file.read_text(encoding="utf-8") for file in out.rglob("records.jsonl")}
    assert main([*map(str, args), "1"]) == 0
    page = (out / "layers.html").read_text(encoding="utf-8")
    assert "mid.attn2.to_v" in page
    assert "data:image/png" in page
    assert len(list(out.rglob("records.jsonl"))) == 4
    for file in out.rglob("records.jsonl"):
        seeds = [json.loads(line)["seed"] for line in file.read_text(encoding="utf-8").splitlines()]
        assert seeds == [0, 1, 2]
        whole = files.get(file, "").rpartition("\n")[0]
        assert file.read_text(encoding="utf-8").startswith(whole), (
            "finished seeds are kept, not run again"
        )

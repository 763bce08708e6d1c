"""Two machines of a Ray cluster find what this one finds, and go on after kills."""

import json
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from deadly import double, refuse, touch
from factories import small_zoo, write_adapter
from kept import kept, records
from warm import COMMAND, Warm

from lora_ws.adapters import Layout
from lora_ws.cli import main
from lora_ws.collection import AdapterSet, load
from lora_ws.errors import TrainingError
from lora_ws.workers import current_engine, on_engine

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
FILES = 40


@pytest.fixture(scope="module")
def address(_cache: None) -> Iterator[str]:
    """Of a cluster of two machines with a CPU each."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (HERE.parent, HERE))))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        # Ray lets others go first, which on a busy machine are the other tests.
        patch.setenv("RAY_worker_niceness", "0")
        machine = {"num_cpus": 1, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=machine)
        cluster.add_node(num_cpus=1)
        yield str(cluster.address)
        cluster.shutdown()


def test_what_an_engine_promises(address: str, tmp_path: Path) -> None:
    with on_engine("ray", address):
        engine = current_engine()
        assert engine.cpus() == 2
        batches = [list(range(start, start + 3)) for start in range(0, 21, 3)]
        found = engine.map_batches(partial(double, deadly=7), batches, 2, lost=lambda item: -item)
        expected = [-7 if item == 7 else 2 * item for item in range(21)]
        assert list(chain.from_iterable(found)) == expected
        files = [tmp_path / name for name in "abc"]
        engine.work_through(touch, files, 2)
        assert all(file.exists() for file in files)
        with pytest.raises(TrainingError, match="a process of 2 failed: ValueError: no 3"):
            engine.work_through(refuse, [1, 2, 3, 4], 2)


def kill_a_worker(job: int) -> None:
    """End one of the processes that do tasks, while it does one."""
    while not (found := busy()):
        time.sleep(0.001)
        assert psutil.pid_exists(job)
    found[0].kill()


def busy() -> list[psutil.Process]:
    """Processes that do a task now."""
    return [process for process in psutil.process_iter(["cmdline"]) if is_task(process)]


def is_task(process: psutil.Process) -> bool:
    # Of one that ends, the system says nothing.
    return (process.info["cmdline"] or [])[:1] == ["ray::_perform"]


def survives(warm: Warm, count: Callable[[], int], *args: object) -> int:
    """Exit code of a command that loses a process, is killed, and is called again."""
    job = warm.start(COMMAND, *args)
    while count() < 2:
        assert not job.ended, job.wait()
        time.sleep(0.01)
    kill_a_worker(job.pid)
    before = count()
    job.kill(lambda: count() > before)
    return warm.start(COMMAND, *args).wait()[0]


def test_a_scan_finds_what_one_machine_finds(address: str, tmp_path: Path, warm_all: Warm) -> None:
    mini, home = load("lora-ws-mini"), tmp_path / "loras"
    layers = tuple((s.name, s.in_features, s.out_features) for s in mini.layout.layers)
    for row in range(FILES):
        write_adapter(home / f"{row:03}.safetensors", mini.weights[row], layers)
    (home / "020.html.safetensors").write_text("<!DOCTYPE html><html></html>", encoding="utf-8")
    out, cache = {}, {}
    for name in ("local", "ray"):
        out[name], cache[name] = tmp_path / f"{name}.jsonl", tmp_path / name
    args = ("scan", home, "--batch", 1)

    def count() -> int:
        return sum(f.read_bytes().count(b"\n") for f in cache["ray"].glob("*/findings.jsonl"))

    kept = ("--json", out["ray"], "--cache", cache["ray"], "--workers", 2)
    flags = ("--engine", "ray", "--address", address)
    assert survives(warm_all, count, *args, *kept, *flags) == 3
    own = ("--json", out["local"], "--cache", cache["local"])
    assert main([*map(str, (*args, *own))]) == 3
    assert out["ray"].read_text(encoding="utf-8") == out["local"].read_text(encoding="utf-8")
    lines = [json.loads(line) for line in out["ray"].read_text(encoding="utf-8").splitlines()]
    assert [line["reason"] for line in lines if line["reason"]] == ["html"]
    assert count() == FILES + 1, "no content has two lines"


def test_a_representation_is_that_of_one_machine(
    address: str, tmp_path: Path, warm_all: Warm
) -> None:
    layout = Layout.sd15_qv()
    # Of a block and a half.
    rows = (3 << 25) // (4 * layout.size)
    weights = np.random.default_rng(0).standard_normal((rows, layout.size), dtype=np.float32)
    table = small_zoo(rows).rows
    store = AdapterSet(weights, layout, table, small_zoo(3).card).save(tmp_path / "store")
    args = ["featurize", "--dataset", store, "--featurizer", "StatsFlatVec"]
    local, out = tmp_path / "local.parquet", tmp_path / "ray.parquet"
    cluster = (*args, "--out", out, "--workers", 2, "--engine", "ray", "--address", address)
    job = warm_all.start(COMMAND, *cluster)
    kill_a_worker(job.pid)
    # It is begun again, for a command that is killed, too.
    job.kill(lambda: bool(busy()))
    assert not out.exists(), "no half of a file"
    assert warm_all.start(COMMAND, *cluster).wait()[0] == 0
    assert main([*map(str, args), "--out", str(local), "--workers", "1"]) == 0
    assert pq.read_table(out).equals(pq.read_table(local))
    assert not list(tmp_path.glob("ray.parquet?*")), "what was cut off is gone"


def test_a_sweep_is_that_of_one_machine(address: str, tmp_path: Path, warm_all: Warm) -> None:
    store, out = small_zoo().save(tmp_path / "store"), tmp_path / "ray"
    args = ["sweep", "--dataset", store, "--featurizer", "FlatVec", "--seeds", 3]
    args += ["--over", "matrices", "--fit.max_epochs", 5, "--model", "MLP"]
    args += ["--model.hidden", "[16]"]

    def count() -> int:
        return sum(file.read_bytes().count(b"\n") for file in out.rglob("records.jsonl"))

    cluster = ("--engine", "ray", "--address", address)
    assert survives(warm_all, count, *args, "--out", out, *cluster) == 0
    assert main([*map(str, args), "--out", str(tmp_path / "local"), "--processes", "1"]) == 0
    texts = [(tmp_path / name / "matrices.csv").read_text("utf-8") for name in ("ray", "local")]
    assert texts[0] == texts[1]
    assert count() == 8 * 3, "no seed has two records"


def test_seeds_of_a_training_are_those_of_one_machine(
    address: str, tmp_path: Path, warm_all: Warm
) -> None:
    store, out = small_zoo().save(tmp_path / "store"), tmp_path / "ray"
    args = ["train", "--dataset", store, "--featurizer", "FlatVec", "--seeds", 10]
    args += ["--fit.max_epochs", 5, "--model", "MLP", "--model.hidden", "[16]"]
    cluster = ("--out", out, "--engine", "ray", "--address", address)
    assert survives(warm_all, lambda: records(out), *args, *cluster) == 0
    assert main([*map(str, args), "--out", str(tmp_path / "local")]) == 0
    assert kept(out) == kept(tmp_path / "local"), "files but for times"

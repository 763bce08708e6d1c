"""Seeds that processes of this machine train side by side are those of one process."""

import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from factories import small_zoo
from kept import kept, records
from warm import COMMAND, Warm

from lora_ws.cli import main
from lora_ws.workers import in_processes, on_engine, processes_asked

SEEDS = 8


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--processes", "0"], "processes: expected at least 1, got 0"),
        (["--trainer.devices", "2"], "trainer.devices x trainer.num_nodes: expected 1 with --pro"),
        (["--trainer.engine", "batched"], "trainer.engine: expected auto or one-by-one with --pro"),
    ],
)
def test_what_does_not_go_together_is_refused_before_work(
    flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--dataset", "none", "--processes", "2", *flags]) == 2
    assert said in capsys.readouterr().err


def test_one_process_is_this_one() -> None:
    assert processes_asked() == 0
    with in_processes(1), on_engine():
        assert processes_asked() == 0
    with in_processes(3):
        assert processes_asked() == 3


def await_count(count: Callable[[], int], least: int) -> None:
    deadline = time.monotonic() + 300
    while count() < least:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
def test_seeds_side_by_side_are_seeds_in_turn_also_after_kills(
    tmp_path: Path, warm_all: Warm
) -> None:
    store, out = small_zoo().save(tmp_path / "store"), tmp_path / "two"
    args = ["train", "--dataset", store, "--featurizer", "FlatVec", "--seeds", SEEDS]
    args += ["--fit.max_epochs", 5, "--model", "MLP", "--model.hidden", "[16]"]
    side = (*args, "--out", out, "--processes", 2)
    job = warm_all.start(COMMAND, *side)
    await_count(lambda: records(out), 2)
    spawned = [
        one
        for one in psutil.Process(job.pid).children(recursive=True)
        if "spawn_main" in " ".join(one.cmdline())
    ]
    spawned[0].kill()
    before = records(out)
    job.kill(lambda: records(out) > before)
    assert warm_all.start(COMMAND, *side).wait()[0] == 0
    assert main([*map(str, args), "--out", str(tmp_path / "one")]) == 0
    assert kept(out) == kept(tmp_path / "one")
    assert records(out) == SEEDS

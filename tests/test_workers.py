"""Work in processes, some of which end."""

import os
import sys
from collections.abc import Iterator
from functools import partial
from itertools import chain

import psutil
import pytest
from deadly import double, refuse
from warm import Warm

from lora_ws.cli import main
from lora_ws.errors import TrainingError
from lora_ws.workers.local import Local


def seen(items: list[str]) -> list[str]:
    return [os.environ[item] for item in items]


def batches(count: int, size: int) -> Iterator[list[int]]:
    for start in range(0, count, size):
        yield list(range(start, min(start + size, count)))


@pytest.mark.parametrize("processes", [1, 2])
def test_results_come_in_order(processes: int) -> None:
    found = list(Local().map_batches(double, batches(23, 3), processes, lost=lambda _: -1))
    assert list(chain.from_iterable(found)) == [2 * item for item in range(23)]
    assert [len(part) for part in found] == [3] * 7 + [2]


def test_an_item_that_ends_its_process_costs_its_own_result_alone() -> None:
    call = partial(double, deadly=7)
    found = Local().map_batches(call, batches(20, 4), 2, lost=lambda item: -item)
    assert list(chain.from_iterable(found)) == [-7 if item == 7 else 2 * item for item in range(20)]


@pytest.mark.slow
def test_processes_see_the_environment_of_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("first", "second"):
        monkeypatch.setenv("LORA_WS_SEEN", value)
        found = Local().map_batches(seen, [["LORA_WS_SEEN"]], 2, lost=str)
        assert list(found) == [[value]]


def test_what_a_call_raises_comes_out() -> None:
    with pytest.raises(TypeError):
        list(Local().map_batches(double, iter([[1], [None]]), 2, lost=lambda _: -1))  # type: ignore[list-item]


def test_the_error_of_a_task_ends_all_and_is_told() -> None:
    with pytest.raises(TrainingError, match="a process of 2 failed: ValueError: no 3"):
        Local().work_through(refuse, [1, 2, 3, 4], 2)


def test_one_process_is_this_one() -> None:
    done: list[int] = []
    Local().work_through(done.append, [1, 2], 1, lambda: done.append(-1))
    assert done == [1, -1, 2, -1]
    with pytest.raises(ValueError, match="no 3"):
        Local().work_through(refuse, [3], 1)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--engine", "ray"], "pip install 'lora_ws[ray]'"),
        (["--address", "auto"], "address: expected engine=ray beside it, got engine=local"),
        (["--engine", "dask"], "engine"),
    ],
)
def test_an_engine_that_cannot_be_had_is_named(
    flags: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "lora_ws.workers.on_ray", raising=False)
    assert main(["scan", "loras", *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


@pytest.mark.slow
def test_processes_end_with_the_one_that_started_them(warm: Warm) -> None:
    code = "import time; from lora_ws.workers.local import Local\n"
    code += "Local().work_through(time.sleep, [99, 99], 2)"
    job, children = warm.start(code), list[psutil.Process]()

    def working() -> bool:
        children[:] = psutil.Process(job.pid).children(recursive=True)
        return len(children) >= 2

    job.kill(working)
    assert not psutil.wait_procs(children, timeout=20)[1]

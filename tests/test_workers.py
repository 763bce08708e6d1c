"""Batches in processes, some of which end."""

import os
from collections.abc import Iterator
from functools import partial
from itertools import chain

import pytest

from lora_ws.workers import map_batches


def double(items: list[int], deadly: int = -1) -> list[int]:
    if deadly in items:
        os._exit(9)
    return [2 * item for item in items]


def batches(count: int, size: int) -> Iterator[list[int]]:
    for start in range(0, count, size):
        yield list(range(start, min(start + size, count)))


@pytest.mark.parametrize("processes", [1, 2])
def test_results_come_in_order(processes: int) -> None:
    found = list(map_batches(double, batches(23, 3), processes, lost=lambda _: -1))
    assert list(chain.from_iterable(found)) == [2 * item for item in range(23)]
    assert [len(part) for part in found] == [3] * 7 + [2]


def test_an_item_that_ends_its_process_costs_its_own_result_alone() -> None:
    call = partial(double, deadly=7)
    found = map_batches(call, batches(20, 4), 2, lost=lambda item: -item)
    assert list(chain.from_iterable(found)) == [-7 if item == 7 else 2 * item for item in range(20)]


def test_what_a_call_raises_comes_out() -> None:
    with pytest.raises(TypeError):
        list(map_batches(double, iter([[1], [None]]), 2, lost=lambda _: -1))  # type: ignore[list-item]

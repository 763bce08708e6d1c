"""Tables show whatever metrics records hold, and say where one was not measured."""

from dataclasses import replace

import pytest
from factories import record

from lora_ws.errors import DataError
from lora_ws.report.grid import Cell
from lora_ws.report.metrics import METRICS, measured, metrics_of
from lora_ws.report.records import Summary, summarise
from lora_ws.report.tables import headline, results_grid

NUMBERS = {"r2": 0.25, "mae": 1.5, "spearman": 0.5}


def number_record(seed: int = 0, **test: float):
    return record(seed, classes=(), confusion=(), test={**NUMBERS, **test})


def test_the_highest_share_and_the_lowest_error_are_the_best():
    low, high = Summary.of([0.1, 0.3]), Summary.of([0.5])
    assert METRICS["f1"].column([low, high, None]) == [
        Cell("20.0 ± 14.1", "second"),
        Cell("50.0", "best"),
        Cell("–"),
    ]
    assert [cell.mark for cell in METRICS["mae"].column([low, high])] == ["best", "second"]
    assert METRICS["mae"].column([high, None], ["", "no number"])[1] == Cell("no number")


def test_a_metric_that_is_not_listed_is_shown_under_its_own_name():
    own = record()
    grid = results_grid({"new": [replace(own, test={"kappa": 0.125, **own.test})], "old": [own]})
    assert grid.head[2:] == (
        "Accuracy",
        "AUROC",
        "Precision",
        "Recall",
        "F1",
        "kappa",
        "p (chance)",
    )
    assert [row[-2] for row in grid.rows] == [Cell("0.125", "best"), Cell("–")]


def test_a_record_without_a_metric_has_a_dash_and_no_p():
    own = record()
    few = [replace(own, test={"f1": 0.25})]
    grid = results_grid({"all": [own], "few": few})
    assert [cell.text for cell in grid.rows[1][2:]] == ["–", "–", "–", "–", "25.0", "–"]
    assert measured([*few, own], "accuracy") is None
    assert measured([], "accuracy") is None
    with pytest.raises(DataError, match="FlatVec: expected records with accuracy, got f1"):
        summarise(few, "accuracy")


def test_numbers_are_shown_as_they_are_without_a_chance():
    rows = {"one": [number_record()], "two": [number_record(mae=1.0)]}
    grid = results_grid(rows)
    assert grid.head == ("Representation", "Numbers", "R²", "Mean absolute error", "Spearman")
    assert [row[3] for row in grid.rows] == [Cell("1.500", "second"), Cell("1.000", "best")]
    assert grid.caption.endswith("mean of the training rows has an R² of about 0.")
    assert "percent" not in grid.caption
    assert "largest class" not in grid.caption


def test_seeds_that_choose_what_to_read_show_from_how_few_to_how_many_numbers():
    seeds = [replace(record(seed), dim=dim) for seed, dim in enumerate((96, 64, 128))]
    grid = results_grid({"one module": seeds, "all": [record()]})
    assert [row[1].text for row in grid.rows] == ["64 to 128", str(record().dim)]


def test_the_headline_is_the_first_metric():
    assert headline([record()]) == "test accuracy 50.0 %"
    assert headline([number_record(), number_record(1, r2=0.75)]) == "test R² 0.500 ± 0.354"
    assert metrics_of([[number_record(), record()]])[0] == "accuracy"

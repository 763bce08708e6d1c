"""The page and the table of a scan show what every task of a classifier predicts."""

import csv
import io

import pytest

from lora_ws.adapters.summary import AdapterSummary
from lora_ws.audit.classify import Finding
from lora_ws.audit.output import csv_head, csv_line
from lora_ws.audit.policy import Reviewed
from lora_ws.audit.provenance import Provenance
from lora_ws.audit.report import Report
from lora_ws.bundle.confidence import Prediction
from lora_ws.bundle.heads import Answer


@pytest.mark.parametrize("abstains", [False, True])
def test_every_task_is_shown(abstains: bool) -> None:
    name, number = (None, None) if abstains else ("red, bold", "7.25")
    verdict = Prediction(
        None if abstains else "fish",
        *(0.9, {"fish": 0.9, "tree": 0.1}, 0.1, "unusual" if abstains else "", ("fish",)),
        answers={
            "traits": Answer(name, {"red": 0.8125, "bold": 0.75}, ("red", "bold")),
            "size": Answer(number, {}, value=7.25),
        },
    )
    facts = AdapterSummary("tiny", "names", {}, {}, {}, {}, 0.0, {}, (), {})
    one = Reviewed(Finding("a.safetensors", facts=facts, verdict=verdict))
    report = Report()
    report.add(one)
    html = report.page("a page", Provenance())
    for title in ("traits", "size"):
        assert f">{title}<" in html
    shown = ("abstains",) if abstains else ("red, bold", "7.25", "0.812")
    assert all(text in html for text in shown)
    (row,) = csv.DictReader(io.StringIO(csv_head() + csv_line(one)))
    assert row["answers"] == f"traits: {name or 'abstains'}; size: {number or 'abstains'}"

"""Write committed reports again from their records: `python docs/site/reports.py table1 figure2`.

Nothing is trained, and a missing record is an error. Left out is what needs more than records:
learning curves, and ROC. The other reports need more throughout (losses of 64 layers, costs of a
bundle, images): `lora-ws reproduce` makes them.
"""

import json
import shutil
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any, NoReturn

from lora_ws.experiments import trials
from lora_ws.experiments.kinds import run_eval
from lora_ws.experiments.options import Options, ReproduceSpec
from lora_ws.learn.run_folder import RECORDS
from lora_ws.learn.spec import ExperimentSpec

RESULTS = Path(__file__).parents[2] / "eval" / "results"
PICTURES = ("*.png", "*.svg")


def render(name: str, committed: Path) -> None:
    """Write the report of a file of `eval/` into the folder of its ``records.jsonl``."""
    with tempfile.TemporaryDirectory() as home:
        out = Path(home)
        _unpack(committed / RECORDS, out / "runs")
        trials.run = _refuse
        report = run_eval(Options(name, out, ReproduceSpec(processes=1)))
        for pattern in PICTURES:
            for file in committed.glob(pattern):
                file.unlink()
        shutil.copytree(report, committed, dirs_exist_ok=True)


def _unpack(file: Path, runs: Path) -> None:
    """Put records back where a run keeps them."""
    lines = defaultdict[str, list[str]](list)
    for line in file.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        lines[record.pop("experiment")].append(json.dumps(record) + "\n")
    for experiment, own in lines.items():
        (runs / experiment).mkdir(parents=True)
        (runs / experiment / RECORDS).write_text("".join(own), encoding="utf-8")


def _refuse(spec: ExperimentSpec, folder: Path, **_: Any) -> NoReturn:
    """Stand in for what trains."""
    raise SystemExit(f"{folder}: expected {spec.seeds} records; `lora-ws reproduce` makes them")


if __name__ == "__main__":
    for asked in sys.argv[1:]:
        render(asked, RESULTS / asked)

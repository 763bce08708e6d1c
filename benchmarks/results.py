"""What benchmarks measured, a line each in results.jsonl, and the table made of them.

``python benchmarks/results.py`` writes the table into docs/performance.md, between two marks: of
each operation, baseline and processor the last line that is no quick one. Whoever gives an
operation another name takes its earlier lines out of the file.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from lora_ws.system import processor_facts

FOLDER = Path(__file__).parent
FILE = FOLDER / "results.jsonl"
PAGE = FOLDER.parent / "docs" / "performance.md"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


@dataclass(frozen=True)
class Result:
    """What an operation cost, beside one other way of doing it.

    Attributes:
        operation: what was done, sizes included.
        baseline: the other way.
        script: that measured both, in ``benchmarks/``.
        ratios: the other way's cost over ours: minimum, median, maximum; one number of one turn.
        turns: how many ratios these are of; 0 where nobody noted it.
        ours: median cost of our way, NaN not allowed; None where nobody noted it.
        unit: of that cost, such as ``ms per file``.
        goal: the ratio to reach; None without one.
        floor: what cannot be saved, as a share of our cost; None where it is not known.
        remark: what else there is to say, such as a rate and its own goal.
        processor: its name.
        load: of the machine at the end, all its work together, one minute's mean.
        date: of the measurement; empty where nobody noted it.
        commit: of the code.
        command: that measured it.
        quick: whether at sizes that only show that it runs.
    """

    operation: str
    baseline: str
    script: str
    ratios: tuple[float, ...]
    turns: int = 0
    ours: float | None = None
    unit: str = ""
    goal: float | None = None
    floor: float | None = None
    remark: str = ""
    processor: str = ""
    load: float | None = None
    date: str = ""
    commit: str = ""
    command: str = ""
    quick: bool = False

    @property
    def ratio(self) -> float:
        """The median."""
        return self.ratios[len(self.ratios) // 2]


def here(script: str, argv: Sequence[str]) -> dict[str, str | float | None]:
    """What is the same for all results of a run: machine, day, commit, command."""
    return {
        "script": script,
        "processor": processor(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "commit": commit(),
        "command": " ".join(["python", f"benchmarks/{script}", *argv]),
    }


def processor() -> str:
    """Name of the processor, without marks and frequency, and its family."""
    said = processor_facts()
    name = re.sub(r"\((R|TM)\)|@.*", "", said.get("model name", "unknown"))
    words = [word for word in name.split() if word not in ("CPU", "Processor")]
    # Virtual machines call processors of several families alike.
    return " ".join(words) + (f", family {said['cpu family']}" if "cpu family" in said else "")


def commit() -> str:
    """Short hash of the checkout, with a + where code was changed since; empty outside of one."""

    def git(*words: str) -> subprocess.CompletedProcess[str]:
        command = ["git", "-C", str(FOLDER), *words]
        return subprocess.run(command, capture_output=True, encoding="utf-8", check=False)

    changed = git("diff", "--quiet", "HEAD", "--", "*.py", "../lora_ws").returncode == 1
    return git("rev-parse", "--short", "HEAD").stdout.strip() + "+" * changed


def add(results: Iterable[Result], file: Path) -> None:
    """Write results at the end of a file."""
    with file.open("a", encoding="utf-8") as out:
        out.writelines(json.dumps(asdict(result)) + "\n" for result in results)


def read(file: Path = FILE) -> list[Result]:
    """All results of a file."""
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [Result(**line | {"ratios": tuple(line["ratios"])}) for line in lines]


def newest(results: Iterable[Result]) -> list[Result]:
    """The last full result of each row of the table.

    Returns:
        One of each operation, baseline and processor, in the order in which the operations, and
        within them the baselines, came first.
    """
    found: dict[str, dict[str, dict[str, Result]]] = {}
    for one in results:
        if not one.quick:
            of_baseline = found.setdefault(one.operation, {}).setdefault(one.baseline, {})
            of_baseline[one.processor] = one
    return [one for of in found.values() for by in of.values() for one in by.values()]


def table(results: Iterable[Result]) -> str:
    """The Markdown table of the newest results."""
    heads = ["operation", "baseline", "times", "ours", "of the floor", "goal", "measured"]
    lines = ["| " + " | ".join(heads) + " |", "|---|---|--:|--:|--:|---|---|"]
    above = ("", "")
    for one in newest(results):
        names = (one.operation, one.baseline)
        shown = ("" if names[0] == above[0] else f"{one.operation} (`{one.script}`)",)
        shown += ("" if names == above else one.baseline,)
        above = names
        ours = "" if one.ours is None else f"{number(one.ours)} {one.unit}"
        floor = "" if one.floor is None else f"{100 * one.floor:.0f} %"
        cells = [*shown, times(one.ratios), ours, floor, verdict(one), measured(one)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def times(ratios: Sequence[float]) -> str:
    """Minimum, median and maximum, such as ``5.1 < **5.4** < 6.0``.

    Example:
        >>> times((2.0, 2.53, 1234.0)), times((7.0,))
        ('2 < **2.53** < 1,234', '**7**')
    """
    found = [number(ratio) for ratio in ratios]
    found[len(found) // 2] = f"**{found[len(found) // 2]}**"
    return " < ".join(found)


def verdict(result: Result) -> str:
    """Whether the goal was reached, and the remark."""
    said = []
    if result.goal is not None:
        reached = result.ratio >= result.goal
        said.append(f"{number(result.goal)}" + (" reached" if reached else " **missed**"))
    return "; ".join([*said, *([result.remark] if result.remark else [])])


def measured(result: Result) -> str:
    """Where, when and how often."""
    said = [result.processor, result.date or "date unknown"]
    said += [f"`{result.commit}`"] if result.commit else []
    said += [f"load {result.load:g}"] if result.load is not None else []
    said += [f"{result.turns} turn{'s' * (result.turns > 1)}"] if result.turns else []
    return ", ".join(said)


def number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def rendered(page: str, results: Iterable[Result]) -> str:
    """The page with the table of these results in place of its own."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + "\n\n" + table(results) + "\n\n" + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(rendered(PAGE.read_text(encoding="utf-8"), read()), encoding="utf-8")
    print(f"{PAGE}: {len(newest(read()))} rows", file=sys.stderr)

"""What a study says: a table and a curve for each change, with intervals and the limits of both."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from lora_ws.experiments.differences import interval
from lora_ws.experiments.study.changes import CHANGES, Level
from lora_ws.experiments.study.run import CLEAN, Read
from lora_ws.experiments.study.trained import Learned
from lora_ws.experiments.study.trained_report import trained_sections
from lora_ws.report.charts import chart_bars, chart_lines
from lora_ws.report.grid import Cell, Grid
from lora_ws.report.page import Figure, Section, write_report

PAGE = "report.html"
By = Mapping[Level, Sequence[Read]]


def write_study(
    found: Sequence[Read], folder: Path, trained: Sequence[Learned] = ()
) -> tuple[Path, list[Grid]]:
    """Write the page of a study beside its records.

    Args:
        found: readings, those of unchanged adapters among them.
        folder: where to.
        trained: results of studies that train.

    Returns:
        The page, and its tables.
    """
    names = [name for name in CHANGES if any(read.study == name for read in found)]
    grids, sections = list[Grid](), list[Section]()
    for name in names:
        readers = _by_reader(found, name)
        grids.append(study_grid(name, readers))
        sections.append(Section(name, (_chart(name, readers, folder), grids[-1])))
    if trained:
        lines = "".join(json.dumps(asdict(one)) + "\n" for one in trained)
        (folder / "trained.jsonl").write_text(lines, encoding="utf-8")
    more, tables = trained_sections(trained, folder)
    sections = [Section("Summary", (summary_grid(found, trained),)), *sections, *more]
    grids = [*grids, *tables]
    write_report(folder, "How robust classifiers of adapters are", sections)
    return folder / PAGE, grids


def summary_grid(found: Sequence[Read], trained: Sequence[Learned] = ()) -> Grid:
    """A row for each study and reader: where its accuracy is highest, and where lowest.

    Args:
        found: readings, those of unchanged adapters among them.
        trained: results of studies that train.

    Example:
        >>> clean = Read("m", "d", "unchanged", "unchanged", 0, "1110", 0.5, 1.0, 0.0)
        >>> hidden = Read("m", "d", "camouflage", 1.0, 0, "1000", 0.5, 1.0, 0.0)
        >>> [cell.text for cell in summary_grid([clean, hidden]).rows[0]]
        ['camouflage', 'm', '75.0', 'unchanged', '25.0', '1']
    """
    accuracies: dict[tuple[str, str], dict[Level, list[float]]] = {}
    for name in CHANGES:
        for reader, levels in _by_reader(found, name).items():
            own = {level: [one.hits.mean() for one in reads] for level, reads in levels.items()}
            accuracies[name, reader] = own
    for one in trained:
        levels = accuracies.setdefault((one.study, one.model), {})
        levels.setdefault(one.level, []).append(one.accuracy)
    rows = []
    for (name, reader), levels in sorted(accuracies.items(), key=lambda item: item[0][0]):
        means = {level: 100 * float(np.mean(values)) for level, values in levels.items()}
        best, worst = max(means, key=means.__getitem__), min(means, key=means.__getitem__)
        said = [f"{means[best]:.1f}", _text(best), f"{means[worst]:.1f}", _text(worst)]
        rows.append(tuple(map(Cell, [name, reader, *said])))
    head = ("study", "reader", "highest accuracy, %", "at level", "lowest, %", "at level")
    return Grid(
        head, tuple(rows), "Mean accuracy over draws; what a level is stands below.", left=2
    )


def study_grid(name: str, readers: Mapping[str, By]) -> Grid:
    """A row for each reader and level of a change.

    Args:
        name: of the change.
        readers: reader -> level -> readings, `CLEAN` among the levels.
    """
    change = CHANGES[name]
    head = ["reader", "level", "accuracy, %", "difference (95 %)", "other answer, %", "NLL"]
    head += ["abstains, %"] + (["one of the two, %", "both in top two, %"] if change.merges else [])
    rows = []
    for reader, levels in readers.items():
        clean = levels[CLEAN][0]
        for level, reads in levels.items():
            low, high = difference(reads, clean)
            mean = 100 * np.mean([read.hits.mean() for read in reads])
            gap = mean - 100 * clean.hits.mean()
            said = "" if level == CLEAN else f"{gap:+.1f} ({low:+.1f} to {high:+.1f})"
            cells = [reader, _text(level), f"{mean:.1f}", said]
            cells += [f"{100 * np.mean([read.flipped for read in reads]):.1f}"]
            cells += [f"{np.mean([read.nll for read in reads]):.2f}"]
            cells += [f"{100 * np.mean([read.abstained for read in reads]):.1f}"]
            if change.merges:
                cells += [_percent([read.either for read in reads])]
                cells += [_percent([read.both for read in reads])]
            rows.append(tuple(map(Cell, cells)))
    draws = max(len(reads) for levels in readers.values() for reads in levels.values())
    tested = len(next(iter(readers.values()))[CLEAN][0].right)
    same = " The update stays the same." if change.keeps_update else ""
    counted = f"{draws} {'draw' if draws == 1 else 'draws'} a level"
    title = change.title[0].upper() + change.title[1:]
    caption = (
        f"{title}.{same} {tested} test adapters, {counted}. Differences to "
        "unchanged adapters, intervals by a paired bootstrap over test adapters; answers count "
        "also where the classifier abstains."
    )
    return Grid(tuple(head), tuple(rows), caption, left=2)


def difference(reads: Sequence[Read], clean: Read) -> tuple[float, float]:
    """Interval of the difference in accuracy, in percent, over resampled test adapters.

    Example:
        >>> one = Read("m", "d", "s", 0.1, 0, "1100", 0.5, 1.0, 0.0)
        >>> difference([one], one)
        (0.0, 0.0)
    """
    gaps = np.mean([read.hits for read in reads], axis=0) - clean.hits
    return interval(gaps)


def _by_reader(found: Sequence[Read], name: str) -> dict[str, dict[Level, list[Read]]]:
    """Reader -> level -> readings of a study, the unchanged adapters first."""
    data = dict.fromkeys(read.data for read in found)
    readers: dict[str, dict[Level, list[Read]]] = {}
    for read in found:
        if read.study in (name, CLEAN):
            title = read.model if len(data) == 1 else f"{read.model} on {read.data}"
            readers.setdefault(title, {}).setdefault(read.level, []).append(read)
    # Of records put together from several runs, some read other changes alone.
    return {title: levels for title, levels in readers.items() if {*levels} != {CLEAN}}


def _chart(name: str, readers: Mapping[str, By], folder: Path) -> Figure:
    change = CHANGES[name]
    file = folder / f"{name}.png"
    tested = len(next(iter(readers.values()))[CLEAN][0].right)
    title = f"{name}, {tested} test adapters"
    series = {
        reader: {level: _accuracy(reads) for level, reads in levels.items()}
        for reader, levels in readers.items()
    }
    if change.named:
        named = {reader: {str(k): v for k, v in own.items()} for reader, own in series.items()}
        chart_bars(named, file, title=title, chance=0.0)
    else:
        numbers = {
            reader: {float(k): v for k, v in own.items() if k != CLEAN}
            for reader, own in series.items()
        }
        chart_lines(numbers, file, title=title, chance=None, xlabel=change.title)
    return Figure(file, f"Accuracy by level: {change.title}; bars: standard deviation over draws.")


def _accuracy(reads: Sequence[Read]) -> tuple[float, float]:
    values = [100 * read.hits.mean() for read in reads]
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def _percent(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{100 * np.mean(known):.1f}" if known else ""


def _text(level: Level) -> str:
    return level if isinstance(level, str) else f"{level:g}"

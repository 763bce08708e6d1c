"""What a scan found as one HTML page that needs nothing beside it."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from lora_ws.audit.classify import Finding
from lora_ws.audit.dedup import Copies
from lora_ws.audit.details import details
from lora_ws.audit.output import csv_head, csv_line, others
from lora_ws.audit.policy import Reviewed
from lora_ws.audit.provenance import Provenance
from lora_ws.bundle import Bundle
from lora_ws.bundle.card import MEASURES, measure_text
from lora_ws.bundle.shipped import ShippedReader, loaded
from lora_ws.errors import printable
from lora_ws.report.grid import Cell, Grid
from lora_ws.report.heat import Heat
from lora_ws.report.modules import short_name
from lora_ws.report.page import Attachment, Details, Facts, Section, to_page

# Rows of a table, rows of a map, files named of a group: a page is for reading.
LISTED, MAPPED, NAMED = 200, 40, 6
# Lines of the table that a page carries, to be saved.
CARRIED = 5000
# Characters of a name, and of one among others.
LONGEST_NAME, SHORT_NAME = 80, 40
TRIAGE = (
    "This is triage: it says which files deserve a look, and why. It certifies nothing. A file "
    "that is not flagged has not been found harmless, and a verdict is a guess from weights alone."
)
# A name up to its second number: down_blocks.0.attentions.1.
BLOCK = re.compile(r"^.*?\.\d+(?:\.[a-z_]+\.\d+)?")
# The end of a file's name that labels can do without.
USUAL = re.compile(r"(/(pytorch_lora_weights|adapter_model))?\.safetensors$")


@dataclass
class Report:
    """Gathers files one by one and keeps what a page has room for.

    Attributes:
        counts: of files, by what became of them.
        bases: of files that were read, by base model.
        flagged: the first that were.
        refused: the first that could not be read.
        read: the first that could be read.
        root: the folders that all files are in.
        left_out: reason -> files and folders that the search passed over.
        lines: of the table of all files, the first.
    """

    counts: Counter[str] = field(default_factory=Counter)
    bases: Counter[str] = field(default_factory=Counter)
    flagged: list[Reviewed] = field(default_factory=list)
    refused: list[Reviewed] = field(default_factory=list)
    read: list[Reviewed] = field(default_factory=list)
    root: tuple[str, ...] | None = None
    left_out: Mapping[str, int] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)

    def add(self, one: Reviewed) -> None:
        """Take in one file."""
        finding = one.finding
        folders = tuple(finding.file.split("/")[:-1])
        self.root = folders if self.root is None else _common(self.root, folders)
        self.counts[outcome(finding)] += 1
        self.counts["files"] += 1
        self.counts[PARTLY] += finding.partly_read
        if len(self.lines) < CARRIED:
            self.lines.append(csv_line(one))
        if one.flags:
            self.counts["flagged"] += 1
            _keep(self.flagged, one, LISTED)
        if finding.reason:
            _keep(self.refused, one, LISTED)
        elif finding.facts:
            self.bases[finding.facts.base] += 1
            _keep(self.read, one, LISTED)

    def page(
        self,
        title: str,
        made: Provenance,
        *,
        bundle: Bundle | ShippedReader | None = None,
        copies: Copies | None = None,
        bytes_read: int | None = None,
    ) -> str:
        """The page.

        Args:
            title: of the page.
            made: with what it was made.
            bundle: the classifier; a `ShippedReader` is reported where it had a file to classify.
            copies: groups of files with the same or nearly the same update; None leaves them out.
            bytes_read: by this scan.
        """
        told = bundle if self.judged or isinstance(bundle, Bundle) else None
        sections = [
            self._summary(made, bytes_read),
            self._flagged(),
            self._verdicts(),
            self._refused(),
            self._evidence(),
            self._facts(),
            self._norms(),
            _copies(copies) if copies else None,
            self._details(),
            _classifier(loaded(told)) if told else None,
            Section("The policy", (made.attachment(),)) if made.policy else None,
        ]
        return to_page(title, [section for section in sections if section])

    @property
    def judged(self) -> int:
        """How many files a classifier answered or abstained from."""
        return self.counts["answered"] + self.counts["abstained"]

    def grid(self) -> Grid:
        """What became of the files, in numbers."""
        names = (*OUTCOMES, PARTLY)
        rows = [(name, self.counts[name]) for name in names if self.counts[name]]
        rows += [(f"base: {name}", count) for name, count in self.bases.most_common()]
        rows += [(f"left out: {reason}", count) for reason, count in self.left_out.items()]
        cells = [(Cell(name), Cell(f"{count}")) for name, count in rows]
        return Grid(("", "count"), tuple(cells))

    def _summary(self, made: Provenance, bytes_read: int | None) -> Section:
        said = [f"File names start at `{'/'.join(self.root)}`."] if self.root else []
        if bytes_read is not None:
            said.append(f"This scan read {bytes_read:,} bytes.")
        more = {**self.counts, **{f"left out: {why}": n for why, n in self.left_out.items()}}
        shown = [name for name in (*OUTCOMES, *more) if more.get(name)]
        tiles = {name: Cell(f"{more[name]}", link=LEADS.get(name, "")) for name in shown}
        bases = ", ".join(f"{base} ({count})" for base, count in self.bases.most_common())
        facts = made.facts()
        facts = replace(facts, values={**facts.values, "bases": Cell(bases or "none")})
        whole = len(self.lines) == self.counts["files"]
        rows = "all files" if whole else f"the first {CARRIED} files; --csv writes all"
        table = csv_head() + "".join(self.lines)
        parts = (Attachment(f"Save the table (CSV) of {rows}", "findings.csv", table),)
        return Section("Summary", (Facts(tiles, True), TRIAGE, facts, " ".join(said), *parts))

    @cached_property
    def _anchors(self) -> dict[str, str]:
        """File -> anchor of its details, of all that are named."""
        return {name: f"file-{k}" for k, name in enumerate(self._kept)}

    @cached_property
    def _kept(self) -> dict[str, Reviewed]:
        return {one.finding.file: one for one in (*self.flagged, *self.read, *self.refused)}

    def _details(self) -> Section | None:
        single = len(self._kept) == 1
        parts = tuple(
            details(one, self._name(one.finding), self._anchors[name], opened=single)
            for name, one in self._kept.items()
        )
        return Section("Details", parts) if parts else None

    def _cell(self, finding: Finding, *, short: bool = False) -> Cell:
        """The name of a file, which leads to its details."""
        name = self._label(finding) if short else self._name(finding)
        return Cell(name, link=self._anchors[finding.file])

    def _name(self, finding: Finding) -> str:
        return _short(finding.file[len("/".join((*(self.root or ()), ""))) :])

    def _label(self, finding: Finding) -> str:
        return _short(USUAL.sub("", self._name(finding)), SHORT_NAME)

    def _flagged(self) -> Section | None:
        rows = [
            (self._cell(one.finding), Cell("; ".join(one.flags)), Cell(_all_said(one.finding)))
            for one in self.flagged
        ]
        head = ("file", "why", "verdict")
        return _table("Flagged", head, rows, self.counts["flagged"], anchor="flagged")

    def _verdicts(self) -> Section | None:
        """A group per verdict, the largest first."""
        if not any(one.finding.verdict for one in self.read):
            return None
        groups: dict[str, list[Reviewed]] = {}
        for one in self.read:
            groups.setdefault(said(one.finding), []).append(one)
        parts = [
            Details(f"{verdict}: {len(group)}", (self._group(group),), open=True)
            for verdict, group in sorted(groups.items(), key=lambda item: -len(item[1]))
        ]
        total = sum(self.bases.values())
        some = f"The first {LISTED} of {total} files that could be read; --json has all."
        return Section("Verdicts", (*([some] if total > LISTED else []), *parts), "verdicts")

    def _group(self, group: Sequence[Reviewed]) -> Grid:
        """Files of one verdict; of a classifier of several tasks, with the other predictions."""
        tasks = {column: None for one in group for column in others(one.finding)}
        rows = []
        for finding, flags, nearest in group:
            verdict = finding.verdict
            could = ", ".join(verdict.conformal_set) or "none of them" if verdict else ""
            sure = f"{verdict.confidence:.2f}" if verdict else ""
            near = (
                f"{_short(nearest[0].name, SHORT_NAME)} ({nearest[0].cosine:.2f})"
                if nearest
                else ""
            )
            more = [others(finding).get(column, "") for column in tasks]
            told = map(Cell, (*more, could, near, "; ".join(flags), sure))
            rows.append((self._cell(finding), *told))
        head = ("file", *tasks, "could be", "nearest known", "flags", "confidence")
        # A column in which nothing stands is left out.
        used = [k for k in range(len(head)) if k == 0 or any(row[k].text for row in rows)]
        cells = tuple(tuple(row[k] for k in used) for row in rows)
        names = tuple(head[k] for k in used)
        return Grid(names, cells, left=len(names) - (names[-1] == "confidence"))

    def _evidence(self) -> Section | None:
        found = [f for f, _, _ in self.read if f.evidence][:MAPPED]
        maps = [finding.evidence or {} for finding in found]
        text = (
            "By how much the log-odds of the verdict fall (red) or rise (blue) when a layer's "
            "update is taken away, beside the largest in its row. Layers that say the same hide "
            "each other."
        )
        names = [f"{said(finding)} · {self._label(finding)}" for finding in found]
        return _map("What verdicts rest on", names, maps, text)

    def _facts(self) -> Section | None:
        head = ("file", "base", "modules", "ranks", "scales", "warnings", "norm")
        rows = []
        for finding, _, _ in self.read:
            facts = finding.facts
            assert facts is not None
            modules = ", ".join(f"{count} of {name}" for name, count in facts.modules.items())
            kinds = (modules, ", ".join(facts.ranks), ", ".join(facts.scales))
            norm = f"{facts.norm:.3g}" if facts.norms else ""
            told = map(Cell, (facts.base, *kinds, "; ".join(facts.warnings), norm))
            rows.append((self._cell(finding, short=True), *told))
        return _table("What files are", head, rows, sum(self.bases.values()), numbers=1)

    def _norms(self) -> Section | None:
        found = [f for f, _, _ in self.read if f.facts and f.facts.norms][:MAPPED]
        maps = [_shares(finding.facts.norms) for finding in found if finding.facts]
        text = "Share of the update's squared norm, by block."
        names = [self._label(finding) for finding in found]
        return _map("Where updates are", names, maps, text)

    def _refused(self) -> Section | None:
        rows = [
            (
                self._cell(finding),
                Cell(finding.reason),
                Cell(finding.message.removeprefix(f"{finding.file}: ")),
            )
            for finding, _, _ in self.refused
        ]
        head = ("file", "reason", "what was found")
        return _table("Not read", head, rows, self.counts["not read"], anchor="not-read")


PARTLY = "read in part"
OUTCOMES = ("files", "flagged", "answered", "abstained", "no verdict", "not read")
# Where their numbers lead on a page.
LEADS = {"flagged": "flagged", "answered": "verdicts", "abstained": "verdicts"}
LEADS["not read"] = "not-read"


def outcome(finding: Finding) -> str:
    """What became of a file, one of `OUTCOMES`."""
    if finding.reason:
        return "not read"
    if finding.verdict is None:
        return "no verdict"
    return "answered" if finding.verdict.label else "abstained"


def said(finding: Finding) -> str:
    """The verdict in a word or few, or why there is none."""
    if finding.reason:
        return f"not read: {finding.reason}"
    if finding.verdict is None:
        return finding.no_prediction_reason
    return finding.verdict.label or f"abstains: {finding.verdict.reason}"


def _all_said(finding: Finding) -> str:
    """The verdict, and the predictions of other tasks behind it."""
    more = [f"{column}: {text}" for column, text in others(finding).items()]
    return "; ".join([said(finding), *more])


def _classifier(bundle: Bundle) -> Section:
    held = bundle.confidence.calibration
    data = bundle.training.get("dataset", "unknown")
    names = ", ".join(head.name for head in bundle.heads)
    tasks = f"; also predicts {names}" if names else ""
    text = (
        f"{len(bundle.classes)} classes ({', '.join(bundle.classes)}) of {bundle.base} adapters, "
        f"from {len(bundle.layers)} layers, {bundle.size_mb:.1f} MiB; trained on {data}{tasks}."
    )
    if held is None:
        return Section("The classifier", (text, "It is not calibrated, and abstains from all."))
    rows = tuple(
        (Cell(MEASURES.get(name, name)), Cell(measure_text(name, value)))
        for name, value in held.test.items()
    )
    caption = "Measured on its own test rows, which are like its training rows."
    return Section("The classifier", (text, Grid(("", "value"), rows, caption)))


def _copies(copies: Copies) -> Section | None:
    rows = [("the same", names) for names in copies.equal] + [("near", n) for n in copies.near]
    cells = [
        (
            Cell(kind),
            Cell(", ".join(_short(name, SHORT_NAME) for name in names[:NAMED])),
            Cell(f"{len(names)}"),
        )
        for kind, names in rows[:LISTED]
    ]
    return _table("Copies", ("updates are", "such as", "files"), cells, len(rows), numbers=1)


def _table(
    title: str,
    head: tuple[str, ...],
    rows: Sequence[tuple[Cell, ...]],
    total: int,
    numbers: int = 0,
    anchor: str = "",
) -> Section | None:
    if not rows:
        return None
    caption = f"The first {len(rows)} of {total}; --json has all." if total > len(rows) else ""
    return Section(title, (Grid(head, tuple(rows), caption, len(head) - numbers),), anchor)


def _map(
    title: str, names: Sequence[str], maps: Sequence[dict[str, float]], text: str
) -> Section | None:
    if not maps:
        return None
    columns = tuple(dict.fromkeys(name for values in maps for name in values))
    values = tuple(tuple(values.get(name) for name in columns) for values in maps)
    short = tuple(short_name(name) for name in columns)
    caption = f"The first {len(maps)} files." if len(maps) == MAPPED else ""
    return Section(title, (text, Heat(short, tuple(names), values, caption)))


def _shares(norms: dict[str, float]) -> dict[str, float]:
    """Squared norms by block, as shares of their sum."""
    sums: dict[str, float] = {}
    for name, norm in norms.items():
        found = BLOCK.match(name)
        block = found[0] if found else name
        sums[block] = sums.get(block, 0.0) + norm**2
    total = sum(sums.values()) or 1.0
    return {block: value / total for block, value in sums.items()}


def _common(one: tuple[str, ...], other: tuple[str, ...]) -> tuple[str, ...]:
    same = [a == b for a, b in zip(one, other, strict=False)]
    return one[: same.index(False) if False in same else len(same)]


def _short(text: str, longest: int = LONGEST_NAME) -> str:
    """The end of a long name tells more than its start."""
    text = printable(text)
    return text if len(text) <= longest else f"…{text[1 - longest :]}"


def _keep(kept: list[Reviewed], one: Reviewed, most: int) -> None:
    if len(kept) < most:
        kept.append(one)

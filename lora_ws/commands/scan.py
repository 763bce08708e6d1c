"""`lora-ws scan`: many adapter files in, verdicts, flags and a report out."""

from collections.abc import Iterator

from rich.console import Console
from rich.markup import escape

from lora_ws.audit.dedup import Copies
from lora_ws.audit.report import NAMED, Report, said
from lora_ws.audit.scan import AUTO, ScanSpec
from lora_ws.audit.triage import triage
from lora_ws.errors import printable
from lora_ws.report.grid import show

FLAGGED = 3
# Flagged files that are named on the terminal.
SHOWN = 20
# Characters of a name, which may come from a stranger's list.
LONGEST = 400
# Groups of copies of each kind that are.
GROUPS = 5


def scan(what: list[str], /, spec: ScanSpec) -> int:
    """Triage adapter files: what they are, what they learned, which are flagged, and why.

    Findings are cached by file content: an interrupted scan resumes, and a repeated one reads only
    new files. A file that cannot be read is listed with its reason. Exit code 3: at least one file
    is flagged.

    Args:
        what: files, folders, .txt lists; on the Hub owner/name, hf://owner/name/folder, or
            hub:owner; or an address such as s3://bucket/folder
        spec: how files are read, classified, flagged and reported.
    """
    found = triage(what, spec)
    shipped = spec.called if spec.model == AUTO and found.report.judged else None
    _show(found.report, found.copies, found.scan.new, shipped)
    if spec.rules and not spec.policy:
        print(f"flags are by {spec.rules}; --policy takes another")  # noqa: T201
    for file in filter(None, (spec.out, spec.json, spec.csv)):
        print(file)  # noqa: T201
    return FLAGGED if found.report.counts["flagged"] else 0


def _show(report: Report, alike: Copies | None, new: int, shipped: str | None) -> None:
    console = Console(highlight=False, soft_wrap=True)
    show(console, report.grid())
    if alike and (alike.equal or alike.near):
        console.print(f"copies: {alike.counted}")
        for line in _groups(alike):
            console.print(escape(line))
    for finding, flags, _ in report.flagged[:SHOWN]:
        verdict = "" if finding.reason else f" ({said(finding)})"
        text = f"{_cut(finding.file)}: {'; '.join(flags)}{verdict}"
        console.print(f"flagged: {escape(printable(text))}")
    if (rest := report.counts["flagged"] - SHOWN) > 0:
        console.print(f"and {rest} more; --json has all")
    if shipped:
        console.print(f"verdicts are of the shipped {shipped} model; --model none leaves them out")
    console.print(f"{new} read now, {report.counts['files'] - new} known already")


def _groups(alike: Copies) -> Iterator[str]:
    """The largest groups of copies, and some files of each."""
    for kind, groups in (("equal", alike.equal), ("near", alike.near)):
        for names in groups[:GROUPS]:
            more = ", …" if len(names) > NAMED else ""
            yield printable(f"  {kind}: {', '.join(map(_cut, names[:NAMED]))}{more}")


def _cut(name: str) -> str:
    """A name without its middle where a list has one that no file has."""
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 60]}...{name[-60:]}"

"""`lora-ws scan`: many adapter files in, verdicts, flags and a report out."""

from rich.console import Console
from rich.markup import escape

from lora_ws.audit.dedup import Copies
from lora_ws.audit.report import Report, said
from lora_ws.audit.scan import AUTO, ScanSpec
from lora_ws.audit.triage import triage
from lora_ws.errors import printable
from lora_ws.report.grid import show

FLAGGED = 3
# Flagged files that are named on the terminal.
SHOWN = 20
# Groups of copies of each kind, and files of a group, that are.
GROUPS, GROUPED = 5, 6


def scan(what: list[str], /, spec: ScanSpec) -> int:
    """Triage adapter files: what they are, what they learned, which are flagged, and why.

    What was read is kept by content: a scan that was cut off goes on, and one that is repeated
    reads what is new. A file that cannot be read is listed with its reason and stops nothing. Exit
    code 3: some are flagged.

    Args:
        what: files, folders, .txt lists, or on the Hub owner/name, hf://owner/name/folder, or
            hub:owner
        spec: how they are read, classified, flagged and reported.
    """
    found = triage(what, spec)
    shipped = spec.called if spec.model == AUTO and found.report.judged else None
    _show(found.report, found.copies, found.scan.new, shipped)
    return FLAGGED if found.report.counts["flagged"] else 0


def _show(report: Report, alike: Copies | None, new: int, shipped: str | None) -> None:
    console = Console(highlight=False, soft_wrap=True)
    show(console, report.grid())
    if alike and (alike.equal or alike.near):
        console.print(
            f"copies: {len(alike.equal)} groups of equal updates, {len(alike.near)} of near ones"
        )
        for kind, groups in (("equal", alike.equal), ("near", alike.near)):
            for names in groups[:GROUPS]:
                shown = [*names[:GROUPED], *(["…"] if len(names) > GROUPED else [])]
                console.print(f"  {kind}: {escape(printable(', '.join(shown)))}")
    for finding, flags, _ in report.flagged[:SHOWN]:
        text = f"{finding.file}: {'; '.join(flags)} ({said(finding)})"
        console.print(f"flagged: {escape(printable(text))}")
    if (rest := report.counts["flagged"] - SHOWN) > 0:
        console.print(f"and {rest} more; --json has all")
    if shipped:
        console.print(f"verdicts are of the shipped {shipped} model; --model none leaves them out")
    console.print(f"{new} read now, {report.counts['files'] - new} known already")

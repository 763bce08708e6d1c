"""`lora-ws scan`: many adapter files in, verdicts, flags and a report out."""

from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from lora_ws.audit.dedup import Copies, copies
from lora_ws.audit.output import csv_rows, json_lines
from lora_ws.audit.policy import Policy, review
from lora_ws.audit.report import Report, said
from lora_ws.audit.scan import ScanSpec, find_all, library
from lora_ws.audit.scan import scan as run
from lora_ws.bundle import Bundle
from lora_ws.bundle.hub import fetch_bundle
from lora_ws.config import load_spec
from lora_ws.errors import ConfigError
from lora_ws.report.grid import terminal
from lora_ws.report.progress import progress

FLAGGED = 3
# Flagged files that are named on the terminal.
SHOWN = 20


def scan(
    what: list[str],
    /,
    *,
    model: str | None = None,
    revision: str | None = None,
    out: Path | None = None,
    json: Path | None = None,
    csv: Path | None = None,
    policy: Path | None = None,
    index: str | None = None,
    evidence: bool = True,
    whole: bool | None = None,
    workers: int = 1,
    batch: int = 32,
    cache: Path | None = None,
) -> int:
    """Triage adapter files: what they are, what they learned, which are flagged, and why.

    What was read is kept by content: a scan that was cut off goes on, and one that is repeated
    reads what is new. A file that cannot be read is listed with its reason and stops nothing. Exit
    code 3: some are flagged.

    Args:
        what: files, folders, .txt lists, or on the Hub owner/name, hub:owner/name, hub:owner
        model: folder of a bundle, or its Hub repository; null tells of files alone
        revision: Hub revision of the bundle.
        out: HTML page to write.
        json: file of one JSON object a line to write.
        csv: table to write.
        policy: YAML file with what to flag; null flags what cannot be read.
        index: known adapters to compare with: a file, folder, list or name on the Hub as above, or
            the folder of an index
        evidence: say what each layer adds to a verdict, which takes a third more time.
        whole: read all of every file; null does so on this machine, and reads what the model needs
            of files on the Hub.
        workers: processes.
        batch: files that a process has in memory.
        cache: folder for what is known of contents; null takes scan/ in the user's cache.
    """
    rules = load_spec(Policy, policy) if policy else Policy()
    folder = _bundle_folder(model, revision) if model else None
    bundle = Bundle.load(folder) if folder else None
    rules.check(bundle.classes if bundle else (), index is not None)
    for file in (out, json, csv):
        if file and not file.absolute().parent.is_dir():
            raise ConfigError(f"{file}: there is no folder {file.parent} to write to; make it")
    places = find_all(what)
    if not places:
        raise ConfigError(f"{', '.join(what)}: expected adapter files, found none")
    spec = ScanSpec(folder, whole, evidence and bundle is not None, batch, workers, cache)
    known = library([index], spec) if index else None
    with progress("scan", len(places)) as advance:
        found = run(places, spec, advance)
    report = Report()
    with ExitStack() as stack:
        files = ((json_lines, json), (csv_rows, csv))
        sinks = [stack.enter_context(open_sink(file)) for open_sink, file in files if file]
        for one in review(found, rules, known):
            for sink in (report.add, *sinks):
                sink(one)
    signatures = found.index()
    alike = copies(signatures) if len(signatures) > 1 else None
    if out:
        title = f"Scan of {', '.join(what)}"
        page = report.page(title, bundle=bundle, copies=alike, bytes_read=found.bytes_read)
        out.write_text(page, encoding="utf-8")
    _show(report, alike, found.new)
    return FLAGGED if report.counts["flagged"] else 0


def _bundle_folder(model: str, revision: str | None) -> Path:
    return Path(model) if Path(model).is_dir() else fetch_bundle(model, revision)[0]


def _show(report: Report, alike: Copies | None, new: int) -> None:
    console = Console(highlight=False, soft_wrap=True)
    console.print(terminal(report.grid()))
    if alike and (alike.equal or alike.near):
        console.print(f"copies: {len(alike.equal)} groups the same, {len(alike.near)} near")
    for finding, flags, _ in report.flagged[:SHOWN]:
        text = f"{finding.file}: {'; '.join(flags)} ({said(finding)})"
        console.print(f"flagged: {escape(text)}")
    if (rest := report.counts["flagged"] - SHOWN) > 0:
        console.print(f"and {rest} more; --json has all")
    console.print(f"{new} read now, {report.counts['files'] - new} known already")

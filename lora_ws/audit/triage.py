"""Scan, flag and report: what `lora-ws scan` does, for Python."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from lora_ws.adapters import find_adapters
from lora_ws.adapters.locate import exists
from lora_ws.addresses import file_system, is_address
from lora_ws.audit.dedup import Copies, copies
from lora_ws.audit.output import csv_rows, json_lines, writing
from lora_ws.audit.policy import Policy, review
from lora_ws.audit.provenance import Provenance
from lora_ws.audit.report import Report
from lora_ws.audit.scan import Scan, ScanSpec, library, scan
from lora_ws.audit.sidecars import write_sidecars
from lora_ws.config import load_spec
from lora_ws.errors import ConfigError, printable
from lora_ws.report.progress import progress


class Triage(NamedTuple):
    """What a scan found.

    Attributes:
        scan: the finding of each file.
        report: what became of them, in numbers and on a page.
        copies: groups of equal and nearly equal updates; None of fewer than two that were read.
    """

    scan: Scan
    report: Report
    copies: Copies | None


def triage(what: Sequence[str], spec: ScanSpec) -> Triage:
    """Classify adapter files, flag some, and write the page, JSON lines and table asked for.

    Args:
        what: files, folders, lists and names on the Hub, as `find_adapters` takes them.
        spec: how.

    Raises:
        ConfigError: there are no files, rules that can never apply, or no folder to write to.
        DataError: another process scans in the same way.
        NotAvailableError: something on the Hub cannot be had.
    """
    file = spec.rules
    rules = load_spec(Policy, file) if file else Policy()
    model, spec = spec.called, spec.fetched()
    bundle = spec.bundle()
    made = Provenance.now(model, spec.folder, file)
    rules.check(bundle.classes if rules.classes and bundle else (), spec.index is not None)
    if (rules.deny or rules.allow) and not spec.hashes:
        raise ConfigError(
            "hashes: expected true, as the policy has a deny or allow list, got false"
        )
    for file in (spec.out, spec.json, spec.csv):
        if is_address(file):
            # What it needs is missed now, not after the scan.
            file_system(str(file))
        elif file and not Path(file).absolute().parent.is_dir():
            raise ConfigError(
                f"{file}: there is no folder {Path(file).parent} to write to; make it"
            )
    refs = find_adapters(*what)
    if not refs:
        raise ConfigError(f"{', '.join(what)}: expected adapter files, found none")
    known = library([spec.index], spec) if spec.index else None
    with progress("scan", len(refs)) as advance:
        found = scan(refs, spec, advance)
    report = Report(left_out=refs.left_out)
    with ExitStack() as stack:
        files = ((json_lines, spec.json), (csv_rows, spec.csv))
        sinks = [stack.enter_context(open_sink(file)) for open_sink, file in files if file]
        for ref, one in zip(refs, review(found, rules, known), strict=True):
            for sink in (report.add, *sinks):
                sink(one)
            if spec.sidecars and ref.path and exists(ref.path):
                write_sidecars(ref.file(), one, model)
    signatures = found.index()
    alike = copies(signatures) if len(signatures) > 1 else None
    if spec.out:
        title = printable(f"Scan of {', '.join(what)}")
        page = report.page(title, made, bundle=bundle, copies=alike, bytes_read=found.bytes_read)
        with writing(spec.out) as partial:
            partial.write_text(page, encoding="utf-8")
    return Triage(found, report, alike)

"""`lora-ws predict`: name the class of adapter files."""

import json
import sys

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lora_ws.adapters import AdapterRef
from lora_ws.audit.classify import Finding, classify_files
from lora_ws.bundle import Bundle
from lora_ws.bundle.confidence import ABSTENTIONS
from lora_ws.errors import ConfigError


def predict(
    files: list[str],
    /,
    *,
    model: str,
    top: int = 3,
    revision: str | None = None,
    as_json: bool = False,
    allow_classes: tuple[str, ...] = (),
) -> int:
    """Name the classes of adapter files with calibrated probabilities, or abstain and say why.

    A file that cannot be read is named with the reason, and the exit code is 1.

    Args:
        files: .safetensors files, PEFT folders, or hub:owner/name/file.safetensors
        model: folder of a bundle, or its Hub repository.
        top: how many classes to show.
        revision: Hub revision of the bundle.
        allow_classes: dotted paths of representations and networks outside this library that it may
            name.
        as_json: print one JSON line a file instead of a table.
    """
    if top < 1:
        raise ConfigError(f"--top: expected at least 1, got {top}")
    bundle = Bundle.from_pretrained(model, revision=revision, allow_classes=allow_classes)
    table = Table("file", "verdict", "class", "probability", box=None)
    failed, reasons = 0, set()
    for file in files:
        finding = classify_files([AdapterRef.parse(file)], bundle, whole=False)[0].finding
        assert finding is not None  # nothing is known already
        verdict = finding.verdict
        if verdict is None:
            failed += 1
            why = finding.message or f"{file}: {finding.no_prediction_reason}"
            print(f"lora-ws: {why}", file=sys.stderr)  # noqa: T201
            continue
        for said in _notes(finding):
            print(f"lora-ws: {file}: {said}", file=sys.stderr)  # noqa: T201
        if as_json:
            print(json.dumps({"file": file, **verdict.to_dict()}))  # noqa: T201
        said = verdict.label or f"abstains: {verdict.reason}"
        for rank, (name, value) in enumerate(list(verdict.probabilities.items())[:top]):
            first = (escape(file), said) if rank == 0 else ("", "")
            table.add_row(*first, name, f"{value:.3f}")
        reasons |= {verdict.reason} - {""}
    if not as_json and failed < len(files):
        console = Console(highlight=False, soft_wrap=True)
        console.print(table)
        for reason in sorted(reasons):
            console.print(f"{reason}: {ABSTENTIONS[reason]}")
    return 1 if failed else 0


def _notes(finding: Finding) -> list[str]:
    """What was done to a file to judge it, and what of it was not judged."""
    notes = []
    if finding.retained_energy is not None and finding.retained_energy < 1:
        share = 100 * finding.retained_energy
        notes.append(f"cut to the bundle's rank: {share:.1f} % of its energy is judged")
    if finding.layers_missing:
        notes.append(f"{finding.layers_missing} layers that the bundle reads are not adapted")
    if finding.modules_ignored:
        notes.append(f"{finding.modules_ignored} modules beyond it were not judged")
    return notes

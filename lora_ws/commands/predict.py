"""`lora-ws predict`: name the class of adapter files."""

import json
import sys

from rich.console import Console

from lora_ws.audit.classify import Finding
from lora_ws.audit.predict import PredictSpec, predict_files
from lora_ws.bundle.confidence import ABSTENTIONS
from lora_ws.errors import printable
from lora_ws.report.grid import Cell, Grid, show

HEAD = ("file", "verdict", "class", "probability")


def predict(files: list[str], /, spec: PredictSpec) -> int:
    """Predict the class of adapter files, with calibrated probabilities, or abstain with a reason.

    A file that cannot be read is listed with its reason, and the exit code is 1.

    Args:
        files: .safetensors files, PEFT folders, or hf://owner/name/file.safetensors on the Hub
        spec: classifier and output.
    """
    lines = list[tuple[Cell, ...]]()
    failed, reasons = 0, set()
    for file, finding in zip(files, predict_files(files, spec), strict=True):
        verdict = finding.verdict
        if verdict is None:
            failed += 1
            why = finding.message or f"{file}: {finding.no_prediction_reason}"
            print(f"lora-ws: {printable(why)}", file=sys.stderr)  # noqa: T201
            continue
        for note in _notes(finding):
            print(f"lora-ws: {printable(file)}: {note}", file=sys.stderr)  # noqa: T201
        if spec.as_json:
            print(json.dumps({"file": file, **verdict.to_dict()}))  # noqa: T201
        label = verdict.label or f"abstains: {verdict.reason}"
        for rank, (name, value) in enumerate(list(verdict.probabilities.items())[: spec.top]):
            first = (printable(file), label) if rank == 0 else ("", "")
            lines.append(tuple(map(Cell, (*first, name, f"{value:.3f}"))))
        for column, answer in verdict.answers.items():
            said = f"{column}: {answer.label or 'abstains'}"
            lines.append(tuple(map(Cell, ("", said, "", ""))))
        reasons |= {verdict.reason} - {""}
    if not spec.as_json and failed < len(files):
        console = Console(highlight=False, soft_wrap=True)
        show(console, Grid(HEAD, tuple(lines), left=3))
        for reason in sorted(reasons):
            console.print(f"{reason}: {ABSTENTIONS[reason]}")
    return 1 if failed else 0


def _notes(finding: Finding) -> list[str]:
    """Say what was done to a file to classify it, and what of it was not read."""
    notes = []
    if finding.retained_energy is not None and finding.retained_energy < 1:
        share = 100 * finding.retained_energy
        notes.append(f"cut to the bundle's rank, which keeps {share:.1f} % of its energy")
    if finding.layers_missing:
        notes.append(f"{finding.layers_missing} layers that the bundle reads are not adapted")
    if finding.modules_ignored:
        notes.append(f"{finding.modules_ignored} modules are not used: the classifier reads others")
    return notes

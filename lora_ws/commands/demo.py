"""`lora-ws demo`: what the library does, in seconds and without a file of one's own."""

import time

from rich.console import Console

from lora_ws.audit.examples import FOLDER, examples
from lora_ws.audit.predict import PredictSpec, predict_files
from lora_ws.commands.next_steps import command, show_next
from lora_ws.report.grid import Cell, Grid, show

HEAD = ("file", "trained on photos of", "verdict", "probability")


def demo() -> None:
    """Classify three adapter files that ship with the library, from their weights alone.

    They are adapters of the bundled diffusion model tiny-sd, of rows of lora-ws-mini that its
    classifier was not trained on. The last lines are commands to go on with.
    """
    console = Console(highlight=False, soft_wrap=True)
    spec, given = PredictSpec(), examples()
    bundle = spec.bundle()
    start = time.perf_counter()
    findings = predict_files([str(example.file) for example in given], spec)
    lines = list[tuple[Cell, ...]]()
    for example, finding in zip(given, findings, strict=True):
        assert finding.verdict is not None  # the files are ours
        said = finding.verdict
        label = said.label or f"abstains: {said.reason}"
        truth = f"{example.leaf} ({example.label})"
        line = (example.file.name, truth, label, f"{said.confidence:.2f}")
        lines.append(tuple(map(Cell, line)))
    seconds = time.perf_counter() - start
    console.print(
        f"Three LoRA adapters of {spec.model}, each trained on a few photos of one thing. The "
        "classifier knows neither them nor their photos, and reads their weights alone."
    )
    show(console, Grid(HEAD, tuple(lines), left=3))
    held = bundle.confidence.calibration
    assert held is not None  # so is the classifier
    silent, right = (held.test[name] or 0 for name in ("abstained", "accuracy_answered"))
    console.print(
        f"{seconds:.1f} s. Of {bundle.training['n_test']} such adapters it answers "
        f"{100 * (1 - silent):.0f} %, {100 * right:.0f} % of these correctly; guessing is right in "
        f"{100 / len(bundle.classes):.0f} %."
    )
    first = given[0].file
    steps = {
        "a verdict on any file": command("predict", first),
        "what is in it": command("inspect", first),
        "a folder of files, as a page": command(
            "scan", FOLDER, "--model", spec.model, "--out", "scan.html"
        ),
    }
    show_next(console, steps)

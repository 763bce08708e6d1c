"""`lora-ws study`: how robust a trained classifier is."""

from rich.console import Console

from lora_ws.experiments.study.spec import StudySpec


def study(name: str, /, spec: StudySpec) -> None:
    """Change test adapters step by step, and measure what trained classifiers still read.

    Args:
        name: weight-noise, noise-in-a, noise-in-b, update-noise, missing-modules, missing-parts,
            gauge, rank-padding, rescale, strength, cast, truncation, merging, or all
        spec: how.
    """
    # Here, because torch takes a second to import.
    from lora_ws.experiments.study.report import write_study
    from lora_ws.experiments.study.run import run_study
    from lora_ws.report.grid import show

    found = run_study(name, spec)
    console = Console(highlight=False, soft_wrap=True)
    page, grids = write_study(found, spec.out)
    for grid in grids:
        show(console, grid)
    console.print(f"Open {page}")

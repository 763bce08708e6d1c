"""`lora-ws study`: how robust a trained classifier is."""

from rich.console import Console

from lora_ws.experiments.study.spec import StudySpec


def study(name: str, /, spec: StudySpec) -> None:
    """Change adapters step by step, and measure what classifiers still read or learn.

    Args:
        name: weight-noise, noise-in-a, noise-in-b, update-noise, missing-modules, missing-parts,
            gauge, rank-padding, rescale, strength, cast, truncation, merging, camouflage,
            spelling; label-noise, label-confusion, leaf-noise, imbalance, few-shot, which train; or
            all
        spec: how.
    """
    # Here, because torch takes a second to import.
    from lora_ws.experiments.study.report import write_study
    from lora_ws.experiments.study.run import run_study, run_trainings
    from lora_ws.report.grid import show

    found, trained = run_study(name, spec), run_trainings(name, spec)
    console = Console(highlight=False, soft_wrap=True)
    page, grids = write_study(found, spec.out, trained)
    for grid in grids:
        show(console, grid)
    console.print(f"Open {page}")

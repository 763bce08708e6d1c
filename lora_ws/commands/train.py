"""`lora-ws train`: the main job."""

import shutil
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from lora_ws.collection import load
from lora_ws.learn.spec import ExperimentSpec

TABLE = "table.md"


def train(spec: ExperimentSpec) -> None:
    """Train and evaluate classifiers on the weights of adapters, and print the table.

    Without flags: the paper's five representations on each subset of the bundled adapters, three
    seeds each. A run that was cut off continues when the same command is given again.
    """
    console = Console(highlight=False, soft_wrap=True)
    out = spec.out or default_folder(spec)
    subsets = () if spec.subset else load(spec.dataset, revision=spec.revision).card.subsets
    for subset in subsets:
        console.print(f"\n[bold]{spec.dataset}, {subset}[/bold]")
        _train(replace(spec, subset=subset), out / subset, console)
    if not subsets:
        _train(spec, out, console)


def default_folder(spec: ExperimentSpec) -> Path:
    """`runs/<dataset>`, and the subset if one is named."""
    return Path("runs") / Path(spec.dataset).name / (spec.subset or "")


def _train(spec: ExperimentSpec, folder: Path, console: Console) -> None:
    """All representations on one collection: runs, table, and the bundle of the best."""
    # Here, because Lightning takes seconds to import: a wrong flag is answered at once.
    from lora_ws.learn.run import BUNDLE, best_run, run
    from lora_ws.report.records import summarise
    from lora_ws.report.tables import caption, results_markdown, results_terminal

    groups = {}
    for row in spec.rows():
        groups[row.name] = run(row, folder / row.name)
        accuracy = summarise(groups[row.name], "accuracy")
        console.print(
            f"{row.name}: test accuracy {100 * accuracy.mean:.1f} ± {100 * accuracy.std:.1f} % "
            f"over {len(accuracy.values)} seeds"
        )
    (folder / TABLE).write_text(results_markdown(groups) + "\n")
    best = best_run(groups)
    shutil.copytree(folder / best / BUNDLE, folder / BUNDLE, dirs_exist_ok=True)
    Console(width=max(console.width, 110)).print(results_terminal(groups))
    console.print(caption(next(iter(groups.values()))))
    console.print(f"Best on validation: {best}. Bundle: {folder / BUNDLE}")

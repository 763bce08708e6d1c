"""`lora-ws train`: the main job."""

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console

from lora_ws.collection import load
from lora_ws.learn.ranks import Ranks, join
from lora_ws.learn.spec import ExperimentSpec, slug
from lora_ws.learn.tasks import TASKS

TABLE = "table.md"


def train(spec: ExperimentSpec) -> None:
    """Train and evaluate classifiers on the weights of adapters, and print the table.

    Without flags: the paper's five representations on each subset of the bundled adapters, three
    seeds each. A run that was cut off continues when the same command is given again.
    """
    ranks = join(spec.trainer)
    console = Console(highlight=False, soft_wrap=True, quiet=ranks.rank > 0)
    out = spec.out or default_folder(spec)
    subsets = () if spec.subset else ranks.first(lambda: _subsets(spec))
    for subset in subsets:
        console.print(f"\n[bold]{spec.dataset}, {subset}[/bold]")
        _train(replace(spec, subset=subset), out / subset, console, ranks)
    if not subsets:
        _train(spec, out, console, ranks)


def default_folder(spec: ExperimentSpec) -> Path:
    """`runs/<dataset>`, and the subset if one is named."""
    return Path("runs") / Path(spec.dataset).name / (spec.subset or "")


def _subsets(spec: ExperimentSpec) -> tuple[str, ...]:
    return tuple(load(spec.dataset, revision=spec.revision).card.subsets)


def _train(spec: ExperimentSpec, folder: Path, console: Console, ranks: Ranks) -> None:
    """Run the representations; make table and bundle from all experiments the folder holds."""
    # Here, because Lightning takes seconds to import: a wrong flag is answered at once.
    from lora_ws.learn.run import run
    from lora_ws.learn.run_folder import folder_for
    from lora_ws.report.tables import headline

    rows = spec.rows()
    homes = [ranks.first(partial(folder_for, row, folder / row.slug)) for row in rows]
    for row, home in zip(rows, homes, strict=True):
        if home.name != row.slug:
            console.print(f"{row.name}: other settings than {folder / row.slug}, in {home.name}")
        records = run(row, home)
        console.print(f"{row.name}: {headline(records)}, n = {len(records)}")
    ranks.first(lambda: _report(homes[0], folder, console))


def _report(own: Path, folder: Path, console: Console) -> None:
    from lora_ws.learn.run import best_run
    from lora_ws.learn.run_folder import BUNDLE, RECORDS
    from lora_ws.report.grid import markdown, show
    from lora_ws.report.metrics import metric_of
    from lora_ws.report.records import read_records
    from lora_ws.report.tables import results_grid

    held = {file.parent: read_records(file) for file in sorted(folder.glob(f"*/{RECORDS}"))}
    first = held[own][0]
    wanted = (first.data_version, first.task, first.classes)
    same = [(path, records[0]) for path, records in held.items() if records]
    same = [(p, r) for p, r in same if (r.data_version, r.task, r.classes) == wanted]
    homes = {_label(record.name, path.name): path for path, record in same}
    groups = {name: held[path] for name, path in homes.items()}
    grid = results_grid(groups)
    (folder / TABLE).write_text(markdown(grid) + "\n", encoding="utf-8")
    show(console, grid)
    best, by = best_run(groups), metric_of(TASKS[first.task].selects).title
    bundle = homes[best] / BUNDLE
    if bundle.is_dir():
        shutil.copytree(bundle, folder / BUNDLE, dirs_exist_ok=True)
        console.print(f"Best by validation {by}: {best}. Bundle: {folder / BUNDLE}")
    else:
        console.print(f"Best by validation {by}: {best}; no bundle can hold it")


def _label(name: str, folder: str) -> str:
    """Name of a row: the experiment's, and the settings that its folder's name adds."""
    settings = folder.removeprefix(slug(name)).lstrip("-")
    return f"{name}, {settings}" if settings else name

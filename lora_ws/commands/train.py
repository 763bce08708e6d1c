"""`lora-ws train`: the main job."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console

from lora_ws.audit.examples import COLLECTION, examples
from lora_ws.collection import load
from lora_ws.commands.next_steps import command, show_next
from lora_ws.errors import ConfigError
from lora_ws.experiments.recipes import names_no_reader, readers
from lora_ws.learn.ranks import Ranks, join
from lora_ws.learn.spec import ExperimentSpec
from lora_ws.workers import processes_asked

TABLE, ALL = "table.md", "all"


def train(spec: ExperimentSpec) -> None:
    """Train and evaluate classifiers on the weights of adapters: one table and one page.

    Without flags: the paper's five representations, a kernel reader and a network over factors on
    the bundled adapters, three seeds each, in a minute or two. Runs that are finished are used
    again, and one that was cut off continues.
    """
    processes = _processes(spec)
    ranks = join(spec.trainer)
    console = Console(highlight=False, soft_wrap=True, quiet=ranks.rank > 0)
    subsets = ranks.first(lambda: _subsets(spec))
    for subset in subsets:
        what = " ".join(filter(None, [spec.dataset, subset]))
        console.print(f"[bold]{what}[/bold]: {spec.seeds} seeds a reader; finished runs are kept")
        own = replace(spec, subset=subset or None)
        _train(own, _folder(spec, subset), console, ranks, processes)
    if names_no_reader(spec):
        show_next(console, _next(spec, _folder(spec, subsets[0])))


def _folder(spec: ExperimentSpec, subset: str) -> Path:
    """`runs/<dataset>/<subset>`, or the folder asked for, where each of all has its own."""
    if spec.out is None:
        return Path("runs", Path(spec.dataset).name, subset)
    return spec.out / subset if spec.subset == ALL else spec.out


def _subsets(spec: ExperimentSpec) -> tuple[str, ...]:
    """The subset asked for, the card's main one, or each; a collection may have none."""
    if spec.subset not in (None, ALL):
        return (spec.subset,)
    card = load(spec.dataset, revision=spec.revision).card
    if spec.subset == ALL and card.subsets:
        return card.subsets
    return (card.main_subset or next(iter(card.subsets), ""),)


def _processes(spec: ExperimentSpec) -> int:
    """How many processes train a seed each; 0 where this one trains all."""
    processes, trainer = processes_asked(), spec.trainer
    if processes and trainer.world > 1:
        raise ConfigError(
            "trainer.devices x trainer.num_nodes: expected 1 with --processes or --engine ray, "
            f"which give each seed a process, got {trainer.world}; leave one of them out"
        )
    if processes and trainer.engine == "batched":
        raise ConfigError(
            "trainer.engine: expected auto or one-by-one with --processes or --engine ray, got "
            "batched, which trains all seeds in this process; leave one of them out"
        )
    return processes


def _train(
    spec: ExperimentSpec, folder: Path, console: Console, ranks: Ranks, processes: int
) -> None:
    """Run the readers; make table, page and bundle from all experiments the folder holds."""
    # Here, because Lightning takes seconds to import: a wrong flag is answered at once.
    from lora_ws.learn.run_folder import folder_for

    ranks.first(lambda: _warn_of_leaks(spec, console))
    homes, runs = dict[str, Path](), list[tuple[ExperimentSpec, Path]]()
    for title, row in ranks.first(lambda: readers(spec)).items():
        home = ranks.first(partial(folder_for, row, folder / row.slug))
        if home.name != row.slug:
            console.print(f"{title}: other settings than {folder / row.slug}, in {home.name}")
        homes[title] = home
        runs.append((row, home))
    _run(runs, processes)
    ranks.first(lambda: _report(spec, homes, folder, console))


def _run(runs: list[tuple[ExperimentSpec, Path]], processes: int) -> None:
    """Train one seed after the other, or side by side in several processes."""
    from lora_ws.learn.engine import engine_of
    from lora_ws.learn.run import run
    from lora_ws.learn.side_by_side import run_side_by_side

    # A stack of networks trains all seeds at once already.
    spread = [one for one in runs if processes and engine_of(one[0]) == "one-by-one"]
    run_side_by_side(spread, processes)
    for spec, home in runs:
        if (spec, home) not in spread:
            run(spec, home)


def _warn_of_leaks(spec: ExperimentSpec, console: Console) -> None:
    """Say what test and training rows share, by the columns that the card names."""
    from lora_ws.learn.features import open_data, split_rows
    from lora_ws.learn.leaks import shared_columns

    adapters, _ = open_data(spec)
    if not adapters.card.group_columns:
        return
    for one in shared_columns(adapters, split_rows(adapters, spec)):
        if one.verdict == "leak":
            console.print(
                f"[yellow]{one.what}[/yellow]: {one.found}; {one.advice} keeps them apart"
            )


def _report(
    spec: ExperimentSpec, homes: Mapping[str, Path], folder: Path, console: Console
) -> None:
    from lora_ws.experiments.comparison import Comparison, write_page
    from lora_ws.learn.run_folder import BUNDLE
    from lora_ws.report.grid import markdown, show
    from lora_ws.report.metrics import metric_of

    runs = Comparison.of(spec, homes, folder)
    (folder / TABLE).write_text(markdown(runs.grid) + "\n", encoding="utf-8")
    show(console, runs.grid)
    by = metric_of(runs.spec.kind.selects).title
    bundle = runs.homes[runs.best] / BUNDLE
    if bundle.is_dir():
        shutil.copytree(bundle, folder / BUNDLE, dirs_exist_ok=True)
        console.print(f"Best by validation {by}: {runs.best}. Bundle: {folder / BUNDLE}")
    else:
        console.print(f"Best by validation {by}: {runs.best}; no bundle can hold it")
    console.print(f"Open {write_page(runs)}")


def _next(spec: ExperimentSpec, folder: Path) -> dict[str, str]:
    """What to type next, by what it does."""
    own = spec.dataset == COLLECTION
    data = [] if own else ["--dataset", spec.dataset]
    data += ["--subset", spec.subset] if spec.subset else []
    data += ["--out", str(spec.out)] if spec.out else []
    file = examples()[0].file if own else "my_lora.safetensors"
    other = ("train", *data, "--featurizer", "DeltaPCA", "--model", "LogisticRegression")
    steps = {
        "judge a file": command("predict", file, "--model", folder / "bundle"),
        "one more reader in the same table": command(*other),
        "every reader on five questions": command("reproduce", "readers"),
    }
    if own and spec.subset != ALL:
        del steps["every reader on five questions"]
        steps["the other starts and prompts"] = command("train", "--subset", ALL)
    return steps

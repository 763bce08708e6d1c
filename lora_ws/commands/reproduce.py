"""`lora-ws reproduce` and `lora-ws sweep`: the paper's tables and figures, and what layers tell."""

from importlib import import_module
from pathlib import Path
from typing import Literal

from rich.console import Console

from lora_ws.config import load_spec, nearest
from lora_ws.errors import ConfigError
from lora_ws.experiments.spec import PROTOCOLS, SweepSpec, cores, eval_file
from lora_ws.learn.spec import slug

# Experiments on pictures: class of the specification, and what runs it.
PICTURES = {
    "attribution": ("AttributionSpec", "run_attribution"),
    "cad": ("CadSpec", "run_cad"),
    "composition": ("CompositionSpec", "run_composition"),
}


def reproduce(
    what: str,
    /,
    *,
    dataset: str | None = None,
    subset: str | None = None,
    protocol: Literal["clean", "paper", "as-run", "all"] | None = None,
    seeds: int | None = None,
    processes: int | None = None,
    controls: bool = True,
    rows: tuple[str, ...] | None = None,
    out: Path | None = None,
) -> None:
    """Run a table or figure and report it beside the published numbers.

    A run that was cut off continues when the same command is given again.

    Args:
        what: table1, table2, figure2, figure3, or all of these; composition, attribution or cad,
            which take --out alone
        dataset: a collection instead of the bundled one, such as lora-ws-10k
        subset: a subset of it; null takes the card's first
        protocol: how data are split and models chosen; null takes all three for tables and clean
            for figures
        seeds: how many instead of the recipes' ten
        processes: how many work at once; null takes one a core
        controls: also measure plain inputs, other prompts, unseen leaves and shuffled labels
        rows: some rows of a table, such as '["FlatVec"]'; null takes all
        out: folder of runs and reports; null makes one below runs/
    """
    # Here, because Lightning takes seconds to import: a wrong flag is answered at once.
    from lora_ws.experiments.reproduce import NAMES, Options
    from lora_ws.experiments.reproduce import reproduce as run

    console = Console(highlight=False, soft_wrap=True)
    if what in PICTURES:
        folder = _pictures(what, out or Path("runs", "reproduce", what))
        console.print(f"{what}: {folder / 'report.html'}")
        return
    if what not in (*NAMES, "all"):
        raise ConfigError(f"no table or figure `{what}`{nearest(what, (*NAMES, *PICTURES))}")
    names = NAMES if what == "all" else (what,)
    protocols = (protocol,) if protocol and protocol != "all" else PROTOCOLS
    home = out or Path("runs", "reproduce", slug(dataset or "bundled"), subset or "")
    for name in names:
        options = Options(
            out=home,
            dataset=dataset,
            subset=subset,
            protocols=protocols,
            seeds=seeds,
            processes=cores(processes),
            controls=controls,
            rows=rows,
        )
        folder = run(name, options)
        console.print(f"{name}: {folder / 'report.html'}")


def _pictures(what: str, out: Path) -> Path:
    """An experiment on what a diffusion model draws."""
    spec, run = PICTURES[what]
    # Needs the `diffusion` extra.
    home = import_module(f"lora_ws.experiments.{what}")
    return getattr(home, run)(load_spec(getattr(home, spec), eval_file(what)), out)


def sweep(spec: SweepSpec) -> None:
    """Train the same classifier on each layer, on each matrix, or without the best layers."""
    from lora_ws.experiments.sweep import run_sweep, sweep_chart, sweep_grid, write_csv
    from lora_ws.report.grid import terminal

    subset = spec.subset or ""
    folder = spec.out or Path("runs", "sweep", Path(spec.dataset).name, subset, spec.slug)
    points = run_sweep(spec, folder)
    console = Console(highlight=False, soft_wrap=True)
    grid = sweep_grid(points, spec.top)
    console.print(terminal(grid), grid.caption, sep="\n")
    chart = sweep_chart(points, spec.over, folder / f"{spec.over}.png")
    console.print(f"{chart}, {write_csv(points, folder / f'{spec.over}.csv')}")

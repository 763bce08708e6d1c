"""`lora-ws reproduce`: files of `eval/`; `lora-ws sweep`: accuracy per layer or matrix."""

from pathlib import Path
from typing import Literal

from rich.console import Console

from lora_ws.errors import ConfigError
from lora_ws.experiments.kinds import kind_of, run_eval, trained
from lora_ws.experiments.layers.spec import SweepSpec
from lora_ws.experiments.options import Options
from lora_ws.experiments.recipes import PROTOCOLS, cores
from lora_ws.learn.spec import slug

ALL = "all"


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
    draws: int = 0,
    size: str | None = None,
    out: Path | None = None,
) -> None:
    """Run a table, figure or experiment of `eval/` and report it beside the published numbers.

    A run that was cut off continues when the same command is given again.

    Args:
        what: name of a file in eval/, such as table1; all runs every table and figure that trains
            classifiers. Experiments that draw images, such as composition, take --out alone
        dataset: a collection instead of the bundled one, such as lora-ws-10k
        subset: a subset of it; null takes the card's first
        protocol: how data are split and models chosen; null takes all three for tables and clean
            for figures
        seeds: how many instead of the recipes' ten
        processes: how many work at once; null takes one per core
        controls: also measure plain inputs, other prompts, unseen leaves and shuffled labels
        rows: some rows of a table, such as '["FlatVec"]'; null takes all
        draws: of `readers`, how many learning rates and weight decays every network tries; the
            validation rows choose
        size: of `readers`, a budget of parameters such as 1.3M; null takes the recipes' networks
        out: folder of runs and reports; null makes one below runs/
    """
    trains = what == ALL or kind_of(what).trains
    asked = {"dataset": dataset, "subset": subset, "protocol": protocol, "seeds": seeds}
    asked |= {"processes": processes, "controls": None if controls else False, "rows": rows}
    asked |= {"draws": draws or None, "size": size}
    given = [name for name, value in asked.items() if value is not None]
    if given and not trains:
        raise ConfigError(f"{given[0]}: `{what}` draws images and takes --out alone")
    home = Path("runs", "reproduce")
    home = home / slug(dataset or "bundled") / (subset or "") if trains else home / what
    console = Console(highlight=False, soft_wrap=True)
    for name in trained() if what == ALL else [what]:
        options = Options(
            name,
            out or home,
            dataset=dataset,
            subset=subset,
            protocols=(protocol,) if protocol and protocol != "all" else PROTOCOLS,
            seeds=seeds,
            processes=cores(processes),
            controls=controls,
            rows=rows,
            draws=draws,
            size=size,
        )
        console.print(f"{name}: {run_eval(options) / 'report.html'}")


def sweep(spec: SweepSpec) -> None:
    """Train the same classifier on each layer, on each matrix, or without the best layers."""
    from lora_ws.experiments.layers.report import sweep_chart, sweep_grid, write_csv
    from lora_ws.experiments.layers.sweep import run_sweep
    from lora_ws.report.grid import show

    subset = spec.subset or ""
    folder = spec.out or Path("runs", "sweep", Path(spec.dataset).name, subset, spec.slug)
    points = run_sweep(spec, folder)
    console = Console(highlight=False, soft_wrap=True)
    grid = sweep_grid(points, spec.top)
    show(console, grid)
    chart = sweep_chart(points, spec.over, folder / f"{spec.over}.png")
    console.print(f"{chart}, {write_csv(points, folder / f'{spec.over}.csv')}")

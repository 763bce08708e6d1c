"""`lora-ws reproduce`: files of `eval/`; `lora-ws sweep`: accuracy per layer or matrix."""

from pathlib import Path

from rich.console import Console

from lora_ws.errors import ConfigError
from lora_ws.experiments.kinds import TRAINS, kind_of, load_eval, run_eval, trained
from lora_ws.experiments.layers.spec import SweepSpec
from lora_ws.experiments.options import Options, ReproduceSpec
from lora_ws.learn.spec import slug

ALL = "all"


def reproduce(what: str, /, flags: ReproduceSpec) -> None:
    """Run a table, figure or experiment of `eval/` and report it beside the published numbers.

    The expected time is printed before a run starts. An interrupted run resumes when the same
    command is run again.

    Args:
        what: name of a file in eval/, such as table1; all runs every table and figure that trains
            classifiers on a collection. transfer builds its zoos first, and takes --zoos, --photos,
            --processes, --rows and --out; experiments that generate images, such as composition,
            only take --out
        flags: settings.
    """
    taken = TRAINS if what == ALL else kind_of(what).flags
    if foreign := [name for name in flags.changed if name not in taken]:
        known = ", ".join(f"--{name}" for name in (*taken, "out"))
        raise ConfigError(f"{foreign[0]}: expected one of the flags of `{what}`, which are {known}")
    trains = "dataset" in taken
    home = Path("runs", "reproduce")
    home = home / slug(flags.dataset or "bundled") / (flags.subset or "") if trains else home / what
    console = Console(highlight=False, soft_wrap=True)
    names = trained() if what == ALL else [what]
    for name in names:
        console.print(f"{name}: {load_eval(name)[1].cost}")
    for name in names:
        report = run_eval(Options(name, flags.out or home, flags)) / "report.html"
        console.print(f"{name}: {report}")


def sweep(spec: SweepSpec) -> None:
    """Train the same classifier on each layer, on each matrix, or without the best layers."""
    from lora_ws.experiments.layers.report import sweep_grid, sweep_section
    from lora_ws.experiments.layers.sweep import run_sweep, sweep_folder
    from lora_ws.report.grid import show
    from lora_ws.report.page import to_page

    dataset, subset = Path(spec.dataset).name, spec.subset or ""
    home = spec.out or Path("runs", "sweep", dataset, subset, spec.slug)
    folder = sweep_folder(spec, home)
    console = Console(highlight=False, soft_wrap=True)
    if folder != home:
        console.print(f"other settings than {home}, in {folder.name}")
    points = run_sweep(spec, folder)
    show(console, sweep_grid(points, spec.top))
    section = sweep_section(spec.over, points, spec.top, folder)
    page, table = (folder / f"{spec.over}.{kind}" for kind in ("html", "csv"))
    page.write_text(to_page(f"Sweep of {dataset} {subset}".strip(), [section]), encoding="utf-8")
    console.print(f"{page}, {table}")

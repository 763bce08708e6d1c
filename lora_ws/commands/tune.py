"""`lora-ws tune`: hyper-parameters by Optuna."""

from pathlib import Path

from rich.console import Console

from lora_ws.learn.tune_spec import TuneSpec

# Trials that are listed.
SHOWN = 5


def tune(spec: TuneSpec) -> None:
    """Search hyper-parameters with Optuna on the validation rows, then run and test the best.

    A search that was cut off, or is asked for more trials, goes on.
    """
    import optuna  # noqa: F401  a missing extra is said before Lightning is loaded

    from lora_ws.learn.tune import tune as search
    from lora_ws.report.grid import Cell, Grid, show
    from lora_ws.report.metrics import metric_of
    from lora_ws.report.tables import headline

    out = spec.out or Path("runs", "tune", Path(spec.dataset).name, spec.subset or "", spec.slug)
    found = search(spec, out)
    tried = [(t.value, t.user_attrs) for t in found.study.trials if t.value is not None]
    best = sorted(tried, key=lambda one: -one[0])[:SHOWN]
    keys = tuple(spec.search)
    metric = metric_of(spec.kind.selects)
    shown = [f"{100 * quality:.2f}" if metric.percent else f"{quality:.4g}" for quality, _ in best]
    rows = [
        (*(Cell(values[key]) for key in keys), Cell(text))
        for (_, values), text in zip(best, shown, strict=True)
    ]
    console = Console(highlight=False, soft_wrap=True)
    caption = f"The best of {len(tried)} trials, mean of {spec.seeds} seeds."
    show(console, Grid((*keys, f"validation {metric.title}"), tuple(rows), caption, left=len(keys)))
    console.print(f"{found.spec.name}: {headline(found.records)}, n = {len(found.records)}")
    console.print(f"The run: {found.folder}. Its recipe: {found.folder / 'config.yaml'}")

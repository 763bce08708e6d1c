"""Measure every sweep of a figure of layers."""

from dataclasses import replace
from pathlib import Path

from lora_ws.config import load_spec
from lora_ws.experiments import report
from lora_ws.experiments.layers.report import layers_section
from lora_ws.experiments.layers.spec import LayersSpec, SweepSpec
from lora_ws.experiments.layers.sweep import run_sweep
from lora_ws.experiments.options import Options
from lora_ws.experiments.recipes import recipe_file
from lora_ws.experiments.trials import Trial
from lora_ws.report.modules import short_name
from lora_ws.report.records import RunRecord


def run(spec: LayersSpec, options: Options) -> Path:
    """Measure what is not measured yet, and report.

    Returns:
        The folder of the report.
    """
    home, sections = options.run_folder(options.name), []
    trials: list[Trial] = []
    compared: dict[str, list[RunRecord]] = {}
    for over, name in spec.recipes.items():
        sweep = load_spec(SweepSpec, recipe_file(name))
        sweep = replace(
            sweep,
            dataset=options.flags.dataset or spec.dataset,
            subset=options.flags.subset,
            seeds=sweep.seeds if options.flags.seeds is None else options.flags.seeds,
            processes=options.processes,
        )
        points = run_sweep(sweep, home)
        sections.append(layers_section(spec, over, points, sweep.top, options.folder))
        trials += [Trial(sweep, home / over / point.name) for point in points]
        compared = compared or {short_name(point.name): point.records for point in points}
    return report.write(options, spec, sections, trials, compared)

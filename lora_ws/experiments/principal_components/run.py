"""Measure a representation at every number of principal components."""

from pathlib import Path

from lora_ws.experiments import report
from lora_ws.experiments.options import Options
from lora_ws.experiments.principal_components.report import components_section
from lora_ws.experiments.principal_components.spec import PrincipalComponentsSpec
from lora_ws.experiments.trials import Trial, first_records, run_trials, why_missing


def run(spec: PrincipalComponentsSpec, options: Options) -> Path:
    """Measure what is not measured yet, and report.

    Returns:
        The folder of the report.
    """
    protocol = options.protocols[0]
    name = spec.recipes.get(protocol) or spec.recipes["clean"]
    own, home = options.spec(name, spec.dataset), options.run_folder(name)
    folders = {k: home / f"k{k}" for k in spec.components}
    if protocol == "as-run":
        # Batches of an incremental fit depend on K, so every K is fitted as the script does.
        trials = [Trial(own.vary(n_components=k), folder) for k, folder in folders.items()]
    else:
        trials = [Trial(own, home, components=spec.components)]
    run_trials(trials, options.processes, options.name)
    records = {k: first_records(folder, own.seeds) for k, folder in folders.items()}
    missing = {k: why_missing(folder) for k, folder in folders.items()}
    section = components_section(spec, records, missing, options.folder)
    trials = [Trial(own, folder) for folder in folders.values()]
    compared = {f"K = {k}": found for k, found in records.items() if found}
    return report.write(options, spec, [section], trials, compared)

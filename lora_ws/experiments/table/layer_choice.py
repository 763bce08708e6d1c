"""Choose a single layer per row without the reported rows; nested cross-validation; ROC."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from lora_ws import journal
from lora_ws.experiments.recipes import Protocol
from lora_ws.experiments.trials import Trial, run_trials
from lora_ws.learn.features import open_data
from lora_ws.learn.run_folder import CURVES
from lora_ws.learn.spec import ExperimentSpec, slug
from lora_ws.report.charts import chart_detection
from lora_ws.report.grid import Cell, Grid
from lora_ws.report.page import Figure, Section
from lora_ws.report.records import RunRecord, Summary, summarise

# For the choice of a layer; with 64 layers, ten would cost more than all the rest.
CHOICE_SEEDS = 1
FOLDS = 5

Plan = Mapping[Protocol, Mapping[str, Trial]]


def choose_layers(
    plan: Plan, processes: int, nested: Sequence[str]
) -> tuple[dict[Protocol, dict[str, Trial]], list[Section]]:
    """Put into every row's experiment the layer whose validation loss is lowest.

    Where a protocol validates on the rows it reports (`paper`), so does its choice. Experiments
    that cannot be limited to a layer (`as-run`) stay as they are.

    Returns:
        The new plan, and sections that say which layers were chosen and what choosing costs.
    """
    every = [
        trial for rows in plan.values() for trial in rows.values() if trial.spec.takes_matrices
    ]
    layers = _layer_names(every[0].spec)
    choices = {
        trial.folder: {layer: _trial(trial, layer, "layers") for layer in layers} for trial in every
    }
    run_trials([t for found in choices.values() for t in found.values()], processes, "layers")
    chosen: dict[Protocol, dict[str, Trial]] = {}
    table = []
    for protocol, rows in plan.items():
        chosen[protocol] = {}
        for name, trial in rows.items():
            if trial.folder not in choices:
                chosen[protocol][name] = trial
                continue
            best = _best({x: t.records() for x, t in choices[trial.folder].items()})
            spec = replace(trial.spec, matrices=(best,))
            chosen[protocol][name] = replace(trial, spec=spec, folder=trial.folder / "chosen")
            table.append((Cell(f"{name}, {protocol}"), Cell(best)))
    grid = Grid(
        ("Row", "Layer"),
        tuple(table),
        f"The layer (A and B) of the lowest validation loss among {len(layers)}, {CHOICE_SEEDS} "
        "seed each. In the paper's protocol the validation rows are the reported ones.",
    )
    sections = [Section("The chosen layers", (grid,))]
    wanted = {name: trial for name, trial in plan.get("clean", {}).items() if name in nested}
    if wanted:
        sections += _nested(wanted, layers, processes)
    return chosen, sections


def detection_sections(plan: Plan, folder: Path) -> list[Section]:
    """ROC and precision/recall curves of every row of the first protocol."""
    rows = next(iter(plan.values()))
    scores = {}
    for name, trial in rows.items():
        lines = [line for line in journal.read(trial.folder / CURVES) if "scores" in line]
        if lines:
            scores[name] = [(np.array(x["truth"]), np.array(x["scores"])) for x in lines]
    if not scores:
        return []
    chart = chart_detection(scores, folder / "detection.png", title="Detection")
    return [
        Section(
            "Curves",
            (Figure(chart, "ROC, and precision over recall, on the test rows: mean ± deviation."),),
        )
    ]


def _nested(rows: Mapping[str, Trial], layers: list[str], processes: int) -> list[Section]:
    """Choose the layer inside each of five folds, so that no reported row has a say."""
    plan = {
        name: [
            {layer: _trial(trial, layer, f"fold-{k}", f"fold-{k}-of-{FOLDS}") for layer in layers}
            for k in range(FOLDS)
        ]
        for name, trial in rows.items()
    }
    trials = [t for folds in plan.values() for fold in folds for t in fold.values()]
    run_trials(trials, processes, "nested cross-validation")
    cells = []
    for name, folds in plan.items():
        honest, peeked = [], []
        for fold in folds:
            records = {layer: trial.records() for layer, trial in fold.items()}
            tested = {layer: summarise(r, "accuracy").mean for layer, r in records.items()}
            honest.append(tested[_best(records)])
            peeked.append(max(tested.values()))
        cells.append(
            (Cell(name), Cell(Summary.of(honest).percent()), Cell(Summary.of(peeked).percent()))
        )
    grid = Grid(
        ("Representation", "chosen on validation rows", "chosen on the reported rows"),
        tuple(cells),
        f"Test accuracy in percent, mean ± sample standard deviation over {FOLDS} folds, each "
        f"adapter tested once, {CHOICE_SEEDS} seed per fold and layer. The right column takes the "
        "best of all layers by the very rows it reports: the difference is what that inflates.",
    )
    return [Section("Nested cross-validation", (grid,))]


def _trial(trial: Trial, layer: str, place: str, split: str | None = None) -> Trial:
    """A row's experiment on one layer."""
    split = split or trial.spec.split
    spec = replace(trial.spec, matrices=(layer,), seeds=CHOICE_SEEDS, split=split)
    return Trial(spec, trial.folder / place / slug(layer))


def _best(records: Mapping[str, list[RunRecord]]) -> str:
    """The layer of the lowest mean validation loss."""
    return min(records, key=lambda layer: np.mean([r.val_loss for r in records[layer]]))


def _layer_names(spec: ExperimentSpec) -> list[str]:
    return [layer.name for layer in open_data(spec)[0].layout.layers]

"""Figures as PNG: curves of a training, confusion and reliability of a classifier."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lora_ws.functional.calibrate import Reliability
from lora_ws.report.drawing import look, save
from lora_ws.report.metrics import metric_of


def plot_curves(
    histories: Sequence[Sequence[dict[str, float]]],
    best_epochs: Sequence[int],
    path: Path,
    *,
    title: str,
) -> None:
    """Plot the loss and what stands beside it by epoch, a line per seed; marks are epochs kept.

    Args:
        histories: of each seed, an entry per epoch.
        best_epochs: the epoch kept of each.
        path: where the PNG goes.
        title: says which experiment, and of how many rows.
    """
    quality = next(k for k in histories[0][0] if k.startswith("val_") and k != "val_loss")
    name = quality.removeprefix("val_")
    top = 1 if metric_of(name).percent else None
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _curves(left, histories, "train_loss", "training", 0)
    _curves(left, histories, "val_loss", "validation", 1, best_epochs)
    _curves(right, histories, quality, "validation", 1, best_epochs)
    figure.suptitle(title)
    left.set(xlabel="epoch", ylabel="loss")
    right.set(xlabel="epoch", ylabel=name, ylim=(0, top))
    for axes in (left, right):
        axes.legend(frameon=False)
    save(figure, path, vector=False)


def plot_confusion(
    confusion: Sequence[Sequence[int]], classes: Sequence[str], path: Path, *, seeds: int = 1
) -> None:
    """Share of each true class (row) that was predicted as each class (column).

    Args:
        confusion: counts; of several seeds, their sum.
        classes: names.
        path: where the PNG goes.
        seeds: how many are summed, which share their test rows.
    """
    counts = np.asarray(confusion)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size = max(4, 2.6 + 0.42 * len(classes))
    figure = Figure(figsize=(size + 0.8, size), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    for (row, column), count in np.ndenumerate(counts):
        if count:
            color = "white" if shares[row, column] > 0.55 else "black"
            axes.text(column, row, str(count), ha="center", va="center", color=color, fontsize=8)
    ticks = range(len(classes))
    axes.set_xticks(ticks, classes, rotation=45, ha="right")
    axes.set_yticks(ticks, classes)
    of_seeds = f", sum of {seeds} seeds" if seeds > 1 else ""
    figure.suptitle(f"Confusion, n = {counts.sum() // seeds} test rows{of_seeds}")
    axes.set(xlabel="predicted", ylabel="true")
    figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8)
    save(figure, path, vector=False)


def plot_reliability(tables: Mapping[str, Reliability], path: Path) -> None:
    """How often the named class is right by how sure the classifier is; the diagonal is honest.

    Bars are standard errors of the shares; areas of the points and the bars below say how many rows
    are in a bin.

    Args:
        tables: reliability by what the probabilities are, such as before and after calibration.
        path: where the PNG goes.
    """
    figure = Figure(figsize=(4.6, 5.2), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    above.plot((0, 1), (0, 1), color="0.6", linestyle=":", label="perfectly calibrated")
    for number, (name, table) in enumerate(tables.items()):
        some, total = table.counts > 0, table.counts.sum()
        color, marker, _ = look(number)
        label = f"{name}: error {100 * table.error:.1f} %"
        x, y, counts = table.confidence[some], table.accuracy[some], table.counts[some]
        above.errorbar(x, y, np.sqrt(y * (1 - y) / counts), color=color, alpha=0.5, capsize=2)
        style = {"color": color, "marker": marker, "alpha": 0.6, "linewidths": 0, "label": label}
        above.scatter(x, y, s=8 + 300 * counts / total, **style)
        shares, width = table.counts / total, np.diff(table.edges) / (len(tables) + 0.5)
        below.bar(table.edges[:-1] + number * width, shares, width, align="edge", color=color)
    rows = next(iter(tables.values())).counts.sum()
    figure.suptitle(f"Reliability, n = {rows} rows")
    above.set(ylabel="accuracy", xlim=(0, 1), ylim=(-0.02, 1.02))
    below.set(xlabel="probability of the predicted class", ylabel="share of rows")
    legend = above.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1))
    for handle in legend.legend_handles[1:]:
        handle.set_sizes([40])  # type: ignore[union-attr]
    save(figure, path, vector=False)


def _curves(
    axes: Axes,
    histories: Sequence[Sequence[dict[str, float]]],
    key: str,
    label: str,
    number: int,
    best_epochs: Sequence[int] = (),
) -> None:
    color, marker, line = look(number)
    style = {"color": color, "linestyle": line, "alpha": 0.6, "linewidth": 1.2}
    for k, history in enumerate(histories):
        points = {entry["epoch"]: entry[key] for entry in history if key in entry}
        axes.plot(*zip(*points.items(), strict=True), label="" if k else label, **style)
        if best_epochs:
            kept, name = best_epochs[k], "" if k else "epoch kept"
            axes.plot(kept, points[kept], marker, color=color, markersize=5, label=name)

"""Charts that compare experiments: bars, curves with bands, layers, maps. Each as PNG and SVG."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLORS = ("#3b6fb6", "#e08a2e", "#3f9b6c", "#b9475b", "#7d62a8", "#5d6b78")


def chart_bars(
    groups: Mapping[str, Mapping[str, tuple[float, float]]],
    file: Path,
    *,
    chance: float,
    ylabel: str = "test accuracy, percent",
) -> Path:
    """Bars with error bars: one cluster per name, one colour per series.

    Args:
        groups: series -> name -> (mean, standard deviation) in percent.
        file: PNG to write; the SVG stands beside it.
        chance: where a dotted line marks guessing, in percent.
        ylabel: what the bars measure.
    """
    names = list(dict.fromkeys(name for values in groups.values() for name in values))
    figure = Figure(figsize=(1.8 + 1.35 * len(names), 3.8), layout="constrained")
    axes, width = figure.subplots(), 0.8 / len(groups)
    for k, (series, values) in enumerate(groups.items()):
        at = [names.index(name) + (k - (len(groups) - 1) / 2) * width for name in values]
        means, stds = zip(*values.values(), strict=True)
        color = COLORS[k % len(COLORS)]
        axes.bar(at, means, width * 0.92, yerr=stds, color=color, label=series, capsize=2)
    axes.axhline(chance, color="0.4", linestyle=":", label="largest class")
    axes.set_xticks(range(len(names)), names, rotation=20, ha="right")
    axes.set(ylabel=ylabel, ylim=(0, 100))
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return _save(figure, file)


def chart_dots(
    series: Mapping[str, Mapping[str, tuple[float, float]]],
    file: Path,
    *,
    chance: float,
    xlabel: str,
) -> Path:
    """One line of dots per name, one colour per series: many names, a few questions to each.

    Args:
        series: series -> name -> (mean, standard deviation) in percent.
        file: PNG to write; the SVG stands beside it.
        chance: where a dotted line marks guessing, in percent.
        xlabel: what the dots measure.
    """
    names = list(dict.fromkeys(name for values in series.values() for name in values))
    figure = Figure(figsize=(8.5, 1.6 + 0.3 * len(names)), layout="constrained")
    axes, step = figure.subplots(), 0.6 / len(series)
    for k, (title, values) in enumerate(series.items()):
        at = [names.index(name) + (k - (len(series) - 1) / 2) * step for name in values]
        means, stds = zip(*values.values(), strict=True)
        color = COLORS[k % len(COLORS)]
        axes.errorbar(means, at, xerr=stds, fmt="o", ms=4, color=color, label=title, lw=1)
    axes.axvline(chance, color="0.4", linestyle=":", label="largest class")
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel=xlabel, xlim=(0, 100), ylim=(len(names) - 0.5, -0.5))
    axes.grid(axis="y", color="0.92")
    axes.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)
    return _save(figure, file)


def chart_shares(shares: Mapping[str, float], file: Path, xlabel: str) -> Path:
    """One horizontal bar per name, with its number, in percent.

    Args:
        shares: name -> percent.
        file: PNG to write; the SVG stands beside it.
        xlabel: what the bars measure.
    """
    figure = Figure(figsize=(7, 0.7 + 0.35 * len(shares)), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(list(shares), list(shares.values()), 0.7, color=COLORS[0])
    axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=9)
    axes.set(xlabel=xlabel, xlim=(0, 105))
    axes.invert_yaxis()
    return _save(figure, file)


def chart_curves(curves: Mapping[str, Sequence[Sequence[Mapping[str, float]]]], file: Path) -> Path:
    """Learning curves: mean and range over seeds of validation loss and accuracy by epoch.

    Args:
        curves: experiment -> one history of epochs per seed.
        file: PNG to write; the SVG stands beside it.
    """
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    panels = zip(figure.subplots(1, 2), ("val_loss", "val_accuracy"), strict=True)
    for axes, key in panels:
        for k, (name, seeds) in enumerate(curves.items()):
            longest = max(len(history) for history in seeds)
            table = np.full((len(seeds), longest), np.nan)
            for row, history in zip(table, seeds, strict=True):
                row[: len(history)] = [entry[key] for entry in history]
            _band(axes, table, COLORS[k % len(COLORS)], name)
        axes.set(xlabel="epoch", ylabel=f"validation {key.partition('_')[2]}")
        axes.spines[["top", "right"]].set_visible(False)
        # The loss of what overfits leaves the picture, or nothing else could be seen.
        if key == "val_loss":
            axes.set_ylim(0, 2 * np.nanmedian([h[0][key] for s in curves.values() for h in s]))
    figure.axes[1].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return _save(figure, file)


def chart_layers(
    names: Sequence[str],
    values: Mapping[str, Sequence[tuple[float, float]]],
    file: Path,
    *,
    chance: float | None,
    ylabel: str = "accuracy, percent",
    ylim: tuple[float, float] | None = (0, 100),
) -> Path:
    """A metric of each layer or matrix, coloured by self- or cross-attention, q or v.

    Args:
        names: of layers or matrices, in order.
        values: part ("test", "validation") -> (mean, standard deviation) of each.
        file: PNG to write; the SVG stands beside it.
        chance: where a dotted line marks guessing; None draws none.
        ylabel: what is plotted.
        ylim: of the axis; None takes what the values need.
    """
    figure = Figure(figsize=(min(17, max(9, 0.16 * len(names) + 3)), 4.6), layout="constrained")
    axes = figure.subplots()
    kinds = [layer_kind(name) for name in names]
    means, stds = np.array(values["test"]).T
    for k, kind in enumerate(dict.fromkeys(sorted(kinds))):
        at = [i for i, other in enumerate(kinds) if other == kind]
        axes.bar(at, means[at], 0.8, yerr=stds[at], color=COLORS[k], label=kind, capsize=1)
    val = [mean for mean, _ in values["validation"]]
    axes.plot(range(len(names)), val, ".", color="black", markersize=4, label="validation")
    _guess(axes, chance, "largest class")
    blocks = [name.partition(".attentions")[0] for name in names]
    starts = [i for i, block in enumerate(blocks) if i == 0 or block != blocks[i - 1]]
    for start in starts[1:]:
        axes.axvline(start - 0.5, color="0.85", zorder=0)
    middles = [(a + b - 1) / 2 for a, b in zip(starts, [*starts[1:], len(names)], strict=True)]
    axes.set_xticks(middles, [blocks[start] for start in starts], fontsize=8)
    axes.tick_params(axis="x", length=0)
    axes.set(ylabel=ylabel, ylim=ylim, xlim=(-1, len(names)))
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper left")
    return _save(figure, file)


def layer_kind(name: str) -> str:
    """``cross-attention v``, ``self-attention q`` and so on, by the module's path."""
    kinds = {"attn1": "self-attention", "attn2": "cross-attention"}
    where = next((kind for part, kind in kinds.items() if part in name), "")
    what = {"to_q": "q", "to_v": "v", "to_k": "k", "to_out": "out"}
    kind = next((short for part, short in what.items() if part in name), "")
    return f"{where} {kind}".strip()


def chart_lines(
    values: Mapping[str, Mapping[int, tuple[float, float]]],
    file: Path,
    *,
    chance: float | None,
    xlabel: str,
    ylabel: str = "accuracy, percent",
    ylim: tuple[float, float] | None = (0, 100),
    guess: str = "largest class",
) -> Path:
    """A metric over a number on a logarithmic axis, with bands of a standard deviation.

    Args:
        values: series -> number -> (mean, standard deviation).
        file: PNG to write; the SVG stands beside it.
        chance: where a dotted line marks guessing; None draws none.
        xlabel: what the number is.
        ylabel: what is plotted.
        ylim: of the axis; None takes what the values need.
        guess: what the dotted line is.
    """
    figure = Figure(figsize=(7.2, 4), layout="constrained")
    axes = figure.subplots()
    for k, (series, points) in enumerate(values.items()):
        x = np.array(list(points))
        mean, std = np.array(list(points.values())).T
        axes.plot(x, mean, "o-", color=COLORS[k], label=series, markersize=4)
        axes.fill_between(x, mean - std, mean + std, color=COLORS[k], alpha=0.15, linewidth=0)
    _guess(axes, chance, guess)
    axes.set(xscale="log", xlabel=xlabel, ylabel=ylabel, ylim=ylim)
    ticks = sorted({x for points in values.values() for x in points})
    axes.set_xticks(ticks, [str(t) for t in ticks], rotation=45)
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return _save(figure, file)


def chart_trade(
    series: Mapping[str, Sequence[tuple[float, float]]], file: Path, xlabel: str, ylabel: str
) -> Path:
    """Trade-off between cost and quality: one line per series, from 0 to 1 upwards.

    Args:
        series: name -> points (paid, kept).
        file: PNG to write; the SVG stands beside it.
        xlabel: what is paid.
        ylabel: what is kept.
    """
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for k, (name, points) in enumerate(series.items()):
        axes.plot(*zip(*points, strict=True), "o-", color=COLORS[k], label=name, markersize=4)
    axes.set(xlabel=xlabel, ylabel=ylabel, ylim=(0, 1.03))
    axes.legend(frameon=False, fontsize=8)
    return _save(figure, file)


def chart_map(
    points: Float[np.ndarray, "rows 2"],
    labels: Int[np.ndarray, " rows"],
    classes: Sequence[str],
    file: Path,
) -> Path:
    """Adapters as dots in a plane, coloured by class."""
    from matplotlib import colormaps

    figure = Figure(figsize=(6.8, 5), layout="constrained")
    axes, palette = figure.subplots(), colormaps["tab10" if len(classes) <= 10 else "tab20"]
    for k, name in enumerate(classes):
        here = points[labels == k]
        axes.scatter(*here.T, s=14, color=palette(k % palette.N), label=name, linewidths=0)
    axes.set_axis_off()
    axes.set_aspect("equal", "datalim")
    if len(classes) <= 20:
        axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return _save(figure, file)


def chart_detection(
    scores: Mapping[str, Sequence[tuple[np.ndarray, np.ndarray]]], file: Path
) -> Path:
    """ROC and precision over recall of a two-class detector: one line per seed, one colour per row.

    Args:
        scores: row -> for each seed the truth (0 or 1) and the score of class 1.
        file: PNG to write; the SVG stands beside it.
    """
    from sklearn.metrics import precision_recall_curve, roc_curve

    figure = Figure(figsize=(10, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for k, (name, seeds) in enumerate(scores.items()):
        for j, (truth, score) in enumerate(seeds):
            style = {"color": COLORS[k % len(COLORS)], "alpha": 0.45, "linewidth": 1.2}
            label = name if j == 0 else None
            falses, trues, _ = roc_curve(truth, score)
            left.plot(falses, trues, label=label, **style)
            precision, recall, _ = precision_recall_curve(truth, score)
            right.step(recall, precision, where="post", **style)
    left.plot([0, 1], [0, 1], ":", color="0.5")
    left.set(xlabel="false positive rate", ylabel="true positive rate", title="ROC")
    right.set(xlabel="recall", ylabel="precision", ylim=(0, 1.02), title="precision and recall")
    legend = figure.legend(frameon=False, fontsize=8, loc="outside right upper")
    for line in legend.get_lines():
        line.set_alpha(1)
    return _save(figure, file)


def _guess(axes: Axes, chance: float | None, label: str) -> None:
    if chance is not None:
        axes.axhline(chance, color="0.4", linestyle=":", label=label)


def _band(axes: Axes, table: np.ndarray, color: str, label: str) -> None:
    # A seed that has stopped counts no more; where few are left the mean says little.
    enough = np.isfinite(table).sum(0) * 2 >= len(table)
    table = table[:, enough]
    epochs = np.arange(1, table.shape[1] + 1)
    axes.plot(epochs, np.nanmean(table, 0), color=color, label=label)
    low, high = np.nanmin(table, 0), np.nanmax(table, 0)
    axes.fill_between(epochs, low, high, color=color, alpha=0.15, linewidth=0)


def _save(figure: Figure, file: Path) -> Path:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)
    figure.savefig(file.with_suffix(".svg"), metadata={"Date": None})
    return file

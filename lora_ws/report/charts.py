"""Charts that compare experiments: bars, curves with bands, layers, maps. Each as PNG and SVG."""

import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lora_ws.report.drawing import COLORS, look, plot_chance, roomy, save
from lora_ws.report.modules import layer_kind, short_name


def chart_bars(
    groups: Mapping[str, Mapping[str, tuple[float, float]]],
    file: Path,
    *,
    title: str,
    chance: float,
    ylabel: str = "test accuracy, percent",
) -> Path:
    """Bars with error bars: one cluster per name, one colour per series.

    Args:
        groups: series -> name -> (mean, standard deviation) in percent.
        file: PNG to write; the SVG stands beside it.
        title: says of how many seeds.
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
    plot_chance(axes, chance, "largest class")
    axes.set_xticks(range(len(names)), names, rotation=20, ha="right")
    _, top = roomy([pair for values in groups.values() for pair in values.values()], chance)
    axes.set(title=title, ylabel=ylabel, ylim=(0, top))
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    return save(figure, file)


def chart_dots(
    series: Mapping[str, Mapping[str, tuple[float, float]]],
    file: Path,
    *,
    title: str,
    chance: float,
    xlabel: str,
) -> Path:
    """One line of dots per name, one colour per series: many names, a few questions to each.

    Args:
        series: series -> name -> (mean, standard deviation) in percent.
        file: PNG to write; the SVG stands beside it.
        title: says of how many seeds.
        chance: where a dotted line marks guessing, in percent.
        xlabel: what the dots measure.
    """
    names = list(dict.fromkeys(name for values in series.values() for name in values))
    figure = Figure(figsize=(8.5, 1.6 + 0.3 * len(names)), layout="constrained")
    axes, step = figure.subplots(), 0.6 / len(series)
    for k, (name, values) in enumerate(series.items()):
        at = [names.index(one) + (k - (len(series) - 1) / 2) * step for one in values]
        _dots(axes, at, list(values.values()), k, name)
    plot_chance(axes, chance, "largest class", upright=True)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel=xlabel, ylim=(len(names) - 0.5, -0.5))
    axes.set_xlim(roomy([pair for v in series.values() for pair in v.values()], chance))
    axes.grid(axis="y", color="0.92")
    figure.suptitle(title)
    figure.legend(frameon=False, fontsize=9, loc="outside lower center", ncols=3)
    return save(figure, file)


def chart_shares(shares: Mapping[str, float], file: Path, *, title: str, xlabel: str) -> Path:
    """One horizontal bar per name, with its number, in percent.

    Args:
        shares: name -> percent.
        file: PNG to write; the SVG stands beside it.
        title: says of how many seeds.
        xlabel: what the bars measure.
    """
    figure = Figure(figsize=(7, 0.7 + 0.35 * len(shares)), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(list(shares), list(shares.values()), 0.7, color=look(0).color)
    axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=9)
    axes.set(title=title, xlabel=xlabel, xlim=(0, 1.12 * max(shares.values())))
    axes.invert_yaxis()
    return save(figure, file)


def chart_curves(
    curves: Mapping[str, Sequence[Sequence[Mapping[str, float]]]], file: Path, *, title: str
) -> Path:
    """Learning curves: mean and range over seeds of validation loss and accuracy by epoch.

    Args:
        curves: experiment -> one history of epochs per seed.
        file: PNG to write; the SVG stands beside it.
        title: says of how many seeds.
    """
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    panels = zip(figure.subplots(1, 2), ("val_loss", "val_accuracy"), strict=True)
    for axes, key in panels:
        for k, (name, seeds) in enumerate(curves.items()):
            longest = max(len(history) for history in seeds)
            table = np.full((len(seeds), longest), np.nan)
            for row, history in zip(table, seeds, strict=True):
                row[: len(history)] = [entry[key] for entry in history]
            _band(axes, table, k, name)
        axes.set(xlabel="epoch", ylabel=f"validation {key.partition('_')[2]}")
        # The loss of what overfits leaves the image, or nothing else could be seen.
        if key == "val_loss":
            axes.set_ylim(0, 2 * np.nanmedian([h[0][key] for s in curves.values() for h in s]))
    figure.suptitle(title)
    figure.legend(
        *figure.axes[1].get_legend_handles_labels(),
        frameon=False,
        fontsize=9,
        loc="outside lower center",
        ncols=4,
    )
    return save(figure, file)


def chart_layers(
    values: Mapping[str, tuple[float, float]],
    file: Path,
    *,
    title: str,
    chance: float | None,
    xlabel: str = "accuracy, percent",
) -> Path:
    """A metric of each layer or matrix: a line per block, a mark per kind, a panel per side.

    Args:
        values: layer or matrix -> (mean, standard deviation).
        file: PNG to write; the SVG stands beside it.
        title: says of how many seeds.
        chance: where a dotted line marks guessing; None draws none.
        xlabel: what is plotted.
    """
    places = {name: _place(name) for name in values}
    sides = list(dict.fromkeys(side for _, _, side in places.values()))
    blocks = list(dict.fromkeys(block for block, _, _ in places.values()))
    kinds = sorted({kind for _, kind, _ in places.values()})
    size = (1.8 + 4.4 * len(sides), 1.8 + 0.36 * len(blocks))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(sides), sharex=True, sharey=True, squeeze=False)[0]
    for axes, side in zip(panels, sides, strict=True):
        for k, kind in enumerate(kinds):
            own = {n: p[0] for n, p in places.items() if p[1:] == (kind, side)}
            step = 0.7 * (k / max(len(kinds) - 1, 1) - 0.5)
            at = [blocks.index(block) + step for block in own.values()]
            if own:
                _dots(axes, at, [values[name] for name in own], k, kind)
        plot_chance(axes, chance, "largest class", upright=True)
        axes.set(xlabel=xlabel, title=side)
        for edge in range(1, len(blocks)):
            axes.axhline(edge - 0.5, color="0.9", lw=0.8, zorder=0)
    panels[0].set_yticks(range(len(blocks)), blocks)
    panels[0].set(ylim=(len(blocks) - 0.5, -0.5), xlim=roomy(list(values.values()), chance))
    figure.suptitle(title)
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        frameon=False,
        fontsize=9,
        loc="outside lower center",
        ncols=3,
    )
    return save(figure, file)


def _place(name: str) -> tuple[str, str, str]:
    """Block, kind and side of a layer or matrix.

    Example:
        >>> _place("down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q.up")
        ('down.0.1.0', 'self-attention q', 'B')
    """
    layer, end = re.fullmatch(r"(.*?)(?:\.(down|up))?", name).groups()  # type: ignore[union-attr]
    side = {"down": "A", "up": "B", None: ""}[end]
    found = re.match(r"(.*?)\.(attn\d.*)|(.*\.\d+)\.(.*)", layer)
    block, rest = [one for one in found.groups() if one] if found else ("", layer)
    return short_name(block), layer_kind(layer) or rest, side


def chart_lines(
    values: Mapping[str, Mapping[int, tuple[float, float]] | Mapping[float, tuple[float, float]]],
    file: Path,
    *,
    title: str,
    chance: float | None,
    xlabel: str,
    ylabel: str = "accuracy, percent",
    guess: str = "largest class",
) -> Path:
    """A metric over a number on a logarithmic axis with a place for 0, with standard deviations.

    Args:
        values: series -> number -> (mean, standard deviation).
        file: PNG to write; the SVG stands beside it.
        title: says of how many seeds.
        chance: where a dotted line marks guessing; None draws none.
        xlabel: what the number is.
        ylabel: what is plotted.
        guess: what the dotted line is.
    """
    figure = Figure(figsize=(7.2, 4), layout="constrained")
    axes = figure.subplots()
    for k, (series, points) in enumerate(values.items()):
        mean, std = np.array(list(points.values())).T
        color, marker, line = look(k)
        axes.errorbar(
            list(points), mean, yerr=std, fmt=marker + line, color=color, label=series, ms=4,
            capsize=2,
        )  # fmt: skip
    plot_chance(axes, chance, guess)
    # Beside a legend of long names the axis is narrow.
    axes.set(title=title, xlabel=textwrap.fill(xlabel, 48), ylabel=ylabel)
    axes.set_ylim(roomy([pair for points in values.values() for pair in points.values()], chance))
    ticks = sorted({x for points in values.values() for x in points})
    if ticks[0] > 0:
        axes.set_xscale("log")
    else:
        axes.set_xscale("symlog", linthresh=next(x for x in ticks if x > 0), linscale=0.3)
    axes.set_xticks(ticks, [f"{t:.9g}" for t in ticks], rotation=45)
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    return save(figure, file)


def chart_tables(
    tables: Mapping[str, Sequence[Sequence[float | None]]],
    rows: Sequence[str],
    columns: Sequence[str],
    file: Path,
    *,
    title: str,
    ylabel: str,
    xlabel: str,
) -> Path:
    """Percentages as heat maps side by side, of one scale from 0 to 100.

    Args:
        tables: title -> a number for each row and column; None where there is none.
        rows: their names.
        columns: their names.
        file: PNG to write; the SVG stands beside it.
        title: says what the numbers are.
        ylabel: what the rows are.
        xlabel: what the columns are.
    """
    wide = min(3, len(tables))
    deep = -(-len(tables) // wide)
    # Panels hold their titles, and the page the longest name of a row.
    panel = max(0.55 * len(columns), 0.085 * max(map(len, tables)))
    across = 0.8 + 0.09 * max(map(len, rows)) + wide * (0.2 + panel)
    size = (max(across, 0.1 * len(title)), 1.3 + deep * (0.5 + 0.36 * len(rows)))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(deep, wide, squeeze=False, sharex=True, sharey=True)
    for axes in grid.flat[len(tables) :]:
        axes.set_visible(False)
    for axes, (name, table) in zip(grid.flat, tables.items(), strict=False):
        values = np.array([[np.nan if v is None else v for v in row] for row in table], float)
        axes.imshow(values, vmin=0, vmax=100, cmap="Blues", aspect="auto")
        for (row, column), value in np.ndenumerate(values):
            text = "–" if np.isnan(value) else f"{value:.0f}"
            color = "white" if value > 55 else "black"
            axes.text(column, row, text, ha="center", va="center", color=color, fontsize=10)
        axes.set_title(name, fontsize=10)
        tilt = {"rotation": 30, "ha": "right"} if max(map(len, columns)) > 8 else {}
        axes.set_xticks(range(len(columns)), columns, **tilt)
        axes.set_yticks(range(len(rows)), rows)
    figure.suptitle(title)
    figure.supxlabel(xlabel, fontsize=10)
    figure.supylabel(ylabel, fontsize=10)
    return save(figure, file)


def chart_trade(
    series: Mapping[str, Sequence[tuple[float, float, float]]],
    file: Path,
    *,
    title: str,
    xlabel: str,
    ylabel: str,
) -> Path:
    """Trade-off between cost and quality: one line per series, from 0 to 1 upwards.

    Args:
        series: name -> points (paid, kept, its error; 0 draws none).
        file: PNG to write; the SVG stands beside it.
        title: says of how many images.
        xlabel: what is paid.
        ylabel: what is kept.
    """
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for k, (name, points) in enumerate(series.items()):
        paid, kept, error = zip(*points, strict=True)
        color, marker, line = look(k)
        axes.errorbar(
            paid, kept, error, fmt=marker + line, color=color, label=name, ms=4, capsize=2
        )
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel, ylim=(0, 1.03))
    axes.legend(frameon=False, fontsize=9)
    return save(figure, file)


def chart_map(
    points: Float[np.ndarray, "rows 2"],
    labels: Int[np.ndarray, " rows"],
    classes: Sequence[str],
    file: Path,
    *,
    title: str,
) -> Path:
    """Adapters as marks in a plane, a colour and a mark per class."""
    figure = Figure(figsize=(6.8, 5), layout="constrained")
    axes = figure.subplots()
    for k, name in enumerate(classes):
        color, marker, _ = look(k)
        here = points[labels == k]
        axes.scatter(*here.T, s=16, color=color, marker=marker, label=name, linewidths=0, alpha=0.8)
    axes.set_axis_off()
    axes.set_aspect("equal", "datalim")
    axes.set_title(f"{title}, n = {len(points)}")
    if len(classes) <= 28:
        axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    return save(figure, file)


def chart_detection(
    scores: Mapping[str, Sequence[tuple[np.ndarray, np.ndarray]]], file: Path, *, title: str
) -> Path:
    """ROC and precision over recall of a two-class detector: mean and deviation over seeds.

    Args:
        scores: row -> for each seed the truth (0 or 1) and the score of class 1.
        file: PNG to write; the SVG stands beside it.
        title: says of what.
    """
    from sklearn.metrics import precision_recall_curve, roc_auc_score, roc_curve

    figure = Figure(figsize=(10, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    grid, seeds = np.linspace(0, 1, 201), max(map(len, scores.values()))
    for k, (name, drawn) in enumerate(scores.items()):
        trues = [np.interp(grid, *roc_curve(truth, score)[:2]) for truth, score in drawn]
        curves = [precision_recall_curve(truth, score)[:2] for truth, score in drawn]
        # Of equal recall the highest precision; recalls fall along a curve.
        precisions = [np.interp(grid, recall[::-1], p[::-1]) for p, recall in curves]
        areas = [roc_auc_score(truth, score) for truth, score in drawn]
        label = f"{name}: AUROC {np.mean(areas):.2f} ± {np.std(areas, ddof=len(areas) > 1):.2f}"
        _ribbon(left, grid, np.stack(trues), k, label)
        _ribbon(right, grid, np.stack(precisions), k, name)
    truth = next(iter(scores.values()))[0][0]
    left.plot([0, 1], [0, 1], ":", color="0.4")
    plot_chance(right, float(np.mean(truth)), "")
    left.set(xlabel="false positive rate", ylabel="true positive rate", title="ROC")
    right.set(xlabel="recall", ylabel="precision", ylim=(0, 1.02), title="precision and recall")
    figure.suptitle(f"{title}; {len(truth)} test rows, up to {seeds} seeds; dotted: guessing")
    handles = left.get_legend_handles_labels()
    figure.legend(*handles, frameon=False, fontsize=9, loc="outside lower center", ncols=2)
    return save(figure, file)


def _ribbon(axes: Axes, x: np.ndarray, table: np.ndarray, k: int, label: str) -> None:
    """The mean of curves, and a band of a standard deviation, as the k-th series."""
    mean, std = table.mean(0), table.std(0, ddof=len(table) > 1)
    color, _, line = look(k)
    axes.plot(x, mean, color=color, linestyle=line, label=label)
    axes.fill_between(x, mean - std, mean + std, color=color, alpha=0.12, linewidth=0)


def _dots(
    axes: Axes, at: Sequence[float], values: Sequence[tuple[float, float]], k: int, label: str
) -> None:
    """Means at heights, with their deviations, as the k-th series."""
    means, stds = zip(*values, strict=True)
    color, marker, _ = look(k)
    axes.errorbar(
        means, at, xerr=stds, fmt=marker, ms=4, color=color, label=label, lw=1, capsize=1.5
    )


def _band(axes: Axes, table: np.ndarray, k: int, label: str) -> None:
    # A seed that has stopped counts no more; where few are left the mean says little.
    enough = np.isfinite(table).sum(0) * 2 >= len(table)
    table = table[:, enough]
    epochs = np.arange(1, table.shape[1] + 1)
    color, _, linestyle = look(k)
    axes.plot(epochs, np.nanmean(table, 0), color=color, linestyle=linestyle, label=label)
    low, high = np.nanmin(table, 0), np.nanmax(table, 0)
    axes.fill_between(epochs, low, high, color=color, alpha=0.15, linewidth=0)

"""Charts: nothing is cut off, all is named, sizes can be read, colours can be told apart."""

import colorsys
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from lora_ws.functional.calibrate import expected_calibration_error
from lora_ws.report import charts, plots
from lora_ws.report.drawing import COLORS, look

RNG = np.random.default_rng(0)
BLOCKS = [
    f"{side}_blocks.{k}.attentions.0.transformer_blocks.0"
    for side in ("down", "up")
    for k in (0, 1)
]
MATRICES = [
    f"{b}.{a}.to_{x}.{s}"
    for b in BLOCKS
    for a in ("attn1", "attn2")
    for x in "qv"
    for s in ("down", "up")
]
LONG = ["StatsLayerDense > MLP", "UpdateKernel of attn2.to_v > SVC", "FlatVec"]
HISTORY = [
    {"epoch": k, "train_loss": 3.0 / k, "val_loss": 2.0 / k, "val_accuracy": 0.1 * k}
    for k in (1, 2, 3)
]
SURE = RNG.dirichlet((1, 1), 50)
TRUTH = np.array([0, 1, 1, 0, 1])


def scored(seeds: int) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(TRUTH, RNG.random(5)) for _ in range(seeds)]


# What each is given besides the file; all have a title.
CHARTS: dict[str, Callable[[Path], object]] = {
    "layers": lambda file: charts.chart_layers(
        dict.fromkeys(MATRICES, (20.0, 3.0)), file, title="10 seeds", chance=10.0
    ),
    "bars": lambda file: charts.chart_bars(
        {"clean": dict.fromkeys(LONG, (50.0, 3.0))}, file, title="10 seeds", chance=10.0
    ),
    "dots": lambda file: charts.chart_dots(
        {"a": dict.fromkeys(LONG, (50.0, 3.0))}, file, title="n = 3", chance=1.0, xlabel="x"
    ),
    "shares": lambda file: charts.chart_shares(
        dict.fromkeys(LONG, 33.3), file, title="one", xlabel="x"
    ),
    "curves": lambda file: charts.chart_curves(
        {n: [HISTORY] * 2 for n in LONG}, file, title="2 seeds"
    ),
    "lines": lambda file: charts.chart_lines(
        {"test": {5: (1.0, 0.1), 200: (2.0, 0.0)}}, file, title="2 seeds", chance=None, xlabel="K"
    ),
    "lines from nothing": lambda file: charts.chart_lines(
        {n: {0: (2.0, 0.1), 0.1: (1.5, 0.1), 0.4: (1.0, 0.0)} for n in LONG},
        file,
        title="2 seeds",
        chance=None,
        xlabel="share of leaf classes of which all training and validation labels are wrong",
    ),
    "trade": lambda file: charts.chart_trade(
        {"a": [(1.0, 0.2, 0.1), (2.0, 0.4, 0.0)]}, file, title="n = 2", xlabel="x", ylabel="y"
    ),
    "map": lambda file: charts.chart_map(
        RNG.random((20, 2)), np.arange(20) % 10, list("abcdefghij"), file, title="All"
    ),
    "detection": lambda file: charts.chart_detection({"a": scored(2)}, file, title="All"),
    "history": lambda file: plots.plot_curves([HISTORY] * 2, [1, 2], file, title="seeds"),
    "confusion": lambda file: plots.plot_confusion([[3, 1], [0, 4]], LONG[:2], file, seeds=2),
    "reliability": lambda file: plots.plot_reliability(
        {"softmax": expected_calibration_error(SURE, RNG.integers(0, 2, 50))}, file
    ),
}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Figure]:
    """Draw a chart, and hand over what would be written."""
    kept: list[Figure] = []

    def save(figure: Figure, file: Path, **_: object) -> Path:
        kept.append(figure)
        return file

    for module in (charts, plots):
        monkeypatch.setattr(module, "save", save)

    def draw(name: str) -> Figure:
        CHARTS[name](tmp_path / "a.png")
        (figure,) = kept
        FigureCanvasAgg(figure).draw()
        return figure

    return draw


@pytest.mark.slow
@pytest.mark.parametrize("name", CHARTS)
def test_all_is_named_and_nothing_is_cut_off(name: str, drawn: Callable[[str], Figure]) -> None:
    figure = drawn(name)
    texts = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip()]
    assert figure.get_suptitle() or any(axes.get_title() for axes in figure.axes)
    assert min(text.get_fontsize() for text in texts) >= 8
    shown, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert min(shown.x0, shown.y0) > -0.01
    assert shown.x1 < width + 0.01
    assert shown.y1 < height + 0.01


@pytest.mark.slow
def test_layers_have_a_line_a_block_and_a_panel_a_side(drawn: Callable[[str], Figure]) -> None:
    left, right = drawn("layers").axes
    assert [label.get_text() for label in left.get_yticklabels()] == [
        "down.0.0.0",
        "down.1.0.0",
        "up.0.0.0",
        "up.1.0.0",
    ]
    assert (left.get_title(), right.get_title()) == ("A", "B")
    kinds = {"self-attention q", "self-attention v", "cross-attention q", "cross-attention v"}
    assert kinds < set(left.get_legend_handles_labels()[1])
    # The axis is that of the values, not of all that there could be.
    assert left.get_xlim()[1] < 30


def seen(color: str, matrix: np.ndarray) -> np.ndarray:
    rgb = np.array([int(color[k : k + 2], 16) / 255 for k in (1, 3, 5)])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    shown = np.clip(matrix @ linear, 0, 1)
    return np.where(shown <= 0.0031308, 12.92 * shown, 1.055 * shown ** (1 / 2.4) - 0.055)


# G. Machado et al., A Physiologically-based Model for Simulation of Color Vision Deficiency, 2009.
EYES = {
    "all": np.eye(3),
    "protanopia": np.reshape(
        [
            0.152286,
            1.052583,
            -0.204868,
            0.114503,
            0.786281,
            0.099216,
            -0.003882,
            -0.048116,
            1.051998,
        ],
        (3, 3),
    ),
    "deuteranopia": np.reshape(
        [
            0.367322,
            0.860646,
            -0.227968,
            0.280085,
            0.672501,
            0.047413,
            -0.011820,
            0.042940,
            0.968881,
        ],
        (3, 3),
    ),
    "tritanopia": np.reshape(
        [
            1.255528,
            -0.076749,
            -0.178779,
            -0.078411,
            0.930809,
            0.147602,
            0.004733,
            0.691367,
            0.303900,
        ],
        (3, 3),
    ),
}


@pytest.mark.parametrize("eyes", EYES)
def test_colours_differ_for_all_eyes(eyes: str) -> None:
    shown = [seen(color, EYES[eyes]) for color in COLORS]
    assert min(np.abs(a - b).max() for a, b in combinations(shown, 2)) > 0.1


def test_no_two_of_many_series_look_alike() -> None:
    assert len({look(k) for k in range(28)}) == 28
    assert all(colorsys.rgb_to_hls(*seen(c, np.eye(3)))[1] < 0.75 for c in COLORS), "on white"


@pytest.mark.slow
def test_levels_are_seen_in_their_order_nothing_among_them(drawn: Callable[[str], Figure]) -> None:
    (axes,) = drawn("lines from nothing").axes
    places = axes.transAxes.inverted().transform(
        axes.transData.transform([(level, 1.0) for level in (0, 0.1, 0.4)])
    )[:, 0]
    assert (np.diff(places) > 0.05).all()
    assert places.min() > 0
    assert places.max() < 1

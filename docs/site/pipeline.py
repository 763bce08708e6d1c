"""Draw docs/images/pipeline.png, the first image of README: from an adapter file to a verdict.

Numbers in it are real: a shipped file, one of its layers, and what the shipped bundle predicts.
"""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyBboxPatch

from lora_ws import Bundle, read_adapter
from lora_ws.audit.examples import examples
from lora_ws.bundle.hub import SHIPPED

OUT = Path(__file__).parents[1] / "images" / "pipeline.png"
LAYER = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
INK, MUTED, BLUE, PALE = "#1f2328", "#59636e", "#0072b2", "#eaf2f8"
WIDTH, HEIGHT = 8.4, 2.5  # inches; README shows it at about 100 pixels per inch
TITLES = (0.95, 3.02, 5.25, 7.4)


def draw(out: Path = OUT) -> None:
    """Draw the four steps from left to right.

    Args:
        out: PNG to write.
    """
    file = examples()[1].file
    adapter = read_adapter(file)
    bundle = Bundle.load(SHIPPED / "tiny-sd")
    figure = plt.figure(figsize=(WIDTH, HEIGHT), dpi=200, facecolor="white")
    page = figure.add_axes((0, 0, 1, 1))
    page.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
    page.axis("off")
    names = ("1  adapter file", "2  factors", "3  representation\nor network", "4  verdict")
    for x, name in zip(TITLES, names, strict=True):
        page.text(x, 2.22, name, ha="center", va="center", size=10, weight="bold", color=INK)
    _file(page, file.name, f"{len(adapter.layout.layers)} layers, rank 1", adapter.flat().size)
    _factors(page, figure, adapter)
    _readers(page)
    _verdict(page, bundle.predict(adapter))
    for start, end in ((1.72, 1.98), (4.05, 4.31), (6.2, 6.46)):
        page.annotate(
            "",
            (end, 1.15),
            (start, 1.15),
            arrowprops={"arrowstyle": "-|>", "color": INK, "lw": 1.6},
        )
    figure.savefig(out, metadata={"Software": ""})
    plt.close(figure)


def _box(page: Any, x: float, y: float, width: float, height: float) -> None:
    style = "round,pad=0,rounding_size=0.06"
    page.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, fc=PALE, ec=BLUE, lw=1))


def _file(page: Any, name: str, layers: str, numbers: int) -> None:
    _box(page, 0.2, 0.55, 1.5, 1.2)
    lines = (
        (1.47, name, 8.5, INK),
        (1.12, layers, 8, MUTED),
        (0.82, f"{numbers} numbers", 8, MUTED),
    )
    for y, text, size, color in lines:
        page.text(0.95, y, text, ha="center", va="center", size=size, color=color)
    page.text(0.95, 0.28, "no image is generated", ha="center", size=8, style="italic", color=MUTED)


def _factors(page: Any, figure: Any, adapter: Any) -> None:
    """The two vectors of a layer, and the update that they make."""
    module = adapter.linear[LAYER]
    most = 24  # numbers of each vector that can be told apart at this size
    b, a = module.up[:most], module.down[:, :most]
    places = ((2.08, 0.6, 0.11, 1.1, b), (2.32, 1.79, 1.1, 0.11, a), (2.32, 0.6, 1.1, 1.1, b @ a))
    for x, y, width, height, matrix in places:
        part = figure.add_axes((x / WIDTH, y / HEIGHT, width / WIDTH, height / HEIGHT))
        top = np.abs(matrix).max()
        part.imshow(matrix, cmap="RdBu", vmin=-top, vmax=top, aspect="auto")
        part.set(xticks=[], yticks=[])
    page.text(2.13, 0.44, "B", ha="center", va="center", size=9, color=INK)
    page.text(3.5, 1.84, "A", ha="left", va="center", size=9, color=INK)
    page.text(3.5, 1.15, "ΔW\n= B·A", ha="left", va="center", size=9, color=INK)
    page.text(2.95, 0.28, "of every layer", ha="center", size=8, style="italic", color=MUTED)


def _readers(page: Any) -> None:
    for y, name, kinds in (
        (1.2, "statistics, PCA, kernels", "StatsLayer, UpdateKernel"),
        (0.55, "networks over factors", "DeepSets, SignNet, W2T"),
    ):
        _box(page, 4.4, y, 1.75, 0.55)
        page.text(5.275, y + 0.37, name, ha="center", va="center", size=8.5, color=INK)
        page.text(5.275, y + 0.16, kinds, ha="center", va="center", size=7.5, color=MUTED)
    page.text(
        5.275, 0.28, "trained on other adapters", ha="center", size=8, style="italic", color=MUTED
    )


def _verdict(page: Any, probabilities: dict[str, float]) -> None:
    best = sorted(probabilities.items(), key=lambda pair: -pair[1])[:3]
    for k, (name, probability) in enumerate(best):
        y = 1.6 - 0.36 * k
        page.barh(y, 0.75 * probability, height=0.2, left=7.25, color=BLUE if k == 0 else "#9fb8c9")
        page.text(7.18, y, name, ha="right", va="center", size=8.5, color=INK)
        text = f"{probability:.2f}"
        page.text(7.3 + 0.75 * probability, y, text, ha="left", va="center", size=8.5, color=INK)
    page.text(
        7.4, 0.28, "calibrated, or it abstains", ha="center", size=8, style="italic", color=MUTED
    )


if __name__ == "__main__":
    draw()

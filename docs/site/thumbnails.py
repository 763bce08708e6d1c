"""Cut the small images of README's table of tasks out of real outputs; run it after they change.

Each is a part of a committed image: a report's figure, a page, a grid of images.
"""

from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageOps

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "images" / "tasks"
SIZE = (240, 150)  # pixels, shown at half of it


class Cut(NamedTuple):
    """A part of an image: left, top, right and bottom as shares of its width and height."""

    source: str
    box: tuple[float, float, float, float]


CUTS = {
    "classify": Cut("eval/results/table1/confusion.png", (0.0, 0.03, 0.9, 0.66)),
    "triage": Cut("docs/images/scan.png", (0.02, 0.01, 0.66, 0.253)),
    "search": Cut("eval/results/table1/map.png", (0.08, 0.15, 0.83, 0.8)),
    "compose": Cut("docs/images/composed.png", (0.29, 0.0, 0.76, 0.5)),
    "attribute": Cut("docs/images/attributed.png", (0.338, 0.333, 1.0, 1.0)),
    "edit": Cut("eval/results/cad/three.png", (0.3, 0.168, 0.55, 0.333)),
}


def cut(name: str) -> Image.Image:
    """The thumbnail of a task."""
    source, shares = CUTS[name]
    whole = Image.open(ROOT / source).convert("RGB")
    left, top, right, bottom = shares
    wide, high = whole.size
    part = whole.crop(
        (round(left * wide), round(top * high), round(right * wide), round(bottom * high))
    )
    return ImageOps.fit(part, SIZE, Image.Resampling.LANCZOS, centering=(0.5, 0.0))


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for task in CUTS:
        cut(task).quantize(48).save(FOLDER / f"{task}.png", optimize=True)

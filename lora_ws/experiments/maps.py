"""Maps of adapters: who lies near whom, by what a classifier makes of them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from lora_ws.report.charts import chart_map

# Thousands of rows more would only hide each other.
MOST_ROWS = 2000


def map_rows(count: int) -> Int[np.ndarray, " rows"]:
    """Which rows a map shows: all, or evenly chosen ones where there are very many.

    Example:
        >>> len(map_rows(500)), len(map_rows(50_000))
        (500, 2000)
    """
    return np.linspace(0, count - 1, min(count, MOST_ROWS)).astype(int)


def draw_map(
    features: Float[np.ndarray, "rows features"],
    labels: Int[np.ndarray, " rows"],
    classes: Sequence[str],
    file: Path,
) -> Path:
    """Lay rows out in a plane by t-SNE, which does not see the labels, and colour them by class.

    Args:
        features: of every adapter shown.
        labels: number of each row's class.
        classes: their names.
        file: PNG to write.
    """
    from sklearn.manifold import TSNE

    # A layout needs neighbours.
    init = "pca" if features.shape[1] > 1 else "random"
    layout = TSNE(init=init, perplexity=min(30, len(features) // 4), random_state=0)
    points, title = layout.fit_transform(features), "All adapters by t-SNE"
    return chart_map(points, labels, classes, file, title=title)

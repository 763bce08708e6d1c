"""Maps of adapters: who lies near whom, by what a classifier makes of them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from lora_ws.report.charts import chart_map

# Thousands of rows more would only hide each other.
MOST_ROWS = 2000


def draw_map(
    features: Float[np.ndarray, "rows features"],
    labels: Int[np.ndarray, " rows"],
    classes: Sequence[str],
    file: Path,
) -> Path:
    """Lay rows out in a plane by t-SNE, which does not see the labels, and colour them by class.

    Args:
        features: of every adapter; evenly chosen rows of them where there are very many.
        labels: number of each row's class.
        classes: their names.
        file: PNG to write.
    """
    from sklearn.manifold import TSNE

    # A layout needs neighbours.
    rows = np.linspace(0, len(features) - 1, min(len(features), MOST_ROWS)).astype(int)
    layout = TSNE(init="pca", perplexity=min(30, len(rows) // 4), random_state=0)
    points, title = layout.fit_transform(features[rows]), "All adapters by t-SNE"
    return chart_map(points, labels[rows], classes, file, title=title)

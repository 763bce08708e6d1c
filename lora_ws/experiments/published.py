"""Representations of the authors' published scripts that the paper does not describe (`as-run`)."""

from collections.abc import Sequence
from typing import Self

import numpy as np
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.decomposition import IncrementalPCA
from sklearn.preprocessing import StandardScaler

from lora_ws.adapters.layout import Layout
from lora_ws.featurizers import Featurizer, StatsFlatVec

# The script's slice: columns 74 560 to 75 199 of the flat vector of Stable Diffusion 1.5. By a
# table of widths that is 4 entries short, it is the last quarter of one matrix and the first half
# of the next.
SLICE_END = "up_blocks.1.attentions.2.transformer_blocks.0.attn2.to_v.up"
SLICE_START = "up_blocks.2.attentions.0.transformer_blocks.0.attn1.to_q.down"


class PublishedPCA(TransformerMixin, BaseEstimator):
    """Incremental PCA of standardised vectors, in batches, padded with zeros beyond the rank.

    Args:
        n_components: K.
        batch_size: rows of a batch.

    Example:
        >>> PublishedPCA(n_components=9).fit_transform(np.random.rand(5, 20)).shape
        (5, 9)
    """

    def __init__(self, *, n_components: int = 200, batch_size: int = 1024) -> None:
        self.n_components = n_components
        self.batch_size = batch_size

    def fit(self, X: np.ndarray, y: object = None) -> Self:
        """Learn from training rows ``[adapters, params]``."""
        self.scaler_ = StandardScaler().fit(X)
        most = min(self.n_components, *X.shape)
        self.pca_ = IncrementalPCA(most, batch_size=max(self.batch_size, most))
        self.pca_.fit(self.scaler_.transform(X))
        return self

    def transform(self, X: np.ndarray) -> np.ndarray:
        """Return scores ``[adapters, n_components]``."""
        scores = self.pca_.transform(self.scaler_.transform(X))
        missing = self.n_components - scores.shape[1]
        return np.pad(scores, ((0, 0), (0, missing))).astype(X.dtype)


class PublishedSlice(Featurizer):
    """The fixed slice of the vector that the harmful-content script reads, or its statistics.

    On other layouts of the same modules: the same parts of the same matrices.

    Args:
        statistics: which statistics of the slice; None takes its numbers.
        layout: which columns are which matrix.

    Example:
        >>> layout = Layout.sd15_qv()
        >>> PublishedSlice(layout=layout).fit_transform(np.zeros((2, layout.size))).shape
        (2, 640)
    """

    learns = False

    def __init__(
        self, *, statistics: Sequence[str] | None = None, layout: Layout | None = None
    ) -> None:
        self.statistics = statistics
        self.layout = layout

    @property
    def _columns(self) -> slice:
        self._pairs()
        assert self.layout is not None
        end, start = (
            next(m.columns for m in self.layout.matrices if m.name == name)
            for name in (SLICE_END, SLICE_START)
        )
        quarter, half = (end.stop - end.start) // 4, (start.stop - start.start) // 2
        return slice(end.stop - quarter, start.start + half)

    def _fit(self, rows: np.ndarray) -> None:
        self.n_features_out_ = len(self._names())

    def _transform(self, rows: np.ndarray) -> np.ndarray:
        part = rows[:, self._columns]
        if self.statistics is None:
            return part
        return StatsFlatVec(statistics=self.statistics).fit_transform(part)

    def _names(self) -> Sequence[str]:
        columns = self._columns
        if self.statistics is None:
            return [f"param{k}" for k in range(columns.start, columns.stop)]
        return list(self.statistics)

"""Norms: how large each factor is, and nothing else; a control of what richer inputs must beat."""

from collections.abc import Sequence

import numpy as np

from lora_ws.adapters.layout import Layout
from lora_ws.featurizers.base import Featurizer


class Norms(Featurizer):
    """Logarithm of the Euclidean norm of every A and every B.

    Logarithms, because B starts at zero and its norms span decades. A factor of zeros gets that of
    the smallest normal number. Without a layout the whole row is one matrix.

    Args:
        layout: which columns are which matrix.
        matrices: names of the layers or matrices to read, ``*`` standing for anything (see
            `Layout.choose`); None reads all.

    Example:
        >>> layout = Layout.known("tiny_sd_qv")
        >>> Norms(layout=layout).fit_transform(np.ones((2, layout.size))).shape
        (2, 128)
    """

    learns = False

    def __init__(
        self, *, layout: Layout | None = None, matrices: Sequence[str] | None = None
    ) -> None:
        self.layout = layout
        self.matrices = matrices

    def _fit(self, rows: np.ndarray) -> None:
        self.n_features_out_ = len(self._names())

    def _transform(self, rows: np.ndarray) -> np.ndarray:
        selection = self._selection
        columns = [m.columns for m in selection.matrices] if selection else [slice(None)]
        # In float64, where squares of small numbers do not vanish.
        wide = rows.astype(np.float64)
        norms = np.stack([np.linalg.norm(wide[:, part], axis=1) for part in columns], axis=1)
        return np.log(np.maximum(norms, np.finfo(rows.dtype).tiny)).astype(rows.dtype)

    def _names(self) -> Sequence[str]:
        selection = self._selection
        return [f"{m.name}.norm" for m in selection.matrices] if selection else ["norm"]

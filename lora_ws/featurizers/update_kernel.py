"""UpdateKernel: the kernel between updates itself, for classifiers that take a kernel."""

from collections.abc import Sequence

import numpy as np

from lora_ws.adapters.layout import Layout
from lora_ws.featurizers.base import narrow
from lora_ws.featurizers.updates import UpdateFeaturizer


class UpdateKernel(UpdateFeaturizer):
    """Kernel of each adapter's updates with those of the training adapters (a number per landmark).

    The kernel is that of `DeltaPCA`, without principal components: column k compares with the k-th
    training row, as ``SVC(kernel="precomputed")`` takes it. With ``landmarks`` the columns are of
    those rows alone: features for any other classifier.

    Args:
        layout: which columns are which matrix; needed, because a vector alone has no B and A.
        matrices: names of the layers to read, ``*`` standing for anything (see `Layout.choose`);
            None reads all.
        kernel: ``left``, ``delta``, ``right``, or several joined by ``+``.
        normalize: scale every layer of every adapter to a kernel of 1 with itself, so that
            neither the size of an update nor that of a layer counts.
        whiten: shrinkage above 0 and up to 1 with which directions common to the training
            adapters are lowered; None leaves them. With it, updates count with unit norm even
            without ``normalize``.
        landmarks: how many training rows, drawn at random, to compare with; None takes all.
        max_memory_mb: bound on the memory taken for fitting, in MiB.
        seed: of the draw of landmarks.

    Example:
        >>> layout = Layout.known("tiny_sd_qv")
        >>> UpdateKernel(layout=layout).fit_transform(np.random.rand(9, layout.size)).shape
        (9, 9)
    """

    # The kernel, and the features rounded to at most that precision.
    bytes_per_value = 16

    def __init__(
        self,
        *,
        layout: Layout | None = None,
        matrices: Sequence[str] | None = None,
        kernel: str = "left+delta",
        normalize: bool = True,
        whiten: float | None = None,
        landmarks: int | None = None,
        max_memory_mb: int = 4096,
        seed: int = 0,
    ) -> None:
        self.layout = layout
        self.matrices = matrices
        self.kernel = kernel
        self.normalize = normalize
        self.whiten = whiten
        self.landmarks = landmarks
        self.max_memory_mb = max_memory_mb
        self.seed = seed

    def _fit(self, rows: np.ndarray) -> None:
        self._fit_kernel(rows, self._draw(len(rows)))

    def _fit_transform(self, rows: np.ndarray) -> np.ndarray:
        return narrow(self._fit_kernel(rows, self._draw(len(rows))), rows.dtype)

    def _transform(self, rows: np.ndarray) -> np.ndarray:
        return narrow(self._gram(rows), rows.dtype)

    def _names(self) -> Sequence[str]:
        return [f"update_kernel{k}" for k in range(len(self.landmarks_))]

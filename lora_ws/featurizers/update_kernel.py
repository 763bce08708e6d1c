"""UpdateKernel: the kernel between updates itself, for classifiers that take a kernel."""

from collections.abc import Sequence
from typing import Any, Literal, Self

import numpy as np

from lora_ws.adapters.layout import Layout
from lora_ws.errors import ConfigError
from lora_ws.featurizers.base import Array, narrow
from lora_ws.featurizers.updates import UpdateFeaturizer


class UpdateKernel(UpdateFeaturizer):
    """Compare each adapter's updates with those of the training adapters (a number per landmark).

    The kernel is that of `DeltaPCA`, without principal components: column k compares with the k-th
    training row, as ``SVC(kernel="precomputed")`` takes it. With ``landmarks`` the columns are of
    those rows alone: features for any other classifier. Labels, where ``fit`` is given them, say
    which layers count and which inputs to probe.

    Args:
        layout: which columns are which matrix; needed, because a vector alone has no B and A.
        matrices: names of the layers to read, ``*`` standing for anything (see `Layout.choose`);
            None reads all.
        kernel: ``left``, what updates write, whatever their signs; ``right``, what they read;
            ``delta``, whole updates; ``probe``, what they answer to the inputs on which updates of
            a class agree; or several joined by ``+``.
        weights: ``alignment`` weighs the kernel of each layer by its centred alignment with the
            labels, none below 0; ``alignf`` chooses the non-negative weights whose sum of kernels
            is best aligned (Cortes et al. 2012); ``equal``, or no labels, takes all alike.
        probes: how many inputs, where the kernel is ``probe``.
        normalize: scale every layer of every adapter to a kernel of 1 with itself, so that
            neither the size of an update nor that of a layer counts.
        whiten: shrinkage above 0 and up to 1 with which directions common to the training
            adapters are lowered; None leaves them. With it, updates count with unit norm even
            without ``normalize``.
        landmarks: how many training rows, drawn at random, to compare with; None takes all.
        max_memory_mb: bound on the memory taken for fitting, in MiB, below the command's.
        seed: of the draw of landmarks.

    Example:
        >>> layout = Layout.known("tiny_sd_qv")
        >>> UpdateKernel(layout=layout).fit_transform(np.random.rand(9, layout.size)).shape
        (9, 9)
    """

    # The kernel, and one layer's, as it is and centred, beside that of the labels.
    bytes_per_value = 32

    def __init__(
        self,
        *,
        layout: Layout | None = None,
        matrices: Sequence[str] | None = None,
        kernel: str = "left+probe",
        weights: Literal["equal", "alignment", "alignf"] = "alignment",
        probes: int = 4,
        normalize: bool = True,
        whiten: float | None = None,
        landmarks: int | None = None,
        max_memory_mb: int = 4096,
        seed: int = 0,
    ) -> None:
        self.layout = layout
        self.matrices = matrices
        self.kernel = kernel
        self.weights = weights
        self.probes = probes
        self.normalize = normalize
        self.whiten = whiten
        self.landmarks = landmarks
        self.max_memory_mb = max_memory_mb
        self.seed = seed

    def fit(self, X: Array, y: Any = None) -> Self:
        """Learn from training rows.

        Args:
            X: weights ``[adapters, params]``, finite.
            y: labels of each adapter; those of equal labels are a class. None, or labels that no
                two share, weigh all layers alike and take all adapters for one class.
        """
        self._learn(self._read(X, reset=True), y)
        return self

    def fit_transform(self, X: Array, y: Any = None) -> Array:
        """Fit, and return the kernel of the training rows, which the fit gives for free."""
        rows = self._read(X, reset=True)
        return self._like(narrow(self._learn(rows, y), rows.dtype), X)

    def _learn(self, rows: np.ndarray, y: Any) -> np.ndarray:
        """Fit; returns the kernel of the training rows ``[rows, landmarks]``."""
        labels = None
        if y is not None:
            given = np.asarray(y)
            if given.ndim not in (1, 2) or len(given) != len(rows):
                raise ConfigError(
                    f"UpdateKernel: expected one label for each of the {len(rows)} rows, got "
                    f"{given.shape}; pass y=None to weigh all layers alike"
                )
            found, labels = np.unique(given, axis=0, return_inverse=True)
            labels = labels.reshape(-1) if len(found) < len(rows) else None
        return self._fit_kernel(rows, self._draw(len(rows)), labels)

    def _fit(self, rows: np.ndarray) -> None:
        self._learn(rows, None)

    def _transform(self, rows: np.ndarray) -> np.ndarray:
        return narrow(self._gram(rows), rows.dtype)

    def _names(self) -> Sequence[str]:
        return [f"update_kernel{k}" for k in range(len(self.landmarks_))]

"""DeltaPCA@K: principal components of the updates B·A, not of the numbers that make them."""

from collections.abc import Sequence

import numpy as np

from lora_ws.adapters.layout import Layout
from lora_ws.errors import ConfigError
from lora_ws.featurizers.base import narrow
from lora_ws.featurizers.updates import UpdateFeaturizer
from lora_ws.functional.kernel_pca import kernel_pca

DEFAULT_COMPONENTS = 200


class DeltaPCA(UpdateFeaturizer):
    """Kernel principal components of what each layer's update does (K numbers; not in the paper).

    Each layer compares two adapters by their updates, never formed; the layers' kernels are added.
    ``left`` compares what updates write, ``delta`` whole updates with their signs, ``right`` what
    they read; ``+`` adds kernels. No feature depends on how an update is split into B and A, and
    ``left`` does not look at A at all: it tells classes also where every adapter has its own.

    A layer whose update is next to nothing beside the adapter's largest (1e-4 of it) counts as 0.

    Args:
        layout: which columns are which matrix; needed, because a vector alone has no B and A.
        matrices: names of the layers to read, ``*`` standing for anything (see `Layout.choose`);
            None reads all.
        n_components: K; None takes 200, or as many as the training rows allow.
        kernel: ``left``, ``delta``, ``right``, or several joined by ``+``.
        normalize: scale every layer of every adapter to a kernel of 1 with itself, so that
            neither the size of an update nor that of a layer counts.
        whiten: shrinkage above 0 and up to 1 with which directions common to the training
            adapters are lowered; None leaves them. With it, updates count with unit norm even
            without ``normalize``.
        landmarks: how many training rows, drawn at random, are kept to project on; None keeps
            all, which is exact.
        max_memory_mb: bound on the memory taken for fitting, in MiB, below the command's.
        seed: of the draw of landmarks.

    Example:
        >>> layout = Layout.known("tiny_sd_qv")
        >>> DeltaPCA(layout=layout).fit_transform(np.random.rand(9, layout.size)).shape
        (9, 8)
    """

    # The kernel and two copies for its eigenvectors.
    bytes_per_value = 24

    def __init__(
        self,
        *,
        layout: Layout | None = None,
        matrices: Sequence[str] | None = None,
        n_components: int | None = None,
        kernel: str = "left+delta",
        normalize: bool = True,
        whiten: float | None = 0.1,
        landmarks: int | None = None,
        max_memory_mb: int = 4096,
        seed: int = 0,
    ) -> None:
        self.layout = layout
        self.matrices = matrices
        self.n_components = n_components
        self.kernel = kernel
        self.normalize = normalize
        self.whiten = whiten
        self.landmarks = landmarks
        self.max_memory_mb = max_memory_mb
        self.seed = seed

    def _fit(self, rows: np.ndarray) -> None:
        self._solve(rows)

    def _fit_transform(self, rows: np.ndarray) -> np.ndarray:
        return self._solve(rows)

    def _solve(self, rows: np.ndarray) -> np.ndarray:
        """Fit; returns the scores of the training rows ``[rows, K]``."""
        kept = self._draw(len(rows))
        wanted = self._components(len(rows), len(kept))
        gram = self._fit_kernel(rows, kept)
        everything = len(kept) == len(rows)
        noise = 4 * float(np.finfo(rows.dtype).eps) * len(rows) ** 0.5
        fit = kernel_pca(gram, wanted, landmarks=None if everything else kept, noise=noise)
        self.dual_, self.offset_, self.eigenvalues_ = fit.dual, fit.offset, fit.eigenvalues
        return narrow(fit.scores, rows.dtype)

    def _transform(self, rows: np.ndarray) -> np.ndarray:
        scores = np.empty((len(rows), len(self.offset_)), rows.dtype)
        for block, products in self._products(rows):
            scores[block] = narrow(products @ self.dual_ - self.offset_, rows.dtype)
        return scores

    def _names(self) -> Sequence[str]:
        return [f"delta_pca{k}" for k in range(len(self.offset_))]

    def _components(self, n: int, kept: int) -> int:
        limit = min(n - 1, kept)
        wanted = min(DEFAULT_COMPONENTS, limit) if self.n_components is None else self.n_components
        if not 1 <= wanted <= limit:
            raise ConfigError(
                f"DeltaPCA(n_components={wanted}): expected 1 to {limit} components for {n} "
                f"training rows and {kept} landmarks; use n_components <= {limit}"
            )
        return wanted

"""DeltaPCA@K: principal components of the updates B·A, not of the numbers that make them."""

from collections.abc import Iterator, Sequence

import numpy as np

from lora_ws.adapters.layout import LayerSpec, Layout
from lora_ws.errors import ConfigError
from lora_ws.featurizers.base import Array, Featurizer, _like, narrow
from lora_ws.functional.delta_gram import (
    KERNELS,
    Directions,
    Kernel,
    directions_gram,
    negligible_layers,
    second_moment,
    unit_kernel,
    update_directions,
    update_norms,
    whitened,
    whitener,
)
from lora_ws.functional.kernel_pca import kernel_pca

DEFAULT_COMPONENTS = 200
# Rows whose directions are made at once, and bytes of one layer's products.
BLOCK_ROWS = 128
BLOCK_BYTES = 64 << 20
_MIB = 1 << 20


class DeltaPCA(Featurizer):
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
        max_memory_mb: bound on the memory taken for fitting, in MiB.
        seed: of the draw of landmarks.

    Example:
        >>> layout = Layout.known("tiny_sd_qv")
        >>> DeltaPCA(layout=layout).fit_transform(np.random.rand(9, layout.size)).shape
        (9, 8)
    """

    invariant = True

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

    def fit_transform(self, X: Array, y: object = None, **fit_params: object) -> Array:
        """Fit, and return the scores of the training rows, which the fit gives for free."""
        return _like(self._solve(self._read(X, reset=True)), X)

    def _solve(self, rows: np.ndarray) -> np.ndarray:
        """Fit; returns the scores of the training rows ``[rows, K]``."""
        kernels = self._kernels()
        kept = self._draw(len(rows))
        wanted = self._components(len(rows), len(kept))
        self._check_memory(rows, len(kept))
        self.whiteners_ = self._fit_whiteners(rows, kernels)
        width = sum(size for *_, size in self._parts())
        self.landmarks_ = np.empty((len(kept), width), rows.dtype)
        for start in range(0, len(kept), BLOCK_ROWS):
            block = slice(start, start + BLOCK_ROWS)
            self.landmarks_[block] = self._directions(rows[kept[block]])
        everything = len(kept) == len(rows)
        gram = self._cross(self.landmarks_) if everything else self._gram(rows)
        noise = 4 * float(np.finfo(rows.dtype).eps) * len(rows) ** 0.5
        fit = kernel_pca(gram, wanted, landmarks=None if everything else kept, noise=noise)
        self.dual_, self.offset_, self.eigenvalues_ = fit.dual, fit.offset, fit.eigenvalues
        return narrow(fit.scores, rows.dtype)

    def _transform(self, rows: np.ndarray) -> np.ndarray:
        scores = np.empty((len(rows), len(self.offset_)), rows.dtype)
        for start in range(0, len(rows), BLOCK_ROWS):
            block = slice(start, start + BLOCK_ROWS)
            products = self._cross(self._directions(rows[block]))
            scores[block] = narrow(products @ self.dual_ - self.offset_, rows.dtype)
        return scores

    def _names(self) -> Sequence[str]:
        return [f"delta_pca{k}" for k in range(len(self.offset_))]

    def _gram(self, rows: np.ndarray) -> np.ndarray:
        """Kernel of all rows with the landmarks ``[rows, landmarks]``."""
        gram = np.empty((len(rows), len(self.landmarks_)))
        for start in range(0, len(rows), BLOCK_ROWS):
            block = slice(start, start + BLOCK_ROWS)
            gram[block] = self._cross(self._directions(rows[block]))
        return gram

    def _cross(self, flat: np.ndarray) -> np.ndarray:
        """Kernel of rows of directions with the landmarks, in blocks of bounded memory."""
        gram = np.zeros((len(flat), len(self.landmarks_)))
        for columns, shapes, _ in self._parts():
            others = _unflatten(self.landmarks_[:, columns], shapes)
            rank = shapes[0][0]
            step = max(1, BLOCK_BYTES // (24 * rank * rank * len(self.landmarks_)))
            for start in range(0, len(flat), step):
                block = slice(start, start + step)
                gram[block] += directions_gram(_unflatten(flat[block, columns], shapes), others)
        return gram

    def _parts(self) -> Iterator[tuple[slice, list[tuple[int, int]], int]]:
        """Columns, shapes and size of the directions of every layer and kernel."""
        start = 0
        for layer, _, _ in self._pairs():
            for kernel in self._kernels():
                reads, writes = layer.in_features, layer.out_features
                if kernel == "right":
                    shapes = [(min(layer.rank, writes), reads)]
                else:
                    shapes = [(min(layer.rank, reads), writes)]
                if kernel == "delta":
                    shapes.append((min(layer.rank, reads), reads))
                size = sum(rank * width for rank, width in shapes)
                yield slice(start, start + size), shapes, size
                start += size

    def _directions(self, rows: np.ndarray) -> np.ndarray:
        """Directions of the updates, scaled and whitened, a row an adapter."""
        parts, pairs = [], self._pairs()
        quiet = negligible_layers(_all_norms(rows, pairs))
        matrices = dict(self._stored_whiteners())
        for index, (layer, down, up) in enumerate(pairs):
            a = rows[:, down].reshape(-1, *layer.down_shape)
            b = rows[:, up].reshape(-1, *layer.up_shape)
            for kernel in self._kernels():
                found = update_directions(a, b, kernel)
                if self.whiten is not None:
                    found = whitened(found, matrices[index, kernel == "right"], kernel)
                if self.normalize:
                    found = unit_kernel(found)
                # Without either scaling, next to nothing stays next to nothing by itself.
                if self.normalize or self.whiten is not None:
                    found = Directions(*(_silence(part, quiet[:, index]) for part in found))
                parts += [part.reshape(len(rows), -1) for part in found[: 1 + (kernel == "delta")]]
        return np.concatenate(parts, axis=1, dtype=rows.dtype, casting="same_kind")

    def _fit_whiteners(self, rows: np.ndarray, kernels: tuple[Kernel, ...]) -> np.ndarray:
        """Whitening matrices of every layer and side, one after the other in a vector."""
        if self.whiten is None:
            return np.zeros(0, rows.dtype)
        pairs = self._pairs()
        moments = {key: np.zeros((width, width)) for key, width in self._sides()}
        for start in range(0, len(rows), BLOCK_ROWS):
            block = rows[start : start + BLOCK_ROWS]
            quiet = negligible_layers(_all_norms(block, pairs))
            for index, (layer, down, up) in enumerate(pairs):
                a = block[:, down].reshape(-1, *layer.down_shape)
                b = block[:, up].reshape(-1, *layer.up_shape)
                for right in {kernel == "right" for kernel in kernels}:
                    found = update_directions(a, b, "right" if right else "left").first
                    moments[index, right] += second_moment(_silence(found, quiet[:, index]))
        matrices = [whitener(moments[key], self.whiten).ravel() for key, _ in self._sides()]
        return np.concatenate(matrices).astype(rows.dtype)

    def _sides(self) -> Iterator[tuple[tuple[int, bool], int]]:
        """Each layer and side (True for the one that is read) to whiten, and its width."""
        sides = sorted({kernel == "right" for kernel in self._kernels()})
        for index, (layer, _, _) in enumerate(self._pairs()):
            for right in sides:
                yield (index, right), layer.in_features if right else layer.out_features

    def _stored_whiteners(self) -> Iterator[tuple[tuple[int, bool], np.ndarray]]:
        start = 0
        for key, width in self._sides() if self.whiten is not None else ():
            yield key, self.whiteners_[start : start + width * width].reshape(width, width)
            start += width * width

    def _kernels(self) -> tuple[Kernel, ...]:
        given = self.kernel.split("+")
        if len(set(given)) < len(given) or not set(given) <= set(KERNELS):
            raise ConfigError(
                f"DeltaPCA(kernel={self.kernel!r}): expected {', '.join(KERNELS)}, or several of "
                'them joined by +, each once; use "left+delta"'
            )
        return tuple(kernel for kernel in KERNELS if kernel in given)

    def _draw(self, n: int) -> np.ndarray:
        if n < 2:
            raise ConfigError(f"DeltaPCA: expected at least 2 training rows, got n_samples = {n}")
        if self.landmarks is None or self.landmarks >= n:
            return np.arange(n)
        if self.landmarks < 1:
            raise ConfigError(
                f"DeltaPCA(landmarks={self.landmarks}): expected at least 1; use None to keep all"
            )
        return np.sort(np.random.default_rng(self.seed).permutation(n)[: self.landmarks])

    def _components(self, n: int, kept: int) -> int:
        limit = min(n - 1, kept)
        wanted = min(DEFAULT_COMPONENTS, limit) if self.n_components is None else self.n_components
        if not 1 <= wanted <= limit:
            raise ConfigError(
                f"DeltaPCA(n_components={wanted}): expected 1 to {limit} components for {n} "
                f"training rows and {kept} landmarks; use n_components <= {limit}"
            )
        return wanted

    def _check_memory(self, rows: np.ndarray, kept: int) -> None:
        per_landmark = rows.itemsize * sum(size for *_, size in self._parts())
        fixed = 0 if self.whiten is None else 16 * sum(width**2 for _, width in self._sides())
        # The kernel and two copies for its eigenvectors, with a quarter for blocks.
        needed = 4 * (24 * len(rows) * kept + per_landmark * kept + fixed) // 3
        if needed <= self.max_memory_mb * _MIB:
            return
        room = 3 * self.max_memory_mb * _MIB // 4 - fixed
        fits = max(0, room // (24 * len(rows) + per_landmark))
        advice = f"landmarks={fits} fits" if fits else "no number of landmarks fits"
        raise ConfigError(
            f"DeltaPCA(max_memory_mb={self.max_memory_mb}): expected the kernel of {len(rows)} "
            f"training rows with {kept} landmarks to fit, got {-(-needed // _MIB)} MiB; set "
            f"landmarks lower ({advice}) or raise max_memory_mb"
        )


def _all_norms(rows: np.ndarray, pairs: Sequence[tuple[LayerSpec, slice, slice]]) -> np.ndarray:
    """Frobenius norm of every update ``[rows, layers]``."""
    norms = [
        update_norms(
            rows[:, down].reshape(-1, *layer.down_shape), rows[:, up].reshape(-1, *layer.up_shape)
        )
        for layer, down, up in pairs
    ]
    return np.stack(norms, axis=1)


def _silence(part: np.ndarray, quiet: np.ndarray) -> np.ndarray:
    return np.where(quiet[:, None, None], 0.0, part)


def _unflatten(flat: np.ndarray, shapes: list[tuple[int, int]]) -> Directions:
    first = shapes[0][0] * shapes[0][1]
    mine = flat[:, :first].reshape(-1, *shapes[0])
    if len(shapes) == 1:
        return Directions(mine, mine)
    return Directions(mine, flat[:, first:].reshape(-1, *shapes[1]))

"""What featurizers of updates share: comparing each layer's updates through their factors."""

from abc import ABC
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import ClassVar, Literal

import numpy as np

from lora_ws.adapters.bases import reads_text
from lora_ws.adapters.layout import LayerSpec
from lora_ws.errors import ConfigError
from lora_ws.featurizers.base import Featurizer
from lora_ws.featurizers.update_parts import Part, first_sizes, side_grams
from lora_ws.functional.alignment import (
    agreement,
    kernel_alignment,
    leading_inputs,
    nonnegative_weights,
    scatter,
)
from lora_ws.functional.delta_gram import (
    KERNELS,
    Directions,
    direction_norms,
    negligible_layers,
    second_moment,
    unit_kernel,
    unit_updates,
    update_directions,
    update_norms,
)
from lora_ws.functional.rows import Rows
from lora_ws.functional.whitening import packed, packed_size, unpacked, whitened_rows, whitener
from lora_ws.memory import BLOCK_BYTES, held_bytes, memory_limit

# Rows whose directions are made at once.
BLOCK_ROWS = 128
_MIB = 1 << 20
# Kernels of a layer: those of `delta_gram`, and what updates answer to some inputs.
SIDES = (*KERNELS, "probe")


class UpdateFeaturizer(Featurizer, ABC):
    """Compares rows with training rows, the landmarks, by what each layer's update does.

    Each layer compares two adapters by their updates, never formed; the layers' kernels are added.
    The kernel ``probe`` is <dW_i P, dW_j P>, where P holds the inputs that updates of one class
    answer most alike: signs that a random start of A hides in ``left`` show in it. Modules that
    read the text share its inputs, and P.

    Attributes:
        bytes_per_value: of memory that a fit takes for each kernel value.
        probes: inputs in P.
        weights: what the layers' kernels count: all alike, each by its ``alignment`` with the
            labels, or by that of their sum, ``alignf``.
    """

    invariant = True
    blockwise = True
    bytes_per_value: ClassVar[int]
    probes: int = 4
    weights: Literal["equal", "alignment", "alignf"] = "equal"

    kernel: str
    normalize: bool
    whiten: float | None
    landmarks: int | None
    max_memory_mb: int
    seed: int

    def _fit_kernel(
        self, rows: np.ndarray | Rows, kept: np.ndarray, labels: np.ndarray | None = None
    ) -> np.ndarray:
        """Fit whitening, probes, landmarks and weights; returns all rows' kernel with landmarks.

        Args:
            rows: training rows.
            kept: which of them the landmarks are.
            labels: their classes; without them all are one, and all kernels count alike.
        """
        self._check_memory(rows, len(kept))
        self.whiteners_ = self._fit_whiteners(rows)
        self.probes_ = self._fit_probes(rows, labels)
        self.landmarks_ = np.empty((len(kept), _width(list(self._parts()))), rows.dtype)
        for start in range(0, len(kept), BLOCK_ROWS):
            block = slice(start, start + BLOCK_ROWS)
            self.landmarks_[block] = self._directions(rows[kept[block]])
        self.weights_ = self._fit_weights(None if labels is None else labels[kept])
        return self._cross(self.landmarks_) if len(kept) == len(rows) else self._gram(rows)

    def _gram(self, rows: np.ndarray | Rows) -> np.ndarray:
        """Kernel of all rows with the landmarks ``[rows, landmarks]``."""
        gram = np.empty((len(rows), len(self.landmarks_)))
        for block, products in self._products(rows):
            gram[block] = products
        return gram

    def _products(self, rows: np.ndarray | Rows) -> Iterator[tuple[slice, np.ndarray]]:
        """The kernel with the landmarks, float64, some rows at a time."""
        for start in range(0, len(rows), BLOCK_ROWS):
            block = slice(start, start + BLOCK_ROWS)
            yield block, self._cross(self._directions(rows[block]))

    def _cross(self, flat: np.ndarray) -> np.ndarray:
        """Kernel of rows of directions with the landmarks, in blocks of bounded memory."""
        gram = np.zeros((len(flat), len(self.landmarks_)))
        # Bundles of earlier versions hold no weights.
        weights = getattr(self, "weights_", np.zeros(0))
        for _, found in groupby(sorted(self._parts(), key=_side), key=_side):
            parts = [part for part in found if not len(weights) or weights[part.number]]
            sizes = self._landmark_sizes[[part.number for part in parts]]
            for block, grams in side_grams(flat, self.landmarks_, parts, sizes) if parts else ():
                for part, one in zip(parts, grams, strict=True):
                    gram[block] += weights[part.number] * one if len(weights) else one
        return gram

    def _part(self, flat: np.ndarray, part: Part) -> np.ndarray:
        """One layer's kernel of rows of directions with the landmarks."""
        grams = side_grams(flat, self.landmarks_, [part], np.ones((1, len(self.landmarks_))))
        return np.concatenate([found for _, (found,) in grams])

    @property
    def _landmark_sizes(self) -> np.ndarray:
        """Sizes of the landmarks' first directions ``[parts, landmarks]``, kept once read."""
        held = getattr(self, "_sizes", None)
        if held is None or held[0] is not self.landmarks_:
            held = self._sizes = self.landmarks_, first_sizes(self.landmarks_, list(self._parts()))
        return held[1]

    def _parts(self) -> Iterator[Part]:
        """Where the flat matrix has the directions of every layer and kernel."""
        start = index = 0
        for number, (layer, _, _) in enumerate(self._pairs()):
            for kernel in self._kernels():
                reads, writes = layer.in_features, layer.out_features
                if kernel == "right":
                    shapes = [(min(layer.rank, writes), reads)]
                else:
                    shapes = [(min(layer.rank, reads), writes)]
                if kernel in ("delta", "probe"):
                    second = reads if kernel == "delta" else min(self.probes, reads)
                    shapes.append((min(layer.rank, reads), second))
                end = start + sum(rank * width for rank, width in shapes)
                side = number, kernel == "right"
                yield Part(index, side, slice(start, end), tuple(shapes))
                start, index = end, index + 1

    def _directions(self, rows: np.ndarray) -> np.ndarray:
        """Directions of the updates, scaled and whitened, a row per adapter."""
        kernels, parts, pairs = self._kernels(), list(self._parts()), self._pairs()
        flat = np.empty((len(rows), _width(parts)), rows.dtype)
        norms = np.zeros((len(rows), len(pairs)))
        matrices, inputs = dict(self._stored_whiteners()), dict(self._stored_probes())
        places = iter(parts)
        for index, (layer, down, up) in enumerate(pairs):
            a = rows[:, down].reshape(-1, *layer.down_shape)
            b = rows[:, up].reshape(-1, *layer.up_shape)
            sides: dict[bool, Directions] = {}
            for kernel in kernels:
                right = kernel == "right"
                if right not in sides:
                    whole = "delta" if {"delta", "probe"} & set(kernels) else "left"
                    found = update_directions(a, b, "right" if right else whole)
                    norms[:, index] = direction_norms(found.first)
                    sides[right] = self._scaled(found, matrices.get((index, right)), rows.dtype)
                first, second = sides[right]
                if kernel == "probe":
                    second = second @ inputs[_source(layer)]
                found = Directions(first, second if kernel in ("delta", "probe") else first)
                found = unit_kernel(found) if self.normalize else found
                place = next(places)
                held = [part.reshape(len(rows), -1) for part in found[: len(place.shapes)]]
                np.concatenate(held, axis=1, out=flat[:, place.columns], casting="same_kind")
        # Without either scaling, next to nothing stays next to nothing by itself.
        if self.normalize or self.whiten is not None:
            quiet = negligible_layers(norms)
            for part in parts:
                flat[quiet[:, part.side[0]], part.columns] = 0.0
        return flat

    def _scaled(
        self, found: Directions, panels: list[np.ndarray] | None, dtype: np.dtype
    ) -> Directions:
        """Updates of unit norm, whitened, in the precision of the rows; else as is."""
        if not self.normalize and panels is None:
            return found
        first = unit_updates(found.first).astype(dtype)
        if panels is not None:
            # As one product; a stack of them would read the matrix for every adapter.
            first = whitened_rows(first.reshape(-1, first.shape[2]), panels).reshape(first.shape)
        same = found.second is found.first
        return Directions(first, first if same else found.second.astype(dtype))

    def _fit_probes(self, rows: np.ndarray | Rows, labels: np.ndarray | None) -> np.ndarray:
        """The probes of every source of inputs, one after the other in a vector.

        Of rows on disk, as many are asked as a quarter of the memory holds.
        """
        if "probe" not in self._kernels():
            return np.zeros(0, rows.dtype)
        if self.probes < 1:
            raise ConfigError(
                f"{type(self).__name__}(probes={self.probes}): expected at least 1; use 4, say"
            )
        pairs = self._pairs()
        moments = {source: np.zeros((width, width)) for source, width in self._sources()}
        labels = np.zeros(len(rows)) if labels is None else labels
        if isinstance(rows, Rows):
            # A class's updates are summed at full size, layer by layer, so rows are held meanwhile.
            most = max(2, held_bytes() // (rows.itemsize * rows.shape[1]))
            drawn = np.sort(np.random.default_rng(self.seed).permutation(len(rows))[:most])
            rows, labels = rows[drawn], labels[drawn]
        quiet = negligible_layers(_all_norms(rows, pairs))
        for index, (layer, down, up) in enumerate(pairs):
            a = rows[:, down].reshape(-1, *layer.down_shape)
            b = rows[:, up].reshape(-1, *layer.up_shape)
            found = update_directions(a, b, "delta")
            loud = Directions(_silence(found.first, quiet[:, index]), found.second)
            moments[_source(layer)] += agreement(loud, labels)
        probes = [leading_inputs(moment, self.probes).ravel() for moment in moments.values()]
        return np.concatenate(probes).astype(rows.dtype)

    def _sources(self) -> Iterator[tuple[str, int]]:
        """Each source of inputs, once, and its width."""
        yield from {_source(layer): layer.in_features for layer, *_ in self._pairs()}.items()

    def _stored_probes(self) -> Iterator[tuple[str, np.ndarray]]:
        start = 0
        for source, width in self._sources() if "probe" in self._kernels() else ():
            size = width * min(self.probes, width)
            yield source, self.probes_[start : start + size].reshape(width, -1)
            start += size

    def _fit_weights(self, labels: np.ndarray | None) -> np.ndarray:
        """Weight of each layer's kernel, with a mean of 1; none where all count alike."""
        if self.weights not in ("equal", "alignment", "alignf"):
            raise ConfigError(
                f"{type(self).__name__}(weights={self.weights!r}): expected equal, alignment or "
                "alignf"
            )
        if self.weights == "equal" or labels is None:
            return np.zeros(0)
        if self.weights == "alignf":
            weights = self._joint_weights(labels)
        else:
            grams = (self._part(self.landmarks_, part) for part in self._parts())
            weights = np.array([_alignment(gram, labels) for gram in grams])
        return weights / weights.mean() if weights.any() else np.zeros(0)

    def _joint_weights(self, labels: np.ndarray) -> np.ndarray:
        """Weights of the sum of kernels that is nearest to the kernel of equal labels.

        As in `kernel_alignment`, kernels are centred, and a row with itself does not count.
        """
        parts, landmarks = list(self._parts()), self.landmarks_
        n, wanted = len(landmarks), (labels[:, None] == labels).astype(np.float64)
        means, sizes = [], []
        for part in parts:
            gram = self._part(landmarks, part)
            # A kernel that is the same everywhere has no scatter but rounding.
            level, spread = np.abs(gram).max(initial=0.0), scatter(gram)
            means.append(gram.mean(axis=0))
            sizes.append(spread if spread > 1e-12 * n * level else np.inf)
        moment, aligned = np.zeros((len(parts), len(parts))), np.zeros(len(parts))
        step = max(1, BLOCK_BYTES // (8 * n * len(parts)))
        for start in range(0, n, step):
            block = slice(start, start + step)
            rows = np.arange(n)[block]
            target = _centred(wanted[block], wanted.mean(axis=0), block)
            target[np.arange(len(rows)), rows] = 0.0
            flat = []
            for part, mean, size in zip(parts, means, sizes, strict=True):
                own = _centred(self._part(landmarks[block], part), mean, block) / size
                own[np.arange(len(rows)), rows] = 0.0
                flat.append(own.ravel())
            moment += np.stack(flat) @ np.stack(flat).T
            aligned += np.stack(flat) @ target.ravel()
        return nonnegative_weights(moment, aligned) / np.array(sizes)

    def _fit_whiteners(self, rows: np.ndarray | Rows) -> np.ndarray:
        """Panels of the whitening matrix of every layer and side, one after the other."""
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
                for right in {kernel == "right" for kernel in self._kernels()}:
                    found = update_directions(a, b, "right" if right else "left").first
                    moments[index, right] += second_moment(_silence(found, quiet[:, index]))
        keys, widths = zip(*self._sides(), strict=True)
        return packed((whitener(moments.pop(key), self.whiten) for key in keys), widths, rows.dtype)

    def _sides(self) -> Iterator[tuple[tuple[int, bool], int]]:
        """Each layer and side (True for the one that is read) to whiten, and its width."""
        sides = sorted({kernel == "right" for kernel in self._kernels()})
        for index, (layer, _, _) in enumerate(self._pairs()):
            for right in sides:
                yield (index, right), layer.in_features if right else layer.out_features

    def _stored_whiteners(self) -> Iterator[tuple[tuple[int, bool], list[np.ndarray]]]:
        """Panels of each layer and side."""
        if self.whiten is not None:
            keys, widths = zip(*self._sides(), strict=True)
            yield from zip(keys, unpacked(self.whiteners_, widths), strict=True)

    def _kernels(self) -> tuple[str, ...]:
        given = self.kernel.split("+")
        if len(set(given)) < len(given) or not set(given) <= set(SIDES):
            raise ConfigError(
                f"{type(self).__name__}(kernel={self.kernel!r}): expected {', '.join(SIDES)}, or "
                'several of them joined by +, each once; use "left+delta"'
            )
        return tuple(kernel for kernel in SIDES if kernel in given)

    def _draw(self, n: int) -> np.ndarray:
        if n < 2:
            raise ConfigError(
                f"{type(self).__name__}: expected at least 2 training rows, got n_samples = {n}"
            )
        if self.landmarks is None or self.landmarks >= n:
            return np.arange(n)
        if self.landmarks < 1:
            raise ConfigError(
                f"{type(self).__name__}(landmarks={self.landmarks}): expected at least 1; use None "
                "to keep all"
            )
        return np.sort(np.random.default_rng(self.seed).permutation(n)[: self.landmarks])

    def _check_memory(self, rows: np.ndarray | Rows, kept: int) -> None:
        per_landmark = rows.itemsize * _width(list(self._parts()))
        widths = [] if self.whiten is None else [width for _, width in self._sides()]
        # Second moments in float64, and what is kept of their roots.
        fixed = sum(8 * width**2 + rows.itemsize * packed_size(width) for width in widths)
        # A quarter is for blocks.
        values = self.bytes_per_value * len(rows)
        needed = 4 * (values * kept + per_landmark * kept + fixed) // 3
        memory_mb = min(self.max_memory_mb, memory_limit() >> 20)
        if needed <= memory_mb * _MIB:
            return
        room = 3 * memory_mb * _MIB // 4 - fixed
        fits = max(0, room // (values + per_landmark))
        advice = f"landmarks={fits} fits" if fits else "no number of landmarks fits"
        raise ConfigError(
            f"{type(self).__name__}(max_memory_mb={self.max_memory_mb}): expected the kernel of "
            f"{len(rows)} training rows with {kept} landmarks to fit {memory_mb} MiB, got "
            f"{-(-needed // _MIB)} MiB; set landmarks lower ({advice}) or raise max_memory_mb and "
            "--memory_limit"
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


def _alignment(gram: np.ndarray, labels: np.ndarray) -> float:
    """What a kernel of unit scatter would count; nothing where it speaks against the labels."""
    aligned = max(0.0, kernel_alignment(gram, labels))
    return aligned / scatter(gram) if aligned else 0.0


def _centred(rows: np.ndarray, mean: np.ndarray, block: slice) -> np.ndarray:
    """Some rows of a symmetric matrix, less the means of rows and columns."""
    return rows - mean - mean[block][:, None] + mean.mean()


def _source(layer: LayerSpec) -> str:
    """What a module's inputs are called; all that read the text read the same."""
    return f"text of {layer.in_features}" if reads_text(layer.name) else layer.name


def _silence(part: np.ndarray, quiet: np.ndarray) -> np.ndarray:
    return np.where(quiet[:, None, None], 0.0, part)


def _width(parts: Sequence[Part]) -> int:
    return parts[-1].columns.stop if parts else 0


def _side(part: Part) -> tuple[int, bool]:
    return part.side

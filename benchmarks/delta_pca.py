"""DeltaPCA: milliseconds of a file in batches and alone, and of a training row.

Every fifth of the 64 layers of Stable Diffusion 1.5, rank 4, 256 landmarks, ``left+delta``.
Compared with the kernel as its formula says, layer by layer: a QR decomposition of A in float64 for
each kernel and once more for the norms, whitening in float64, and one product a kernel.

``mixed`` has layers of rank 1 to 8; in ``deficient`` each adapter has a layer whose A lacks a rank.

Before, both agree on every feature to a bound of the precision of the rows. Goals: 7 times in
batches of 32 and 3 times alone.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import common
import numpy as np
import scipy.linalg  # noqa: F401 (fitting imports both)
import sklearn.utils.validation  # noqa: F401

from lora_ws import DeltaPCA, Layout
from lora_ws.functional import kernel_pca

NEGLIGIBLE, SHRINKAGE = 1e-4, 0.1
BATCH, ALONE = "batches of 32", "alone"
GOALS = {BATCH: 7.0, ALONE: 3.0}
PLAIN = "QR, float64"
# How far features may differ: products of rows of 1280 numbers of single precision, and squares.
BOUND = 2 * float(np.finfo(np.float32).eps) * 1280**0.5


class Plain:
    """The kernel of updates as it is defined, with nothing shared."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    def factors(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """A and B of every layer."""
        for layer, down, up in self.layout.pairs():
            a, b = rows[:, down], rows[:, up]
            yield a.reshape(-1, *layer.down_shape), b.reshape(-1, *layer.up_shape)

    def quiet(self, rows: np.ndarray) -> np.ndarray:
        """Which layers are next to nothing ``[n, layers]``."""
        norms = [np.linalg.norm(written(a, b)[0], axis=(1, 2)) for a, b in self.factors(rows)]
        norms = np.stack(norms, axis=1)
        return norms <= NEGLIGIBLE * norms.max(axis=1, keepdims=True)

    def fit(self, rows: np.ndarray, components: int) -> np.ndarray:
        """Fit with all rows as landmarks; returns their features."""
        moments = [np.zeros((layer.out_features,) * 2) for layer, *_ in self.layout.pairs()]
        quiet = self.quiet(rows)
        for index, (a, b) in enumerate(self.factors(rows)):
            flat = unit(silenced(written(a, b)[0], quiet[:, index]))
            moments[index] += flat.reshape(-1, flat.shape[2]).T @ flat.reshape(-1, flat.shape[2])
        self.whiteners = [whitener(moment).astype(rows.dtype) for moment in moments]
        self.landmarks = [
            [part.astype(rows.dtype) for part in found] for found in self.directions(rows)
        ]
        fit = kernel_pca(self.kernel(rows), components)
        return fit.scores

    def directions(self, rows: np.ndarray) -> Iterator[list[np.ndarray]]:
        """First directions for ``left``, and both for ``delta``, of every layer."""
        quiet = self.quiet(rows)
        for index, (a, b) in enumerate(self.factors(rows)):
            whitened = unit(written(a, b)[0]) @ self.whiteners[index]
            left, _ = unit_kernel(whitened, whitened)
            first, basis = written(a, b)
            first, second = unit_kernel(unit(first) @ self.whiteners[index], basis)
            yield [silenced(part, quiet[:, index]) for part in (left, first, second)]

    def kernel(self, rows: np.ndarray) -> np.ndarray:
        """With the landmarks, summed over layers and kernels."""
        total = 0.0
        for own, others in zip(self.directions(rows), self.landmarks, strict=True):
            left, first, second = (
                products(mine.astype(rows.dtype), other)
                for mine, other in zip(own, others, strict=True)
            )
            total = total + (left**2).sum(axis=(1, 3)) + (first * second).sum(axis=(1, 3))
        return np.asarray(total)


def written(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What an update writes, and an orthonormal basis of what it reads."""
    basis, mixing = np.linalg.qr(a.astype(np.float64).transpose(0, 2, 1))
    return mixing @ b.astype(np.float64).transpose(0, 2, 1), basis.transpose(0, 2, 1)


def unit(rows: np.ndarray) -> np.ndarray:
    """Scaled to unit norm; zeros stay zeros."""
    norms = np.linalg.norm(rows, axis=(1, 2))[:, None, None]
    return rows / np.where(norms > 0, norms, 1.0)


def unit_kernel(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scaled to a kernel of 1 with itself."""
    first, second = unit(first), unit(second)
    own = [rows @ rows.transpose(0, 2, 1) for rows in (first, second)]
    scale = np.maximum((own[0] * own[1]).sum(axis=(1, 2)), 0)[:, None, None] ** 0.25
    scale = np.where(scale > 0, scale, 1.0)
    return first / scale, second / scale


def silenced(rows: np.ndarray, quiet: np.ndarray) -> np.ndarray:
    """Zeros where an update is next to nothing."""
    return np.where(quiet[:, None, None], 0.0, rows)


def whitener(moment: np.ndarray) -> np.ndarray:
    """Inverse root of a moment that is shrunk to its mean."""
    width = len(moment)
    shrunk = (1 - SHRINKAGE) * moment * (width / np.trace(moment)) + SHRINKAGE * np.eye(width)
    values, vectors = np.linalg.eigh(shrunk)
    return (vectors / np.sqrt(values)) @ vectors.T


def products(mine: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Of every direction with every other ``[n, rank, m, rank]``."""
    flat = mine.reshape(-1, mine.shape[2]) @ others.reshape(-1, mine.shape[2]).T
    return flat.astype(np.float64).reshape(*mine.shape[:2], *others.shape[:2])


def adapters(layout: Layout, n: int, seed: int, deficient: bool) -> np.ndarray:
    """Rows that share some directions; B is small, and A may lack a rank in one layer of each."""
    random = np.random.default_rng(seed)
    rows = random.standard_normal((n, layout.size), dtype=np.float32)
    shared = random.standard_normal((20, layout.size), dtype=np.float32)
    rows += 0.5 * random.standard_normal((n, 20), dtype=np.float32) @ shared
    pairs = list(layout.pairs())
    for _, _, up in pairs:
        rows[:, up] *= np.float32(1e-3)
    for k in range(n if deficient else 0):
        layer, down, _ = pairs[k % len(pairs)]
        a = rows[k, down].reshape(layer.down_shape)
        a[-1] = a[0] if k % 2 else 0
    return rows


def compare(name: str, layout: Layout, args: tuple[int, int, int, int], deficient: bool) -> None:
    """Check that both agree, then time them."""
    landmarks, components, repeats, seed = args
    rows = adapters(layout, landmarks + 32, seed, deficient)
    train, new = rows[:landmarks], rows[landmarks:]
    ours, plain = DeltaPCA(layout=layout, n_components=components), Plain(layout)
    fits = {common.OURS: lambda: ours.fit(train), PLAIN: lambda: plain.fit(train, components)}
    fitting = common.alternate({way: common.timed(fit) for way, fit in fits.items()}, 1)
    # With our components, as single precision turns those of one variance into each other.
    kernel = plain.kernel(new)
    expected, got = kernel @ ours.dual_ - ours.offset_, ours.transform(new)
    off = np.linalg.norm(got - expected) / np.linalg.norm(expected)
    print(f"\n{name}: features differ by {off:.1e}, at most {BOUND:.1e} expected")
    assert off < BOUND
    title = f"DeltaPCA, {name}, {len(layout.layers)} layers, {landmarks} landmarks"
    common.show(f"{title}: fitting", "s", fitting, [common.Baseline(PLAIN)])
    alone = [new[k : k + 1] for k in range(8)]
    calls: dict[str, Callable[[Callable[[np.ndarray], np.ndarray]], common.Contender]] = {
        BATCH: lambda act: common.timed(lambda: act(new), len(new)),
        ALONE: lambda act: common.timed(lambda: [act(row) for row in alone], len(alone)),
    }
    for size, call in calls.items():
        ways = {
            common.OURS: call(ours.transform),
            PLAIN: call(lambda rows: plain.kernel(rows) @ ours.dual_ - ours.offset_),
        }
        costs = common.alternate(ways, repeats)
        common.show(
            f"{title}: {size}",
            "ms per file",
            costs,
            [common.Baseline(PLAIN, GOALS[size])],
            floor=floor(layout, landmarks) if size == BATCH else None,
        )


def floor(layout: Layout, landmarks: int) -> float:
    """CPU seconds of a file's matrix products at the rate of a large one; whitening's is half."""
    matrix = np.random.default_rng(0).standard_normal((1024, 1024), dtype=np.float32)
    rate = 2 * 1024**3 / min(common.measure(lambda: matrix @ matrix).cpu for _ in range(5))
    work = sum(
        2
        * layer.rank
        * (
            layer.out_features**2 / 2
            + landmarks * layer.rank * (layer.in_features + layer.out_features)
        )
        for layer, *_ in layout.pairs()
    )
    return work / rate


def main() -> None:
    """Run and print."""
    args = common.arguments(__doc__, repeats=5)
    chosen, landmarks = (slice(4), 48) if args.quick else (slice(None, None, 5), 256)
    layers = Layout.sd15_qv(rank=4).layers[chosen]
    mixed = [replace(layer, rank=(1, 2, 4, 8)[k % 4]) for k, layer in enumerate(layers)]
    sizes = (landmarks, landmarks // 3, args.repeats, args.seed)
    compare("rank 4", Layout.from_layers(layers), sizes, deficient=False)
    compare("mixed ranks", Layout.from_layers(mixed), sizes, deficient=False)
    compare("deficient ranks", Layout.from_layers(layers), sizes, deficient=True)
    common.facts(landmarks=landmarks, layers=len(layers), repeats=args.repeats)


if __name__ == "__main__":
    main()

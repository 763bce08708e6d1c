"""What two adapters have in common, by their effective updates ``dW = scale * up @ down``.

Three answers of rising cost, none of which depends on how a file spells the update:

* `update_hash`: whether the updates are the same numbers;
* `sketch`: a few hundred numbers per adapter, whose cosine estimates that of the updates;
* `overlap`: the exact cosine, and what the updates write and read in common.

An adapter is an iterable of modules ``(name, down, up, scale)``. Modules of the same name and
widths are compared; one that an adapter lacks counts as an update of zero. Factors that are
products themselves, of LoKr and LoHa, are never formed.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from lora_ws.functional.delta_gram import delta_gram, update_norms
from lora_ws.functional.hadamard import PairProducts, hadamard_norm
from lora_ws.functional.kronecker import KroneckerProduct, kronecker_norm
from lora_ws.functional.signs import Signs
from lora_ws.functional.update_modules import Factor, Modules, checked, formed, place, stacks

SIDE = 16
# Names this way of sketching. Another one gets another name, as their sketches do not compare.
METHOD = "lora_ws bilinear signs 1"
# Signs of all modules of SDXL and their likes take half of it.
MOST_SIGNS = 1 << 26
# Share of what it might be below which a sum of products of many signs is not to be trusted.
CANCELLED = 1e-6
FEW_ROWS = 4


def sketch(modules: Modules, side: int = SIDE) -> Float[np.ndarray, "*rows size"]:
    """``sum_l P_l dW_l Q_l^T / side``: a random projection of the whole update, linear in it.

    P_l and Q_l are signs ``[side, out]`` and ``[side, in]`` that hang on the module's name and
    widths alone, so that sketches made anywhere compare. The inner product of two sketches is an
    unbiased estimate of ``sum_l <dW_l, dW'_l>`` (Alon, Matias and Szegedy 1999, "The space
    complexity of approximating the frequency moments", applied to both sides). Where energy is
    spread over modules or directions, the estimate of a cosine c has a variance of about
    ``(1 - c^2)^2 / side^2``: 0.06 is its standard deviation at 0, and next to none is left at 1.
    What two updates share on one side of one module only, such as reading the same direction and
    writing orthogonal ones, fades more slowly: it adds a variance of ``x_l^2 y_l^2 / side``, x_l
    and y_l being the parts of the two norms that the module has.

    Args:
        modules: Of one adapter: finite A ``[rank, in]`` and B ``[out, rank]``; or of n adapters:
            A ``[n, rank, in]``, B ``[n, out, rank]``. Ranks and widths are free.
        side: Rows of the projections.

    Returns:
        Float64 ``[side * side]``, or ``[n, side * side]``; zeros for no modules.

    Raises:
        ConfigError: If factors do not fit each other, are no matrices, or a module comes twice.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> down, up = rng.standard_normal((2, 30)), rng.standard_normal((20, 2))
        >>> mixed = [("to_v", np.diag([2.0, 0.5]) @ down, up @ np.diag([0.5, 2.0]), 1.0)]
        >>> np.allclose(sketch([("to_v", down, up, 1.0)]), sketch(mixed))
        True
    """
    total = None
    for name, down, up, scale in checked(modules, stacks=True):
        write, read = place_signs(place(name, down, up), side, up.shape[-2], down.shape[-1])
        # float64, so that factors near the ends of float32 neither overflow nor vanish.
        left = write @ up.astype(np.float64)
        right = down.astype(np.float64) @ read.T
        product = scale / side * (left @ right)
        total = product if total is None else total + product
    if total is None:
        return np.zeros(side * side)
    return total.reshape(*total.shape[:-2], side * side)


def update_norm(modules: Modules) -> float:
    """Frobenius norm of the whole update of one adapter.

    Args:
        modules: Of one adapter, as for `sketch`.

    Returns:
        A norm; 0 for no modules.

    Raises:
        ConfigError: As for `sketch`.

    Example:
        >>> update_norm([("to_v", np.array([[3.0, 4.0]]), np.array([[2.0], [0.0]]), 0.5)])
        5.0
    """
    return float(np.linalg.norm(module_norms(modules)))


def module_norms(modules: Modules) -> Float[np.ndarray, " modules"]:
    """Frobenius norms of the updates of each module of one adapter.

    Args:
        modules: As for `sketch`.

    Raises:
        ConfigError: As for `sketch`.

    Example:
        >>> module_norms([("to_v", np.array([[3.0, 4.0]]), np.array([[2.0], [0.0]]), 0.5)])
        array([5.])
    """
    found = list(checked(modules))
    norms = np.empty(len(found))
    small: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for k, (_, down, up, _) in enumerate(found):
        if not isinstance(down, np.ndarray) or not isinstance(up, np.ndarray):
            norms[k] = factor_norm(down, up)
        elif len(down) < min(down.shape[1], len(up)):
            small[k] = down, up
        else:
            norms[k] = factor_norm(down, up)
    for part, a, b in stacks(small, np.float64):
        norms[part] = low_rank_norms(a, b)
    return norms * np.abs([scale for *_, scale in found])


class Overlap(NamedTuple):
    """What the updates of two adapters, a and b, have in common.

    Attributes:
        names: Modules of a, then those of b alone.
        cosine: Of the updates of each module, from -1 to 1; 0 where one is zero or missing.
        left: The same of ``dW dW^T``, from 0 to 1: what both write, whatever they read.
        right: The same of ``dW^T dW``: what both read.
        norms: Frobenius norms of the updates of a and of b ``[modules, 2]``.
    """

    names: tuple[str, ...]
    cosine: Float[np.ndarray, " modules"]
    left: Float[np.ndarray, " modules"]
    right: Float[np.ndarray, " modules"]
    norms: Float[np.ndarray, "modules 2"]

    @property
    def total(self) -> tuple[float, float, float]:
        """Cosine, left and right of the whole: the mean over modules, by their norms' products.

        For the cosine this is exactly that of the whole updates. A module that one of them lacks
        weighs on all three as no agreement.
        """
        whole = np.linalg.norm(self.norms, axis=0).prod()
        weights = self.norms.prod(axis=1) / (whole or 1.0)
        cosine, left, right = (float(weights @ v) for v in (self.cosine, self.left, self.right))
        return cosine, left, right

    @property
    def ratio(self) -> float:
        """Norm of b over that of a; NaN where a is zero."""
        mine, other = np.linalg.norm(self.norms, axis=0)
        return float(other / mine) if mine > 0 else float("nan")


def overlap(a: Modules, b: Modules) -> Overlap:
    """Compare the updates of two adapters exactly, from their factors.

    Args:
        a: Modules of one adapter, as for `sketch`.
        b: Modules of another; ranks may differ.

    Returns:
        Agreement by module and, in `Overlap.total`, of the whole.

    Raises:
        ConfigError: As for `sketch`.

    Example:
        >>> down, up = np.array([[3.0, 4.0]]), np.array([[2.0], [0.0]])
        >>> found = overlap([("to_v", down, up, 1.0)], [("to_v", down, up[::-1], 3.0)])
        >>> [round(value, 3) for value in found.total], round(found.ratio, 3)
        ([0.0, 0.0, 1.0], 3.0)
    """
    mine, others = (
        {place(n, down, up): (formed(down), formed(up), s) for n, down, up, s in checked(side)}
        for side in (a, b)
    )
    places = list(dict.fromkeys([*mine, *others]))
    rows = np.zeros((len(places), 5))
    for row, where in zip(rows, places, strict=True):
        both = [side[where] for side in (mine, others) if where in side]
        row[3:] = [_norm(side.get(where)) for side in (mine, others)]
        if len(both) == 2:
            # Of a scale only the sign matters here, and whether it is zero.
            down, up = _stacked([(a, np.sign(scale) * b) for a, b, scale in both])
            row[:3] = [delta_gram(down, up, k)[0, 1] for k in ("delta", "left", "right")]
    names = tuple(where.rsplit(" ", 1)[0] for where in places)
    return Overlap(names, rows[:, 0], rows[:, 1], rows[:, 2], rows[:, 3:])


_signs = Signs(METHOD, MOST_SIGNS).get


def place_signs(where: str, side: int, outputs: int, inputs: int) -> tuple[np.ndarray, np.ndarray]:
    """P and Q of a module, float64 ``[side, outputs]`` and ``[side, inputs]``; see `sketch`.

    Args:
        where: Its `place`.
        side: Rows.
        outputs: Of the module.
        inputs: Of the module.
    """
    return _signs(f"{where} write", side, outputs), _signs(f"{where} read", side, inputs)


def factor_norm(down: Factor, up: Factor) -> float:
    """Norm of ``up @ down`` in float64, by the cheapest way that is exact."""
    if isinstance(down, KroneckerProduct) and isinstance(up, KroneckerProduct):
        return kronecker_norm(down, up)
    if isinstance(down, PairProducts) and isinstance(up, PairProducts):
        return hadamard_norm(down, up)
    a, b = formed(down).astype(np.float64), formed(up).astype(np.float64)
    rank, inputs = a.shape
    if rank < min(inputs, len(b)):
        return float(low_rank_norms(a[None], b[None])[0])
    # A whole matrix beside the identity, or so many components that the product is smaller.
    if rank == inputs and np.array_equal(a, np.eye(rank)):
        return float(np.linalg.norm(b))
    if rank == len(b) and np.array_equal(b, np.eye(rank)):
        return float(np.linalg.norm(a))
    return float(np.linalg.norm(b @ a))


def low_rank_norms(
    down: Float[np.ndarray, "n rank i"], up: Float[np.ndarray, "n o rank"]
) -> Float[np.ndarray, " n"]:
    """Norms of ``up @ down`` in float64, of fewer components than inputs and outputs."""
    read, written = _gram(down), _gram(up.transpose(0, 2, 1))
    # What is too large or cancels is computed another way.
    with np.errstate(over="ignore", invalid="ignore"):
        square = (read * written).sum(axis=(1, 2))
        most = read.trace(axis1=1, axis2=2) * written.trace(axis1=1, axis2=2)
        steady = (
            (square > CANCELLED * most) & (square < np.inf) & (most > np.finfo(np.float64).tiny)
        )
        norms = np.sqrt(square)
    if not steady.all():
        norms[~steady] = update_norms(down[~steady], up[~steady])
    return norms


def _gram(rows: Float[np.ndarray, "n rank d"]) -> Float[np.ndarray, "n rank rank"]:
    """Inner products of rows; of few rows one by one, which takes half as long."""
    if 1 < rows.shape[1] <= FEW_ROWS:
        return np.vecdot(rows[:, :, None], rows[:, None])
    return rows @ rows.transpose(0, 2, 1)


def _stacked(pairs: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Factors of unequal ranks as one stack; rows and columns of zeros change no update."""
    rank = max(len(down) for down, _ in pairs)
    down = [np.pad(a.astype(np.float64), ((0, rank - len(a)), (0, 0))) for a, _ in pairs]
    up = [np.pad(b.astype(np.float64), ((0, 0), (0, rank - b.shape[1]))) for _, b in pairs]
    return np.stack(down), np.stack(up)


def _norm(factors: tuple[np.ndarray, np.ndarray, float] | None) -> float:
    if factors is None:
        return 0.0
    down, up, scale = factors
    return float(abs(scale) * update_norms(down[None], up[None])[0])

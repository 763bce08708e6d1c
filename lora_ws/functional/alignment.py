"""What labels show about kernels of updates: which count, and which inputs separate classes."""

import numpy as np
from jaxtyping import Float, Shaped

from lora_ws.functional.delta_gram import Directions, unit_updates


def kernel_alignment(gram: Float[np.ndarray, "n n"], labels: Shaped[np.ndarray, " n"]) -> float:
    """Measure how far a kernel is large within classes: the alignment of Cortes et al. (2012).

    The cosine between the centred kernel and the centred kernel of equal labels (Cortes, Mohri and
    Rostamizadeh, "Algorithms for learning kernels based on centered alignment"), over pairs of
    different rows: of a row with itself a kernel says nothing.

    Args:
        gram: Symmetric kernel ``[n, n]``.
        labels: Class of each row.

    Returns:
        A number from -1 to 1; 0 where the kernel or the labels are all the same.

    Example:
        >>> y = np.array([0, 0, 1, 1])
        >>> round(kernel_alignment((y[:, None] == y).astype(float), y), 6)
        1.0
    """
    own, wanted = _centred(gram), _centred((labels[:, None] == labels).astype(np.float64))
    for centred in (own, wanted):
        np.fill_diagonal(centred, 0.0)
    size, ideal = np.linalg.norm(own), np.linalg.norm(wanted)
    # The norm of a constant kernel, once centred, is rounding.
    noise = 1e-12 * len(gram)
    if size <= noise * np.abs(gram).max(initial=0.0) or ideal <= noise:
        return 0.0
    return float(np.vdot(own, wanted) / (size * ideal))


def nonnegative_weights(
    moment: Float[np.ndarray, "k k"], aligned: Float[np.ndarray, " k"]
) -> Float[np.ndarray, " k"]:
    """Solve non-negative least squares from its normal equations: ``alignf`` of Cortes et al.

    Weights ``v >= 0`` minimise ``|sum_k v_k K_k - Y|^2``, which is the sum of centred kernels of
    highest alignment with a target kernel Y: kernels that say the same share one weight, where
    weights by `kernel_alignment` alone count each in full.

    Args:
        moment: ``<K_k, K_l>``, symmetric and positive semi-definite.
        aligned: ``<K_k, Y>``.

    Returns:
        Weights, 0 where a kernel adds nothing.

    Example:
        >>> nonnegative_weights(np.array([[2.0, 1.0], [1.0, 2.0]]), np.array([3.0, 0.0]))
        array([1.5, 0. ])
    """
    from scipy.optimize import nnls  # slow to import, and only fitting needs it

    values, vectors = np.linalg.eigh(moment)
    # Directions in which kernels do not differ but for rounding decide nothing.
    kept = values > len(values) * np.finfo(np.float64).eps * max(values[-1], 0.0)
    if not kept.any():
        return np.zeros(len(moment))
    root = np.sqrt(values[kept])[:, None]
    return nnls(root * vectors[:, kept].T, (vectors[:, kept].T @ aligned) / root[:, 0])[0]


def scatter(gram: Float[np.ndarray, "n n"]) -> float:
    """Mean squared distance of the rows to their mean, in the space of a kernel.

    Args:
        gram: Symmetric kernel ``[n, n]``.

    Example:
        >>> x = np.array([[0.0], [2.0]])
        >>> scatter(x @ x.T)
        1.0
    """
    return float(np.trace(gram) / len(gram) - gram.mean())


def agreement(
    updates: Directions, labels: Shaped[np.ndarray, " n"]
) -> Float[np.ndarray, "in_features in_features"]:
    """Second moment of the inputs on which different updates of one class agree.

    The sum of ``dW_i^T dW_j`` over pairs i, j of different adapters of a class, each update scaled
    to unit norm. A random start of A makes its expectation 0 but for inputs that all updates of
    the class answer alike; their leading directions are `leading_inputs`.

    Args:
        updates: Of one layer, as ``update_directions(..., "delta")`` gives them.
        labels: Class of each adapter.

    Returns:
        A symmetric matrix; eigenvalues near or below 0 are those of inputs without agreement.

    Example:
        >>> down, up = np.array([[[1.0, 0.0]], [[1.0, 0.0]]]), np.array([[[2.0]], [[3.0]]])
        >>> from lora_ws.functional.delta_gram import update_directions
        >>> agreement(update_directions(down, up, "delta"), np.array([0, 0])).round(6) + 0.0
        array([[2., 0.],
               [0., 0.]])
    """
    written, read = unit_updates(updates.first), updates.second
    own = (written @ written.transpose(0, 2, 1) @ read).reshape(-1, read.shape[2])
    moment = -own.T @ read.reshape(-1, read.shape[2])
    for label in np.unique(labels):
        members = labels == label
        # The mean update of a class is the one matrix of full size that is made.
        total = written[members].reshape(-1, written.shape[2]).T @ read[members].reshape(
            -1, read.shape[2]
        )
        moment += total.T @ total
    return moment


def leading_inputs(
    moment: Float[np.ndarray, "in_features in_features"], count: int
) -> Float[np.ndarray, "in_features count"]:
    """Take the inputs of largest agreement, each as long as the root of its share.

    Args:
        moment: As `agreement` returns it, or a sum of such.
        count: How many.

    Returns:
        Orthogonal columns; zeros where there is no agreement.

    Example:
        >>> abs(leading_inputs(np.diag([3.0, -1.0, 1.0]), 2)).round(3)
        array([[0.866, 0.   ],
               [0.   , 0.   ],
               [0.   , 0.5  ]])
    """
    values, vectors = np.linalg.eigh(moment)
    values = np.maximum(values[::-1][:count], 0.0)
    return vectors[:, ::-1][:, :count] * np.sqrt(values / max(values.sum(), np.finfo(float).tiny))


def _centred(gram: np.ndarray) -> np.ndarray:
    mean = gram.mean(axis=0)
    return gram - mean - mean[:, None] + mean.mean()

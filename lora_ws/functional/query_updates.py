"""Which directions training can write into the queries of cross-attention, given a prompt.

With frozen keys ``k_j`` and values ``v_j`` of the prompt's tokens, a query q attends with
``p = softmax(K q)`` and reads ``o = sum_j p_j v_j``, so that a gradient g of what is read becomes

    dL/dq = sum_j p_j (g . (v_j - o)) k_j

A low-rank update ``B A`` of the query projection starts with B = 0, and the gradient of B is
``dL/dq (A x)^T`` summed over hidden states x. Hence B is made of the prompt's keys, head by head,
and its second moment follows from weights that no training touched. Adam divides every number by
its own root mean square, which leaves the correlations.
"""

import numpy as np
from jaxtyping import Float

from lora_ws.errors import ConfigError


def update_covariance(
    attention: Float[np.ndarray, "*heads n tokens"],
    weights: Float[np.ndarray, " n"],
    keys: Float[np.ndarray, "*heads tokens d"],
    values: Float[np.ndarray, "*heads tokens e"],
) -> Float[np.ndarray, "*heads d d"]:
    """Second moment of ``sum_n sqrt(w_n) dL/dq_n`` for independent white gradients g.

    Args:
        attention: probabilities p of n queries; they sum to 1 over the tokens.
        weights: squared norms of the queries' hidden states, for A of white noise.
        keys: k_j.
        values: v_j, as the output projection of their head leaves them.

    Returns:
        ``sum_n w_n K^T P (V - 1 o^T)(V - 1 o^T)^T P K`` with P = diag(p), of rank below the number
        of tokens; no matrix larger than ``[tokens, tokens]`` or ``[n, tokens]`` is formed.

    Example:
        >>> attention, keys = np.array([[[0.5, 0.5]]]), np.array([[[1.0, 0.0], [0.0, 1.0]]])
        >>> update_covariance(attention, np.ones(1), keys, np.array([[[1.0], [-1.0]]]))
        array([[[ 0.25, -0.25],
                [-0.25,  0.25]]])
    """
    gram = values @ values.swapaxes(-1, -2)
    weighted = (attention * weights[:, None]).swapaxes(-1, -2)
    read = attention * (attention @ gram)  # p_j (v_j . o)
    cross = weighted @ read
    norm = attention * read.sum(axis=-1, keepdims=True)  # p_j (o . o)
    moment = gram * (weighted @ attention) - cross - cross.swapaxes(-1, -2) + weighted @ norm
    return keys.swapaxes(-1, -2) @ moment @ keys


def noisy_correlation(
    covariance: Float[np.ndarray, "*batch d d"], noise: float
) -> Float[np.ndarray, "*batch d d"]:
    """Correlations with a share of independent noise, positive definite.

    Args:
        covariance: positive semi-definite; a direction of no variance is noise alone.
        noise: added to the diagonal before it is scaled back to 1, above 0.

    Raises:
        ConfigError: there is no noise.

    Example:
        >>> noisy_correlation(np.array([[4.0, 2.0], [2.0, 1.0]]), 0.25).round(2)
        array([[1. , 0.8],
               [0.8, 1. ]])
    """
    if not noise > 0:
        raise ConfigError(f"expected a share of noise above 0, got {noise}; 0.01 is a good start")
    variance = np.diagonal(covariance, axis1=-2, axis2=-1)
    scale = 1 / np.sqrt(np.where(variance > 0, variance, 1))
    correlation = covariance * scale[..., :, None] * scale[..., None, :] / (1 + noise)
    diagonal = np.arange(covariance.shape[-1])
    correlation[..., diagonal, diagonal] = 1.0
    return correlation


def log_likelihood_ratio(
    written: Float[np.ndarray, "n rank heads d"],
    correlations: Float[np.ndarray, "words heads d d"],
) -> Float[np.ndarray, "n words"]:
    """Log-likelihood of written directions under normal distributions, above that of white noise.

    The scale of each head is unknown and takes its most likely value. An update of higher rank
    counts as one draw whose second moment is ``sum_r l_r l_r^T``, so that the result does not
    depend on how the update was split into factors, and at rank 1 is exact.

    Args:
        written: rows l with ``dW dW^T = sum l l^T`` (`update_directions`, left), head by head.
        correlations: positive definite with unit diagonals, one a word and head.

    Returns:
        In nats, summed over heads; a head without update adds 0.

    Example:
        >>> alike = np.array([[[[1.0, 0.9], [0.9, 1.0]]]])
        >>> log_likelihood_ratio(np.array([[[[1.0, 1.0]]], [[[1.0, -1.0]]]]), alike).round(2)
        array([[ 1.47],
               [-1.47]])
    """
    width = written.shape[-1]
    square = np.square(written).sum(axis=(1, 3))
    moved = square > 0
    # A moment of unit trace neither over- nor underflows.
    unit = written / np.sqrt(np.where(moved, square, 1))[:, None, :, None]
    roots = np.linalg.cholesky(correlations)
    half_logdets = np.log(np.diagonal(roots, axis1=2, axis2=3)).sum(axis=2)
    result = np.empty((len(written), len(correlations)))
    for word, inverse in enumerate(np.linalg.inv(roots)):
        energy = np.square(np.einsum("hde,nrhe->nrhd", inverse, unit)).sum(axis=(1, 3))
        ratio = -0.5 * width * np.log(np.where(moved, energy, 1)) - half_logdets[word]
        result[:, word] = (ratio * moved).sum(axis=1)
    return result

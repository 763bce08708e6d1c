"""The probability from which on a label is predicted to apply."""

import numpy as np
from jaxtyping import Bool, Float

from lora_ws.errors import ConfigError


def f1_threshold(
    probabilities: Float[np.ndarray, " rows"], applies: Bool[np.ndarray, " rows"]
) -> float:
    """Choose the threshold of one label with the highest F1 on rows that were not trained on.

    Halfway between two probabilities, so that it does not hang on rounding; of equals the highest.

    Args:
        probabilities: of the label ``[rows]``.
        applies: whether it is true ``[rows]``.

    Returns:
        The threshold: the label is said where the probability is at least that; 0.5 where it
        applies to no row, as F1 is then 0 whatever is predicted.

    Raises:
        ConfigError: there are no rows, or the shapes do not match.

    Example:
        >>> round(f1_threshold(np.array([0.1, 0.3, 0.4]), np.array([False, True, True])), 3)
        0.2
    """
    if probabilities.ndim != 1 or not probabilities.size or applies.shape != probabilities.shape:
        raise ConfigError(
            f"expected probabilities and labels [rows] of at least one row, got "
            f"{probabilities.shape} and {applies.shape}; pass the labels of the same rows"
        )
    if not applies.any():
        return 0.5
    order = np.argsort(-probabilities, kind="stable")
    values, hits = probabilities[order].astype(np.float64), applies[order].cumsum()
    said = np.arange(1, len(values) + 1)
    f1 = 2 * hits / (said + hits[-1])
    below = np.append(values[1:], 0.0)
    # Equal probabilities are said together.
    f1[:-1][values[:-1] == values[1:]] = -1
    best = int(f1.argmax())
    return float(values[best] + below[best]) / 2

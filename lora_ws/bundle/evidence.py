"""Which layers a verdict rests on."""

import numpy as np
from jaxtyping import Float

from lora_ws.adapters import Layout
from lora_ws.bundle import Bundle

ROWS_AT_ONCE = 64
# The logarithm of a probability that is 0 in float64.
TINY = np.finfo(np.float64).tiny


def layer_evidence(
    bundle: Bundle, row: Float[np.ndarray, " params"], layout: Layout | None = None
) -> dict[str, float]:
    """What each layer adds to the most probable class, by taking the layer's update away.

    A classifier that looks at single layers one by one is judged fairly by this; where layers say
    the same, each of them seems to add little.

    Args:
        bundle: the classifier.
        row: an adapter in the bundle's layout.
        layout: that layout at other ranks, of a bundle that reads any.

    Returns:
        layer -> by how much the log-odds of the class fall without it (nats); negative where the
        layer speaks against the class. Of the layers that the bundle reads.
    """
    layout = layout or bundle.layout
    read = set(bundle.layers)
    pairs = [pair for pair in layout.pairs() if pair[0].name in read]
    # The whole adapter is the first of the rows: a call for itself would cost as much as for all.
    taken = [(), *((down, up) for _, down, up in pairs)]
    found = []
    for start in range(0, len(taken), ROWS_AT_ONCE):
        block = taken[start : start + ROWS_AT_ONCE]
        without = np.repeat(row[None], len(block), axis=0)
        for copy, columns in zip(without, block, strict=True):
            for one in columns:
                copy[one] = 0
        found.append(bundle.predict_proba(without, layout))
    probabilities = np.concatenate(found)
    best, several = int(probabilities[0].argmax()), bool(bundle.confidence.thresholds)
    whole, *without = _log_odds(probabilities, best, several)
    names = [layer.name for layer, _, _ in pairs]
    return {name: float(whole - odds) for name, odds in zip(names, without, strict=True)}


def _log_odds(
    probabilities: Float[np.ndarray, "rows classes"], best: int, several: bool
) -> np.ndarray:
    likely = probabilities[:, best]
    others = 1 - likely if several else np.delete(probabilities, best, axis=1).sum(axis=1)
    return np.log(np.maximum(likely, TINY)) - np.log(np.maximum(others, TINY))

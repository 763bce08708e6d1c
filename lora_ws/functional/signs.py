"""Random signs for projections: the same for a name on every machine, kept within a bound."""

import hashlib
from collections import OrderedDict
from threading import Lock

import numpy as np
from jaxtyping import Float


class Signs:
    """Random signs that hang on names alone; those drawn are kept, the longest unused goes first.

    Args:
        method: what names the way of drawing them.
        most: how many are kept, a byte each.

    Example:
        >>> Signs("example", most=100).get("to_v read", 2, 4).tolist()
        [[1.0, 1.0, -1.0, 1.0], [1.0, 1.0, 1.0, -1.0]]
    """

    def __init__(self, method: str, most: int) -> None:
        self.method = method
        self.most = most
        self.size = 0
        self.kept: OrderedDict[tuple[str, int, int], np.ndarray] = OrderedDict()
        self.lock = Lock()

    def get(self, place: str, side: int, width: int) -> Float[np.ndarray, "side width"]:
        """Signs as float64.

        Args:
            place: what they are for.
            side: rows.
            width: columns.
        """
        key = place, side, width
        with self.lock:
            if key in self.kept:
                self.kept.move_to_end(key)
                return self.kept[key].astype(np.float64)
        # From the bits of SHAKE-256: the same on any machine, whatever the version of numpy.
        stream = hashlib.shake_256(f"{self.method} {place}".encode()).digest(-(-side * width // 8))
        bits = np.unpackbits(np.frombuffer(stream, np.uint8), count=side * width)
        signs = (1 - 2 * bits.astype(np.int8)).reshape(side, width)
        with self.lock:
            if key not in self.kept and signs.nbytes <= self.most:
                self.kept[key] = signs
                self.size += signs.nbytes
            while self.size > self.most:
                self.size -= self.kept.popitem(last=False)[1].nbytes
        return signs.astype(np.float64)

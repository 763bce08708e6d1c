"""Features of names from a file."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float

from lora_ws.config import nearest
from lora_ws.errors import ConfigError

NAMES, FEATURES = "names", "features"
KINDS = (".npy", ".npz", ".parquet")
DAMAGE = (OSError, EOFError, ValueError, KeyError, TypeError, pa.ArrowException)


def read_features(file: Path, names: Sequence[str]) -> Float[np.ndarray, "names width"]:
    """Read the features of names from a file.

    Args:
        file: ``.npy`` with ``[names, width]`` in the order of the names; ``.npz`` or ``.parquet``
            with ``names`` and ``features``, in any order and with any others.
        names: whose features.

    Raises:
        ConfigError: there is no such file, it holds something else, or lacks a name.
    """
    if file.suffix not in KINDS or not file.is_file():
        raise ConfigError(f"task.texts: expected a file, {' or '.join(KINDS)}, got {file}")
    try:
        known, features = _read(file)
    except DAMAGE as error:
        raise ConfigError(
            f"task.texts: expected `{NAMES}` and `{FEATURES}` of one length in {file}, got {error}"
        ) from error
    if known is not None:
        if lacking := sorted(set(names) - set(known)):
            raise ConfigError(
                f"task.texts: {file} has no features of `{lacking[0]}`{nearest(lacking[0], known)}"
            )
        places = {name: place for place, name in enumerate(known)}
        features = features[[places[name] for name in names]]
    return _checked(features, len(names), file)


def _read(file: Path) -> tuple[list[str] | None, np.ndarray]:
    if file.suffix == ".npy":
        return None, np.load(file, allow_pickle=False)
    if file.suffix == ".npz":
        held = np.load(file, allow_pickle=False)
        names, features = held[NAMES].tolist(), held[FEATURES]
    else:
        table = pq.read_table(file, columns=[NAMES, FEATURES])
        names, features = table[NAMES].to_pylist(), np.array(table[FEATURES].to_pylist(), float)
    if len(names) != len(features):
        raise ValueError(f"{len(names)} names and {len(features)} rows")
    return names, features


def _checked(features: np.ndarray, count: int, file: Path) -> np.ndarray:
    if features.ndim != 2 or len(features) != count:
        raise ConfigError(
            f"task.texts: expected features [{count}, width] in {file}, a row for each name in "
            f"their sorted order, got {list(features.shape)}; `{NAMES}` beside `{FEATURES}` in a "
            ".npz or .parquet leave the order open"
        )
    if not np.issubdtype(features.dtype, np.number) or not np.isfinite(features).all():
        raise ConfigError(f"task.texts: expected finite numbers in {file}, got {features.dtype}")
    return features.astype(np.float32)

"""Parameters chosen by validation: every combination of some values, and which one was best."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import numpy as np
from sklearn.base import clone

from lora_ws.config import nearest
from lora_ws.errors import ConfigError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    class HasChoices(DataclassInstance, Protocol):
        """A spec with choices to make."""

        @property
        def choose(self) -> Mapping[str, Sequence[Any]]:
            """Candidate values by dotted key."""
            ...


S = TypeVar("S", bound="HasChoices")
T = TypeVar("T")
# What may be chosen; everything else decides which question is asked, or of which rows.
ROOTS = ("model", "featurizer", "fit", "matrices")


@dataclass(frozen=True)
class Candidate(Generic[S]):
    """One combination.

    Attributes:
        values: chosen, by dotted key; records repeat them.
        spec: with these values, and nothing left to choose.
    """

    values: dict[str, Any]
    spec: S


def candidates(spec: S) -> list[Candidate[S]]:
    """Take every combination of the values in ``spec.choose``, the last key varying fastest.

    Args:
        spec: a dataclass; ``choose`` maps dotted keys, such as ``model.C``, to values.

    Returns:
        The combinations; the spec itself where there is nothing to choose.

    Raises:
        ConfigError: a key is none of the model, featurizer, fit or matrices, or has no values.
    """
    choices = dict(spec.choose)
    for key, values in choices.items():
        if not values:
            raise ConfigError(f"choose.{key}: expected at least one value, got none")
    plain, found = replace(spec, choose={}), []
    for values in product(*choices.values()):
        chosen = dict(zip(choices, values, strict=True))
        found.append(Candidate(chosen, with_values(plain, chosen)))
    return found


def with_values(spec: T, values: Mapping[str, Any], flag: str = "choose") -> T:
    """A copy of an experiment with other values.

    Args:
        spec: the experiment.
        values: by dotted key, such as ``model.C``.
        flag: what the user calls them, for errors.

    Raises:
        ConfigError: a key is none of the model, featurizer, fit or matrices.
    """
    for key, value in values.items():
        if key.partition(".")[0] not in ROOTS:
            raise ConfigError(f"{flag}: expected keys of {', '.join(ROOTS)}, got `{key}`")
        spec = _with(spec, key, value, f"{flag}.{key}")
    return spec


def best(qualities: Sequence[float]) -> int:
    """Number of the best candidate: of the highest quality, the first of several.

    Args:
        qualities: of each candidate on the validation rows, such as ``Task.selects`` says; NaN
            is worse than all.

    Example:
        >>> best([0.7, float("nan"), 0.9, 0.9])
        2
    """
    values = np.asarray(qualities, float)
    return int(np.argmax(np.where(np.isnan(values), -np.inf, values)))


def _with(owner: Any, key: str, value: Any, whole: str) -> Any:
    """A copy of a dataclass or estimator with another value at a dotted key."""
    name, _, rest = key.partition(".")
    if is_dataclass(owner):
        known = [field.name for field in fields(owner)]
    elif hasattr(owner, "get_params"):
        known = list(owner.get_params(deep=False))
    else:
        raise ConfigError(f"{whole}: {owner!r} has no `{name}`; leave it out")
    if name not in known:
        where = type(owner).__name__
        raise ConfigError(f"{whole}: no `{name}` in {where}{nearest(name, known)}")
    if rest:
        value = _with(getattr(owner, name), rest, value, whole)
    if is_dataclass(owner) and not isinstance(owner, type):
        return replace(owner, **{name: value})
    copied: Any = clone(owner)
    return copied.set_params(**{name: value})

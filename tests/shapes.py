"""The type checker of the runs with array shapes checked: an int may stand for a float."""

import inspect
from functools import partial
from typing import Any

from beartype import BeartypeConf, beartype

_CONF = BeartypeConf(is_pep484_tower=True)


def checked(target: Any) -> Any:
    """Check what a function or dataclass takes and returns, as ``beartype.beartype`` does."""
    return beartype(conf=_CONF)(target)


def unchecked(target: Any) -> Any:
    """A function or method without that check, for its own answer to an argument of a wrong type.

    Other decorators are taken off with it.
    """
    plain = inspect.unwrap(getattr(target, "__func__", target))
    return partial(plain, target.__self__) if inspect.ismethod(target) else plain

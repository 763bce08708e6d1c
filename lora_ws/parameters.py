"""`Parametrized`: what scikit-learn asks of an object that it clones, searches over and prints.

It asks for ``get_params`` and ``set_params``, not for `sklearn.base.BaseEstimator`, whose import
takes longer than to classify a file.
"""

import inspect
from typing import Any, Self

from lora_ws.errors import ConfigError


class Parametrized:
    """An object whose constructor only stores: each argument is an attribute of the same name.

    Example:
        >>> class Ball(Parametrized):
        ...     def __init__(self, *, radius: float = 1.0, colour: str = "red") -> None:
        ...         self.radius = radius
        ...         self.colour = colour
        >>> Ball(radius=2.0)
        Ball(radius=2.0)
        >>> Ball().set_params(colour="blue").get_params()
        {'colour': 'blue', 'radius': 1.0}
    """

    @classmethod
    def _defaults(cls) -> dict[str, Any]:
        """Name and default of each constructor argument, by name."""
        if cls.__init__ is object.__init__:
            return {}
        arguments = inspect.signature(cls.__init__).parameters.items()
        return {name: held.default for name, held in sorted(arguments) if name != "self"}

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the constructor's arguments, by name.

        Args:
            deep: add those of arguments that have some of their own, as ``argument__name``.
        """
        found: dict[str, Any] = {}
        for name in self._defaults():
            value = found[name] = getattr(self, name)
            if deep and hasattr(value, "get_params") and not isinstance(value, type):
                found |= {f"{name}__{key}": held for key, held in value.get_params().items()}
        return found

    def set_params(self, **params: Any) -> Self:
        """Set arguments by name, or those of an argument by ``argument__name``.

        Raises:
            ConfigError: the constructor has no such argument.
        """
        known = self._defaults()
        for key, value in params.items():
            name, nested, rest = key.partition("__")
            if name not in known:
                raise ConfigError(
                    f"{type(self).__name__}: no parameter `{name}`; expected one of "
                    f"{', '.join(known)}"
                )
            if nested:
                getattr(self, name).set_params(**{rest: value})
            else:
                setattr(self, name, value)
        return self

    def __repr__(self) -> str:
        default = self._defaults()
        held = {name: repr(value) for name, value in self.get_params(deep=False).items()}
        changed = [f"{n}={text}" for n, text in held.items() if text != repr(default[n])]
        return f"{type(self).__name__}({', '.join(changed)})"

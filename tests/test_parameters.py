"""What is not inherited from scikit-learn is held to it."""

from typing import Any

import pytest
from sklearn.base import BaseEstimator, clone

from lora_ws.parameters import Parametrized


def pair(base: type) -> tuple[Any, Any]:
    """An inner and an outer object of classes that differ in their base alone."""

    class Inner(base):
        def __init__(self, *, size: int = 1, colour: str = "red") -> None:
            self.size = size
            self.colour = colour

    class Outer(base):
        def __init__(
            self, *, held: Any = None, kind: Any = int, names: tuple[str, ...] = ()
        ) -> None:
            self.held = held
            self.kind = kind
            self.names = names

    return Inner, Outer


@pytest.mark.parametrize("deep", [False, True])
def test_parameters_are_those_of_scikit_learn(deep: bool) -> None:
    found = []
    for base in (Parametrized, BaseEstimator):
        Inner, Outer = pair(base)
        outer = Outer(held=Inner(size=2), names=("a",)).set_params(held__colour="blue", kind=str)
        params = clone(outer).get_params(deep)
        found.append((repr(outer), {name: repr(value) for name, value in params.items()}))
    assert found[0] == found[1]
    assert (
        found[0][0] == "Outer(held=Inner(colour='blue', size=2), kind=<class 'str'>, names=('a',))"
    )


def test_a_clone_shares_nothing_that_changes() -> None:
    Inner, Outer = pair(Parametrized)
    outer = Outer(held=Inner(size=2))
    clone(outer).set_params(held__size=3)
    assert outer.held.size == 2


def test_without_a_constructor_there_are_no_parameters() -> None:
    assert Parametrized().get_params() == {}
    assert repr(Parametrized()) == "Parametrized()"

"""Which representations are of the update B·A, and which of the numbers that make it."""

import numpy as np
import pytest
from tolerances import EXACT

import lora_ws.featurizers
from lora_ws.adapters import LayerSpec, Layout
from lora_ws.featurizers import Featurizer

KINDS = [
    kind
    for kind in map(vars(lora_ws.featurizers).get, lora_ws.featurizers.__all__)
    if isinstance(kind, type) and kind is not Featurizer
]


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_features_say_truly_whether_they_are_of_the_update(
    kind: type[Featurizer], rank: int
) -> None:
    layout = Layout.from_layers([LayerSpec("a", 9, 8, rank), LayerSpec("b", 7, 9, rank)])
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((12, layout.size))
    other = np.empty_like(rows)
    for _, down, up in layout.pairs():
        a, b = rows[:, down].reshape(12, rank, -1), rows[:, up].reshape(12, -1, rank)
        mixing = rng.standard_normal((12, rank, rank)) + 2 * np.eye(rank)
        other[:, down] = (np.linalg.inv(mixing) @ a).reshape(12, -1)
        other[:, up] = (b @ mixing).reshape(12, -1)
    given = kind()
    if "layout" in given.get_params():
        given.set_params(layout=layout)
    fitted = given.fit(rows)
    same = np.allclose(fitted.transform(rows), fitted.transform(other), rtol=EXACT, atol=EXACT)
    assert same is kind.invariant

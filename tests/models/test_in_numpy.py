"""Networks that numpy runs: equal to their modules in torch, and as strict about their state."""

import numpy as np
import pytest
import torch
from tolerances import EXACT, rounding, terms_of

from lora_ws.models import MLP, DeepSets, InputSpec, Metanetwork
from lora_ws.models.kernel_machine import KernelMachine
from lora_ws.models.linear import Linear

WIDTH = 7
NETWORKS = {
    "mlp": MLP(hidden=(9, 5)),
    "one hidden layer": MLP(hidden=(3,)),
    "linear": Linear(),
    "linear of a kernel": Linear(normalize=False),
    "precomputed": KernelMachine(kernel="precomputed"),
    "svm": KernelMachine(kernel="linear"),
    "poly": KernelMachine(kernel="poly", gamma=0.3, coef0=0.5, degree=2, vectors=6),
    "rbf": KernelMachine(kernel="rbf", gamma=0.2, vectors=6),
    "sigmoid": KernelMachine(kernel="sigmoid", gamma=0.1, coef0=0.1, vectors=6),
}


def state_of(network: Metanetwork, outputs: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Random numbers in the shapes of the module."""
    draw = torch.Generator().manual_seed(len(repr(network)) + outputs)
    module = network.build(InputSpec(WIDTH), outputs)
    return {
        name: torch.rand(value.shape, generator=draw, dtype=dtype) + 0.5 * ("scale" in name) - 0.2
        for name, value in module.state_dict().items()
    }


@pytest.mark.parametrize("outputs", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_equal_to_the_module(network: Metanetwork, dtype: torch.dtype, outputs: int) -> None:
    state = state_of(network, outputs, dtype)
    module = network.build(InputSpec(WIDTH), outputs).to(dtype)
    module.load_state_dict(state)
    rows = torch.randn(11, WIDTH, generator=torch.Generator().manual_seed(1), dtype=dtype)
    arrays = {name: value.numpy() for name, value in state.items()}
    score = network.in_numpy(InputSpec(WIDTH), outputs, arrays)
    assert score is not None
    with torch.no_grad():
        expected = module(rows).numpy()
    found = score(rows.numpy())
    # Sums over features, then over vectors or widths, then over pairs.
    terms = WIDTH + terms_of(module) + 9 + outputs**2
    bound = EXACT if dtype == torch.float64 else rounding(terms)
    np.testing.assert_allclose(found, expected, rtol=0, atol=bound * max(1, abs(expected).max()))
    assert score(np.zeros((0, WIDTH), np.float32)).shape == (0, outputs)


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_a_state_of_another_module_is_refused(network: Metanetwork) -> None:
    state = {k: v.numpy() for k, v in state_of(network, 3, torch.float32).items()}
    for name, value in state.items():
        wrong = [
            {k: v for k, v in state.items() if k != name},
            {**state, name: np.concatenate([value, value, np.ones((1, *value.shape[1:]))])},
            {**state, "more": value},
        ]
        for one in wrong:
            with pytest.raises(ValueError, match="expected a state of"):
                network.in_numpy(InputSpec(WIDTH), 3, one)


def test_others_are_left_to_torch() -> None:
    assert DeepSets().in_numpy(InputSpec(WIDTH), 3, {}) is None

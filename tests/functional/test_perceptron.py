"""The written-out perceptron against autograd, exactly in float64 and to rounding in float32."""

from itertools import pairwise

import pytest
import torch
from tolerances import EXACT, rounding
from torch import Tensor, nn

from lora_ws.functional.perceptron import layer_gradients, layer_values

SHAPES = [(3, 2), (7, 5, 1), (40, 16, 9, 10), (5, 8, 8, 8, 8, 3)]


def network(widths: tuple[int, ...], dtype: torch.dtype) -> nn.Sequential:
    layers: list[nn.Module] = []
    for wide, narrow in pairwise(widths):
        layers += [nn.Linear(wide, narrow, dtype=dtype), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


@pytest.mark.parametrize("rows", [1, 2, 33])
@pytest.mark.parametrize("widths", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_equal_to_autograd(widths: tuple[int, ...], rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(sum(widths) + rows)
    model, inputs = network(widths, dtype), torch.randn(rows, widths[0], dtype=dtype)
    errors = torch.randn(rows, widths[-1], dtype=dtype)
    outputs = model(inputs)
    outputs.backward(errors)
    own = list(model.parameters())
    weights = [one.detach() for one in own[::2]]
    values = layer_values(inputs.T, weights, [one.detach() for one in own[1::2]])
    into = [(torch.full_like(w, torch.nan), torch.empty(len(w), dtype=dtype)) for w in weights]
    layer_gradients(values, weights, errors.T, into)
    # Forwards and backwards, sums follow on one another, and at last one over rows.
    terms = 2 * sum(widths) + rows
    near(values[-1].T, outputs.detach(), terms)
    for parameter, found in zip(own, [one for pair in into for one in pair], strict=True):
        assert parameter.grad is not None
        near(found, parameter.grad, terms)


def near(found: Tensor, expected: Tensor, terms: int) -> None:
    bound = EXACT if found.dtype == torch.float64 else rounding(terms)
    torch.testing.assert_close(
        found, expected, rtol=0, atol=bound * max(1.0, float(expected.abs().max()))
    )


def test_what_relu_stops_passes_no_gradient() -> None:
    weights, biases = [-torch.ones(2, 1), torch.ones(1, 2)], [torch.zeros(2), torch.zeros(1)]
    values = layer_values(torch.ones(1, 3), weights, biases)
    into = [(torch.ones_like(w), torch.ones(len(w))) for w in weights]
    layer_gradients(values, weights, torch.ones(1, 3), into)
    assert [one.abs().sum().item() for pair in into for one in pair] == [0, 0, 0, 3]

"""Stacked networks compute what the networks compute one by one."""

import pytest
import torch

from lora_ws.errors import ConfigError
from lora_ws.models import MLP, ManyMLP


def networks(count: int = 4) -> list[MLP]:
    torch.manual_seed(0)
    return [MLP(6, 3, (8, 5)).double() for _ in range(count)]


def test_stacked_equals_separate() -> None:
    models, own = networks(), torch.randn(4, 9, 6, dtype=torch.float64)
    many = ManyMLP(models)
    separate = torch.stack([model(x) for model, x in zip(models, own, strict=True)])
    torch.testing.assert_close(many(own), separate)
    torch.testing.assert_close(many(own[0]), torch.stack([m(own[0]) for m in models]))
    torch.testing.assert_close(many(own[:1]), many(own[0]))


def test_gradients_stay_with_their_model() -> None:
    models, x = networks(), torch.randn(9, 6, dtype=torch.float64)
    many = ManyMLP(models)
    many(x).square().mean((1, 2)).sum().backward()
    for k, model in enumerate(models):
        model(x).square().mean().backward()
        grads = [w.grad[k].T for w in many.weights] + [b.grad[k, 0] for b in many.biases]
        linear = [layer for layer in model.layers if isinstance(layer, torch.nn.Linear)]
        wanted = [m.weight.grad for m in linear] + [m.bias.grad for m in linear]
        torch.testing.assert_close(grads, wanted)


def test_kept_models_compute_as_before() -> None:
    many, x = ManyMLP(networks()), torch.randn(9, 6, dtype=torch.float64)
    before = many(x)
    many.keep(torch.tensor([3, 1]))
    assert len(many) == 2
    torch.testing.assert_close(many(x), before[[3, 1]], rtol=0, atol=1e-15)
    many.keep(torch.tensor([], dtype=torch.long))
    assert many(x).shape == (0, 9, 3)


def test_unstacked_model_is_a_copy_of_the_original() -> None:
    models = networks()
    many = ManyMLP(models)
    for k, model in enumerate(models):
        alone = many.unstack(k)
        assert all(torch.equal(alone.state_dict()[n], v) for n, v in model.state_dict().items())
        assert all(value.requires_grad for value in alone.parameters())
    before = models[0].layers[0].bias.clone()
    many.unstack(0).layers[0].bias.data += 1
    assert torch.equal(many.biases[0][0, 0], before)


@pytest.mark.parametrize("models", [[], [MLP(6, 3, (8,)), MLP(6, 4, (8,))]])
def test_networks_of_other_shapes_are_refused(models: list[MLP]) -> None:
    with pytest.raises(ConfigError, match="expected networks of one shape"):
        ManyMLP(models)

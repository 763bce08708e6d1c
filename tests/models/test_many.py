"""Stacked networks compute what the networks compute one by one."""

from typing import Any

import pytest
import torch
from torch import nn

from lora_ws.errors import ConfigError
from lora_ws.models import MLP, InputSpec
from lora_ws.models.many import ManyModules, Stacked
from lora_ws.models.mlp_module import ManyMLP, MLPModule


def networks(count: int = 4) -> list[MLPModule]:
    torch.manual_seed(0)
    built = [MLP(hidden=(8, 5)).build(InputSpec(6), 3).double() for _ in range(count)]
    for number, network in enumerate(built):
        constants = {"mean": torch.full((6,), number), "scale": torch.full((6,), number + 1)}
        network.normalizer.load_state_dict(constants)
    return built


KINDS = pytest.mark.parametrize("kind", [ManyMLP, ManyModules])


@KINDS
def test_stacked_equals_separate(kind: type[Stacked[Any]]) -> None:
    models, own = networks(), torch.randn(4, 9, 6, dtype=torch.float64)
    many: Any = kind(models)
    separate = torch.stack([model(x) for model, x in zip(models, own, strict=True)])
    torch.testing.assert_close(many(own), separate)
    torch.testing.assert_close(many(own[0]), torch.stack([m(own[0]) for m in models]))
    torch.testing.assert_close(many(own[:1]), many(own[0]))


def test_shared_constants_are_kept_once() -> None:
    models = networks(1) * 3
    assert ManyMLP(models).mean.shape == (1, 1, 6)
    assert ManyMLP(networks()).mean.shape == (4, 1, 6)


def test_gradients_stay_with_their_model() -> None:
    models, x = networks(), torch.randn(9, 6, dtype=torch.float64)
    many = ManyMLP(models)
    many(x).square().mean((1, 2)).sum().backward()
    for k, model in enumerate(models):
        model(x).square().mean().backward()
        grads = [w.grad[k].T for w in many.weights] + [b.grad[k, 0] for b in many.biases]
        linear = [layer for layer in model.layers if isinstance(layer, nn.Linear)]
        wanted = [m.weight.grad for m in linear] + [m.bias.grad for m in linear]
        torch.testing.assert_close(grads, wanted)


def test_gradients_of_any_network_are_its_own() -> None:
    models, x = networks(), torch.randn(9, 6, dtype=torch.float64)
    many = ManyModules(models)
    many(x).square().mean((1, 2)).sum().backward()
    for k, model in enumerate(models):
        model(x).square().mean().backward()
        grads = [w.grad[k] for w in many.parameters() if w.grad is not None]
        torch.testing.assert_close(grads, [weight.grad for weight in model.parameters()])


@KINDS
def test_kept_models_compute_as_before(kind: type[Stacked[Any]]) -> None:
    models, x = networks(), torch.randn(9, 6, dtype=torch.float64)
    many: Any = kind(models)
    before = many(x)
    many.keep(torch.tensor([3, 1]))
    assert len(many) == 2
    torch.testing.assert_close(many(x), before[[3, 1]])


def test_all_models_may_leave() -> None:
    many, x = ManyMLP(networks()), torch.randn(9, 6, dtype=torch.float64)
    many.keep(torch.tensor([], dtype=torch.long))
    assert many(x).shape == (0, 9, 3)


@KINDS
def test_unstacked_model_is_a_copy_of_the_original(kind: type[Stacked[Any]]) -> None:
    models, x = networks(), torch.randn(9, 6, dtype=torch.float64)
    many: Any = kind(models)
    for k, model in enumerate(models):
        alone = many.unstack(k)
        assert all(torch.equal(alone.state_dict()[n], v) for n, v in model.state_dict().items())
        assert all(value.requires_grad for value in alone.parameters())
    before = many(x)
    for copied in (many.unstack(0), models[0]):
        nn.init.ones_(copied.layers[0].bias)
    assert torch.equal(many(x), before)


def test_networks_drop_out_units_of_their_own() -> None:
    one = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5))
    many, x = ManyModules([one, one]), torch.ones(1, 64)
    first, second = many.train()(x)
    assert not torch.equal(first, second)
    kept, same = many.eval()(x)
    assert torch.equal(kept, same)


@KINDS
@pytest.mark.parametrize("others", [(), (3, 4)])
def test_networks_of_other_shapes_are_refused(
    kind: type[Stacked[Any]], others: tuple[int, ...]
) -> None:
    models: Any = [MLP(hidden=(8,)).build(InputSpec(6), outputs) for outputs in others]
    with pytest.raises(ConfigError, match="expected networks of one shape"):
        kind(models)  # type: ignore[call-arg]

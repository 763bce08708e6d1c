"""Tokens equal their definition on updates that are formed, module by module."""

import numpy as np
import pytest
import torch
from tolerances import EXACT

from lora_ws.adapters import LayerSpec, Layout
from lora_ws.errors import ConfigError
from lora_ws.models import DeepSets, InputSpec, Metanetwork, ModuleTransformer
from lora_ws.models.tokens import FADE, ModuleLinear, UpdateTokens

LAYOUT = Layout.from_layers(
    [
        LayerSpec("a", 6, 5, 1),
        LayerSpec("b", 4, 7, 2),
        LayerSpec("c", 6, 5, 1),
        LayerSpec("d", 6, 5, 3),
    ]
)


def rows(n: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, LAYOUT.size))


def updates(row: np.ndarray) -> list[np.ndarray]:
    return [
        row[up].reshape(layer.up_shape) @ row[down].reshape(layer.down_shape)
        for layer, down, up in LAYOUT.pairs()
    ]


def probes_of(tokens: UpdateTokens, width: int) -> np.ndarray:
    """P of the modules of a width, from the state that a bundle keeps."""
    found = [p.numpy() for n, p in tokens.state_dict().items() if n.startswith("_probes")]
    of_width = [p for p in found if len(p) == width]
    assert all((p == of_width[0]).all() for p in of_width)
    return of_width[0]


def reference(tokens: UpdateTokens, row: np.ndarray, probes: int) -> np.ndarray:
    found = []
    for update in updates(row):
        width, square = len(update), (update**2).sum()
        basis = probes_of(tokens, width)
        centred = update @ update.T - square / width * np.eye(width)
        gram = basis.T @ centred @ basis * width / (square + FADE)
        upper = [
            gram[i, j] / (np.sqrt(2) if i == j else 1)
            for i in range(probes)
            for j in range(i, probes)
        ]
        found.append([*upper, np.log(1 + square)])
    return np.array(found)


@pytest.mark.parametrize("probes", [1, 4, 9])
def test_tokens_are_those_of_the_dense_updates(probes: int) -> None:
    tokens = UpdateTokens(LAYOUT, probes).double()
    got = tokens(torch.from_numpy(rows())).numpy()
    assert got.shape == (3, 4, tokens.features)
    expected = np.stack([reference(tokens, row, probes) for row in rows()])
    np.testing.assert_allclose(got, expected, rtol=EXACT, atol=EXACT)


def test_probes_are_orthonormal_and_equal_for_every_seed() -> None:
    for probes in (3, 9):
        torch.manual_seed(1)
        state = UpdateTokens(LAYOUT, probes).state_dict()
        torch.manual_seed(2)
        again = UpdateTokens(LAYOUT, probes).state_dict()
        assert state
        for name, basis in state.items():
            assert torch.equal(basis, again[name])
            count = min(len(basis), probes)
            wanted = torch.eye(probes)
            wanted[count:] = 0
            # Of float32 entries below 1, each product of a column rounds by at most eps.
            bound = torch.finfo(torch.float32).eps * len(basis)
            torch.testing.assert_close(basis.mT @ basis, wanted, rtol=0, atol=bound)


def test_with_as_many_probes_as_outputs_the_whole_gram_matrix_is_kept() -> None:
    """Angles between tokens are those of the left Gram matrices, centred."""
    got = UpdateTokens(LAYOUT, 7).double()(torch.from_numpy(rows()))[..., :-1]
    for module, layer in enumerate(LAYOUT.layers):
        width = layer.out_features
        dense = []
        for row in rows():
            update = updates(row)[module]
            gram = update @ update.T
            dense.append((gram / np.trace(gram) - np.eye(width) / width).ravel())
        products = np.array(dense) @ np.array(dense).T * width**2 / 2
        mine = got[:, module] @ got[:, module].mT
        # Probes are rounded to float32.
        bound = torch.finfo(torch.float32).eps * width**2 * products.max()
        np.testing.assert_allclose(mine.numpy(), products, rtol=0, atol=bound)


def test_random_directions_of_rank_1_have_mean_0_and_variance_1() -> None:
    layout = Layout.from_layers([LayerSpec("a", 4, 64)])
    drawn = np.random.default_rng(0).standard_normal((4000, layout.size))
    tokens = UpdateTokens(layout, 4).double()(torch.from_numpy(drawn))[:, 0, :-1].numpy()
    # Ten tokens' features of heavy tails (fourth moment at most 60): five deviations of a mean.
    assert np.abs(tokens.mean(0)).max() < 5 / np.sqrt(4000)
    assert np.abs(tokens.var(0) - 64 / 66).max() < 5 * np.sqrt(60 / 4000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_missing_modules_give_zeros_and_finite_gradients(dtype: torch.dtype) -> None:
    given = torch.from_numpy(rows()).to(dtype)
    for _, down, up in list(LAYOUT.pairs())[:2]:
        given[0, down], given[0, up] = 0, 0
    given[1] = 0
    given.requires_grad_()
    tokens = UpdateTokens(LAYOUT, 4).to(dtype)(given)
    tokens.square().sum().backward()
    assert (tokens[0, :2] == 0).all()
    assert (tokens[1] == 0).all()
    assert given.grad is not None
    assert given.grad.isfinite().all()


def test_module_linear_is_a_map_per_module() -> None:
    torch.manual_seed(0)
    linear, tokens = ModuleLinear(3, 5, 2).double(), torch.randn(4, 3, 5).double()
    got = linear(tokens)
    for module in range(3):
        wanted = tokens[:, module] @ linear.weight[module] + linear.bias[module]
        torch.testing.assert_close(got[:, module], wanted, rtol=EXACT, atol=EXACT)


def test_no_probes_are_refused() -> None:
    with pytest.raises(ConfigError, match="probes: expected at least 1, got 0"):
        UpdateTokens(LAYOUT, 0)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (DeepSets(width=0), "width of at least 1"),
        (DeepSets(depth=-1), "depth of at least 0"),
        (DeepSets(input_dropout=1), "input_dropout from 0 to below 1"),
        (DeepSets(probes=0), "probes: expected at least 1"),
        (ModuleTransformer(width=30, heads=4), "width a multiple of heads"),
        (ModuleTransformer(depth=0), "depth and heads of at least 1"),
        (ModuleTransformer(dropout=1.5), "dropout from 0 to below 1"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused(spec: Metanetwork, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        spec.build(InputSpec.of(LAYOUT), 3)


@pytest.mark.parametrize("spec", [DeepSets(), ModuleTransformer()])
def test_features_are_refused(spec: Metanetwork) -> None:
    with pytest.raises(ConfigError, match=r"use InputSpec\.of\(layout\)"):
        spec.build(InputSpec(7), 3)

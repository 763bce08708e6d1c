"""Poolings: modules that are absent are not looked at, and averages are what they say."""

import pytest
import torch
from tolerances import EXACT

from lora_ws.errors import ConfigError
from lora_ws.models.pooling import AttentionPool, ModuleEncoder, ModulePool, make_pool

POOLS = pytest.mark.parametrize("pool", ["concat", "transformer"])


def tokens(seed: int = 0) -> torch.Tensor:
    return torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(seed)).double()


def made(pool: str) -> ModulePool:
    torch.manual_seed(0)
    return make_pool(pool, 5, 7, 4).double().eval()  # type: ignore[arg-type]


@POOLS
def test_absent_modules_do_not_count(pool: str) -> None:
    present = torch.tensor([[True] * 5, [True, False, True, False, True], [True] + [False] * 4])
    net, given = made(pool), tokens()
    other = torch.where(present[..., None], given, tokens(1))
    one = net(given, present)
    torch.testing.assert_close(one, net(other, present), rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(one[:1], net(given)[:1], rtol=EXACT, atol=EXACT)
    assert (one - net(given))[1:].abs().min(1).values.max() > 1e4 * EXACT


@POOLS
def test_an_adapter_without_modules_has_numbers_and_gradients(pool: str) -> None:
    given = tokens().requires_grad_()
    out = made(pool)(given, torch.zeros(3, 5, dtype=torch.bool))
    out.square().sum().backward()
    assert out.isfinite().all()
    assert given.grad is not None
    assert given.grad.isfinite().all()


def test_attention_pool_is_a_weighted_average() -> None:
    torch.manual_seed(0)
    pool, given = AttentionPool(7).double(), tokens()
    scores = pool.score(given)[..., 0].detach().numpy()
    for row, score, got in zip(given.numpy(), scores, pool(given).detach().numpy(), strict=True):
        weights = [2.718281828459045**s for s in score]
        wanted = sum(w * token for w, token in zip(weights, row, strict=True)) / sum(weights)
        assert abs(got - wanted).max() < EXACT


def test_encoder_has_no_order_of_modules() -> None:
    torch.manual_seed(0)
    encoder = ModuleEncoder(7, depth=2, heads=1, feedforward=8).double().eval()
    order = torch.tensor([3, 1, 4, 0, 2])
    permuted = encoder(tokens()[:, order])
    torch.testing.assert_close(permuted, encoder(tokens())[:, order], rtol=EXACT, atol=EXACT)


def test_unknown_pool_is_refused() -> None:
    with pytest.raises(ConfigError, match="pool: expected concat or transformer, got mean"):
        make_pool("mean", 5, 7, 4)  # type: ignore[arg-type]

"""Dropout hides as many entries as torch's own, each on its own, and keeps their mean."""

import math

import pytest
import torch
from torch import nn

from lora_ws.models.dropout import Dropout

SHAPE = (40, 50)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.75])
def test_it_hides_a_share_and_scales_the_rest(share: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    values = torch.rand(SHAPE, dtype=dtype) + 1
    for kind in (Dropout, nn.Dropout):
        got = kind(share)(values)
        kept = got != 0
        torch.testing.assert_close(got[kept], values[kept] / (1 - share))
        # Five standard deviations of a count of independent draws, of the whole and of each side.
        for hidden in ((~kept).flatten(), *(~kept[::20]), *(~kept[:, ::25].T)):
            spread = math.sqrt(share * (1 - share) / len(hidden))
            assert abs(hidden.double().mean() - share) < 5 * spread


@pytest.mark.parametrize("layer", [Dropout(0.0), Dropout(0.5).eval()])
def test_it_leaves_all_as_it_is_where_nothing_is_to_hide(layer: Dropout) -> None:
    values = torch.ones(SHAPE)
    assert layer(values) is values


def test_draws_follow_the_seed_and_differ_between_stacked_networks() -> None:
    def drawn() -> torch.Tensor:
        torch.manual_seed(3)
        return torch.vmap(Dropout(0.5), randomness="different")(torch.ones(2, *SHAPE))

    one, other = drawn()
    assert torch.equal(drawn()[0], one)
    assert not torch.equal(one, other)


def test_hidden_entries_have_no_gradient() -> None:
    values = torch.ones(SHAPE, requires_grad=True)
    got = Dropout(0.25)(values)
    got.sum().backward()
    torch.testing.assert_close(values.grad, got.detach(), rtol=0, atol=0)

"""What training may write into queries, against autograd through diffusers' own attention."""

from typing import Any

import numpy as np
import pytest
import torch
from tolerances import EXACT

from lora_ws.diffusion.bank import AdapterBank
from lora_ws.diffusion.cross_attention import (
    QUERY,
    noise_states,
    query_correlations,
    query_names,
)
from lora_ws.diffusion.pipeline import PipelineSize, adapter_layout, build_pipeline
from lora_ws.diffusion.prompts import encode_prompts
from lora_ws.errors import ConfigError
from lora_ws.functional.query_updates import noisy_correlation

# Heads of 16 numbers against 6 tokens, so that keys span a part of a head only.
SIZE = PipelineSize(
    16, (8, 8), (32, 32), 1, 1, 2, 24, 1, prompt_length=6, norm_groups=8, latent_channels=2
)


@pytest.fixture(scope="module")
def pipeline() -> Any:
    """Untrained, in float64."""
    made = build_pipeline(SIZE, ["cat", "dog"])
    for part in (made.unet, made.text_encoder):
        part.requires_grad_(False).eval().double()
        # Attention of an untrained model is flat: make the prompt matter.
        for name, weight in part.named_parameters():
            if "attn2" in name and name.endswith(("to_q.weight", "to_k.weight")):
                weight.mul_(6)
    return made


@pytest.fixture(autouse=True)
def _double() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def query_jacobian(attention: Any, x: torch.Tensor, text: torch.Tensor) -> Any:
    """Derivative of what attention gives for one hidden state by its query, ``[out, width]``."""

    def read(moved: torch.Tensor) -> torch.Tensor:
        hook = attention.to_q.register_forward_hook(lambda *call: call[2] + moved)
        try:
            return attention(x[None, None], encoder_hidden_states=text)[0, 0]
        finally:
            hook.remove()

    return torch.autograd.functional.jacobian(read, torch.zeros(attention.to_q.out_features))


def test_states_are_inputs_of_the_queries_and_repeat_with_the_seed(pipeline: Any) -> None:
    found = noise_states(pipeline, levels=3, positions=10)
    assert list(found) == query_names(pipeline.unet)
    for name, states in found.items():
        assert states.shape == (10, pipeline.unet.get_submodule(name).in_features)
    again, other = (noise_states(pipeline, 3, 10, seed) for seed in (0, 1))
    name = next(iter(found))
    assert torch.equal(found[name], again[name])
    assert not torch.equal(found[name], other[name])
    assert not pipeline.unet.get_submodule(name)._forward_hooks


def test_correlations_are_those_of_gradients_through_the_module(pipeline: Any) -> None:
    states = noise_states(pipeline, levels=2, positions=3)
    prompts = ["a photo of cat", "dog"]
    for name, found in query_correlations(pipeline, states, prompts, noise=0.01):
        attention = pipeline.unet.get_submodule(name.rpartition(".")[0])
        hidden = states[name]
        for prompt, correlation in zip(prompts, found, strict=True):
            text = encode_prompts(pipeline, [prompt])
            moments = 0.0
            for x in hidden:
                jacobian = query_jacobian(attention, x, text).unflatten(1, (attention.heads, -1))
                moments += float(x @ x) * torch.einsum("ohd,ohe->hde", jacobian, jacobian)
            expected = noisy_correlation(np.asarray(moments), 0.01)
            np.testing.assert_allclose(correlation, expected, atol=EXACT)


@pytest.mark.parametrize("rank", [1, 4])
def test_gradients_of_b_lie_in_the_span_of_the_keys_of_the_prompt(pipeline: Any, rank: int) -> None:
    torch.manual_seed(rank)
    layout = adapter_layout(pipeline.unet, rank, targets=("attn2.to_q",))
    bank = AdapterBank.fresh(layout, 1, dtype=torch.float64)
    text = encode_prompts(pipeline, ["a photo of cat"])
    with bank.attach(pipeline.unet, torch.ones(1, 1)):
        said = pipeline.unet(torch.randn(1, 2, 8, 8), 500, encoder_hidden_states=text).sample
        said.square().sum().backward()
    assert [layer.name for layer in layout.layers] == sorted(query_names(pipeline.unet))
    for layer, factors in zip(layout.layers, bank.factors, strict=True):
        attention = pipeline.unet.get_submodule(layer.name.rpartition(".")[0])
        gradient = factors.up.grad[0].unflatten(0, (attention.heads, -1))  # type: ignore[index]
        for word, explained in (("cat", True), ("dog", False)):
            keys = attention.to_k(encode_prompts(pipeline, [f"a photo of {word}"]))[0]
            centred = (keys - keys.mean(0)).unflatten(1, (attention.heads, -1))
            for head in range(attention.heads):
                span = np.linalg.qr(centred[:, head].T.numpy()[:, :-1])[0]
                own = gradient[head].numpy()
                left = np.linalg.norm(own - span @ (span.T @ own)) / np.linalg.norm(own)
                assert (left < EXACT) == explained


def test_what_the_base_cannot_answer_is_refused(pipeline: Any) -> None:
    states = noise_states(pipeline, levels=1, positions=1)
    with pytest.raises(ConfigError, match="no `horse`"):
        next(query_correlations(pipeline, states, ["a photo of horse"], 0.01))
    with pytest.raises(ConfigError, match=f"no module `\\*{QUERY}`"):
        query_names(pipeline.vae)

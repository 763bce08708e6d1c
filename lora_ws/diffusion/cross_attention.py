"""What a prompt lets training write into the queries of a base's cross-attention."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_ws.diffusion.prompts import check_prompts, encode_prompts
from lora_ws.errors import ConfigError
from lora_ws.functional.query_updates import noisy_correlation, update_covariance

QUERY = ".attn2.to_q"
# A U-Net is convolutional: smaller latents than its own cost less and attend alike.
_SIDE, _BATCH = 32, 8
# Attention of prompts that is made at once, in numbers: 8 MiB.
_AT_ONCE = 1 << 20


def query_names(unet: nn.Module) -> list[str]:
    """Names of the query projections of cross-attention.

    Raises:
        ConfigError: the model has none.
    """
    names = [name for name, _ in unet.named_modules() if name.endswith(QUERY)]
    if not names:
        raise ConfigError(
            f"{type(unet).__name__} has no module `*{QUERY}`; expected a U-Net of Stable Diffusion "
            "1.x, or one built like it"
        )
    return names


@torch.no_grad()
def noise_states(
    pipeline: Any, levels: int = 32, positions: int = 256, seed: int = 0
) -> dict[str, Float[Tensor, "n width"]]:
    """Hidden states that the base asks its prompts with, drawn from noise alone: no image is used.

    Args:
        pipeline: the base.
        levels: noise levels, evenly spaced; one latent of white noise at each.
        positions: most hidden states a module.
        seed: of the noise and of the positions.

    Returns:
        Inputs of each query projection of cross-attention.
    """
    unet, generator = pipeline.unet, torch.Generator().manual_seed(seed)
    side = min(int(unet.config.sample_size), _SIDE)
    noise = torch.randn(levels, int(unet.config.in_channels), side, side, generator=generator)
    steps = torch.linspace(0, pipeline.scheduler.config.num_train_timesteps - 1, levels).long()
    names = query_names(unet)
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    empty = encode_prompts(pipeline, [""])
    with ExitStack() as hooks:
        for name in names:
            module = unet.get_submodule(name)
            keep = seen[name].append
            hook = module.register_forward_hook(lambda _, args, __, keep=keep: keep(args[0]))
            hooks.callback(hook.remove)
        for x, step in zip(noise.split(_BATCH), steps.split(_BATCH), strict=True):
            x, step = x.to(unet.device), step.to(unet.device)
            unet(x, step, encoder_hidden_states=empty.expand(len(x), -1, -1))
    found = {}
    for name in names:
        states = torch.cat([part.flatten(0, 1) for part in seen[name]])
        chosen = torch.randperm(len(states), generator=generator)[:positions]
        found[name] = states[chosen.to(states.device)]
    return found


@torch.no_grad()
def query_correlations(
    pipeline: Any,
    states: Mapping[str, Float[Tensor, "n width"]],
    prompts: Sequence[str],
    noise: float,
) -> Iterator[tuple[str, Float[np.ndarray, "prompts heads d d"]]]:
    """Correlations of what Adam writes into each query projection while it trains with a prompt.

    Args:
        pipeline: the base.
        states: of `noise_states`.
        prompts: whole prompts.
        noise: share of what no prompt explains.

    Yields:
        Names of modules and float64 correlations.

    Raises:
        ConfigError: a prompt is too long, or holds a word that the base does not know.
    """
    check_prompts(pipeline, prompts)
    texts = encode_prompts(pipeline, prompts)
    for name, hidden in states.items():
        attention = pipeline.unet.get_submodule(name.rpartition(".")[0])
        found = np.concatenate(list(_covariances(attention, hidden, texts)))
        yield name, noisy_correlation(found, noise)


def _covariances(attention: Any, hidden: Tensor, texts: Tensor) -> Iterator[np.ndarray]:
    """`update_covariance` of prompts at one module, some at a time."""

    def by_head(x: Tensor) -> Tensor:
        return x.double().unflatten(-1, (attention.heads, -1)).transpose(-2, -3)

    queries = by_head(attention.to_q(hidden)) * attention.scale
    weights = hidden.double().square().sum(dim=1)
    outward = by_head(attention.to_out[0].weight).mT
    at_once = max(1, _AT_ONCE // (attention.heads * len(hidden) * texts.shape[1]))
    for text in texts.split(at_once):
        keys, values = by_head(attention.to_k(text)), by_head(attention.to_v(text))
        probabilities = (queries @ keys.mT).softmax(dim=-1)
        parts = (probabilities, weights, keys, values @ outward)
        yield update_covariance(*(part.cpu().numpy() for part in parts))

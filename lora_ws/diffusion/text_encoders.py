"""Adapters of text encoders, and how much a prompt asks for each adapter.

A pipeline embeds a prompt once, before the first step, so adapters of a text encoder cannot take
turns there. The released scripts add all of them for Merge and Composite and take the first one's
for Switch; the paper says nothing of it.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from lora_ws.adapters import Adapter
from lora_ws.adapters.adapter import Module
from lora_ws.diffusion.bank import AdapterBank
from lora_ws.diffusion.methods import By
from lora_ws.diffusion.prompts import token_ids
from lora_ws.diffusion.targets import can_apply
from lora_ws.errors import ConfigError, LayoutError

TextMode = Literal["merged", "first", "per_adapter", "none"]
# Newer versions of transformers leave it out.
PREFIX = "text_model."
# More rows than any pipeline embeds for one call.
_KEPT = 1024


def text_modules(adapter: Adapter) -> dict[str, Module]:
    """Modules of text encoders that a bank applies, by their names in the adapter."""
    return {
        name: module
        for name, module in adapter.modules.items()
        if module.component.startswith("text_encoder") and can_apply(module)
    }


def text_banks(adapters: Sequence[Adapter]) -> dict[str, AdapterBank]:
    """A bank for each text encoder that any adapter adapts; the others are zeros in it."""
    parts = [text_modules(adapter).values() for adapter in adapters]
    components = sorted({module.component for own in parts for module in own})
    return {
        component: AdapterBank.from_modules(
            [{_inner(m.path): m for m in own if m.component == component} for own in parts]
        )
        for component in components
    }


def _inner(path: str) -> str:
    return path.removeprefix(PREFIX)


def encoder_of(pipeline: Any, component: str) -> nn.Module:
    """The module of a pipeline that a text encoder's bank attaches to.

    Raises:
        LayoutError: the pipeline has no such encoder.
    """
    encoder = getattr(pipeline, component, None)
    if encoder is None:
        raise LayoutError(
            f"{type(pipeline).__name__} has no {component}, which the adapters adapt: is this "
            "their base?"
        )
    return getattr(encoder, PREFIX.rstrip("."), encoder)


class PerAdapterText:
    """Embeddings of prompts as the text encoder makes them with each adapter alone.

    The pipeline goes on with plain embeddings; what each adapter makes of them is found again by
    their values, since pipelines repeat and join them in ways of their own.
    """

    def __init__(self, banks: dict[str, AdapterBank], scales: Sequence[float]) -> None:
        self._banks, self._scales = banks, scales
        self._plain: list[Tensor] = []
        self._own: list[Tensor] = []

    @contextmanager
    def watch(self, pipeline: Any) -> Iterator[None]:
        """Embed every prompt with each adapter until the block ends."""
        (component,) = self._banks
        encoder = encoder_of(pipeline, component)
        busy = False

        def embed(module: nn.Module, args: Any, kwargs: dict[str, Any], plain: Any) -> None:
            nonlocal busy
            if busy:
                return
            busy = True
            try:
                own = []
                for row in torch.tensor(self._scales).diag():
                    mixture.set(row)
                    own.append(module(*args, **kwargs)[0])
                # Newest first: the last call's are looked for soonest.
                self._plain = [*plain[0], *self._plain][:_KEPT]
                self._own = [*torch.stack(own, dim=1), *self._own][:_KEPT]
            finally:
                mixture.set(torch.zeros(len(self._scales)))
                busy = False

        with ExitStack() as held:
            none = torch.zeros(len(self._scales))
            mixture = held.enter_context(self._banks[component].attach(encoder, none))
            held.callback(encoder.register_forward_hook(embed, with_kwargs=True).remove)
            yield

    def of(
        self, states: Float[Tensor, "batch length width"], rows: Float[Tensor, "m k"]
    ) -> Float[Tensor, "mixtures length width"]:
        """Embeddings for m mixtures of the same batch, each of one adapter or of none.

        Raises:
            ConfigError: the embeddings were not made while this watched.
        """
        found = [self._find(state) for state in states]
        chosen = []
        for row in rows:
            alone = int(row.abs().argmax())
            for at in found:
                chosen.append(self._own[at][alone] if row.any() else self._plain[at])
        return torch.stack(chosen).to(states)

    def _find(self, state: Tensor) -> int:
        for at, plain in enumerate(self._plain):
            if plain.shape == state.shape and torch.equal(plain.to(state), state):
                return at
        raise ConfigError(
            "text: per_adapter needs prompts that are embedded inside the block by the pipeline's "
            "one text encoder, without skipped layers; choose merged, first or none"
        )


@torch.no_grad()
def prompt_weights(
    pipeline: Any, prompt: str, triggers: Sequence[str], by: By
) -> tuple[float, ...]:
    """How much a prompt asks for each adapter, for weighted Switch and Composite (2606.03792).

    Args:
        pipeline: whose first text encoder is CLIP's.
        prompt: holds the triggers.
        triggers: phrase of each adapter.
        by: absence, the cosine distance of the prompt with and without the trigger (for Switch);
            presence, the cosine of trigger and prompt (for Composite).

    Returns:
        Weights that sum to 1.

    Raises:
        ConfigError: a trigger is not in the prompt.
    """
    if missing := [phrase for phrase in triggers if phrase not in prompt]:
        raise ConfigError(f"triggers: expected phrases of the prompt, got `{missing[0]}`")
    others = [" ".join(prompt.replace(phrase, " ").split()) for phrase in triggers]
    texts = [prompt, *(others if by == "absence" else triggers)]
    ids = token_ids(pipeline, texts).to(pipeline.text_encoder.device)
    said = pipeline.text_encoder(input_ids=ids)
    # Encoders with a projection, as those of SD3, have its output alone.
    whole, *parts = said.pooler_output if hasattr(said, "pooler_output") else said.text_embeds
    cosines = [float(functional.cosine_similarity(whole, part, dim=0)) for part in parts]
    weights = [max(1 - c if by == "absence" else c, 0.0) for c in cosines]
    total = sum(weights)
    # A prompt that asks for none asks for all alike.
    return tuple(w / total if total else 1 / len(weights) for w in weights)

"""How many adapters fit in one forward pass."""

from typing import Any

import torch
from torch import Tensor

from lora_ws.adapters.layout import Layout
from lora_ws.diffusion.bank import AdapterBank
from lora_ws.zoo.finetune import FinetuneSpec

# Beyond it a step of an adapter gets no faster on a CPU, and a killed run loses more.
MOST = 100
# The backward pass holds gradients beside what was kept; on tiny-sd 1.7 times as much in all.
PEAK = 2


def adapters_that_fit(
    pipeline: Any, layout: Layout, spec: FinetuneSpec, memory_gb: float, most: int = MOST
) -> int:
    """Adapters whose training step takes at most ``memory_gb`` beside the model; at least one.

    What a forward pass keeps for the backward pass is counted, not measured, so the same recipe
    gives the same number on every machine.
    """
    one, two = (_kept_bytes(pipeline, layout, n, spec.batch_size) for n in (1, 2))
    # The difference is one adapter's: weights of the model, which are kept too, are not counted.
    # Then factors, their gradients and Adam's two averages.
    each = PEAK * (two - one) + 16 * layout.size
    return int(max(1, min(most, memory_gb * 2**30 // each)))


def _kept_bytes(pipeline: Any, layout: Layout, adapters: int, batch_size: int) -> int:
    """Bytes of all tensors that a forward pass keeps for the backward pass."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    unet, device = pipeline.unet, pipeline.unet.device
    rows, side = adapters * batch_size, int(unet.config.sample_size)
    latents = torch.zeros(rows, int(unet.config.in_channels), side, side, device=device)
    length = int(pipeline.tokenizer.model_max_length)
    context = torch.zeros(rows, length, int(unet.config.cross_attention_dim), device=device)
    levels = torch.zeros(rows, dtype=torch.long, device=device)
    bank = AdapterBank.fresh(layout, adapters, "shared").to(device)
    with (
        bank.attach(unet, torch.eye(adapters, device=device)),
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
    ):
        # Held until all is counted: a freed tensor's place would be counted for another's.
        said = unet(latents, levels, context).sample
        loss = said.square().mean()
    del said, loss
    return sum(kept.values())

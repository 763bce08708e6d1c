"""Fine-tune many adapters in one forward pass: DreamBooth without prior preservation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lora_ws.diffusion.bank import AdapterBank
from lora_ws.diffusion.prompts import encode_prompts
from lora_ws.threads import flushed


@dataclass(frozen=True)
class FinetuneSpec:
    """The paper's recipe (section 3).

    Attributes:
        steps: training steps per adapter.
        batch_size: images per step.
        learning_rate: constant learning rate of AdamW.
        weight_decay: weight decay of AdamW.
        max_grad_norm: maximal gradient norm per adapter.
        rank: rank of the adapters; alpha is the same.
        precision: Lightning's name: the base runs in it; adapters and optimizer stay float32.
    """

    steps: int = 200
    batch_size: int = 1
    learning_rate: float = 1e-4
    weight_decay: float = 1e-2
    max_grad_norm: float = 1.0
    rank: int = 1
    precision: Literal["32-true", "bf16-mixed"] = "32-true"


@dataclass(frozen=True, eq=False)
class Finetuned:
    """What came out of a batch of N adapters.

    Attributes:
        rows: weights in layout order.
        step_loss: mean squared error of the noise, each adapter's own.
        grad_norm: gradient norms before clipping.
    """

    rows: Float[Tensor, "adapters params"]
    step_loss: Float[Tensor, "adapters steps"]
    grad_norm: Float[Tensor, "adapters steps"]


@flushed()
def finetune(
    pipeline: Any,
    bank: AdapterBank,
    latents: Sequence[Float[Tensor, "images channels h w"]],
    prompts: Sequence[str | Sequence[str]],
    seeds: Sequence[int],
    spec: FinetuneSpec,
) -> Finetuned:
    """Train every adapter of a bank on its own images, as if each were alone.

    The loss is the sum of the adapters' own means, so each gets its own gradient; clipping and Adam
    act on each number or adapter by itself.

    Args:
        pipeline: the frozen base.
        bank: fresh adapters; trained in place.
        latents: images of each adapter.
        prompts: prompt of each, or one for each of its images.
        seeds: seed of each adapter's order of images, noise and noise levels.
        spec: the recipe.
    """
    n, batch = len(bank), spec.batch_size
    params = [p for p in bank.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        params, spec.learning_rate, weight_decay=spec.weight_decay, foreach=True
    )
    levels = pipeline.scheduler.config.num_train_timesteps
    mixed = spec.precision == "bf16-mixed"
    texts = _embedded(pipeline, prompts, latents)
    draws = [_Draws(*one, batch, levels) for one in zip(seeds, latents, texts, strict=True)]
    losses, norms = [], []
    with bank.attach(pipeline.unet, torch.eye(n, device=latents[0].device)):
        for _ in range(spec.steps):
            # Sample k belongs to adapter k modulo n, as the bank repeats its scales.
            clean, context, noise, level = (
                torch.stack(parts, 1).flatten(0, 1)
                for parts in zip(*(draw.next() for draw in draws), strict=True)
            )
            noisy = pipeline.scheduler.add_noise(clean, noise, level)
            with torch.autocast(clean.device.type, torch.bfloat16, enabled=mixed):
                said = pipeline.unet(noisy, level, context).sample
            own = (said - noise).square().flatten(1).mean(1).view(batch, n).mean(0)
            optimizer.zero_grad(set_to_none=True)
            own.sum().backward()
            norms.append(bank.clip_grad_norm(spec.max_grad_norm))
            optimizer.step()
            losses.append(own.detach())
    return Finetuned(bank.rows(), torch.stack(losses, 1).cpu(), torch.stack(norms, 1).cpu())


def _embedded(
    pipeline: Any, prompts: Sequence[str | Sequence[str]], latents: Sequence[Tensor]
) -> list[Tensor]:
    """Embeddings of each adapter's images, ``[images, length, width]``; each prompt read once."""
    texts = [
        [said] * len(own) if isinstance(said, str) else list(said)
        for said, own in zip(prompts, latents, strict=True)
    ]
    known = {text: k for k, text in enumerate(dict.fromkeys(t for own in texts for t in own))}
    embedded = encode_prompts(pipeline, list(known))
    return [embedded[[known[text] for text in own]] for own in texts]


class _Draws:
    """One adapter's stream of images, noise and noise levels, the same in any company."""

    def __init__(
        self, seed: int, latents: Tensor, context: Tensor, batch: int, levels: int
    ) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.latents, self.context = latents, context
        self.batch = batch
        self.levels = levels
        self.order: list[int] = []

    def next(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # Every image once in each epoch, in a new order.
        while len(self.order) < self.batch:
            self.order += torch.randperm(len(self.latents), generator=self.generator).tolist()
        index, self.order = self.order[: self.batch], self.order[self.batch :]
        clean = self.latents[index]
        noise = torch.randn(clean.shape, generator=self.generator).to(clean.device)
        level = torch.randint(self.levels, (self.batch,), generator=self.generator)
        return clean, self.context[index], noise, level.to(clean.device)

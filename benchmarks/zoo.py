"""Training rank-1 adapters on tiny-sd: peft one by one against a batch of 100, per adapter-step.

Both train q and v of all 64 layers by the paper's recipe (batch 1, AdamW, clipped gradients) on the
same kind of latents, in one thread; set-up is left out of both. All steps cost the same, so an
adapter of 200 steps costs 200 times as much. Goal: at least 15 times fewer CPU seconds.
"""

from functools import partial
from typing import Any

import common
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch.nn import functional as F

from lora_ws.diffusion.bank import AdapterBank
from lora_ws.diffusion.pipeline import adapter_layout, load_pipeline
from lora_ws.diffusion.prompts import encode_prompts
from lora_ws.zoo.finetune import FinetuneSpec, finetune

PEFT = "peft, one by one"


def one_by_one(steps: int) -> common.Cost:
    """A step of one adapter."""
    pipeline = load_pipeline("tiny-sd")
    config = LoraConfig(r=1, lora_alpha=1, target_modules=["to_q", "to_v"])
    unet: Any = inject_adapter_in_model(config, pipeline.unet)
    params = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, 1e-4)
    context = encode_prompts(pipeline, ["a photo of sks fish"])
    shape = (int(unet.config.in_channels), 8, 8)
    latents = torch.randn(8, *shape)

    def train(step: int) -> None:
        clean, noise = latents[[step % 8]], torch.randn(1, *shape)
        level = torch.randint(1000, (1,))
        said = unet(pipeline.scheduler.add_noise(clean, noise, level), level, context).sample
        optimizer.zero_grad(set_to_none=True)
        F.mse_loss(said, noise).backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()

    for step in range(2):  # which allocate
        train(step)
    return common.measure(lambda: [train(step) for step in range(steps)], steps)


def together(adapters: int, steps: int) -> common.Cost:
    """A step of one adapter of a batch."""
    pipeline = load_pipeline("tiny-sd")
    layout = adapter_layout(pipeline.unet)
    channels = int(pipeline.unet.config.in_channels)
    latents = [torch.randn(8, channels, 8, 8) for _ in range(adapters)]

    def run(n: int) -> common.Cost:
        bank = AdapterBank.fresh(layout, adapters)
        prompts, spec = ["a photo of sks fish"] * adapters, FinetuneSpec(steps=n)
        seeds = list(range(adapters))
        return common.measure(lambda: finetune(pipeline, bank, latents, prompts, seeds, spec))

    run(1)
    many, one, units = run(steps + 1), run(1), steps * adapters
    return common.Cost((many.cpu - one.cpu) / units, (many.wall - one.wall) / units)


def main() -> None:
    """Run and print."""
    args = common.arguments(__doc__, repeats=3)
    adapters, steps = (4, 2) if args.quick else (100, 10)
    contenders = {
        common.OURS: partial(together, adapters, steps),
        PEFT: partial(one_by_one, 5 * steps),
    }
    costs = common.alternate(contenders, args.repeats)
    title = f"Training {adapters} adapters at once on tiny-sd"
    common.show(title, "ms per adapter and step", costs, [common.Baseline(PEFT, 15)])
    common.facts("diffusers", "peft", steps=steps, repeats=args.repeats)


if __name__ == "__main__":
    main()

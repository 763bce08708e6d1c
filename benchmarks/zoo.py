"""Training rank-1 adapters on tiny-sd: peft one by one against a batch of 100, per adapter-step.

Both train q and v of all 64 layers by the paper's recipe (batch 1, AdamW, clipped gradients) on the
same kind of latents, in one thread; set-up is left out of both. All steps cost the same, so an
adapter of 200 steps costs 200 times as much. Goal: at least 15 times fewer CPU seconds.

Beside them stand the same batch with another layout in memory and with attention formed as
matrices, and what a step of the batch spends its time on.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import common
import torch
from diffusers.models.attention_processor import AttnProcessor
from peft import LoraConfig, inject_adapter_in_model
from torch.nn import functional as F

from lora_ws.diffusion.bank import AdapterBank
from lora_ws.diffusion.pipeline import adapter_layout, load_pipeline
from lora_ws.diffusion.prompts import encode_prompts
from lora_ws.zoo.finetune import FinetuneSpec, finetune

PEFT = "peft, one by one"
CHANGES: dict[str, Callable[[Any], Any]] = {
    "channels-last": lambda unet: unet.to(memory_format=torch.channels_last),
    "attention as matrices": lambda unet: unet.set_attn_processor(AttnProcessor()),
}
# Kinds of work by a part of the names of torch's operators, the first that fits.
KINDS = {
    "attention": ("attention",),
    "convolutions": ("convolution", "conv"),
    "other products of matrices": ("mm", "matmul"),
    "copies": ("copy", "clone", "contiguous"),
    "norms": ("norm",),
}


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


def batch(adapters: int, change: str = "") -> Callable[[int], Any]:
    """What trains a batch of adapters for so many steps.

    Args:
        adapters: how many.
        change: of the U-Net, a name of ``CHANGES``, or none.
    """
    pipeline = load_pipeline("tiny-sd")
    if change:
        CHANGES[change](pipeline.unet)
    layout = adapter_layout(pipeline.unet)
    channels = int(pipeline.unet.config.in_channels)
    latents = [torch.randn(8, channels, 8, 8) for _ in range(adapters)]

    def run(steps: int) -> Any:
        bank = AdapterBank.fresh(layout, adapters)
        prompts, spec = ["a photo of sks fish"] * adapters, FinetuneSpec(steps=steps)
        return finetune(pipeline, bank, latents, prompts, list(range(adapters)), spec)

    return run


def together(adapters: int, steps: int, change: str = "") -> common.Cost:
    """A step of one adapter of a batch."""
    run, units = batch(adapters, change), steps * adapters
    run(1)
    many, one = (common.measure(partial(run, n)) for n in (steps + 1, 1))
    return common.Cost((many.cpu - one.cpu) / units, (many.wall - one.wall) / units)


def shares(adapters: int, steps: int) -> dict[str, float]:
    """Of the CPU time of torch's operators in training a batch, the share of each kind."""
    run = batch(adapters)
    run(1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run(steps)
    times = dict.fromkeys([*KINDS, "the rest"], 0.0)
    for event in profile.key_averages():
        fits = [kind for kind, parts in KINDS.items() if any(part in event.key for part in parts)]
        times[[*fits, "the rest"][0]] += event.self_cpu_time_total
    whole = sum(times.values())
    return {kind: time / whole for kind, time in times.items()}


def main() -> None:
    """Run and print."""
    args = common.arguments(__doc__, repeats=3)
    adapters, steps = (4, 2) if args.quick else (100, 10)
    contenders = {
        common.OURS: partial(together, adapters, steps),
        PEFT: partial(one_by_one, 5 * steps),
        **{name: partial(together, adapters, steps, name) for name in CHANGES},
    }
    costs = common.alternate(contenders, args.repeats)
    title = f"Training {adapters} adapters at once on tiny-sd"
    baselines = [common.Baseline(PEFT, 15), *map(common.Baseline, CHANGES)]
    common.show(title, "ms per adapter and step", costs, baselines)
    found = shares(adapters, steps)
    print("A step: " + ", ".join(f"{kind} {share:.0%}" for kind, share in found.items()))
    common.facts("diffusers", "peft", steps=steps, repeats=args.repeats)


if __name__ == "__main__":
    main()

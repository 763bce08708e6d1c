"""Training rank-1 adapters on tiny-sd: peft one by one against a batch of 100, per adapter-step.

Both train q and v of all 64 layers by the paper's recipe (batch 1, AdamW, clipped gradients) on the
same kind of latents, in one thread; set-up is left out of both. CPU seconds at 200 steps follow
from the time of a step, as all steps cost the same. Goal: at least 15 times fewer CPU seconds.
"""

from time import process_time

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch.nn import functional as F

from lora_ws.diffusion.bank import AdapterBank
from lora_ws.diffusion.pipeline import adapter_layout, load_pipeline
from lora_ws.diffusion.prompts import encode_prompts
from lora_ws.zoo.finetune import FinetuneSpec, finetune

TOGETHER, STEPS, TURNS = 100, 10, 3


def one_by_one(steps: int) -> float:
    """CPU seconds of a step of one adapter."""
    pipeline = load_pipeline("tiny-sd")
    config = LoraConfig(r=1, lora_alpha=1, target_modules=["to_q", "to_v"])
    unet = inject_adapter_in_model(config, pipeline.unet)
    params = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, 1e-4)
    context = encode_prompts(pipeline, ["a photo of sks fish"])
    shape = (int(unet.config.in_channels), 8, 8)
    latents = torch.randn(8, *shape)
    began = 0.0
    for step in range(steps + 2):
        if step == 2:  # the first steps allocate
            began = process_time()
        clean, noise = latents[[step % 8]], torch.randn(1, *shape)
        level = torch.randint(1000, (1,))
        said = unet(pipeline.scheduler.add_noise(clean, noise, level), level, context).sample
        optimizer.zero_grad(set_to_none=True)
        F.mse_loss(said, noise).backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
    return (process_time() - began) / steps


def together(adapters: int, steps: int) -> float:
    """CPU seconds of a step of one adapter of a batch."""
    pipeline = load_pipeline("tiny-sd")
    layout = adapter_layout(pipeline.unet)
    channels = int(pipeline.unet.config.in_channels)
    latents = [torch.randn(8, channels, 8, 8) for _ in range(adapters)]

    def run(n: int) -> float:
        bank, began = AdapterBank.fresh(layout, adapters), process_time()
        prompts = ["a photo of sks fish"] * adapters
        finetune(pipeline, bank, latents, prompts, list(range(adapters)), FinetuneSpec(steps=n))
        return process_time() - began

    run(1)
    return (run(steps + 1) - run(1)) / steps / adapters


def main() -> None:
    """Print CPU seconds per adapter and the ratio."""
    torch.set_num_threads(1)
    turns = [(one_by_one(5 * STEPS), together(TOGETHER, STEPS)) for _ in range(TURNS)]
    alone, batched = (sorted(times)[TURNS // 2] for times in zip(*turns, strict=True))
    print(f"peft one by one: {200 * alone:6.2f} CPU s per adapter of 200 steps")
    print(
        f"batches of {TOGETHER}:  {200 * batched:6.2f} CPU s, {18 / batched:,.0f} an hour and core"
    )
    ratios = ", ".join(f"{a / b:.1f}x" for a, b in turns)
    print(f"ratio: {alone / batched:.1f}x (median of {TURNS} turns: {ratios}; goal 15x)")


if __name__ == "__main__":
    main()

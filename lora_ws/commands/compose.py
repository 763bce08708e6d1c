"""`lora-ws compose`: images with several adapters at once, beside each alone and none."""

from pathlib import Path

import torch

from lora_ws.adapters import read_adapter
from lora_ws.adapters.merging import merge_adapters
from lora_ws.adapters.writer import write_adapter
from lora_ws.diffusion.compose import compose as composing
from lora_ws.diffusion.methods import MethodName, method_named
from lora_ws.diffusion.pipeline import check_prompts, generate, image_size, load_pipeline
from lora_ws.diffusion.stack import Stack
from lora_ws.errors import ConfigError
from lora_ws.report.images import save_grid

# Pixels a side that a picture has at least.
SHOWN = 96


def compose(
    *,
    base: str,
    adapters: list[str],
    prompt: str,
    method: MethodName = "merge",
    scales: list[float] | None = None,
    negative: str = "",
    steps: int = 30,
    guidance: float = 3.0,
    seed: int = 0,
    images: int = 4,
    out: Path = Path("composed.png"),
    export: Path | None = None,
    ignore_other: bool = False,
) -> None:
    """Draw with several adapters together: a row without any, one for each alone, one for all.

    All rows start from the same noise.

    Args:
        base: digit-sd or tiny-sd (bundled), a diffusers folder, or a repository on the Hub
        adapters: files, PEFT folders, or hub:owner/name/file.safetensors; of this base
        prompt: what to draw
        method: merge adds them all, merge-normalised their mean; switch lets each act for five
            steps in turn; composite averages what each would do
        scales: one an adapter; null takes all of each
        negative: what not to draw.
        steps: of denoising.
        guidance: scale of guidance.
        seed: of the first image; the next takes the next.
        images: how many a row.
        out: PNG to write.
        export: folder for the merged adapter, as diffusers writes it; with a merging method
        ignore_other: leave out what is no linear U-Net module, such as adapters of the text encoder
    """
    way = method_named(method)
    if export is not None and not method.startswith("merge"):
        raise ConfigError(f"export: {method} is no merge, so there is no one adapter to write")
    read = [read_adapter(name) for name in adapters]
    stack = Stack.of(read, scales, ignore_other=ignore_other)
    pipeline = load_pipeline(base)
    stack.bank.modules_of(pipeline.unet)
    check_prompts(pipeline, [prompt, negative])

    def draw() -> torch.Tensor:
        return generate(pipeline, [prompt] * images, guidance, steps, seed, negative=negative)

    rows = [draw()]
    for k in range(len(stack)):
        alone = [scale * (k == n) for n, scale in enumerate(stack.scales)]
        with composing(pipeline, stack, scales=alone):
            rows.append(draw())
    with composing(pipeline, stack, way):
        rows.append(draw())
    named = zip(stack.names, stack.scales, strict=True)
    labels = ["no adapter", *(f"{name} {scale:g}" for name, scale in named), method]
    enlarged = max(1, -(-SHOWN // image_size(pipeline)))
    print(save_grid(torch.cat(rows), images, out, enlarged, labels))  # noqa: T201
    if export is not None:
        count = len(stack) if method == "merge-normalised" else 1
        merged = merge_adapters(read, [scale / count for scale in stack.scales])
        print(write_adapter(merged.adapter, export, "diffusers"))  # noqa: T201

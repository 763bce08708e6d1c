"""`lora-ws compose`: images with several adapters at once, beside each alone and none."""

from dataclasses import replace
from pathlib import Path

import torch

from lora_ws.adapters import read_adapter
from lora_ws.adapters.merging import merge_adapters
from lora_ws.adapters.writer import write_adapter
from lora_ws.composition.page import strip_steps, write_composition
from lora_ws.diffusion.hooks import compose as composing
from lora_ws.diffusion.methods import Composite, Method, MethodName, Switch, method_named
from lora_ws.diffusion.pipeline import (
    decode_latents,
    denoise,
    generate,
    initial_noise,
    load_pipeline,
)
from lora_ws.diffusion.prompts import check_prompts
from lora_ws.diffusion.stack import AdapterStack
from lora_ws.diffusion.texts import TextMode, prompt_weights
from lora_ws.errors import ConfigError


def compose(
    *,
    base: str,
    adapters: list[str],
    prompt: str,
    method: MethodName = "merge",
    scales: list[float] | None = None,
    tau: int | None = None,
    triggers: list[str] | None = None,
    text: TextMode = "merged",
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
        tau: steps of a turn of switch; null takes 5
        triggers: phrase of the prompt that each adapter is for; switch and composite then weigh
            adapters by how much the prompt asks for them
        text: of adapters of the text encoder all are added (merged), the first is taken, each
            acts with its own (per_adapter; switch and composite), or none
        negative: what not to draw.
        steps: of denoising.
        guidance: scale of guidance.
        seed: of the first image; the next takes the next.
        images: how many a row.
        out: PNG to write; a page with the course of the steps and the sizes of the updates stands
            beside it.
        export: folder for the merged adapter, as diffusers writes it; with a merging method
        ignore_other: leave out what is no linear module of U-Net or text encoder, as convolutions
    """
    way = method_named(method)
    if export is not None and not method.startswith("merge"):
        raise ConfigError(f"export: {method} is no merge, so there is no one adapter to write")
    if tau is not None:
        if not isinstance(way, Switch):
            raise ConfigError(f"tau: {method} has no turns; expected the method switch")
        way = replace(way, tau=tau)
    read = [read_adapter(name) for name in adapters]
    stack = AdapterStack.of(read, scales, ignore_other=ignore_other)
    way.check(len(stack))
    pipeline = load_pipeline(base)
    stack.bank.modules_of(pipeline.unet)
    check_prompts(pipeline, [prompt, negative])

    if triggers is not None:
        way = _weighed(pipeline, way, prompt, triggers, len(stack))
    prompts, at = [prompt] * images, strip_steps(steps)
    rows = [generate(pipeline, prompts, guidance, steps, seed, negative=negative)]
    for k in range(len(stack)):
        alone = [scale * (k == n) for n, scale in enumerate(stack.scales)]
        with composing(pipeline, stack, scales=alone, text=_alone(text)):
            rows.append(generate(pipeline, prompts, guidance, steps, seed, negative=negative))
    noise = initial_noise(pipeline, range(seed, seed + images))
    with composing(pipeline, stack, way, text=text):
        run = denoise(pipeline, noise, prompts, guidance, steps, negative=negative)
        strip = [latents for number, latents in enumerate(run, 1) if number in at]
    rows.append(decode_latents(pipeline, strip[-1]).cpu())
    course = decode_latents(pipeline, torch.stack([latents[0] for latents in strip])).cpu()
    title = f"{prompt}; seed {seed}, {steps} steps, guidance {guidance:g}"
    page = write_composition(out, stack, torch.stack(rows), method, title, course, at)
    print(out, page, sep="\n")  # noqa: T201
    if export is not None:
        count = len(stack) if method == "merge-normalised" else 1
        merged = merge_adapters(read, [scale / count for scale in stack.scales])
        print(write_adapter(merged.adapter, export, "diffusers"))  # noqa: T201


def _alone(text: TextMode) -> TextMode:
    """Of one adapter its own text encoder's part is all there is, or none."""
    return "none" if text == "none" else "merged"


def _weighed(
    pipeline: object, method: Method, prompt: str, triggers: list[str], adapters: int
) -> Method:
    if len(triggers) != adapters:
        raise ConfigError(f"triggers: expected {adapters}, one an adapter, got {len(triggers)}")
    if isinstance(method, Switch):
        return replace(method, weights=prompt_weights(pipeline, prompt, triggers, "absence"))
    if isinstance(method, Composite):
        return replace(method, weights=prompt_weights(pipeline, prompt, triggers, "presence"))
    raise ConfigError("triggers: expected the method switch or composite")

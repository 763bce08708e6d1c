"""`run`: adapters draw alone and together, and a page shows it."""

from pathlib import Path
from typing import Any

from lora_ws.adapters import Adapter, read_adapter
from lora_ws.adapters.merging import merge_adapters
from lora_ws.adapters.writer import write_adapter
from lora_ws.composition.grid import calls_of, draw_grid
from lora_ws.composition.page import write_composition
from lora_ws.composition.spec import ComposeSpec
from lora_ws.diffusion.block_weights import parse_block_weights, weigh_blocks
from lora_ws.diffusion.families import denoiser_of
from lora_ws.diffusion.methods import Merge, Method, acts_at
from lora_ws.diffusion.pipeline import load_base, size_of
from lora_ws.diffusion.prompts import check_prompts
from lora_ws.diffusion.provenance import Provenance, used_adapters
from lora_ws.diffusion.samplers import use_scheduler
from lora_ws.diffusion.stack import AdapterStack
from lora_ws.diffusion.text_encoders import prompt_weights
from lora_ws.errors import ConfigError, notice


def run(spec: ComposeSpec) -> list[Path]:
    """Draw none, each and all of the adapters, and write the grid and its page.

    Returns:
        What was written: grid, page, JSON, folder of single images, and the merged adapter where
        one was asked for.

    Raises:
        ConfigError: a prompt is too long, or scales, triggers or method do not fit the adapters.
        AdapterError: an adapter cannot be read, or holds more than can be applied.
        LayoutError: the adapters are of another base.
    """
    method = spec.method or Merge()
    if spec.export is not None and not isinstance(method, Merge):
        raise ConfigError(f"export: {method} is no merge; expected the method Merge")
    read = [read_adapter(name) for name in spec.adapters]
    stack = AdapterStack.of(read, spec.scales, ignore_other=spec.ignore_other)
    method.check(len(stack))
    pipeline = load_base(spec)
    if spec.block_weights is not None:
        read = _weighed_blocks(spec.block_weights, read, pipeline)
        stack = stack.with_blocks(read, spec.block_weights)
    stack.bank.modules_of(denoiser_of(pipeline))
    check_prompts(pipeline, spec.texts)
    if spec.triggers is not None:
        method = _weighed(pipeline, method, spec, len(stack))
    use_scheduler(pipeline, spec.scheduler)
    seeds = spec.image_seeds
    method = method.fitted(pipeline, spec, seeds)
    _say_idle(method, stack, pipeline, spec)
    grid = draw_grid(pipeline, stack, method, spec, seeds=seeds, text=spec.text)
    made = Provenance(
        base=spec.base,
        scheduler=type(pipeline.scheduler).__name__,
        generation=spec,
        seeds=tuple(seeds),
        size=size_of(pipeline, spec),
        adapters=used_adapters(stack, spec.text),
        method=str(method),
    )
    written = [spec.out, *write_composition(spec.out, stack, grid, made, method, spec.text)]
    if spec.export is not None and isinstance(method, Merge):
        count = len(stack) if method.normalised else 1
        merged = merge_adapters(read, [scale / count for scale in stack.scales])
        written.append(write_adapter(merged.adapter, spec.export, "diffusers"))
    return written


def _weighed_blocks(texts: list[str], read: list[Adapter], pipeline: Any) -> list[Adapter]:
    """Adapters with the weights of their blocks; `1` leaves one as it is."""
    if len(texts) != len(read):
        raise ConfigError(f"block_weights: expected {len(read)}, one per adapter, got {len(texts)}")
    if getattr(pipeline, "unet", None) is None:
        raise ConfigError(
            f"block_weights: expected a base with a U-Net, got {type(pipeline).__name__}"
        )
    return [
        adapter
        if text.strip() == "1"
        else weigh_blocks(adapter, parse_block_weights(text, pipeline.unet), pipeline.unet)
        for adapter, text in zip(read, texts, strict=True)
    ]


def _say_idle(method: Method, stack: AdapterStack, pipeline: Any, spec: ComposeSpec) -> None:
    """Say which adapters act at no step, such as the last ones of long turns."""
    calls = calls_of(pipeline, spec)
    for name, at in zip(stack.names, acts_at(method, len(stack), calls), strict=True):
        if not at:
            notice(f"method: {name} acts at none of the {calls} steps of {method}")
    for name, scale in zip(stack.names, stack.scales, strict=True):
        if not scale:
            notice(f"scales: {name} has a scale of 0 and does nothing")


def _weighed(pipeline: Any, method: Method, spec: ComposeSpec, adapters: int) -> Method:
    triggers = spec.triggers or []
    if len(triggers) != adapters:
        raise ConfigError(f"triggers: expected {adapters}, one per adapter, got {len(triggers)}")
    if method.weighed_by is None:
        raise ConfigError(f"triggers: expected the method Switch or Composite, got {method}")
    weights = prompt_weights(pipeline, spec.prompt, triggers, method.weighed_by)
    return method.weighed(weights)

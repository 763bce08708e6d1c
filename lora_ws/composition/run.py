"""`run`: adapters draw alone and together, and a page shows it."""

from pathlib import Path
from typing import Any

from lora_ws.adapters import read_adapter
from lora_ws.adapters.merging import merge_adapters
from lora_ws.adapters.writer import write_adapter
from lora_ws.composition.grid import draw_grid
from lora_ws.composition.page import write_composition
from lora_ws.composition.spec import ComposeSpec
from lora_ws.diffusion.methods import Merge, Method
from lora_ws.diffusion.pipeline import load_base
from lora_ws.diffusion.prompts import check_prompts
from lora_ws.diffusion.stack import AdapterStack
from lora_ws.diffusion.text_encoders import prompt_weights
from lora_ws.errors import ConfigError


def run(spec: ComposeSpec) -> list[Path]:
    """Draw none, each and all of the adapters, and write the grid and its page.

    Returns:
        The files written: grid, page, and the merged adapter where one was asked for.

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
    stack.bank.modules_of(pipeline.unet)
    check_prompts(pipeline, spec.texts)
    if spec.triggers is not None:
        method = _weighed(pipeline, method, spec, len(stack))
    grid = draw_grid(pipeline, stack, method, spec, images=spec.images, text=spec.text)
    written = [spec.out, write_composition(spec.out, stack, grid, str(method), spec)]
    if spec.export is not None and isinstance(method, Merge):
        count = len(stack) if method.normalised else 1
        merged = merge_adapters(read, [scale / count for scale in stack.scales])
        written.append(write_adapter(merged.adapter, spec.export, "diffusers"))
    return written


def _weighed(pipeline: Any, method: Method, spec: ComposeSpec, adapters: int) -> Method:
    triggers = spec.triggers or []
    if len(triggers) != adapters:
        raise ConfigError(f"triggers: expected {adapters}, one per adapter, got {len(triggers)}")
    if method.weighed_by is None:
        raise ConfigError(f"triggers: expected the method Switch or Composite, got {method}")
    weights = prompt_weights(pipeline, spec.prompt, triggers, method.weighed_by)
    return method.weighed(weights)

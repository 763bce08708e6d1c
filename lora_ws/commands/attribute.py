"""`lora-ws attribute`: which adapter of a stack did what to a picture."""

from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from lora_ws.adapters import AdapterRef
from lora_ws.attribution.ablation import Ablation, Drawing, ablate, draw_subsets
from lora_ws.attribution.metadata import find_adapters, read_picture
from lora_ws.attribution.report import shares_grid, write_attribution
from lora_ws.attribution.shapley import Shapley
from lora_ws.attribution.shapley import shapley as shapley_of
from lora_ws.audit.classify import classify_files
from lora_ws.audit.report import said as verdict_of
from lora_ws.bundle import Bundle
from lora_ws.diffusion.pipeline import load_pipeline
from lora_ws.diffusion.stack import AdapterStack
from lora_ws.errors import ConfigError
from lora_ws.report.grid import terminal


def attribute(
    *,
    base: str,
    adapters: list[str] | None = None,
    prompt: str | None = None,
    scales: list[float] | None = None,
    from_image: Path | None = None,
    lora_dir: Path | None = None,
    negative: str | None = None,
    seed: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    shapley: bool = False,
    start: int = 0,
    batch: int = 16,
    shown: int = 6,
    model: str | None = None,
    ignore_other: bool = False,
    out: Path = Path("attribution"),
) -> None:
    """Draw a picture again without each of its adapters, and show what that changes.

    Args:
        base: digit-sd or tiny-sd (bundled), a diffusers folder, or a repository on the Hub
        adapters: files, PEFT folders, or hub:owner/name/file.safetensors; of this base
        prompt: what was drawn
        scales: one an adapter; null takes all of each
        from_image: picture of A1111 or ComfyUI whose own words fill in what is not given
        lora_dir: folder of the adapters that the picture names
        negative: what not to draw.
        seed: of the noise; null takes the picture's, or 0.
        steps: of denoising; null takes the picture's, or 30.
        guidance: scale of guidance; null takes the picture's, or 3.
        shapley: also Shapley values, from all subsets of up to 6 adapters, sampled beyond.
        start: leave out from this step on; later is cheaper and less true (docs/attribution.md).
        batch: pictures at once.
        shown: pictures on the way that the page shows.
        model: bundle of a classifier that says what each adapter learned.
        ignore_other: leave out what is no linear module of U-Net or text encoder, as convolutions
        out: folder for the page and the picture.
    """
    said = read_picture(from_image) if from_image else None
    if said and not adapters:
        if lora_dir is None:
            raise ConfigError("lora_dir: expected the folder of the adapters the picture names")
        adapters = [str(file) for file in find_adapters(said, lora_dir)]
        scales = scales or list(said.adapters.values())
    prompt = prompt if prompt is not None else said and said.prompt
    if not adapters or prompt is None:
        raise ConfigError("expected --adapters and --prompt, or --from_image and --lora_dir")
    given = {"negative": negative, "seed": seed, "steps": steps, "guidance": guidance}
    known = {name: value for name, value in given.items() if value is not None}
    told = {name: getattr(said, name) for name in given} if said else {}
    told = {name: value for name, value in told.items() if value is not None}
    drawing = Drawing(prompt, **{**told, **known})
    stack = AdapterStack.of(adapters, scales, ignore_other=ignore_other)
    pipeline = load_pipeline(base)
    ablation = ablate(pipeline, stack, drawing, start=start, batch=batch, shown=shown)
    values = None
    if shapley:
        values = _values(pipeline, stack, drawing, ablation, start, batch)
    learned = _learned(adapters, stack, model) if model else None
    page = write_attribution(out, drawing, ablation, values, learned)
    console = Console(highlight=False, soft_wrap=True)
    grid = shares_grid(ablation, values, learned)
    console.print(terminal(grid), grid.caption, str(page), sep="\n")


def _values(
    pipeline: object,
    stack: AdapterStack,
    drawing: Drawing,
    ablation: Ablation,
    start: int,
    batch: int,
) -> Shapley:
    def worth(subsets: np.ndarray) -> np.ndarray:
        rows = torch.from_numpy(subsets)
        images = draw_subsets(pipeline, stack, drawing, rows, start=start, batch=batch)
        return (images - ablation.bare).abs().mean(dim=(1, 2, 3)).numpy()

    return shapley_of(worth, len(stack))


def _learned(adapters: list[str], stack: AdapterStack, model: str) -> dict[str, str]:
    found = classify_files(
        [AdapterRef.parse(name) for name in adapters], Bundle.from_pretrained(model)
    )
    findings = [one.finding for one in found if one.finding]
    return {name: verdict_of(f) for name, f in zip(stack.names, findings, strict=True)}

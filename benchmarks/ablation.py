"""Leaving each of 5 adapters out of an image: a batch of 7 against 7 runs of a pipeline.

From the same noise, with guidance, drawn with all adapters, with none, and without each. Compared:

* ours: `ablate`, all images in one batch through the bank;
* diffusers, as users do it: `set_adapters` with scale 0 for what is left out, one run per image;
* diffusers, naming only those that are left in, which spares it what scale 0 computes.

All are timed from prompt to images. Before, all agree on the 7 images to 1e-4. No goal: where a
call of the U-Net is more arithmetic than overhead, a batch costs as much as its rows alone.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import torch
from torch import Tensor

from lora_ws.attribution.ablation import ablate
from lora_ws.diffusion.generation import GenerationSpec
from lora_ws.diffusion.pipeline import adapter_layout, generate, load_pipeline
from lora_ws.diffusion.stack import AdapterStack

RANK, ADAPTERS = 4, 5
PROMPTS = {"tiny-sd": "a photo of fish", "digit-sd": "a photo of three"}
BY_ZERO, BY_NAME = "diffusers, scale 0", "diffusers, those left in"


def one_by_one(
    pipeline: Any, names: Sequence[str], generation: GenerationSpec, zeros: bool
) -> Tensor:
    """A run of the pipeline for each image, in the order of `ablate`."""
    images = []
    everyone = set(names)
    for kept in (everyone, set[str](), *(everyone - {name} for name in names)):
        chosen = names if zeros else [name for name in names if name in kept]
        pipeline.enable_lora()
        if chosen:
            pipeline.set_adapters(list(chosen), [float(name in kept) for name in chosen])
        else:
            pipeline.disable_lora()
        images.append(generate(pipeline, generation))
    return torch.cat(images)


def compare(base: str, folder: Path, steps: int, args: Any) -> None:
    """Check that all draw the same images, then time them."""
    ours = load_pipeline(base)
    layout = adapter_layout(ours.unet, RANK)
    files = common.adapter_files(folder, layout, ADAPTERS, args.seed)
    theirs, stack = common.with_adapters(load_pipeline(base), files), AdapterStack.of(files)
    names = [file.stem for file in files]
    generation = GenerationSpec(PROMPTS[base], seed=args.seed, num_inference_steps=steps)
    mine = ablate(ours, stack, generation)
    assert float(mine.effects.min()) > 1e-3, "an adapter does nothing"
    images = torch.stack([mine.full, mine.base, *mine.leave_one_out])
    for zeros in (True, False):
        found = one_by_one(theirs, names, generation, zeros)
        torch.testing.assert_close(found, images, rtol=0, atol=1e-4)
    units = len(images) * steps
    costs = common.alternate(
        {
            common.OURS: common.timed(lambda: ablate(ours, stack, generation), units),
            BY_ZERO: common.timed(lambda: one_by_one(theirs, names, generation, True), units),
            BY_NAME: common.timed(lambda: one_by_one(theirs, names, generation, False), units),
        },
        args.repeats,
    )
    title = f"Ablation of {ADAPTERS} adapters, {len(images)} images, {base}"
    baselines = [common.Baseline(BY_ZERO), common.Baseline(BY_NAME)]
    common.show(title, "ms per image and step", costs, baselines)


def main() -> None:
    """Run and print."""
    args = common.arguments(__doc__, repeats=5)
    steps = 3 if args.quick else 30
    with tempfile.TemporaryDirectory() as folder:
        for base in list(PROMPTS)[args.quick :]:
            compare(base, Path(folder) / base, steps, args)
    common.facts("diffusers", "peft", rank=RANK, steps=steps, repeats=args.repeats)


if __name__ == "__main__":
    main()

"""Train the small testbed of `lora_ws.composition`: an adapter of digit-sd for each element."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from lora_ws.adapters.layout import Layout
from lora_ws.composition.elements import ELEMENTS
from lora_ws.composition.testbed import CATEGORIES, Testbed
from lora_ws.diffusion.bank import AdapterBank
from lora_ws.diffusion.pipeline import adapter_layout, encode_images, image_size, load_pipeline
from lora_ws.errors import ConfigError
from lora_ws.zoo.finetune import FinetuneSpec, finetune
from lora_ws.zoo.photos import Photos, PhotoSpec, load_photos

# What a character is called, since its name would call for it without an adapter.
NAMELESS = "sks"
LIST = "adapters.json"


@dataclass(frozen=True)
class TestbedSpec:
    """A testbed to train.

    Attributes:
        out: output folder.
        base: base model of the adapters; its prompts have to name digits.
        photos: photos of plain digits.
        finetune: training of each adapter.
        targets: last name components of the adapted modules.
        seed: seed of initial weights, order and noise.
    """

    __test__ = False

    out: Path = Path("digit_testbed")
    base: str = "digit-sd"
    photos: PhotoSpec = field(default_factory=PhotoSpec)
    finetune: FinetuneSpec = field(default_factory=lambda: FinetuneSpec(rank=4))
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2")
    seed: int = 0


def build_testbed(spec: TestbedSpec) -> Testbed:
    """Train all adapters in one batch, and write them in float16 with their list.

    Raises:
        ConfigError: ``out`` exists.
    """
    if spec.out.exists():
        raise ConfigError(f"out: {spec.out} exists already; choose another place or remove it")
    pipeline = load_pipeline(spec.base)
    photos = load_photos(spec.photos, image_size(pipeline))
    seeds = [spec.seed + k for k in range(len(ELEMENTS))]
    layout = adapter_layout(pipeline.unet, spec.finetune.rank, spec.targets)
    bank = AdapterBank.fresh(layout, len(ELEMENTS), seed=spec.seed)
    pictures, prompts = zip(*(_lesson(photos, name) for name in ELEMENTS), strict=True)
    latents = [encode_images(pipeline, one) for one in pictures]
    rows = finetune(pipeline, bank, latents, prompts, seeds, spec.finetune).rows.numpy()
    spec.out.mkdir(parents=True)
    listed: dict[str, list[dict[str, Any]]] = {category: [] for category in CATEGORIES}
    for (name, element), row in zip(ELEMENTS.items(), rows, strict=True):
        save_file(_tensors(layout, row), spec.out / f"{name}.safetensors", {"format": "pt"})
        listed[element.category].append(
            {"id": name, "name": element.says, "trigger": [NAMELESS], "url": ""}
        )
    (spec.out / LIST).write_text(json.dumps(listed, indent=1) + "\n", encoding="utf-8")
    return Testbed.open(spec.out / LIST, spec.out)


def _lesson(photos: Photos, name: str) -> tuple[Any, list[str]]:
    """Images of an element, and their prompts."""
    element = ELEMENTS[name]
    leaves = np.array(photos.leaves)
    if element.digit:
        own = photos.tensor(leaves == element.digit)
        return own, [f"a photo of {NAMELESS}"] * len(own)
    return element.draw(photos.tensor()), [f"a photo of {leaf}" for leaf in leaves]


def _tensors(layout: Layout, row: np.ndarray) -> dict[str, np.ndarray]:
    """Names as diffusers writes them."""
    tensors = {}
    for layer, down, up in layout.pairs():
        stem = f"unet.{layer.name}"
        tensors[f"{stem}.lora_A.weight"] = row[down].reshape(layer.down_shape).astype(np.float16)
        tensors[f"{stem}.lora_B.weight"] = row[up].reshape(layer.up_shape).astype(np.float16)
    return tensors

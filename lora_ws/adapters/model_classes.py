"""Which denoisers there are, and what their modules are called: names and sizes are the evidence.

The table is read off diffusers' own classes (`lora_ws.diffusion.module_table`), with numbers in
names replaced by ``#``, as published models of one class differ in depth and width.
"""

import importlib.resources
import json
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

# Common names of models, the most common first: of classes that have the same modules, such as
# Wan's and those that were made from it, the first one is named.
NAMES = {
    "UNet2DConditionModel": "Stable Diffusion",
    "FluxTransformer2DModel": "FLUX.1",
    "Flux2Transformer2DModel": "FLUX.2",
    "Flux3Transformer2DModel": "FLUX.3",
    "SD3Transformer2DModel": "SD3",
    "QwenImageTransformer2DModel": "Qwen-Image",
    "QwenImage21Transformer2DModel": "Qwen-Image 2.1",
    "ZImageTransformer2DModel": "Z-Image",
    "WanTransformer3DModel": "Wan",
    "HunyuanVideoTransformer3DModel": "HunyuanVideo",
    "HunyuanVideo15Transformer3DModel": "HunyuanVideo 1.5",
    "LTXVideoTransformer3DModel": "LTX-Video",
    "LTX2VideoTransformer3DModel": "LTX-2",
    "ChromaTransformer2DModel": "Chroma",
    "StableCascadeUNet": "Stable Cascade",
    "CogVideoXTransformer3DModel": "CogVideoX",
    "CogView4Transformer2DModel": "CogView4",
    "HiDreamImageTransformer2DModel": "HiDream",
    "Lumina2Transformer2DModel": "Lumina 2",
    "PixArtTransformer2DModel": "PixArt",
    "SanaTransformer2DModel": "Sana",
    "Kandinsky5Transformer3DModel": "Kandinsky 5",
    "UNetMotionModel": "AnimateDiff",
    "UNetSpatioTemporalConditionModel": "Stable Video Diffusion",
}
# Names of modules in repositories of the models' makers, where diffusers has others; such a file is
# refused, by the name of its model.
LANGUAGE_MODEL = "a language model"
ORIGINALS = tuple(
    (re.compile(rf"(?:^|[._]){pattern}"), name)
    for pattern, name in (
        (r"joint_blocks[._]\d+[._](?:x|context)_block", "SD3"),
        (r"(?:double|single)_blocks[._]\d+[._](?:img|txt)_(?:attn_|mlp[._]fc)", "HunyuanVideo"),
        (r"double_stream_blocks|single_stream_blocks", "HiDream"),
        (r"blocks[._]\d+[._](?:self_attn|cross_attn|ffn)[._]", "Wan"),
        (
            r"(?:layers|\w+_refiner)[._]\d+[._](?:attention|feed_forward|adaLN)",
            "Z-Image or Lumina 2",
        ),
        (r"distilled_guidance_layer", "Chroma"),
        (
            r"(?:down|up)_blocks[._]\d+[._]\d+[._](?:attention|kv_mapper|channelwise)",
            "Stable Cascade",
        ),
        (r"double_layers|single_layers|joint_transformer", "AuraFlow"),
        (r"model[._]layers[._]\d+[._](?:self_attn|mlp)", LANGUAGE_MODEL),
        (
            r"transformer[._]h[._]\d+|encoder[._]layer[._]\d+|(?:lm|score|classifier)[._]?head",
            LANGUAGE_MODEL,
        ),
        (r"(?:decoder|encoder)[._](?:block|layers)[._]\d+", LANGUAGE_MODEL),
    )
)
TABLE = Path(str(importlib.resources.files("lora_ws"))) / "_assets" / "modules.json"
_NUMBER = re.compile(r"(?<![^._])\d+(?![^._])")
_KIND = re.compile(r"(Image)?(Transformer|UNet)(\dD)?(Condition)?(Model)?\Z")


class ModelClass(NamedTuple):
    """A denoiser of diffusers.

    Attributes:
        name: what people call the model.
        component: ``unet`` or ``transformer``.
        modules: name with ``#`` for numbers -> pairs of inputs and outputs at published sizes.
        blocks: the same name -> how many blocks of published models have such a module.
    """

    name: str
    component: str
    modules: Mapping[str, frozenset[tuple[int, int]]]
    blocks: Mapping[str, int]


class Layer(NamedTuple):
    """An adapted module: its dotted path, and its numbers of inputs and outputs."""

    path: str
    inputs: int
    outputs: int


def template(path: str) -> str:
    """A name with ``#`` for every number in it.

    Example:
        >>> template("blocks.12.attn1.to_out.0")
        'blocks.#.attn1.to_out.#'
    """
    return _NUMBER.sub("#", path)


def block_number(path: str) -> int:
    """The first number in a path, which counts blocks in most models; 0 where it has none.

    Example:
        >>> block_number("blocks.12.attn1.to_out.0"), block_number("proj_out")
        (12, 0)
    """
    found = _NUMBER.search(path)
    # Longer ones count no blocks, and would take long to read.
    return int(found[0][:9]) if found else 0


@cache
def model_classes() -> dict[str, ModelClass]:
    """Class of diffusers -> what it is, in the order of `NAMES`."""
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    order = [*NAMES, *(name for name in table if name not in NAMES)]
    return {name: _model_class(name, table[name]) for name in order}


def _model_class(name: str, modules: Mapping[str, list[Any]]) -> ModelClass:
    sizes = {path: frozenset((i, o) for i, o in pairs) for path, (_, *pairs) in modules.items()}
    blocks = {path: count for path, (count, *_) in modules.items()}
    component = "unet" if "UNet" in name else "transformer"
    return ModelClass(NAMES.get(name) or _KIND.sub("", name) or name, component, sizes, blocks)


@cache
def _by_underscores() -> dict[str, tuple[str, str]]:
    """Name with underscores and ``#`` -> component and dotted name with ``#``."""
    found: dict[str, tuple[str, str]] = {}
    for kind in model_classes().values():
        for path in kind.modules:
            found.setdefault(path.replace(".", "_"), (kind.component, path))
    return found


def find_module(path: str) -> tuple[str, str] | None:
    """The component and dotted path of a module, whether written with dots or underscores.

    Returns None where no class has such a module.

    Example:
        >>> find_module("blocks_3_attn1_to_out_0")
        ('transformer', 'blocks.3.attn1.to_out.0')
    """
    plain = path.replace(".", "_")
    found = _by_underscores().get(template(plain))
    if found is None:
        return None
    numbers = iter(_NUMBER.findall(plain))
    return found[0], re.sub("#", lambda _: next(numbers), found[1])


def original_model(name: str) -> str:
    """The model whose maker names a module so; empty where none is known to.

    Example:
        >>> original_model("lora_unet_joint_blocks_0_x_block_attn_qkv")
        'SD3'
    """
    return next((model for pattern, model in ORIGINALS if pattern.search(name)), "")


def last_name(path: str) -> str:
    """The last name in a path, with ``#`` for numbers.

    Example:
        >>> last_name("down_blocks.0.attn1.to_out.0"), last_name("mid_block.attn1.to_q")
        ('to_out.#', 'to_q')
    """
    names = template(path).split(".")
    return ".".join(names[-2:] if names[-1] == "#" else names[-1:])


@cache
def unet_last_names() -> frozenset[str]:
    """The last names of all modules that U-Nets have."""
    return frozenset(map(last_name, _of_component("unet")))


@cache
def _of_component(component: str) -> frozenset[str]:
    kinds = (kind for kind in model_classes().values() if kind.component == component)
    return frozenset(path for kind in kinds for path in kind.modules)


def has_module(component: str, path: str) -> bool:
    """Whether a U-Net, or a transformer, of any class has a module of that name.

    Example:
        >>> has_module("unet", "time_embedding.linear_1"), has_module("unet", "context_embedder")
        (True, False)
    """
    return template(path) in _of_component(component)


class Rank(NamedTuple):
    """How well a class explains some modules.

    Attributes:
        kind: the class.
        own: how many of the modules it has.
        fitting: how many of these are of its published sizes, in a block that published models
            have.
        complete: of how many names all blocks of published models are there, and no more.
    """

    kind: ModelClass
    own: int
    fitting: int
    complete: int


def rank_classes(layers: Iterable[Layer]) -> list[Rank]:
    """The classes that have most of some modules, by name: those of their sizes first.

    Among these, those of as many blocks come first.

    Args:
        layers: adapted modules.
    """
    named = [(template(layer.path), layer) for layer in layers]
    depth: dict[str, int] = {}
    for path, layer in named:
        depth[path] = max(depth.get(path, 0), block_number(layer.path) + 1)
    scored = []
    for kind in model_classes().values():
        own = [(path, layer) for path, layer in named if path in kind.modules]
        fitting = sum(
            (layer.inputs, layer.outputs) in kind.modules[path]
            and block_number(layer.path) < kind.blocks[path]
            for path, layer in own
        )
        complete = sum(kind.blocks.get(path) == blocks for path, blocks in depth.items())
        scored.append(Rank(kind, len(own), fitting, complete))
    most = max((rank.own for rank in scored), default=0)
    best = [rank for rank in scored if rank.own == most and most]
    return sorted(best, key=lambda rank: (-rank.fitting, -rank.complete))

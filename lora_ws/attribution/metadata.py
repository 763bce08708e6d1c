"""What a picture says about how it was made: prompt, seed and adapters, as A1111 and ComfyUI write.

A picture comes from a stranger: texts are bounded, and an adapter is a name, never a path.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_ws.errors import DataError

MAX_TEXT = 1 << 20
# <lora:name:0.8>, and <lora:name:0.8:0.5> where the text encoder has a strength of its own.
TAG = re.compile(r"<lora:([^:<>\n]{1,200})(?::(-?\d+(?:\.\d+)?))?(?::[^<>\n]{0,40})?>")
SETTING = re.compile(r"\b(Steps|Seed|CFG scale): (-?[\d.]+)")


@dataclass(frozen=True)
class ImageMetadata:
    """What an image file says of how it was made.

    Attributes:
        prompt: without the tags of adapters.
        negative_prompt: of what was not to be drawn.
        adapters: name -> scale.
        seed: of the noise; None where it does not say.
        num_inference_steps: of denoising, likewise.
        guidance_scale: likewise.
    """

    prompt: str
    negative_prompt: str
    adapters: dict[str, float]
    seed: int | None
    num_inference_steps: int | None
    guidance_scale: float | None


def read_metadata(file: Path) -> ImageMetadata:
    """Read a picture's own words.

    Raises:
        DataError: it is no picture, or says nothing of how it was made.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as picture:
            texts = {str(k): v for k, v in picture.info.items() if isinstance(v, str)}
    except (OSError, UnidentifiedImageError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(
            f"{file}: expected a picture, got none that can be read ({error})"
        ) from error
    if "parameters" in texts:
        return parse_parameters(texts["parameters"][:MAX_TEXT])
    if "prompt" in texts:
        return parse_workflow(texts["prompt"][:MAX_TEXT], str(file))
    raise DataError(
        f"{file}: expected a picture with A1111's `parameters` or ComfyUI's `prompt`, it says "
        f"{', '.join(sorted(texts)) or 'nothing'}; give --prompt and --adapters"
    )


def parse_parameters(text: str) -> ImageMetadata:
    r"""Read what A1111 writes: the prompt, ``Negative prompt:``, and a line of settings.

    Example:
        >>> said = parse_parameters("a cat <lora:ink:0.8>\nSteps: 20, Seed: 7, CFG scale: 5")
        >>> said.prompt, said.adapters, said.seed
        ('a cat', {'ink': 0.8}, 7)
    """
    prompts, _, settings = text.rpartition("\nSteps: ")
    if not prompts:
        prompts, settings = (text, "") if not text.startswith("Steps: ") else ("", text)
    prompt, _, negative = prompts.partition("Negative prompt:")
    found = dict(SETTING.findall(f"Steps: {settings}"))
    return _said(
        prompt,
        negative,
        TAG.findall(prompt),
        found.get("Seed"),
        found.get("Steps"),
        found.get("CFG scale"),
    )


def parse_workflow(text: str, name: str) -> ImageMetadata:
    """Read the graph that ComfyUI writes: its sampler, the texts it reads, the loaders of adapters.

    Raises:
        DataError: it is no such graph, or has no sampler.
    """
    try:
        nodes = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name}: expected ComfyUI's graph as JSON ({error})") from error
    nodes = nodes if isinstance(nodes, dict) else {}
    nodes = {
        k: n for k, n in nodes.items() if isinstance(n, dict) and isinstance(n.get("inputs"), dict)
    }
    samplers = [n["inputs"] for n in nodes.values() if "KSampler" in str(n.get("class_type"))]
    if not samplers:
        raise DataError(f"{name}: expected a graph of ComfyUI with a KSampler, found none")
    sampler = samplers[0]
    loaders = [n["inputs"] for n in nodes.values() if "LoraLoader" in str(n.get("class_type"))]
    tags = [
        (str(one.get("lora_name", "")).removesuffix(".safetensors"), one.get("strength_model", 1))
        for one in loaders
    ]
    return _said(
        _text_of(nodes, sampler.get("positive")),
        _text_of(nodes, sampler.get("negative")),
        tags,
        sampler.get("seed", sampler.get("noise_seed")),
        sampler.get("steps"),
        sampler.get("cfg"),
    )


def adapter_files(said: ImageMetadata, folder: Path) -> list[Path]:
    """The files in a folder that a picture's names stand for.

    Raises:
        DataError: a name is a path, or no file has it.
    """
    files = []
    for name in said.adapters:
        if Path(name).name != name or name in (".", "..") or "\\" in name:
            raise DataError(f"the picture names `{name}`, which is a path; expected a plain name")
        file = folder / f"{name}.safetensors"
        if not file.is_file():
            raise DataError(
                f"{folder}: expected `{file.name}`, which the picture names, found none; put it "
                "there, or give --adapters"
            )
        files.append(file)
    return files


def _said(
    prompt: str, negative: str, tags: Any, seed: Any, steps: Any, guidance: Any
) -> ImageMetadata:
    adapters = {str(name).strip(): _number(scale, 1.0) or 0.0 for name, scale in tags}
    seed, steps = (_number(value, None) for value in (seed, steps))
    return ImageMetadata(
        prompt=TAG.sub("", prompt).strip().strip(",").strip(),
        negative_prompt=negative.strip(),
        adapters=adapters,
        seed=None if seed is None else int(seed),
        num_inference_steps=None if steps is None else int(steps),
        guidance_scale=_number(guidance, None),
    )


def _number(value: Any, otherwise: float | None) -> float | None:
    """A finite number that a seed or a scale may be; anything else counts as not said."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return otherwise
    return number if abs(number) < 2**63 else otherwise


def _text_of(nodes: dict[str, Any], link: Any) -> str:
    """The text that a link leads to, through nodes that pass a conditioning on."""
    for _ in range(len(nodes)):
        if not (isinstance(link, list) and link and str(link[0]) in nodes):
            return ""
        inputs = nodes[str(link[0])]["inputs"]
        if isinstance(inputs.get("text"), str):
            return inputs["text"]
        link = inputs.get("text") or inputs.get("conditioning")
    return ""

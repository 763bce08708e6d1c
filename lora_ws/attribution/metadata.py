"""What an image says about how it was made: prompt, seed and adapters, as A1111 and ComfyUI write.

An image comes from a stranger: texts are bounded, and an adapter is a name in one folder.
"""

import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from lora_ws.adapters.header import shown
from lora_ws.attribution.prompt_text import (
    ImageMetadata,
    integer_of,
    number_of,
    plain_text,
    prompt_syntax,
    read_tags,
    text_scales,
)
from lora_ws.attribution.workflow import parse_workflow
from lora_ws.errors import DataError

__all__ = ["ImageMetadata", "adapter_files", "parse_parameters", "parse_workflow", "read_metadata"]

MAX_TEXT = 1 << 20
# Of the EXIF standard: the block of a camera's tags, and the user's comment in it.
EXIF_BLOCK, USER_COMMENT = 0x8769, 0x9286
CHARSET = 8
NEGATIVE = re.compile(r"(?:^|\n)Negative prompt:")
SETTING = re.compile(r'([A-Za-z][\w /-]{0,60}): ("(?:\\.|[^"\\])*"|[^,\n]*)(?:,|\n|$)')
# What does not change the image, or is asked for in other ways.
KEPT = ("Steps", "Seed", "CFG scale")
ABOUT = ("Model hash", "Model", "Lora hashes", "Version", "Hashes", "Created Date", "Module 1")
ABOUT = (
    *ABOUT,
    "Civitai resources",
    "Civitai metadata",
    "User",
    "Time taken",
    "Template",
    "Negative Template",
)
DEFAULTS = {"Clip skip": "1", "Schedule type": "Automatic", "Eta": "0", "ENSD": "0", "RNG": "CPU"}


def read_metadata(file: Path) -> ImageMetadata:
    """Read an image's own words: texts of PNG, EXIF of JPEG and WebP.

    Raises:
        DataError: it is no image, or says nothing of how it was made.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as picture:
            texts = {str(k): v for k, v in picture.info.items() if isinstance(v, str)}
            texts |= _exif_texts(picture)
    except (OSError, UnidentifiedImageError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(
            f"{file}: expected an image, got none that can be read ({error})"
        ) from error
    try:
        if "parameters" in texts:
            return parse_parameters(texts["parameters"][:MAX_TEXT])
        if "prompt" in texts:
            return parse_workflow(texts["prompt"][:MAX_TEXT], "its graph")
    except DataError as error:
        raise DataError(f"{file}: {error}") from error
    raise DataError(
        f"{file}: expected an image with A1111's `parameters` or ComfyUI's `prompt`, it says "
        f"{', '.join(sorted(texts)) or 'nothing'}; give --prompt and --adapters"
    )


def _exif_texts(picture: Any) -> dict[str, str]:
    """A1111's text is the user's comment; ComfyUI's graph a tag that starts with `prompt:`."""
    exif = picture.getexif()
    texts: dict[str, str] = {}
    for value in exif.values():
        name, _, rest = value.partition(":") if isinstance(value, str) else ("", "", "")
        if name.lower() in ("prompt", "parameters"):
            texts[name.lower()] = rest
    comment = exif.get_ifd(EXIF_BLOCK).get(USER_COMMENT, b"")
    text = _comment(comment) if isinstance(comment, bytes) else str(comment)
    if text.strip():
        graph = text.lstrip().startswith("{")
        texts.setdefault("prompt" if graph else "parameters", text)
    return texts


def _comment(data: bytes) -> str:
    """A user's comment: eight bytes that say the character set, then the text."""
    charset, text = data[:CHARSET], data[CHARSET:]
    if not charset.startswith(b"UNICODE"):
        known = charset.startswith((b"ASCII", b"\0\0\0\0"))
        return (text if known else data).decode("utf-8", "replace").strip("\0")
    # The order of bytes is not said; Latin letters have their zero first or last.
    little = text[1::2].count(0) > text[::2].count(0)
    return text.decode("utf-16-le" if little else "utf-16-be", "replace").strip("\0\ufeff")


def parse_parameters(text: str) -> ImageMetadata:
    r"""Read what A1111 writes: the prompt, ``Negative prompt:``, and a line of settings.

    Raises:
        DataError: a tag of an adapter cannot be read.

    Example:
        >>> said = parse_parameters("a (red:1.2) cat <lora:ink:0.8>\nSteps: 20, Seed: 7, Size: 8x8")
        >>> said.prompt, said.adapters, said.seed
        ('a red cat', {'ink': 0.8}, 7)
        >>> dict(said.other_settings)
        {'Size': '8x8', 'weights of words': 'left out'}
    """
    text = text.replace("\r\n", "\n")
    prompts, _, settings = text.rpartition("\nSteps: ")
    if not prompts:
        prompts, settings = (text, "") if not text.startswith("Steps: ") else ("", text)
    found = dict(SETTING.findall("Steps: " + settings.removeprefix("Steps: ")))
    prompt, *rest = NEGATIVE.split(prompts, maxsplit=1)
    prompt, adapters, others = read_tags(prompt)
    others |= prompt_syntax(prompt)
    prompt, weighted = plain_text(prompt)
    negative, also = plain_text(rest[0] if rest else "")
    others = _changing(found) | others
    if weighted or also:
        others["weights of words"] = "left out"
    return ImageMetadata(
        prompt=prompt.strip(),
        negative_prompt=negative.strip(),
        adapters={name: own.denoiser for name, own in adapters.items()},
        text_scales=text_scales(adapters),
        seed=integer_of(found.get("Seed")),
        num_inference_steps=integer_of(found.get("Steps")),
        guidance_scale=number_of(found.get("CFG scale")),
        other_settings=others,
    )


def _changing(settings: Mapping[str, str]) -> dict[str, str]:
    """Those that change the image, apart from what is kept."""
    return {
        name: value.strip()
        for name, value in settings.items()
        if name not in (*KEPT, *ABOUT) and DEFAULTS.get(name) != value.strip()
    }


def adapter_files(said: ImageMetadata, folder: Path) -> list[Path]:
    """The files in a folder, or in its folders, that an image's names stand for.

    Raises:
        DataError: a name leads out of the folder, or not exactly one file has it.
    """
    return [_adapter_file(name, folder) for name in said.adapters]


def _adapter_file(name: str, folder: Path) -> Path:
    parts = name.replace("\\", "/").split("/")
    if any(part in ("", ".", "..") or ":" in part or "\0" in part for part in parts):
        raise DataError(f"the image names {shown(name)}, which is a path; expected a plain name")
    file = folder / f"{PurePosixPath(*parts)}.safetensors"
    if file.is_file():
        return file
    # A1111 writes the name alone wherever the file is; ComfyUI its folder on another machine.
    others = sorted(f for f in folder.rglob("*.safetensors") if f.stem == parts[-1])
    if len(others) > 1:
        listed = ", ".join(str(f.relative_to(folder)) for f in others[:4])
        raise DataError(f"{folder}: the image names {shown(name)}, got {listed}; give --adapters")
    if not others:
        raise DataError(
            f"{folder}: expected `{file.name}`, which the image names, found none; put it "
            "there, or give --adapters"
        )
    return others[0]

"""Prompts as hobby tools write them: tags of adapters, and weights of words.

Both are read by A1111's rules; what cannot be read is refused, never guessed.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lora_ws.adapters.header import shown
from lora_ws.errors import DataError

TAG = re.compile(r"<(\w{1,40}):([^<>\n]{1,2000})>")
# LyCORIS' own extension wrote `lyco` with the same arguments.
ADAPTER_TAGS = ("lora", "lyco")
# What is left to do where an image's words cannot be read.
INSTEAD = "give --prompt, --adapters and --scales instead"
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,4})?")
_WEIGHT = re.compile(r":\s*[+-]?(?:\d+\.?\d*|\.\d+)\s*(?=[)\]])")
# What A1111 reads as more than words, by what it is.
_SYNTAX = {
    "words that change on the way": re.compile(r"\[[^\[\]]*(?:\||:\s*\d+\.?\d*\s*\])"),
    "several prompts": re.compile(r"\bAND\b"),
    "parts of the prompt": re.compile(r"\bBREAK\b"),
}
_BRACKET = re.compile(r"\\([\\()\[\]])|([()\[\]])")


@dataclass(frozen=True)
class ImageMetadata:
    """What an image file says of how it was made.

    Attributes:
        prompt: without tags of adapters and weights of words.
        negative_prompt: of what was not to be drawn.
        adapters: name -> scale in the denoiser; subfolders before the name with ``/``.
        text_scales: name -> scale in the text encoders, where it is another.
        seed: of the noise; None where it does not say.
        num_inference_steps: of denoising, likewise.
        guidance_scale: likewise.
        other_settings: what else the image was made by, name -> value as it is written.
    """

    prompt: str
    negative_prompt: str
    adapters: dict[str, float]
    seed: int | None
    num_inference_steps: int | None
    guidance_scale: float | None
    other_settings: Mapping[str, str] = field(default_factory=dict)
    text_scales: Mapping[str, float] = field(default_factory=dict)


class Scales(NamedTuple):
    """How much of an adapter is used.

    Attributes:
        denoiser: in the denoiser.
        text: in the text encoders.
    """

    denoiser: float
    text: float

    def __add__(self, other: Any) -> "Scales":
        """Loaded twice, an adapter is used with the sum of both."""
        return Scales(self.denoiser + other.denoiser, self.text + other.text)


NO_SCALES = Scales(0.0, 0.0)


def text_scales(found: Mapping[str, Scales]) -> dict[str, float]:
    """Scales in the text encoders that differ from those in the denoiser."""
    return {name: own.text for name, own in found.items() if own.text != own.denoiser}


def number_of(value: Any) -> float | None:
    """A finite number, or the text of one; None for anything else.

    Example:
        >>> number_of(" .8"), number_of("1."), number_of("nan"), number_of(True)
        (0.8, 1.0, None, None)
    """
    if isinstance(value, str):
        text = value.strip()
        value = float(text) if len(text) < 100 and _NUMBER.fullmatch(text) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    # Larger ones are no seed either, and no float may be made of every integer.
    return float(value) if abs(value) < 2**64 and math.isfinite(value) else None


def integer_of(value: Any) -> int | None:
    """A whole number, or the text of one, exactly; None for anything else.

    Example:
        >>> integer_of("18446744073709551615"), integer_of(7.0), integer_of(2.5)
        (18446744073709551615, 7, None)
    """
    if isinstance(value, str) and re.fullmatch(r"\s*-?[0-9]{1,20}\s*", value):
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value if -(2**63) <= value < 2**64 else None
    number = number_of(value)
    return int(number) if number is not None and number.is_integer() else None


def read_tags(prompt: str) -> tuple[str, dict[str, Scales], dict[str, str]]:
    """Take the tags of adapters out of a prompt.

    Returns:
        The text without any tag, name -> scales, and what else the tags say.

    Raises:
        DataError: an argument of a tag cannot be read, or the tag is of a hypernetwork.

    Example:
        >>> read_tags("a cat <lora:ink:0.5:0.9>")
        ('a cat ', {'ink': Scales(denoiser=0.9, text=0.5)}, {})
    """
    adapters: dict[str, Scales] = {}
    others: dict[str, str] = {}
    for found in TAG.finditer(prompt):
        tag, kind, arguments = found[0], found[1].lower(), found[2].split(":")
        if kind == "hypernet":
            raise DataError(
                f"{shown(tag)}: expected adapters, got a hypernetwork, which is not read; {INSTEAD}"
            )
        if kind not in ADAPTER_TAGS:
            others[f"tag {tag}"] = "unknown"
            continue
        name, scales, beside = _read_tag(tag, arguments)
        adapters[name] = adapters.get(name, NO_SCALES) + scales
        others |= {f"{what} of {name}": value for what, value in beside.items()}
    return TAG.sub("", prompt), adapters, others


def _read_tag(tag: str, arguments: list[str]) -> tuple[str, Scales, dict[str, str]]:
    """Name, scales, and the rest: text encoder first, then U-Net, then rank."""
    name, *rest = (argument.strip() for argument in arguments)
    if not name:
        raise DataError(f"{shown(tag)}: expected the name of an adapter, got none")
    positional = [argument for argument in rest if "=" not in argument]
    named = dict(argument.split("=", 1) for argument in rest if "=" in argument)
    named = {key.strip(): value.strip() for key, value in named.items()}
    if len(positional) > 3:
        raise DataError(f"{shown(tag)}: expected at most three numbers, got {len(positional)}")
    given = [_argument(tag, value) for value in positional]
    encoder = given[0] if given else 1.0
    if "te" in named:
        encoder = _argument(tag, named.pop("te"))
    scale = given[1] if len(given) > 1 else encoder
    if "unet" in named:
        scale = _argument(tag, named.pop("unet"))
    # Others are for extensions, such as weights of blocks (`lbw`) and first and last steps.
    beside = dict(named)
    if len(given) > 2:
        beside["dyn"] = positional[2]
    return plain_name(name), Scales(scale, encoder), beside


def _argument(tag: str, text: str) -> float:
    number = number_of(text)
    if number is None:
        raise DataError(
            f"{shown(tag)}: expected a number, as in <lora:name:0.8>, got {shown(text)}; {INSTEAD}"
        )
    return number


def plain_name(name: str) -> str:
    r"""An adapter's name with ``/`` between folders and without the ending of files.

    Example:
        >>> plain_name("style\\ink_v1.1.safetensors")
        'style/ink_v1.1'
    """
    return name.strip().replace("\\", "/").removesuffix(".safetensors")


def prompt_syntax(prompt: str) -> dict[str, str]:
    """What a prompt of A1111 asks for beside words and their weights, and where it begins.

    Example:
        >>> prompt_syntax("a [cat:dog:0.5] AND a [red] (hat:1.2)")
        {'words that change on the way': '[cat:dog:0.5]', 'several prompts': 'AND'}
    """
    found = {name: pattern.search(prompt) for name, pattern in _SYNTAX.items()}
    return {name: match[0] for name, match in found.items() if match}


def plain_text(prompt: str, *, square: bool = True) -> tuple[str, bool]:
    r"""A prompt without weights of words, and whether it had any.

    Args:
        prompt: ``(word)``, ``(word:1.2)``, and ``[word]``; ``\(`` stands for the bracket itself.
        square: whether ``[`` means something, as to A1111; ComfyUI takes it for text.

    Example:
        >>> plain_text(r"a (red:1.2) [cat] \(ink\)")
        ('a red cat (ink)', True)
        >>> plain_text("a [cat:dog:0.5] (big", square=False)
        ('a [cat:dog:0.5] (big', False)
    """
    kept: list[str] = []
    opened: list[int] = []
    weighted = False
    position = 0
    closers = {")": "(", "]": "["}
    while position < len(prompt):
        weight = _WEIGHT.match(prompt, position)
        found = _BRACKET.match(prompt, position)
        if weight and opened and kept[opened[-1]] == "(" and prompt[weight.end()] == ")":
            position = weight.end()
        elif found and found[1]:
            kept.append(found[1] if square or found[1] in "()\\" else found[0])
            position = found.end()
        elif found and found[2] in "([" and (square or found[2] == "("):
            opened.append(len(kept))
            kept.append(found[2])
            position += 1
        elif found and opened and closers.get(found[2]) == kept[opened[-1]]:
            kept[opened.pop()] = ""
            weighted, position = True, position + 1
        else:
            kept.append(prompt[position])
            position += 1
    return "".join(kept), weighted

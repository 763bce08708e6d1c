"""Nodes of ComfyUI that load adapters, of any pack, by the names and strengths that they take."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from lora_ws.adapters.header import shown
from lora_ws.attribution.prompt_text import INSTEAD, Scales, number_of, plain_name, read_tags
from lora_ws.errors import DataError

_KIND = re.compile(r"lora|lycoris|locon|loha|lokr|hypernetwork", re.IGNORECASE)
_TAGS = re.compile(r"<(lora|lyco):", re.IGNORECASE)
_DIGITS = re.compile(r"\d+")
# Strengths in the denoiser by the names that packs give them, without marks and numbers; the first
# that a node has counts.
DENOISER = (
    *("strengthmodel", "modelstrength", "modelstr", "modelweight", "loramodelstrength"),
    *("loramodelweight", "weightmodel", "unetstrength", "strength", "lorastrength", "loraweight"),
    *("lorawt", "weight", "multiplier"),
)
ENCODER = (
    *("strengthclip", "clipstrength", "clipstr", "clipweight", "loraclipstrength", "strengthtwo"),
    *("loraclipweight", "weightclip"),
)
SWITCHES = ("switch", "on", "enabled", "enable", "toggle", "active", "loraenabled", "loraon")
OFF = ("off", "false", "disable", "disabled", "no", "0")
FIRST_NAMES = ("lora", "loraname", "lorafile", "loramodel", "loramodelname", "lorapath")
NAMES = (*FIRST_NAMES, "name", "file")
# Inputs that take adapters from other nodes.
LISTS = ("lorastack", "optionallorastack", "stack", "lora", "loras", "prevlora", "prevloras")
NO_NAME = ("", "none", "[none]", "undefined")
# Whose strengths are one number for both, or two, as a switch of the node says.
MODES = ("input_mode", "mode")
COUNTS = ("lora_count", "num_loras")


class Loaded(NamedTuple):
    """An adapter of a node.

    Attributes:
        name: with ``/`` between folders.
        scales: that of the denoiser counts for the text encoders too where the node has but one.
    """

    name: str
    scales: Scales


def loads_adapters(kind: str, inputs: Mapping[str, Any]) -> bool:
    """Whether a node loads adapters, or may: by its class, or by inputs that name one.

    Example:
        >>> loads_adapters("Efficient Loader", {"lora_name": "ink.safetensors"})
        True
        >>> loads_adapters("CheckpointLoaderSimple", {"ckpt_name": "base.safetensors"})
        False
    """
    if _KIND.search(kind):
        return True
    for name, value in inputs.items():
        if isinstance(value, str) and _plain(name)[0] in FIRST_NAMES:
            return True
        if isinstance(value, str) and "model" in inputs and _TAGS.search(value):
            return True
    return False


def has_strength(inputs: Mapping[str, Any]) -> bool:
    """Whether a node says how strong an adapter is."""
    return any(_plain(name)[0] in DENOISER for name in inputs)


def read_loader(
    title: str, kind: str, inputs: Mapping[str, Any], value: Callable[[Any], Any]
) -> list[Loaded]:
    """Read the adapters of a node that are switched on.

    Args:
        title: what errors call the node.
        kind: its class.
        inputs: what it takes.
        value: what an input is worth that comes by a link.

    Raises:
        DataError: no name of an adapter is found, or one without a strength that is a number.

    Example:
        >>> row = {"on": True, "lora": "style/ink.safetensors", "strength": 0.8}
        >>> read_loader("node 2", "Power Lora Loader (rgthree)", {"lora_1": row}, lambda v: v)
        [Loaded(name='style/ink', scales=Scales(denoiser=0.8, text=0.8))]
    """
    rows = _rows(inputs, value)
    found = [one for row in rows if (one := _loaded(title, row, value)) is not None]
    # What is written in a prompt; `populated_text` is what the wildcards of another became.
    written = inputs.get("populated_text")
    texts = [written] if written else [v for v in inputs.values() if isinstance(v, str)]
    texts = [text for text in texts if _TAGS.search(str(text))]
    if not rows:
        for text in texts:
            found += _tagged(title, str(text))
    # Nodes whose rows can be added may have none, and lists come from other nodes.
    growing = "power lora" in kind.lower() or any(_plain(name)[0] in LISTS for name in inputs)
    if not rows and not texts and not growing:
        raise DataError(
            f"{title}: expected the name of an adapter and its strength, got "
            f"{', '.join(map(shown, inputs)) or 'nothing'}; {INSTEAD}"
        )
    return found


def _rows(inputs: Mapping[str, Any], value: Callable[[Any], Any]) -> list[dict[str, Any]]:
    """What belongs to each adapter: inputs with one number, objects, and lists of objects."""
    rows: list[dict[str, Any]] = []
    numbered: dict[int, dict[str, Any]] = {}
    for name, given in inputs.items():
        held = given.get("__value__", given) if isinstance(given, dict) else given
        objects = [held] if isinstance(held, dict) else held if isinstance(held, list) else []
        objects = [one for one in objects if isinstance(one, dict)]
        if objects:
            plain = [{_plain(k)[0]: v for k, v in one.items()} for one in objects]
            rows += [row for row in plain if any(k in row for k in NAMES)]
            continue
        bare, number = _plain(name)
        if bare in LISTS and isinstance(given, list) and value(given) is None:
            continue
        numbered.setdefault(number, {})[bare] = given
    count = next((number_of(value(inputs[k])) for k in COUNTS if k in inputs), None)
    mode = next((value(inputs[k]) for k in MODES if k in inputs), None)
    # A switch without a number is for all.
    switches = {k: v for k, v in numbered.get(0, {}).items() if k in (*SWITCHES, "bypass")}
    for number, row in numbered.items():
        if not any(k in row for k in FIRST_NAMES) or (count and number > count):
            continue
        both = DENOISER[:7] + ENCODER if mode == "simple" else ()
        rows.append({k: v for k, v in (switches | row).items() if k not in both})
    return rows


def _plain(name: str) -> tuple[str, int]:
    """An input's name without marks and number, and the number; 0 for none."""
    number = _DIGITS.search(name)
    letters = "".join(c for c in name.lower() if c.isalpha())
    return letters, int(number[0][:6]) if number else 0


def _loaded(title: str, row: Mapping[str, Any], value: Callable[[Any], Any]) -> Loaded | None:
    """The adapter of a row; None where it is switched off or none is chosen."""
    if any(str(value(row[k])).strip().lower() in OFF for k in SWITCHES if k in row):
        return None
    if value(row.get("bypass")) is True:
        return None
    given = next(row[k] for k in NAMES if k in row)
    name = value(given)
    if given is None or (isinstance(name, str) and name.strip().lower() in NO_NAME):
        return None
    if not isinstance(name, str):
        raise DataError(f"{title}: expected the name of an adapter, got {shown(str(given))}")
    strengths = [row[k] for k in DENOISER if k in row][:1]
    # Packs leave the second strength empty where the first counts for both.
    strengths += [row[k] for k in ENCODER if row.get(k) is not None][:1]
    numbers = [number_of(value(strength)) for strength in strengths]
    if None in numbers or not any(k in row for k in DENOISER):
        wrong = strengths[numbers.index(None)] if None in numbers else "none"
        raise DataError(
            f"{title}: expected a strength of {shown(name)} as a number, got {shown(str(wrong))}; "
            f"{INSTEAD}"
        )
    return Loaded(plain_name(name), Scales(numbers[0], numbers[-1]))  # type: ignore[arg-type]


def _tagged(title: str, text: str) -> list[Loaded]:
    """Adapters by A1111's tags, which packs of nodes read in an order of their own."""
    _, adapters, _ = read_tags(text)
    if any(scales.denoiser != scales.text for scales in adapters.values()):
        raise DataError(
            f"{title}: expected one strength in each tag of {shown(text)}; which of two is the "
            f"denoiser's differs between nodes; {INSTEAD}"
        )
    return [Loaded(name, scales) for name, scales in adapters.items()]

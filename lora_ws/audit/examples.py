"""Three adapter files that come with the library: what they are, and how they are made."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save_file

from lora_ws.collection import load

FOLDER = Path(__file__).parent.parent / "_assets" / "examples"
FACTS = "examples.json"
COLLECTION, SUBSET = "lora-ws-mini", "per_adapter/constant"
# Each is the first test adapter of its class; what a classifier makes of it had no say.
CLASSES = ("fish", "flower", "vehicle")


class Example(NamedTuple):
    """An adapter file, and what its adapter was trained on.

    Attributes:
        file: .safetensors, named after the leaf class of its photos.
        leaf: what the photos show, such as ``orchid``.
        label: the class of that, such as ``flower``.
    """

    file: Path
    leaf: str
    label: str


def examples() -> list[Example]:
    """List the files that come with the library.

    Example:
        >>> [example.file.name for example in examples()]
        ['aquarium-fish.safetensors', 'orchid.safetensors', 'bicycle.safetensors']
    """
    facts = json.loads((FOLDER / FACTS).read_text(encoding="utf-8"))
    return [Example(FOLDER / name, fact["leaf"], fact["class"]) for name, fact in facts.items()]


def write_examples(folder: Path) -> None:
    """Write the files and what they are; `make examples` does it for those of the library.

    Args:
        folder: existing; files of the same names are replaced.
    """
    adapters = load(COLLECTION, subset=SUBSET)
    rows, facts = adapters.rows.to_pylist(), dict[str, dict[str, Any]]()
    for label in CLASSES:
        first = next(k for k in adapters.split().test if rows[k]["category_label"] == label)
        row, weights = rows[first], np.asarray(adapters.weights[first])
        tensors = {
            f"unet.{m.layer.name}.lora.{m.role}.weight": np.ascontiguousarray(
                weights[m.columns].reshape(m.shape)
            )
            for m in adapters.layout.matrices
        }
        name = f"{row['category_name'].replace(' ', '-')}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        facts[name] = {
            "leaf": row["category_name"],
            "class": label,
            "row": f"{COLLECTION}, {row['source']}",
            "photos": row["num_images"],
        }
    (folder / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")

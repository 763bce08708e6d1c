"""`lora-ws similar` and `dedup`: which adapters do the same or nearly, in whatever file format."""

import json

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lora_ws.audit.lookup import DedupSpec, SimilarSpec, find_copies, find_similar
from lora_ws.errors import printable


def similar(file: str, /, spec: SimilarSpec) -> None:
    """Find the adapters whose effective updates are most similar to that of one file.

    Args:
        file: a .safetensors file, a PEFT folder, or hf://owner/name/file.safetensors on the Hub
        spec: adapters to search, and output.
    """
    found = find_similar(file, spec)
    if spec.as_json:
        for one in found:
            print(json.dumps(one.to_dict()))  # noqa: T201
        return
    table = Table("adapter", "cosine", "norm", "", box=None)
    for (name, cosine, norm, _), likeness in found:
        table.add_row(escape(printable(name)), f"{cosine:.4f}", f"{norm:.4g}", likeness)
    Console(highlight=False, soft_wrap=True).print(table)


def dedup(what: list[str], /, spec: DedupSpec) -> None:
    """Group adapter files whose effective updates are the same or nearly the same.

    Args:
        what: files, folders, .txt lists, names on the Hub, or a folder of an index
        spec: thresholds, and output.
    """
    known, found = find_copies(what, spec)
    console = Console(highlight=False, soft_wrap=True)
    for kind, groups in (("the same", found.equal), ("near", found.near)):
        for names in groups:
            if spec.as_json:
                print(json.dumps({"likeness": kind, "files": names}))  # noqa: T201
            else:
                console.print(
                    f"{kind}:", *(f"\n  {escape(printable(name))}" for name in names), sep=""
                )
    if not spec.as_json:
        console.print(f"adapters: {len(known)}, {found.counted}")

"""`lora-ws similar` and `dedup`: which adapters do the same or nearly, however files spell it."""

import json
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lora_ws.adapters import read_adapter
from lora_ws.audit.dedup import copies
from lora_ws.audit.scan import ScanSpec, library
from lora_ws.audit.similar import EQUAL, NEAR, adapter_modules, same_update, signature
from lora_ws.report.progress import progress


def similar(
    file: str,
    /,
    *,
    index: str,
    top: int = 10,
    workers: int = 1,
    cache: Path | None = None,
    as_json: bool = False,
) -> None:
    """The adapters whose effective updates are most like that of one file.

    Args:
        file: a .safetensors file, a PEFT folder, or hub:owner/name/file.safetensors
        index: where to look: a folder, a .txt list, a name on the Hub, or the folder of an index
        top: how many.
        workers: processes that read files.
        cache: folder for what is known of contents; null takes scan/ in the user's cache.
        as_json: print one JSON object a line instead of a table.
    """
    asked = signature(adapter_modules(read_adapter(file)))
    with progress("read", None) as advance:
        known = library([index], ScanSpec(workers=workers, cache=cache), advance)
    table = Table("adapter", "cosine", "norm", "", box=None)
    for match in known.query(asked.sketch, top):
        same = bool(match.hash == asked.hash or same_update(match.cosine, match.norm, asked.norm))
        likeness = "the same" if same else "near" if match.cosine >= NEAR else ""
        if as_json:
            print(json.dumps({**match._asdict(), "likeness": likeness}))  # noqa: T201
        table.add_row(escape(match.name), f"{match.cosine:.4f}", f"{match.norm:.4g}", likeness)
    if not as_json:
        Console(highlight=False, soft_wrap=True).print(table)


def dedup(
    what: list[str],
    /,
    *,
    equal: float = EQUAL,
    near: float = NEAR,
    workers: int = 1,
    cache: Path | None = None,
    as_json: bool = False,
) -> None:
    """Group adapter files whose effective updates are the same, and those that are nearly.

    Args:
        what: files, folders, .txt lists, names on the Hub, or a folder of an index
        equal: least cosine of updates that are the same but for rounding.
        near: least cosine of near ones.
        workers: processes that read files.
        cache: folder for what is known of contents; null takes scan/ in the user's cache.
        as_json: print one JSON object a line instead of text.
    """
    with progress("read", None) as advance:
        known = library(what, ScanSpec(workers=workers, cache=cache), advance)
    found = copies(known, equal, near)
    console = Console(highlight=False, soft_wrap=True)
    for kind, groups in (("the same", found.equal), ("near", found.near)):
        for names in groups:
            if as_json:
                print(json.dumps({"likeness": kind, "files": names}))  # noqa: T201
            else:
                console.print(f"{kind}:", *(f"\n  {escape(name)}" for name in names), sep="")
    if not as_json:
        count = f"{len(found.equal)} groups the same, {len(found.near)} near"
        console.print(f"{len(known)} adapters: {count}")

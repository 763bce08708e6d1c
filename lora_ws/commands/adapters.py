"""`lora-ws inspect` and `convert`: what a file holds, and the same as another file."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lora_ws.adapters import AdapterFile, open_adapter, read_adapter
from lora_ws.adapters.flattened import split_rows
from lora_ws.adapters.header import CONVERT
from lora_ws.adapters.reader import open_pickled
from lora_ws.adapters.summary import AdapterSummary, summarize
from lora_ws.adapters.writer import FileFormat, write_adapter
from lora_ws.errors import AdapterError, ConfigError, printable


def inspect(file: str, /, *, as_json: bool = False) -> None:
    """Describe an adapter file: base model, method, ranks, scales, norms, and warnings.

    Args:
        file: a .safetensors file, a PEFT folder, or hf://owner/name/file.safetensors on the Hub
        as_json: print one JSON object instead of tables.
    """
    with open_adapter(file) as opened:
        adapter = opened.read()
        facts = summarize(opened, adapter)
    if as_json:
        origin = {"file": file, "sha256": adapter.sha256, "revision": adapter.revision}
        print(json.dumps({**origin, **facts.to_dict(), "bytes_read": opened.bytes_read}))  # noqa: T201
        return
    _show(file, adapter.sha256, facts)


def convert(
    file: str,
    out: str,
    /,
    *,
    to: FileFormat,
    allow_pickle: bool = False,
    dimensions: Path | None = None,
) -> None:
    """Write an adapter in another file format, with the same effective update.

    Args:
        file: a .safetensors file, a PEFT folder, or hf://owner/name/file.safetensors on the Hub
        out: folder of the new file
        to: peft, diffusers or kohya
        allow_pickle: also open pickled files, in a separate process with limited memory and time.
            It has your rights: use it for trusted files only.
        dimensions: pickled dictionary of names and shapes, for a pickled matrix with an adapter per
            row (weights2weights); writes a folder per row.
    """
    if dimensions is not None:
        _convert_rows(file, dimensions, Path(out), to, allow_pickle)
        return
    with TemporaryDirectory() as folder:
        with _open(file, Path(folder), allow_pickle) as opened:
            adapter = opened.read()
        written = write_adapter(adapter, Path(out), to, sdxl=opened.base.name == "SDXL")
    print(f"wrote {written}")  # noqa: T201


def _convert_rows(
    file: str, dimensions: Path, out: Path, to: FileFormat, allow_pickle: bool
) -> None:
    if not allow_pickle:
        raise ConfigError(f"dimensions: {file} is pickled, which can run code; {CONVERT}")
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty; choose another folder")
    with TemporaryDirectory() as folder:
        rows = split_rows(file, dimensions, folder)
        for row in rows:
            write_adapter(read_adapter(row), out / row.stem, to)
    print(f"wrote {len(rows)} adapters to {out}; their scale is taken to be 1")  # noqa: T201


def _open(file: str, folder: Path, allow_pickle: bool) -> AdapterFile:
    try:
        return open_adapter(file)
    except AdapterError as error:
        if not allow_pickle or error.reason != "pickle":
            raise
        return open_pickled(file, folder)


def _show(file: str, sha256: str, facts: AdapterSummary) -> None:
    console = Console(highlight=False, soft_wrap=True)
    table = Table(box=None, show_header=False)
    counts = {"modules": facts.modules, "methods": facts.methods, "ranks": facts.ranks}
    said = {
        "file": file,
        "sha256": sha256,
        "base": facts.base,
        "evidence": facts.evidence,
        **{name: _counts(found) for name, found in counts.items()},
        "scales": _counts(facts.scales),
        "norm": f"{facts.norm:.4g}",
    }
    for name, value in said.items():
        table.add_row(name, escape(printable(value)))
    console.print(table)
    for note in facts.warnings:
        console.print(f"note: {escape(note)}")
    if facts.claims:
        console.print("\nThe file claims, unchecked:")
        for name, value in facts.claims.items():
            console.print(f"  {escape(name)}: {escape(value)}")


def _counts(found: dict[str, int]) -> str:
    return ", ".join(f"{count} x {name}" for name, count in found.items())

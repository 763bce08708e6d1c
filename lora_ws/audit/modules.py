"""Where the modules of adapters come from: files and collections, read when they are asked for."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from lora_ws.adapters import Adapter, read_adapter
from lora_ws.collection import AdapterSet
from lora_ws.functional.sketch import Module, Modules


def adapter_modules(adapter: Adapter) -> Iterator[Module]:
    """The modules of an adapter that was read from a file."""
    for name, module in adapter.modules.items():
        yield name, module.down, module.up, module.scale


def file_modules(path: str | Path) -> Iterator[Module]:
    """The modules of an adapter file, which is read when the first of them is asked for."""
    yield from adapter_modules(read_adapter(path))


def set_adapters(
    adapters: AdapterSet, names: Sequence[str] | None = None
) -> Iterator[tuple[str, Modules]]:
    """Every adapter of a collection, for `Index.add`.

    Args:
        adapters: a collection.
        names: one a row; None takes the row's number.
    """
    names = [str(row) for row in range(len(adapters))] if names is None else names
    for row, name in enumerate(names):
        yield name, _row_modules(adapters, row)


def _row_modules(adapters: AdapterSet, row: int) -> Iterator[Module]:
    values = adapters.weights[row]
    for layer, down, up in adapters.layout.pairs():
        a, b = values[down].reshape(layer.down_shape), values[up].reshape(layer.up_shape)
        yield layer.name, a, b, 1.0

"""Adapters as rows of one pickled matrix, as weights2weights publishes them, to files."""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from lora_ws.adapters.header import read_header
from lora_ws.adapters.pickled import convert_pickle
from lora_ws.adapters.source import LocalSource
from lora_ws.adapters.tensors import Tensors, read_tensors
from lora_ws.errors import AdapterError


def split_rows(file: str | Path, dimensions: str | Path, out: str | Path) -> list[Path]:
    """Write each row of a matrix of flattened weights as an adapter file.

    Args:
        file: what ``torch.save`` wrote of a matrix ``[adapters, numbers]``.
        dimensions: the same of a dictionary, in the order of the columns: name of a tensor -> its
            shape, or length and shape.
        out: folder of the new files, absent or empty, named by row. Their scale is 1: neither file
            says another.

    Returns:
        The files.

    Raises:
        AdapterError: as `convert_pickle`, or the two do not fit each other.

    Example:
        >>> split_rows("no.pt", "dimensions.pt", "out")
        Traceback (most recent call last):
        lora_ws.errors.AdapterError: no.pt: expected a file, got none...
    """
    # Here, because it is slow to import.
    from safetensors.numpy import save_file

    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise AdapterError(f"{out} is not empty; choose another folder", "pickle")
    with TemporaryDirectory() as folder:
        whole = Path(folder) / "matrix.safetensors"
        rows = _read(convert_pickle(file, whole, holds="matrix"), file)["matrix"]
        sizes = Path(folder) / "dimensions.safetensors"
        places = _read(convert_pickle(dimensions, sizes, holds="dimensions"), dimensions)
    ordered = sorted(places.items(), key=lambda item: item[1][0])
    shapes = {name: tuple(map(int, place[1:])) for name, place in ordered}
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes.values()])
    if rows.ndim != 2 or not len(rows) or rows.shape[1] != ends[-1]:
        raise AdapterError(
            f"{file}: expected a matrix of rows of {ends[-1]} numbers, as {dimensions} says, got "
            f"shape {rows.shape}",
            "pickle",
        )
    out.mkdir(parents=True, exist_ok=True)
    files = [out / f"{k:0{len(str(len(rows) - 1))}d}.safetensors" for k in range(len(rows))]
    for row, written in zip(rows, files, strict=True):
        parts = np.split(row, ends[:-1])
        named = zip(shapes.items(), parts, strict=True)
        save_file({name: part.reshape(shape) for (name, shape), part in named}, written)
    return files


def _read(file: Path, origin: str | Path) -> Tensors:
    """Tensors of a file that was made from one that the user knows."""
    with LocalSource(file, str(origin)) as source:
        header = read_header(source)
        return read_tensors(source, header, header.tensors)

"""Reading adapters back: a store against safetensors and parquet, from the page cache.

Compared for one collection of Stable Diffusion 1.5 adapters, written in each form:

* ours: `AdapterSet.open`, which maps a row-major matrix;
* safetensors, one tensor: a single file, random rows by slices;
* safetensors, a file per adapter: 128 tensors each, as adapters are exchanged;
* parquet, one vector column: a fixed-size list column in row groups of 32, whole row groups read;
* `datasets`, arrow format: the published schema, mapped, both list levels flattened;
* published way: the same in torch format, on a few rows only.

Three tasks: open the collection, read one batch of 32 random rows (drawn anew each time) once it is
open, and read everything into memory. There is no goal beyond being the fastest at batches.
"""

import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import common
import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from import_parquet import LAYOUT, NAMES, PUBLISHED, as_arrow, published, write_published
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from lora_ws import AdapterSet

BATCH = 32

Rows = np.ndarray
Read = Callable[[Rows], np.ndarray]
Forms = Mapping[str, Callable[[Path], Read]]


def write(weights: np.ndarray, labels: np.ndarray, folder: Path) -> None:
    """Write the collection in every form."""
    rows = pa.table({"category_label": [f"class{k}" for k in labels]})
    AdapterSet(weights, LAYOUT, rows).save(folder / "store")
    save_file({"weights": weights}, folder / "one.safetensors")
    for k, row in enumerate(weights):
        tensors = {n: row[m.columns] for n, m in zip(NAMES, LAYOUT.matrices, strict=True)}
        save_file(tensors, folder / f"{k}.safetensors")
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(weights.ravel()), weights.shape[1])
    pq.write_table(pa.table({"weights": vectors}), folder / "vector.parquet", row_group_size=BATCH)
    write_published(weights, labels, folder / "published.parquet")


def open_store(folder: Path) -> Read:
    """Ours."""
    zoo = AdapterSet.open(folder / "store")
    return lambda rows: zoo.weights[rows]


def open_tensor(folder: Path) -> Read:
    """One large tensor, row by row."""
    whole = safe_open(folder / "one.safetensors", "np").get_slice("weights")
    return lambda rows: np.concatenate([whole[int(k) : int(k) + 1] for k in rows])


def open_files(folder: Path) -> Read:
    """A file per adapter."""

    def read(rows: Rows) -> np.ndarray:
        out = np.empty((len(rows), LAYOUT.size), np.float32)
        for row, k in zip(out, rows, strict=True):
            tensors = load_file(folder / f"{k}.safetensors")
            np.concatenate([tensors[name] for name in NAMES], out=row)
        return out

    return read


def open_parquet(folder: Path) -> Read:
    """The row groups that hold any of the rows."""
    file = pq.ParquetFile(folder / "vector.parquet", memory_map=True)

    def read(rows: Rows) -> np.ndarray:
        groups, held = np.unique(rows // BATCH), []
        for group in groups.tolist():
            column = file.read_row_group(group)["weights"].combine_chunks()
            matrix = column.flatten().to_numpy().reshape(-1, LAYOUT.size)
            held.append(matrix[rows[rows // BATCH == group] % BATCH])
        return np.concatenate(held)[np.argsort(np.argsort(rows // BATCH, kind="stable"))]

    return read


def open_datasets(folder: Path, decode: Callable[[datasets.Dataset], object]) -> Read:
    """The published schema through `datasets`, from its own mapped copy."""
    rows = datasets.Dataset.from_parquet(
        str(folder / "published.parquet"), cache_dir=str(folder / "cache")
    )
    assert isinstance(rows, datasets.Dataset)
    return lambda index: np.asarray(decode(rows.select(index)))


FORMS: Forms = {
    common.OURS: open_store,
    "safetensors, one tensor": open_tensor,
    "safetensors, a file per adapter": open_files,
    "parquet, one vector column": open_parquet,
    "datasets, arrow": partial(open_datasets, decode=as_arrow),
    PUBLISHED: partial(open_datasets, decode=published),
}


def batches(folder: Path, n: int, size: int, repeats: int, seed: int) -> None:
    """Time random batches; five in a row, as one is too short to be timed."""
    random = np.random.default_rng(seed)

    def contender(name: str) -> common.Contender:
        read = FORMS[name](folder)

        def run() -> common.Cost:
            draws = [random.choice(n, size, replace=False) for _ in range(5)]
            if name == PUBLISHED:
                draws = draws[:1]
            units = size * len(draws)
            return common.measure(lambda: [read(rows) for rows in draws], units)

        return run

    costs = common.alternate({name: contender(name) for name in FORMS}, repeats, {PUBLISHED: 1})
    baselines = [common.Baseline(name) for name in FORMS if name != common.OURS]
    title = f"Random batches of {size} of {n} SD1.5 adapters"
    common.show(title, "ms per adapter", costs, baselines)


def main() -> None:
    """Run and print."""
    args = common.arguments(__doc__, repeats=5)
    n, size = (16, 4) if args.quick else (500, 32)
    datasets.disable_progress_bars()
    weights, labels = common.synthetic(n, args.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(weights, labels, folder)
        some = np.random.default_rng(args.seed).permutation(n)[:2]
        for opened in FORMS.values():
            np.testing.assert_array_equal(opened(folder)(some), weights[some])
        opening = {name: common.timed(lambda f=f: f(folder)) for name, f in FORMS.items()}
        costs = common.alternate(opening, args.repeats)
        common.show(f"Opening a collection of {n} adapters", "ms", costs)
        batches(folder, n, size, args.repeats, args.seed)
        everything = {
            name: common.timed(lambda f=f: f(folder)(np.arange(n)), n)
            for name, f in FORMS.items()
            if name != PUBLISHED
        }
        costs = common.alternate(everything, args.repeats)
        common.show(f"Opening and reading all {n} adapters", "ms per adapter", costs)
    common.facts("datasets", "pyarrow", "safetensors", n=n, repeats=args.repeats)


if __name__ == "__main__":
    main()

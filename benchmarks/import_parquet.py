"""Import of the published parquet schema into one float32 matrix.

The file has a nested-list column for each of the 128 matrices of Stable Diffusion 1.5, one row per
adapter, in row groups of 1,000 rows as `datasets` writes them. Compared, in time per adapter:

* ours: `import_collection`, which decodes, checks shapes and finiteness, hashes every row and
  writes a store that a kill cannot damage;
* published way: `datasets` in torch format, every column read as a tensor and concatenated to the
  vectors so far;
* `datasets` in numpy format, and in arrow format with the lists flattened: the best that library
  does, for those who know the trick. Neither checks, hashes or writes anything.

The slow two are measured on few rows: the difference between two numbers of rows, divided by
theirs, is the cost of every further row, without what `datasets` spends once a column.

Goals: at least 200 times faster than the published way; the same peak memory for 2,000 rows as for
1,000. Below a row group it is less: parquet keeps a dictionary and a page of each column at hand.
"""

import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import common
import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from lora_ws import Layout, import_collection

LAYOUT = Layout.sd15_qv()
PUBLISHED = "published way (datasets, torch)"
Decoder = Callable[[datasets.Dataset], object]
NAMES = [f"unet.{m.layer.name}.lora.{m.role}.weight" for m in LAYOUT.matrices]


def write_published(weights: np.ndarray, labels: np.ndarray, file: Path) -> None:
    """Write rows with a list of lists of float32 for every matrix."""
    columns: dict[str, pa.Array] = {"category_label": pa.array([f"class{k}" for k in labels])}
    columns["rank"] = pa.array(np.ones(len(weights), np.int32))
    for name, matrix in zip(NAMES, LAYOUT.matrices, strict=True):
        rows, width = matrix.shape
        numbers = pa.array(weights[:, matrix.columns].ravel())
        inner = pa.ListArray.from_arrays(
            np.arange(0, len(numbers) + 1, width, dtype=np.int32), numbers
        )
        outer = np.arange(0, len(inner) + 1, rows, dtype=np.int32)
        columns[name] = pa.ListArray.from_arrays(outer, inner)
    pq.write_table(pa.table(columns), file, row_group_size=1000)


def ours(file: Path, out: Path) -> Callable[[], None]:
    """Import into a new store."""

    def run() -> None:
        import_collection(file, out)

    return run


def check(decoders: Mapping[str, Decoder], rows: datasets.Dataset, weights: np.ndarray) -> None:
    """Decode once, untimed: the results are right, and fresh memory is paid for."""
    for decode in decoders.values():
        np.testing.assert_array_equal(np.asarray(decode(rows)), weights[: len(rows)])


def check_import(file: Path, weights: np.ndarray) -> None:
    """The same for an import."""
    out = file.with_name("checked")
    np.testing.assert_array_equal(import_collection(file, out).weights, weights)
    shutil.rmtree(out)


def timed_import(file: Path, rows: int) -> common.Cost:
    """Import, then throw the store away."""
    out = file.with_name("store")
    cost = common.measure(ours(file, out), rows)
    shutil.rmtree(out)
    return cost


def published(rows: datasets.Dataset) -> torch.Tensor:
    """Columns as torch tensors, concatenated one by one."""
    rows = rows.with_format("torch")
    vectors = torch.empty(len(rows), 0)
    for name in NAMES:
        column = torch.as_tensor(rows[name][:]).reshape(len(rows), -1)
        vectors = torch.cat([vectors, column], 1)
    return vectors


def as_numpy(rows: datasets.Dataset) -> np.ndarray:
    """Columns as numpy arrays."""
    rows = rows.with_format("numpy")
    return np.concatenate([np.reshape(rows[name][:], (len(rows), -1)) for name in NAMES], 1)


def as_arrow(rows: datasets.Dataset) -> np.ndarray:
    """Arrow columns, both list levels flattened."""
    table = rows.with_format("arrow")[:]
    out = np.empty((len(rows), LAYOUT.size), np.float32)
    for name, matrix in zip(NAMES, LAYOUT.matrices, strict=True):
        numbers = table[name].combine_chunks().flatten().flatten()
        out[:, matrix.columns] = numbers.to_numpy().reshape(len(rows), -1)
    return out


def slope(decode: Decoder, rows: datasets.Dataset) -> common.Contender:
    """The cost of a further row: a fifth of the rows taken off all of them."""
    few = rows.select(range(len(rows) // 5))

    def run() -> common.Cost:
        low, high = (common.measure(lambda part=part: decode(part)) for part in (few, rows))
        more = len(rows) - len(few)
        return common.Cost((high.cpu - low.cpu) / more, (high.wall - low.wall) / more)

    return run


def memory(files: Mapping[int, Path], quick: bool) -> None:
    """Print the peak memory of imports in fresh processes."""
    print("\n### Peak memory of an import\n")
    peaks = []
    for rows, file in files.items():
        out = file.with_name(f"store{rows}")
        peaks.append(common.in_child(ours, file, out).peak_mib)
        shutil.rmtree(out)
    cells = [[f"{n:,}", f"{p:.0f}"] for n, p in zip(files, peaks, strict=True)]
    common.print_table(["adapters", "peak MiB"], cells)
    if not quick:
        constant = peaks[-1] < 1.1 * peaks[-2]
        print(f"\nGoal constant memory: {'reached' if constant else 'MISSED'}")


def main() -> None:
    """Run and print."""
    args = common.arguments(__doc__, repeats=5)
    n, few = (10, 5) if args.quick else (1000, 30)
    datasets.disable_progress_bars()
    weights, labels = common.synthetic(2 * n, args.seed)
    with tempfile.TemporaryDirectory() as folder:
        files = {
            rows: Path(folder) / f"{rows}.parquet"
            for rows in ((n,) if args.quick else (n // 4, n, 2 * n))
        }
        for rows, file in files.items():
            write_published(weights[:rows], labels[:rows], file)
        everything = datasets.Dataset.from_parquet(str(files[n]), cache_dir=f"{folder}/cache")
        assert isinstance(everything, datasets.Dataset)
        small = everything.select(range(few))
        slow: dict[str, Decoder] = {PUBLISHED: published, "datasets, numpy": as_numpy}
        if args.quick:
            del slow["datasets, numpy"]
        check({**slow, "arrow": as_arrow}, small, weights)
        check_import(files[n], weights[:n])
        contenders = {
            common.OURS: lambda: timed_import(files[n], n),
            **{name: slope(decode, small) for name, decode in slow.items()},
            "datasets, arrow, decoding only": common.timed(lambda: as_arrow(everything), n),
        }
        costs = common.alternate(contenders, args.repeats, {"datasets, numpy": 1})
        goal = common.Baseline(PUBLISHED, 200)
        common.show(f"Import of {n:,} published rows", "ms per adapter", costs, [goal])
        memory(files, args.quick)
    common.facts("datasets", "pyarrow", n=n, n_slow=few, repeats=args.repeats)


if __name__ == "__main__":
    main()

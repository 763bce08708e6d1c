"""How import and representations grow with the number of SD1.5 adapters, beyond memory too.

Each step runs in a fresh process with the default `--memory_limit`. Stated are CPU seconds, the
peak of anonymous memory (pages of mapped files do not count, as the system takes them back at
will) and bytes read from disk: the store is put out of the page cache before each step. The
representation steps are what `lora-ws train` does before its first epoch: features of all rows,
fitted on the training rows, and their scaler. `FlatVec > MLP` is one epoch on rows on disk, of a
network of one layer of 64, which is small so that reading shows.

A host that takes free memory back from a virtual machine makes every page of the cache that is new
cost several times as much, so steps that read more than was touched before look worse than linear:
switch its page reporting off, and touch the memory once.

Goal: a step of n rows takes at most 1.3 times its share of the time of the next smaller n.

Rows are random, made in blocks; n rows take 0.4 MB each of disk, twice that during the import.
`--sizes 1000,3000` says which; `--steps` takes some of the steps; `--plot` writes the plot.
"""

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common import Cost, arguments, facts, in_child, print_table, synthetic

from lora_ws.memory import memory_limit

GOAL = 1.3
AT_ONCE = 200
STEPS = ("import", "StatsFlatVec", "StatsLayer", "StatsLayerDense", "FlatVecPCA", "DeltaPCA", "MLP")
OPTIONS = {"DeltaPCA": {"landmarks": 256}}


class Step(NamedTuple):
    """What a step took at a size."""

    name: str
    rows: int
    cpu: float
    wall: float
    peak_mib: float
    read_mib: float

    @property
    def share(self) -> float:
        """What was read, as a share of the store."""
        return self.read_mib * (1 << 20) / (self.rows * 99_648 * 4)


def write_parquet(path: Path, rows: int, seed: int) -> None:
    """Write the published schema, one nested list per matrix, group by group."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from lora_ws import Layout

    layout, writer = Layout.sd15_qv(), None
    for start in range(0, rows, AT_ONCE):
        weights, labels = synthetic(min(AT_ONCE, rows - start), seed + start)
        columns: dict[str, Any] = {"category_label": [f"class{label}" for label in labels]}
        for matrix in layout.matrices:
            inner = pa.FixedSizeListArray.from_arrays(
                weights[:, matrix.columns].ravel(), matrix.shape[1]
            )
            nested = pa.FixedSizeListArray.from_arrays(inner, matrix.shape[0])
            kind = pa.list_(pa.list_(pa.float32()))
            columns[f"unet.{matrix.layer.name}.lora.{matrix.role}.weight"] = nested.cast(kind)
        table = pa.table(columns)
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    if writer:
        writer.close()


def write_store(path: Path, rows: int, seed: int) -> None:
    """The same rows as a store, without an import."""
    import pyarrow as pa

    from lora_ws import Layout
    from lora_ws.collection import DatasetCard
    from lora_ws.collection.store import StoreWriter, row_hashes

    with StoreWriter(path, Layout.sd15_qv(), DatasetCard(name="scale"), {}) as writer:
        for start in range(0, rows, AT_ONCE):
            weights, labels = synthetic(min(AT_ONCE, rows - start), seed + start)
            names = [f"class{label}" for label in labels]
            columns = {"category_label": names, "sha256": row_hashes(weights)}
            writer.append(weights, pa.table(columns))
        writer.finish()


def importing(parquet: Path, store: Path) -> Callable[[], Any]:
    """The import, to be called in a fresh process."""
    from lora_ws import import_collection

    return _counted(lambda: import_collection(parquet, store), parquet)


def preparing(store: Path, name: str) -> Callable[[], Any]:
    """Features of all rows and their scaler, to be called in a fresh process."""
    from lora_ws import featurizers
    from lora_ws.learn.features import prepare
    from lora_ws.learn.spec import ExperimentSpec

    featurizer = getattr(featurizers, name)(**OPTIONS.get(name, {}))
    spec = ExperimentSpec(str(store), featurizer=featurizer)
    return _counted(lambda: prepare(spec), store / "weights.npy")


def training(store: Path) -> Callable[[], Any]:
    """One epoch of a small network on the weights, to be called in a fresh process."""
    from lora_ws import FlatVec
    from lora_ws.learn.run import run_one
    from lora_ws.learn.spec import ExperimentSpec, FitSpec
    from lora_ws.models import MLP

    fit, model = FitSpec(max_epochs=1), MLP(hidden=(64,))
    spec = ExperimentSpec(str(store), featurizer=FlatVec(), model=model, fit=fit)
    return _counted(lambda: run_one(spec, 0), store / "weights.npy")


def _counted(call: Callable[[], Any], file: Path) -> Callable[[], Any]:
    """Put a file out of the page cache first, and leave beside it how many bytes were read."""
    opened = os.open(file, os.O_RDONLY)
    os.posix_fadvise(opened, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(opened)
    before = _bytes_read()

    def counted() -> None:
        call()
        file.with_name("read").write_text(str(_bytes_read() - before), encoding="utf-8")

    return counted


def _bytes_read() -> int:
    """What this process had the disk read."""
    told = Path("/proc/self/io").read_text(encoding="utf-8")
    return int(told.split("read_bytes:")[1].split()[0])


def run_size(rows: int, steps: Sequence[str], seed: int) -> list[Step]:
    """All steps at one size, in a folder of their own."""
    found = []
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        parquet, store = Path(folder) / "rows.parquet", Path(folder) / "store"

        def note(name: str, cost: Cost, beside: Path) -> None:
            read = int(beside.with_name("read").read_text(encoding="utf-8")) / (1 << 20)
            found.append(Step(name, rows, cost.cpu, cost.wall, cost.peak_mib, read))
            print(json.dumps(found[-1]._asdict()), flush=True)

        if "import" in steps:
            write_parquet(parquet, rows, seed)
            note("import", in_child(importing, parquet, store), parquet)
            parquet.unlink()
        else:
            write_store(store, rows, seed)
        for name in steps:
            if name != "import":
                mlp = name == "MLP"
                cost = in_child(training, store) if mlp else in_child(preparing, store, name)
                note(name, cost, store / "weights.npy")
    return found


def growth(steps: Sequence[Step]) -> dict[str, list[float]]:
    """Of each step, CPU time over its share of that of the next smaller size."""
    ratios: dict[str, list[float]] = {}
    for name in dict.fromkeys(step.name for step in steps):
        own = sorted((step for step in steps if step.name == name), key=lambda step: step.rows)
        pairs = zip(own[1:], own, strict=False)
        ratios[name] = [b.cpu / (a.cpu * b.rows / a.rows) for b, a in pairs]
    return ratios


def draw(steps: Sequence[Step], file: Path) -> None:
    """CPU seconds and peak memory over the number of rows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for name in dict.fromkeys(step.name for step in steps):
        own = sorted((step for step in steps if step.name == name), key=lambda step: step.rows)
        rows = [step.rows for step in own]
        axes[0].plot(rows, [step.cpu for step in own], marker="o", label=name)
        axes[1].plot(rows, [step.peak_mib for step in own], marker="o", label=name)
    rows = sorted({step.rows for step in steps})
    axes[0].plot(rows, [2e-3 * n for n in rows], "k:", label="2 ms a row")
    axes[1].plot(rows, [99_648 * 4 * n / 2**20 for n in rows], "k:", label="the store")
    for one, label in zip(axes, ("CPU seconds", "peak anonymous memory, MiB"), strict=True):
        one.set(xscale="log", yscale="log", xlabel="adapters (SD1.5, rank 1)", ylabel=label)
        one.set_xticks(rows, [f"{n:,}".replace(",", " ") for n in rows])
        one.minorticks_off()
        one.grid(alpha=0.3)
    axes[1].legend(fontsize="x-small", ncols=2)
    figure.savefig(file, dpi=110)


def main() -> None:
    """Run all sizes and print the table."""
    sizes = "1000,3000,10000,30000"
    args = arguments(__doc__, repeats=1, sizes=sizes, steps=",".join(STEPS), plot="")
    chosen = "import,StatsLayer,MLP" if args.quick else args.steps
    names = [name for name in STEPS if name in chosen.split(",")]
    wanted = [60] if args.quick else [int(size) for size in args.sizes.split(",")]
    steps = [step for rows in wanted for step in run_size(rows, names, args.seed)]
    print("\n### SD1.5 adapters of 99 648 numbers\n")
    table = [
        [s.name, str(s.rows), *(f"{value:.1f}" for value in (s.cpu, s.wall, s.peak_mib, s.share))]
        for s in sorted(steps, key=lambda step: (STEPS.index(step.name), step.rows))
    ]
    heads = ["step", "rows", "CPU s", "wall s", "peak MiB", "read, times the store"]
    print_table(heads, table)
    print()
    for name, ratios in growth(steps).items():
        if ratios:
            verdict = "reached" if max(ratios) <= GOAL else "MISSED"
            shown = ", ".join(f"{ratio:.2f}" for ratio in ratios)
            print(f"{name}: times linear {shown}; goal {GOAL}: {verdict}")
    if args.plot:
        draw(steps, Path(args.plot))
    limit = f"{memory_limit() >> 20} MiB"
    facts("pyarrow", "scikit-learn", sizes=args.sizes, memory_limit=limit)


if __name__ == "__main__":
    main()

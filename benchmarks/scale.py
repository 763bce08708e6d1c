"""A collection of 10 000 SD1.5 adapters (4 GB): import it and make all five representations.

Each step runs in a fresh process, whose peak of anonymous memory is sampled; pages of mapped files
do not count, as the system takes them back at will. The representation steps are what `lora-ws
train` does before its first epoch: features of all rows, fitted on the training rows, and their
scaler. Goal: every step within 3 GB.

Needs about 11 GB of disk and some minutes; `--quick` takes 200 rows.
"""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import arguments, facts, in_child, print_table, synthetic

GOAL_MIB = 3 * 1024
ROWS_TO_A_GROUP = 200


def write_parquet(path: Path, rows: int, seed: int) -> None:
    """Write the published schema, one nested list per matrix, group by group."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from lora_ws import Layout

    layout, writer = Layout.sd15_qv(), None
    for start in range(0, rows, ROWS_TO_A_GROUP):
        weights, labels = synthetic(min(ROWS_TO_A_GROUP, rows - start), seed + start)
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


def importing(parquet: Path, store: Path) -> Callable[[], Any]:
    """The import, to be called in a fresh process."""
    from lora_ws import import_collection

    return lambda: import_collection(parquet, store)


def preparing(store: Path, name: str) -> Callable[[], Any]:
    """Features of all rows and their scaler, to be called in a fresh process."""
    from lora_ws import featurizers
    from lora_ws.learn.features import prepare
    from lora_ws.learn.spec import ExperimentSpec

    spec = ExperimentSpec(str(store), featurizer=getattr(featurizers, name)())
    return lambda: prepare(spec)


def main() -> None:
    """Run all steps and print the table."""
    args = arguments(__doc__, repeats=1)
    rows = 200 if args.quick else 10_000
    table = []
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        parquet, store = Path(folder) / "rows.parquet", Path(folder) / "store"
        write_parquet(parquet, rows, args.seed)
        steps = {"import": in_child(importing, parquet, store)}
        parquet.unlink()
        for name in ("FlatVec", "FlatVecPCA", "StatsFlatVec", "StatsLayer", "StatsLayerDense"):
            steps[name] = in_child(preparing, store, name)
        for name, cost in steps.items():
            table.append([name, f"{cost.cpu:.1f}", f"{cost.wall:.1f}", f"{cost.peak_mib:.0f}"])
    print(f"\n### {rows} adapters of 99 648 numbers\n")
    print_table(["step", "CPU s", "wall s", "peak MiB"], table)
    worst = max(cost.peak_mib for cost in steps.values())
    verdict = "reached" if worst <= GOAL_MIB else "MISSED"
    print(f"\nGoal {GOAL_MIB} MiB of anonymous memory: {verdict}, {worst:.0f} MiB")
    facts("pyarrow", "scikit-learn", rows=rows)


if __name__ == "__main__":
    main()

"""Files of adapters, written by independent means: numpy, pyarrow and safetensors alone."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

from lora_ws.adapters import LayerSpec, Layout
from lora_ws.collection import AdapterSet, DatasetCard
from lora_ws.report.records import RunRecord

SHARED = Path(__file__).parents[1] / ".." / "shared" / "data"

# Two layers, 20 numbers: module path, inputs, outputs.
SMALL = (
    ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", 3, 4),
    ("mid_block.attentions.0.transformer_blocks.0.attn2.to_v", 6, 7),
)
SMALL_SIZE = 20


def shared_data(name: str) -> Path:
    """A folder of real data that stands beside the repository; skips the test where it does not."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"needs the real data `{name}` beside the repository")
    return path


def sd15_layers() -> list[tuple[str, int, int]]:
    """Every query and value projection of Stable Diffusion 1.5's U-Net, in column order."""
    blocks = [("down_blocks.0", 2, 320), ("down_blocks.1", 2, 640), ("down_blocks.2", 2, 1280)]
    blocks += [("mid_block", 1, 1280)]
    blocks += [("up_blocks.1", 3, 1280), ("up_blocks.2", 3, 640), ("up_blocks.3", 3, 320)]
    return [
        (
            f"{block}.attentions.{index}.transformer_blocks.0.{attention}.{projection}",
            768 if (attention, projection) == ("attn2", "to_v") else width,
            width,
        )
        for block, count, width in blocks
        for index in range(count)
        for attention in ("attn1", "attn2")
        for projection in ("to_q", "to_v")
    ]


def weights(rows: int, size: int = SMALL_SIZE, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, size), dtype=np.float32)


def matrices(vector: np.ndarray, layers: Sequence[tuple[str, int, int]], rank: int = 1) -> dict:
    """Flat vectors (last axis) to published column names and matrices, in column order."""
    found, at = {}, 0
    for path, inputs, outputs in layers:
        for role, shape in (("down", (rank, inputs)), ("up", (outputs, rank))):
            stop = at + shape[0] * shape[1]
            block = vector[..., at:stop].reshape(*vector.shape[:-1], *shape)
            found[f"unet.{path}.lora.{role}.weight"] = block
            at = stop
    assert at == vector.shape[-1]
    return found


def list_column(values: np.ndarray, kind: str = "nested", number: Any = None) -> pa.Array:
    """An Arrow column of one matrix per row, in one of the ways files hold them."""
    number = number or pa.from_numpy_dtype(values.dtype)
    rows, columns = values.shape[1:]
    flat = pa.array(values.ravel(), number)
    if kind == "fixed":
        inner = pa.FixedSizeListArray.from_arrays(flat, columns)
        return pa.FixedSizeListArray.from_arrays(inner, rows)
    if kind == "fixed_flat":
        return pa.FixedSizeListArray.from_arrays(flat, rows * columns)
    lists = pa.LargeListArray if kind == "large" else pa.ListArray
    step = np.int64 if kind == "large" else np.int32
    inner_ends = np.arange(0, values.size + 1, columns, dtype=step)
    inner = lists.from_arrays(pa.array(inner_ends), flat)
    return lists.from_arrays(
        pa.array(np.arange(0, len(values) * rows + 1, rows, dtype=step)), inner
    )


def make_table(
    values: np.ndarray, layers: Sequence[tuple[str, int, int]] = SMALL, kind: str = "nested"
) -> pa.Table:
    """A table of the published schema; metadata first."""
    rows = len(values)
    columns: dict[str, Any] = {
        "folder": [f"folder_{k:05d}" for k in range(rows)],
        "category_label": [("cat", "dog")[k % 2] for k in range(rows)],
        "rank": pa.array([1] * rows, pa.int64()),
        "step_loss": [[0.5, 1.0 / (k + 1)] for k in range(rows)],
    }
    columns |= {name: list_column(m, kind) for name, m in matrices(values, layers).items()}
    return pa.table(columns)


def write_parquet(path: Path, table: pa.Table, rows_a_group: int | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=rows_a_group)
    return path


def write_adapter(
    path: Path,
    vector: np.ndarray,
    layers: Sequence[tuple[str, int, int]] = SMALL,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """A file as diffusers writes it, and metadata.json beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: np.ascontiguousarray(v) for k, v in matrices(vector, layers).items()}, path)
    if metadata is not None:
        path.with_name("metadata.json").write_text(json.dumps(metadata), encoding="utf-8")
    return path


def set_cell(table: pa.Table, column: str, row: int, value: Any) -> pa.Table:
    """The table with one cell replaced."""
    values = table[column].to_pylist()
    values[row] = value
    at = table.column_names.index(column)
    return table.set_column(at, column, pa.array(values, table.schema.field(column).type))


def record(seed: int = 0, **changes: Any) -> RunRecord:
    """A record as a run of two classes leaves it."""
    shares = dict.fromkeys(("accuracy", "auroc", "precision", "recall", "f1"), 0.5)
    values: dict[str, Any] = {
        "name": "FlatVec",
        "representation": "FlatVec",
        "dataset": "synthetic",
        "subset": "",
        "data_version": "v",
        "layout": "l",
        "protocol": "clean",
        "engine": "lightning-cpu",
        "seed": seed,
        "dim": 3,
        "classes": ("a", "b"),
        "n_train": 8,
        "n_val": 2,
        "n_test": 4,
        "epochs": 5,
        "best_epoch": 3,
        "val_loss": 0.5,
        "val": dict(shares),
        "test": dict(shares),
        "confusion": ((1, 1), (1, 1)),
    }
    return RunRecord(**values | changes)


def small_zoo(n: int = 90, seed: int = 0) -> AdapterSet:
    """Adapters of four layers; only B of ``mid.attn2.to_v`` tells the class."""
    layout = Layout.from_layers(
        [
            LayerSpec("down.attn1.to_q", 6, 6),
            LayerSpec("down.attn2.to_v", 5, 6),
            LayerSpec("mid.attn2.to_v", 5, 8),
            LayerSpec("up.attn1.to_v", 6, 6),
        ]
    )
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    values = rng.standard_normal((n, layout.size), dtype=np.float32)
    (telling,) = [m.columns for m in layout.matrices if m.name == "mid.attn2.to_v.up"]
    values[:, telling] += 3 * rng.standard_normal((3, 8), dtype=np.float32)[labels]
    names = np.array(["cat", "dog", "owl"])[labels]
    rows = pa.table({"category_label": names, "num_images": 4 + np.arange(n) % 5})
    return AdapterSet(values, layout, rows, DatasetCard(name="small"))

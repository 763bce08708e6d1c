"""Collections that ship inside the package: float16 numbers with one float32 scale per matrix.

The scale brings each matrix to float16's range, so that small B entries keep 11 bits. The file is
expanded once into a float32 store in the user's cache.
"""

import hashlib
import json
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from safetensors.numpy import load_file, save_file

from lora_ws.adapters.layout import Layout
from lora_ws.collection.adapter_set import AdapterSet
from lora_ws.collection.card import DatasetCard
from lora_ws.collection.store import ROWS

PACKED, ORIGIN = "weights.safetensors", "origin.json"
# One number per training step each, which a package has no room for.
LEFT_OUT = ("step_loss", "grad_norm")
ASSETS = Path(__file__).parent.parent / "_assets"
# Far below float16's largest value (65504), so that rounding cannot overflow.
TOP = 32768.0


def write_packed(adapters: AdapterSet, folder: Path) -> Path:
    """Write a collection in the bundled form, without what it notes of each training step."""
    half = np.empty(adapters.weights.shape, np.float16)
    scales = []
    for matrix in adapters.layout.matrices:
        block = np.asarray(adapters.weights[:, matrix.columns])
        scale = np.float32(np.abs(block).max() / TOP) or np.float32(1)
        half[:, matrix.columns] = block / scale
        scales.append(scale)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"half": half, "scales": np.array(scales, np.float32)}, folder / PACKED)
    rows = adapters.rows.drop_columns(
        [name for name in LEFT_OUT if name in adapters.rows.column_names]
    )
    pq.write_table(rows, folder / ROWS, compression="zstd", compression_level=19)
    (folder / ORIGIN).write_text(json.dumps(adapters.origin, indent=1) + "\n", encoding="utf-8")
    return folder


def unpack(folder: Path, card: DatasetCard) -> AdapterSet:
    """Read a bundled collection into memory as float32."""
    tensors = load_file(folder / PACKED)
    layout = Layout.known(card.layout)
    widths = [matrix.columns.stop - matrix.columns.start for matrix in layout.matrices]
    weights = tensors["half"].astype(np.float32)
    weights *= np.repeat(tensors["scales"], widths)
    origin = json.loads((folder / ORIGIN).read_text(encoding="utf-8"))
    return AdapterSet(weights, layout, pq.read_table(folder / ROWS), card, origin)


@cache
def packed_hash(folder: Path) -> str:
    """Hash of the bundled files, which names the expanded copy."""
    digest = hashlib.sha256()
    for name in (PACKED, ROWS, ORIGIN):
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()[:12]

"""Memory of an import does not grow with the collection."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from factories import make_table, write_adapter
from warm import Warm

LAYERS = [(f"down_blocks.0.attentions.{k}.attn1.to_q", 640, 640) for k in range(5)]
SIZE = 6400
# Anonymous memory, because pages of mapped files are the system's to take back.
CHILD = """
import sys, threading
from pathlib import Path
from lora_ws.collection import import_collection, source

source.BATCH_BYTES = 1 << 20
peak, done = 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.002):
        status = Path("/proc/self/status").read_text()
        peak = max(peak, int(status.partition("RssAnon:")[2].split()[0]))

thread = threading.Thread(target=watch)
thread.start()
import_collection(sys.argv[1], sys.argv[2])
done.set()
thread.join()
print(peak)
"""


def write_rows(path: Path, rows: int, rows_a_group: int) -> Path:
    """Rows whose step_loss is as long as the published one."""
    parts = []
    for start in range(0, rows, 100):
        values = np.random.default_rng(start).standard_normal((100, SIZE), dtype=np.float32)
        table = make_table(values, LAYERS)
        losses = pa.array(list(values[:, :200].astype(np.float64)))
        table = table.set_column(table.column_names.index("step_loss"), "step_loss", losses)
        parts.append(table)
    pq.write_table(pa.concat_tables(parts), path, row_group_size=rows_a_group)
    return path


def write_files(folder: Path, rows: int) -> Path:
    for k in range(rows):
        vector = np.random.default_rng(k).standard_normal(SIZE, dtype=np.float32)
        losses = {"step_loss": vector[:200].tolist()}
        write_adapter(folder / f"{k}" / "x.safetensors", vector, LAYERS, losses)
    return folder


@pytest.fixture
def peak_mb(tmp_path: Path, warm: Warm) -> Callable[[Path], float]:
    """Peak memory of importing a source in batches of a megabyte."""
    return lambda source: int(warm.run(CHILD, source, tmp_path / f"of {source.name}")) / 1024


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="needs Linux's /proc"
)


@pytest.mark.slow
@needs_proc
def test_four_times_the_rows_take_no_more_memory(tmp_path: Path, peak_mb: Callable[[Path], float]):
    few = peak_mb(write_rows(tmp_path / "few.parquet", 800, 100))
    many = peak_mb(write_rows(tmp_path / "many.parquet", 3200, 100))
    assert many - few < 2400 * SIZE * 4 / 2**20 / 4, (few, many)


@pytest.mark.slow
@needs_proc
def test_a_row_group_is_not_held_as_a_whole(tmp_path: Path, peak_mb: Callable[[Path], float]):
    few = peak_mb(write_rows(tmp_path / "few.parquet", 300, 100))
    many = peak_mb(write_rows(tmp_path / "many.parquet", 2400, 2400))
    assert many - few < 2400 * SIZE * 4 / 2**20 / 3, (few, many)


@pytest.mark.slow
@needs_proc
def test_four_times_the_files_take_no_more_memory(tmp_path: Path, peak_mb: Callable[[Path], float]):
    few = peak_mb(write_files(tmp_path / "few", 200))
    many = peak_mb(write_files(tmp_path / "many", 800))
    assert many - few < 600 * SIZE * 4 / 2**20 / 2, (few, many)

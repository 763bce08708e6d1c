"""The bound on memory: how it is said, and that commands on a store larger than it keep to it."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from warm import Warm

from lora_ws.adapters import Layout
from lora_ws.cli import main
from lora_ws.collection import DatasetCard
from lora_ws.collection.store import StoreWriter, row_hashes
from lora_ws.errors import ConfigError
from lora_ws.memory import BLOCK_BYTES, LEAST, LIMIT, blocks, bounded, held_bytes, memory_limit
from lora_ws.system import memory_of_machine

LAYOUT = Layout.known("tiny_sd_qv")
ROWS, STEP = 16_000, 1_000
LIMIT_MB, ROOM_MB, STORE_MB = 256, 400, ROWS * LAYOUT.size * 4 >> 20
# What a command takes beyond its libraries: mapped files do not count, as they are the system's.
CHILD = """
import resource, sys
from pathlib import Path
import lora_ws.commands.featurize, lora_ws.commands.evaluate, lora_ws.experiments.comparison
import scipy.linalg, sklearn.utils.validation, matplotlib.pyplot
status = Path("/proc/self/status").read_text()
held = int(status.partition("VmData:")[2].split()[0]) << 10
room = held + (int(sys.argv.pop(1)) << 20)
resource.setrlimit(resource.RLIMIT_DATA, (room, room))
from lora_ws.cli import main
raise SystemExit(main())
"""


@pytest.mark.parametrize(
    ("text", "size"),
    [("4GiB", 4 << 30), ("500MB", 500_000_000), ("1.5 gib", 3 << 29), ("300000000", 300_000_000)],
)
def test_sizes(monkeypatch: pytest.MonkeyPatch, text: str, size: int) -> None:
    monkeypatch.delenv(LIMIT, raising=False)
    with bounded(text):
        assert (memory_limit(), held_bytes()) == (size, size // 4)
        with bounded():
            assert memory_limit() == size
    assert memory_limit() == memory_of_machine() // 4


@pytest.mark.parametrize(
    ("text", "why"), [("much", "4GiB or 500MB, got `much`"), ("64MiB", "at least 256MiB")]
)
def test_other_sizes_are_refused(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=f"memory_limit: expected .*{why}"), bounded(text):
        pass


def test_a_command_says_what_is_wrong_with_the_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["featurize", "--out", "x.npz", "--memory_limit", "1KB"]) == 2
    assert "memory_limit: expected at least 256MiB, got `1KB`" in capsys.readouterr().err


def test_blocks_hold_every_row_once() -> None:
    for rows, width in ((0, 4), (7, BLOCK_BYTES // 3), (5, 2 * BLOCK_BYTES)):
        parts = list(blocks(rows, width))
        assert [k for part in parts for k in range(rows)[part]] == list(range(rows))
        assert all(part.stop - part.start <= max(1, BLOCK_BYTES // width) for part in parts)
    assert BLOCK_BYTES * 4 <= LEAST


def drawn(start: int) -> tuple[np.ndarray, pa.Table]:
    """Rows of two classes whose means differ, and their labels."""
    weights = np.random.default_rng(start).standard_normal((STEP, LAYOUT.size), dtype=np.float32)
    labels = np.arange(start, start + STEP) % 2
    weights[:, :500] += 0.2 * labels[:, None]
    return weights, pa.table({"category_label": [f"class{k}" for k in labels]})


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "store"
    with StoreWriter(path, LAYOUT, DatasetCard(name="large"), {}) as writer:
        for start in range(0, ROWS, STEP):
            weights, rows = drawn(start)
            writer.append(weights, rows.append_column("sha256", [row_hashes(weights)]))
        writer.finish()
    return path


Command = Callable[..., str]


@pytest.fixture
def within(warm_all: Warm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run a command that gets less memory than the store takes."""
    assert ROOM_MB < STORE_MB
    temporary = tmp_path / "temporary"
    temporary.mkdir()

    def run(*words: object) -> str:
        limit = ("--memory_limit", f"{LIMIT_MB}MiB")
        status, printed = warm_all.start(
            CHILD, ROOM_MB, *words, *limit, LORA_WS_DEBUG="1", TMPDIR=str(temporary)
        ).wait()
        assert status == 0, printed
        assert not list(temporary.rglob("*")), "rows were copied"
        return printed

    return run


linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's limit on data")


@pytest.mark.slow
@linux
def test_an_import_keeps_to_it(within: Command, tmp_path: Path) -> None:
    file, writer = tmp_path / "rows.parquet", None
    for start in range(0, ROWS, STEP):
        weights, rows = drawn(start)
        for matrix in LAYOUT.matrices:
            flat = pa.array(weights[:, matrix.columns].ravel())
            nested = pa.FixedSizeListArray.from_arrays(flat, matrix.shape[1])
            nested = pa.FixedSizeListArray.from_arrays(nested, matrix.shape[0])
            name = f"unet.{matrix.layer.name}.lora.{matrix.role}.weight"
            rows = rows.append_column(name, nested.cast(pa.list_(pa.list_(pa.float32()))))
        writer = writer or pq.ParquetWriter(file, rows.schema)
        writer.write_table(rows)
    assert writer
    writer.close()
    assert f"{ROWS} adapters" in within("data", "import", file, "--out", tmp_path / "store")


@pytest.mark.slow
@linux
@pytest.mark.parametrize(
    ("featurizer", "features"),
    [
        (["FlatVecPCA", "--featurizer.n_components", "20"], 20),
        (["StatsLayer"], None),
        (["DeltaPCA", "--featurizer.landmarks", "64", "--featurizer.n_components", "20"], 20),
        (["UpdateKernel", "--featurizer.landmarks", "64"], 64),
    ],
)
def test_representations_keep_to_it(
    within: Command, store: Path, tmp_path: Path, featurizer: list[str], features: int | None
) -> None:
    out = tmp_path / "features.npz"
    within("featurize", "--dataset", store, "--out", out, "--featurizer", *featurizer)
    found = np.load(out)["features"]
    assert np.isfinite(found).all()
    assert found.shape == (ROWS, features or found.shape[1])


@pytest.mark.slow
@linux
def test_training_on_the_weights_and_evaluating_keep_to_it(
    within: Command, store: Path, tmp_path: Path
) -> None:
    fit = ("--model.hidden", "[16]", "--fit.max_epochs", "1", "--seeds", "1")
    data = ("--dataset", store)
    within("train", *data, "--out", tmp_path, "--featurizer", "FlatVec", "--model", "MLP", *fit)
    said = within("evaluate", *data, "--model", tmp_path / "bundle", "--part", "all")
    accuracy = next(line.split()[-1] for line in said.splitlines() if "accuracy" in line.lower())
    assert float(accuracy) > 90

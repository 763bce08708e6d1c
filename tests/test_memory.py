"""The bound on memory: how it is said, and that commands on a store larger than it keep to it."""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from factories import small_zoo
from sklearn.linear_model import RidgeClassifier
from warm import Warm

from lora_ws.adapters import Layout
from lora_ws.cli import main
from lora_ws.collection import AdapterSet, DatasetCard
from lora_ws.collection.store import StoreWriter, row_hashes
from lora_ws.errors import ConfigError
from lora_ws.featurizers import FlatVec
from lora_ws.learn.features import prepare
from lora_ws.learn.spec import ExperimentSpec
from lora_ws.learn.starts import most_rows, start_groups
from lora_ws.memory import (
    BLOCK_BYTES,
    LEAST,
    LIMIT,
    blocks,
    bounded,
    check_room,
    held_bytes,
    memory_limit,
)
from lora_ws.system import memory_of_machine

LAYOUT = Layout.known("tiny_sd_qv")
ROWS, STEP = 16_000, 1_000
LIMIT_MB, ROOM_MB, STORE_MB = 256, 400, ROWS * LAYOUT.size * 4 >> 20
# What a command takes beyond its libraries: mapped files do not count, as they are the system's.
CHILD = """
import resource, sys
from pathlib import Path
import lora_ws.commands.featurize, lora_ws.commands.evaluate, lora_ws.experiments.comparison
import lora_ws.learn.leaks, lora_ws.experiments.study.report, lora_ws.experiments.study.run
import scipy.linalg, scipy.stats, sklearn.utils.validation, matplotlib.pyplot
status = Path("/proc/self/status").read_text()
held = int(status.partition("VmData:")[2].split()[0]) << 10
room = held + (int(sys.argv.pop(1)) << 20)
resource.setrlimit(resource.RLIMIT_DATA, (room, room))
from lora_ws.cli import main
raise SystemExit(main())
"""

# Arrow's allocator takes a GiB of addresses at once, where it gets them.
ARENA = "import pyarrow; pyarrow.table({'a': [1]})"


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

    def run(*words: object, ends: int = 0, limit_mb: int = LIMIT_MB) -> str:
        limit = ("--memory_limit", f"{limit_mb}MiB")
        room, debug = ROOM_MB + limit_mb - LIMIT_MB, {} if ends else {"LORA_WS_DEBUG": "1"}
        code = CHILD if limit_mb == LIMIT_MB else ARENA + CHILD
        status, printed = warm_all.start(
            code, room, *words, *limit, **debug, TMPDIR=str(temporary)
        ).wait()
        assert status == ends, printed
        assert not list(temporary.rglob("*")), "rows were copied"
        return printed

    return run


def test_what_has_no_room_is_refused_with_the_size_that_would_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(LIMIT, str(64 << 20))
    check_room("rows", 16 << 20)
    with pytest.raises(
        ConfigError,
        match="rows: expected at most 16 MiB to hold, one 4th of --memory_limit, got 17 MiB; "
        "use --memory_limit 65MiB",
    ):
        check_room("rows", (16 << 20) + 1)


def test_rows_apart_are_refused_where_their_copy_has_no_room(
    monkeypatch: pytest.MonkeyPatch, make_zoo: Callable[..., AdapterSet]
) -> None:
    adapters = make_zoo(30)
    size = 15 * adapters.layout.size * 4
    monkeypatch.setenv(LIMIT, str(size))
    assert len(adapters.select(slice(None, None, 2))) == 15
    assert np.shares_memory(adapters.select(slice(0, 25)).weights, adapters.weights)
    monkeypatch.setenv(LIMIT, str(size - 1))
    assert np.shares_memory(adapters.select(slice(0, 25)).weights, adapters.weights)
    with pytest.raises(ConfigError, match=r"15 rows that do not follow.*use --memory_limit 1MiB"):
        adapters.select(slice(None, None, 2))


def test_scikit_learn_gets_no_more_rows_than_there_is_room_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    store = small_zoo().save(tmp_path / "store")
    spec = ExperimentSpec(str(store), featurizer=FlatVec(), model=RidgeClassifier(), seeds=1)
    needed = 4 * 4 * 63 * small_zoo(3).layout.size
    monkeypatch.setenv(LIMIT, str(needed))
    assert prepare(spec).features.shape[0] == 90
    monkeypatch.setenv(LIMIT, str(needed - 4))
    with pytest.raises(ConfigError, match="model: RidgeClassifier, 63 training rows of 48 numbers"):
        prepare(spec)


def test_starts_of_chosen_rows_are_those_of_their_copy(make_zoo: Callable[..., AdapterSet]) -> None:
    zoo, rows = make_zoo(40), np.array([3, 5, 8, 9, 30])
    weights = zoo.weights.copy()
    weights[8] = weights[3]
    assert start_groups(weights, zoo.layout, rows).tolist() == [0, 1, 0, 2, 3]
    assert start_groups(weights[rows], zoo.layout).tolist() == [0, 1, 0, 2, 3]
    assert most_rows(zoo.layout, 1 << 20) == 181, "root of MiB / 32, as its layers are narrow"


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


@pytest.mark.slow
@linux
def test_an_audit_keeps_to_it(within: Command, store: Path) -> None:
    said = within("data", "audit", store)
    assert re.search(r"starts; .*among \d+ of 16000\s+rows", " ".join(said.split()))


@pytest.mark.slow
@linux
def test_scikit_learn_and_studies_say_what_they_need_and_take_no_more(
    within: Command, store: Path, tmp_path: Path
) -> None:
    data, model = ("--dataset", store), ("--model", "RidgeClassifier", "--seeds", "1")
    raw = within(
        "train", *data, "--out", tmp_path / "raw", "--featurizer", "FlatVec", *model, ends=2
    )
    width = LAYOUT.size
    assert f"model: RidgeClassifier, {7 * ROWS // 10} training rows of {width} numbers" in raw
    within("train", *data, "--out", tmp_path / "run", "--featurizer", "StatsLayer", *model)
    study = (
        "study",
        "weight-noise",
        "--draws",
        1,
        *data,
        "--model",
        tmp_path / "run/bundle",
        "--out",
        tmp_path / "s",
    )
    refused = within(*study, ends=2)
    assert f"weight-noise of {2 * ROWS // 10} test adapters: expected at most 256 MiB" in refused
    needed = int(re.search(r"use --memory_limit (\d+)MiB", refused)[1])  # type: ignore[index]
    assert "Noise on both factors" in within(*study, limit_mb=needed)

"""Collections at addresses: what is opened is what is there, whatever its server does."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from factories import small_zoo, write_adapter
from s3_server import Fault, S3Server

from lora_ws.addresses import file_system
from lora_ws.cli import main
from lora_ws.collection import load
from lora_ws.collection.addressed import local_copy, on_disk
from lora_ws.errors import NotAvailableError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_WS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def store(s3: S3Server) -> Path:
    """A store in a bucket."""
    home = s3.root / "bucket/zoo"
    home.parent.mkdir()
    small_zoo().save(home)
    return home


@pytest.mark.parametrize("name", ["rows", "rows/", "rows/inner", "rows/inner/b.csv"])
def test_a_copy_has_the_files_of_its_address(name: str) -> None:
    system, _ = file_system("memory://")
    system.pipe({"/rows/a.csv": b"a", "/rows/inner/b.csv": b"bc", "/rows2/c.csv": b"d"})
    copy = local_copy(f"memory://{name}")
    wanted = name.strip("/")
    files = [copy] if copy.is_file() else sorted(f for f in copy.rglob("*") if f.is_file())
    found = {f"{wanted}/{file.relative_to(copy)}".removesuffix("/."): file for file in files}
    there = [path.strip("/") for path in system.find(f"/{wanted}")]
    assert {name: file.read_bytes() for name, file in found.items()} == {
        path: system.cat(f"/{path}") for path in there
    }
    assert copy.name == Path(wanted).name


def test_a_file_that_changed_is_copied_again_and_paths_stay_paths(tmp_path: Path) -> None:
    system, _ = file_system("memory://")
    system.pipe("/changing/a.csv", b"a")
    first = local_copy("memory://changing")
    assert local_copy("memory://changing") == first
    system.pipe("/changing/a.csv", b"b")
    assert (local_copy("memory://changing") / "a.csv").read_bytes() == b"b"
    assert on_disk(tmp_path) == tmp_path
    assert on_disk("hf://datasets/owner/name") == Path("hf://datasets/owner/name")


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("memory://nothing/here", "expected a file or a folder, found none"),
        ("file:///nothing/here", "expected a file or a folder, found none"),
        ("nosuch://bucket/a", "nosuch"),
    ],
)
def test_what_is_not_there_is_said_by_its_address(address: str, said: str) -> None:
    with pytest.raises(NotAvailableError, match=said) as caught:
        load(address)
    assert str(caught.value).startswith(address)


@pytest.mark.slow
def test_a_store_in_a_bucket_is_what_it_is_on_disk(store: Path, s3: S3Server) -> None:
    faults = [("^GET /bucket/zoo/weights", "drop"), ("^GET /bucket/zoo/rows", "busy")]
    s3.faults += [Fault(match, action) for match, action in faults]  # type: ignore[arg-type]
    there, here = load("s3://bucket/zoo"), load(store)
    np.testing.assert_array_equal(there.weights, here.weights)
    assert there.rows.equals(here.rows)
    assert not s3.faults
    s3.log.clear()
    assert len(load("s3://bucket/zoo", rank=1)) == len(here)
    assert not [line for line in s3.log if "zoo/weights" in line], "copied once"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("action", "said"),
    [("short", "expected 1"), ("change", "files changed"), ("forbid", "PermissionError")],
)
def test_servers_that_lie_or_refuse_leave_no_copy(
    action: str, said: str, store: Path, s3: S3Server, tmp_path: Path
) -> None:
    times = 1 if action == "change" else 20
    s3.faults += [Fault("^GET /bucket/zoo/weights", action)] * times  # type: ignore[arg-type]
    with pytest.raises(NotAvailableError, match=said):
        load("s3://bucket/zoo")
    assert not list((tmp_path / "cache").rglob("zoo"))
    s3.faults.clear()
    whole = load(store)
    np.testing.assert_array_equal(load("s3://bucket/zoo").weights, whole.weights)
    assert not list((tmp_path / "cache").rglob("*.partial"))


@pytest.mark.slow
def test_a_copy_that_was_cut_off_goes_on(store: Path, s3: S3Server) -> None:
    s3.faults += [Fault("^GET /bucket/zoo/weights", "forbid")] * 20
    with pytest.raises(NotAvailableError):
        load("s3://bucket/zoo")
    s3.log.clear()
    s3.faults.clear()
    load("s3://bucket/zoo")
    fetched = [line for line in s3.log if line.startswith("GET /bucket/zoo/")]
    assert fetched
    assert not [line for line in fetched if "manifest" in line], "it was there"


@pytest.mark.slow
def test_commands_read_and_write_addresses(
    store: Path, s3: S3Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    zoo, folder = load("lora-ws-mini"), s3.root / "bucket/files"
    layers = tuple((s.name, s.in_features, s.out_features) for s in zoo.layout.layers)
    for row in range(4):
        file = folder / ("cat", "dog")[row % 2] / f"{row}.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_adapter(file, zoo.weights[row], layers)
    assert main(["data", "import", "s3://bucket/files", "--out", str(tmp_path / "imported")]) == 0
    assert main(["data", "import", str(folder), "--out", str(tmp_path / "local")]) == 0
    imported, local = load(tmp_path / "imported"), load(tmp_path / "local")
    np.testing.assert_array_equal(imported.weights, local.weights)
    assert imported.labels()[1] == local.labels()[1] == ("cat", "dog")
    options = ["--featurizer", "StatsLayer"]
    remote = ["--dataset", "s3://bucket/zoo", "--out", "s3://bucket/out/rows.parquet"]
    assert main(["featurize", *options, *remote]) == 0
    assert "s3://bucket/out/rows.parquet: 90 adapters" in " ".join(capsys.readouterr().out.split())
    here = ["--dataset", str(store), "--out", str(tmp_path / "rows.parquet")]
    assert main(["featurize", *options, *here]) == 0
    found = pq.read_table(s3.root / "bucket/out/rows.parquet")
    assert found.equals(pq.read_table(tmp_path / "rows.parquet"))
    nowhere = ["--dataset", "s3://bucket/none", "--out", str(tmp_path / "none.npz")]
    assert main(["featurize", *nowhere]) == 2
    assert "s3://bucket/none: expected a file or a folder" in capsys.readouterr().err

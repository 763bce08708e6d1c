"""What other systems lack or refuse, simulated: none of this ran on macOS or Windows itself."""

import ast
import csv
import fcntl
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from factories import make_table, small_zoo, weights, write_adapter, write_parquet

from lora_ws import journal, system
from lora_ws.adapters import find_adapters
from lora_ws.adapters.pickled import convert_pickle
from lora_ws.audit import similar
from lora_ws.audit.policy import Policy, review
from lora_ws.audit.scan import ScanSpec, scan
from lora_ws.audit.similar import Index, Signature
from lora_ws.bundle import Bundle
from lora_ws.collection import import_collection
from lora_ws.errors import AdapterError, DataError
from lora_ws.experiments.recipes import cores
from lora_ws.featurizers import StatsFlatVec
from lora_ws.learn.features import prepare
from lora_ws.learn.pack import pack
from lora_ws.learn.run import fit_seed, run
from lora_ws.learn.spec import ExperimentSpec, FitSpec

PACKAGE = Path(system.__file__).parent
NAMES = ("größe", "日本語", "naïve - Copy")
# Of `os` and `signal`, what some system lacks; and modules that only one has.
LACKING = {"fork", "forkpty", "getloadavg", "getppid", "getuid", "kill", "killpg", "mkfifo", "nice"}
LACKING |= {"pread", "pwrite", "sched_getaffinity", "setsid", "sysconf", "uname"}
LACKING |= {"SIGALRM", "SIGHUP", "SIGKILL", "SIGUSR1", "alarm", "pause", "setitimer"}
FOREIGN = {"fcntl", "grp", "pwd", "resource", "termios", "msvcrt", "winreg", "_winapi"}
# It refuses to work where memory cannot be limited, and says so.
LINUX_ALONE = PACKAGE / "adapters" / "pickled.py"


def peculiar(file: Path) -> list[str]:
    """What a file uses that some system lacks."""
    nodes = list(ast.walk(ast.parse(file.read_bytes())))
    used = [
        node.attr
        for node in nodes
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("os", "signal")
    ]
    names = [a.name for node in nodes if isinstance(node, ast.Import) for a in node.names]
    return [name for name in used if name in LACKING] + [n for n in names if n in FOREIGN]


def test_what_a_system_lacks_is_used_in_one_place() -> None:
    found = {file: peculiar(file) for file in PACKAGE.rglob("*.py")}
    assert found.pop(Path(system.__file__))
    assert found.pop(LINUX_ALONE)
    assert not {file.name: used for file, used in found.items() if used}


def test_pickles_are_refused_where_memory_cannot_be_limited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.bin"
    file.write_bytes(b"PK")
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(AdapterError, match="expected Linux, where memory can be limited"):
        convert_pickle(file, tmp_path / "b.safetensors")


def test_cpus_are_counted_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3, 5}, raising=False)
    assert cores(None) == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    assert cores(None) == os.cpu_count()
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cores(None) == 1


class Terminal(io.TextIOWrapper):
    """A terminal with an encoding of its own."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("kind", "expected"),
    [(io.TextIOWrapper, "größe 日本\n".encode()), (Terminal, b"gr\xf6\xdfe \\u65e5\\u672c\n")],
    ids=["pipe", "terminal"],
)
def test_output_is_utf8_or_what_a_terminal_shows(
    monkeypatch: pytest.MonkeyPatch, kind: type[io.TextIOWrapper], expected: bytes
) -> None:
    stream = kind(io.BytesIO(), encoding="cp1252", newline="\n")
    monkeypatch.setattr(sys, "stdout", stream)
    system.write_utf8()
    print("größe 日本", flush=True)
    assert stream.buffer.getvalue() == expected  # type: ignore[attr-defined]


def test_the_end_of_a_parent_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    parents, pauses = iter([7, 7, 1]), list[float]()
    monkeypatch.setattr(os, "getppid", lambda: next(parents))
    monkeypatch.setattr(system.time, "sleep", pauses.append)
    system.wait_for_parent(7)
    assert len(pauses) == 2


@pytest.mark.parametrize("gone", [False, True])
def test_the_end_of_a_parent_is_seen_on_windows(
    monkeypatch: pytest.MonkeyPatch, gone: bool
) -> None:
    calls = []

    def opened(*args: object) -> int:
        calls.append(args)
        if gone:
            raise OSError(87, "there is no such process")
        return 99

    fake = SimpleNamespace(
        SYNCHRONIZE=1,
        INFINITE=-1,
        OpenProcess=opened,
        WaitForSingleObject=lambda *args: calls.append(args),
        CloseHandle=lambda *args: calls.append(args),
    )
    monkeypatch.setitem(sys.modules, "_winapi", fake)
    monkeypatch.setattr(sys, "platform", "win32")
    system.wait_for_parent(7)
    assert calls == ([(1, False, 7)] if gone else [(1, False, 7), (99, -1), (99,)])


def in_use(path: str | Path) -> list[str]:
    """Files at or under a path that this process has open or mapped."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    found = {Path(line.split(maxsplit=5)[-1]) for line in maps}
    for handle in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the listing's own
            found.add(handle.readlink())
    where = Path(path).resolve()
    return [str(file) for file in found if file.is_relative_to(where)]


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows' rules for files: what is open or mapped is not moved, replaced or removed."""

    def guarded(name: str) -> Callable[..., None]:
        real = getattr(os, name)

        def call(path: str | Path, *args: Any, **options: Any) -> None:
            others = args[:1] if name in ("rename", "replace") else ()
            for given in (path, *others):
                if used := in_use(given):
                    raise PermissionError(32, f"{name}: in use: {used}", str(given))
            if name == "rename" and Path(args[0]).exists():
                raise FileExistsError(183, "exists already", str(args[0]))
            real(path, *args, **options)

        return call

    def fsync(handle: int, real: Callable[[int], None] = os.fsync) -> None:
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(9, "fsync: opened for reading alone")
        real(handle)

    for name in ("rename", "replace", "unlink", "remove", "rmdir"):
        monkeypatch.setattr(os, name, guarded(name))
    monkeypatch.setattr(os, "fsync", fsync)
    # By names, as there, and not by handles of folders.
    monkeypatch.setattr(shutil, "_use_fd_functions", False)


@pytest.mark.usefixtures("windows")
def test_the_rules_of_windows_are_kept_by_the_simulation(tmp_path: Path) -> None:
    file = tmp_path / "a" / "b"
    file.parent.mkdir()
    with file.open("wb") as opened:
        opened.write(b"12345678")
        os.fsync(opened.fileno())
        for forbidden in (file.unlink, lambda: file.parent.rename(tmp_path / "c")):
            with pytest.raises(PermissionError):
                forbidden()
        with pytest.raises(PermissionError):
            shutil.rmtree(tmp_path / "a")
    with file.open("rb") as opened, pytest.raises(OSError, match="for reading alone"):
        os.fsync(opened.fileno())
    mapped = np.memmap(file, "u1")
    (tmp_path / "c").touch()
    with pytest.raises(PermissionError):
        (tmp_path / "c").replace(file)
    del mapped
    shutil.rmtree(tmp_path / "a")


@pytest.mark.usefixtures("windows")
def test_stores_are_made_by_windows_rules(tmp_path: Path) -> None:
    values = weights(30)
    write_parquet(tmp_path / "in" / "größe.parquet", make_table(values), 10)
    zoo = import_collection(tmp_path / "in", tmp_path / "store")
    np.testing.assert_array_equal(zoo.weights, values)
    again = import_collection(tmp_path / "in", tmp_path / "other")
    assert again.manifest == zoo.manifest
    bad = values.copy()
    bad[:] = np.nan
    write_parquet(tmp_path / "bad" / "a.parquet", make_table(bad))
    with pytest.raises(DataError, match="no row could be imported"):
        import_collection(tmp_path / "bad", tmp_path / "none", on_error="skip")
    assert not list(tmp_path.glob("none*/*"))


@pytest.mark.usefixtures("windows")
def test_an_index_grows_by_windows_rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("usearch")
    monkeypatch.setattr(similar, "EXACT_ROWS", 50)
    rows = np.random.default_rng(0).standard_normal((200, 64))
    signatures = [Signature(row, 1.0, "") for row in rows]
    index = Index.build(tmp_path, side=8).append([f"a{k}" for k in range(100)], signatures[:100])
    assert index.search(rows[:5], approximate=True).rows[:, 0].tolist() == [0, 1, 2, 3, 4]
    grown = index.append([f"b{k}" for k in range(100)], signatures[100:])
    found = grown.search(rows[195:], approximate=True)
    assert found.rows[:, 0].tolist() == [195, 196, 197, 198, 199]


def adapters_of_any_name(folder: Path) -> Path:
    """Three files that are fine, and an empty one."""
    for row, name in zip(weights(3), NAMES, strict=True):
        write_adapter(folder / f"{name}.safetensors", row)
    (folder / "空.safetensors").write_bytes(b"")
    return folder


@pytest.mark.usefixtures("windows")
def test_files_are_scanned_by_windows_rules(tmp_path: Path) -> None:
    folder = adapters_of_any_name(tmp_path / "in")
    listed = tmp_path / "list.txt"
    # As Windows' editor saves it.
    listed.write_text(f"{folder}\n", encoding="utf-8-sig")
    spec = ScanSpec(cache=tmp_path / "cache")
    for new in (4, 0):
        found = scan(find_adapters(str(listed)), spec)
        assert found.new == new
        assert sum(one.finding.reason == "" for one in review(found, Policy(), None)) == 3


@pytest.mark.slow
@pytest.mark.usefixtures("windows")
def test_runs_and_bundles_are_written_by_windows_rules(tmp_path: Path) -> None:
    store = str(small_zoo(30).save(tmp_path / "store"))
    spec = ExperimentSpec(store, featurizer=StatsFlatVec(), fit=FitSpec(max_epochs=1), seeds=1)
    assert len(run(spec, tmp_path / "run")) == 1
    better = tmp_path / "run" / "bundle"
    kept = Bundle.load(better)
    pack(fit_seed(spec, prepare(spec), 1), better)
    assert Bundle.load(better).training["seed"] != kept.training["seed"]
    assert len(run(replace(spec, seeds=2), tmp_path / "run")) == 2


WRITTEN = {"out": "html", "json": "jsonl", "csv": "csv"}
COMMAND = """
import os, sys, warnings
warnings.filterwarnings("error", category=EncodingWarning, module=r"lora_ws(\\.|$)")
del os.sched_getaffinity
from lora_ws.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_reports_are_utf8_whatever_the_locale(tmp_path: Path) -> None:
    folder = adapters_of_any_name(tmp_path / "in")
    shutil.copy(folder / f"{NAMES[0]}.safetensors", os.fsencode(folder) + b"/\xff.safetensors")
    written = [f"--{flag}=a.{kind}" for flag, kind in WRITTEN.items()]
    strict = [sys.executable, "-X", "warn_default_encoding", "-c", COMMAND]
    done = subprocess.run(
        [*strict, "scan", "in", "--cache", "cache", *written],
        cwd=tmp_path,
        env={**os.environ, "PYTHONIOENCODING": "cp1252", "LORA_WS_DEBUG": "1", "COLUMNS": "200"},
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 3, done.stderr
    assert "flagged: in/空.safetensors" in done.stdout
    names = {f"in/{name}.safetensors" for name in (*NAMES, "空", "\\xff")}
    with (tmp_path / "a.csv").open(encoding="utf-8", newline="") as opened:
        assert {row["file"] for row in csv.DictReader(opened)} == names
    lines = journal.read(tmp_path / "a.jsonl")
    assert {line["file"] for line in lines} == names
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert '<meta charset="utf-8">' in page
    assert "空.safetensors" in page
    assert "größe" in page


ZEN4 = "vendor_id\t: AuthenticAMD\ncpu family\t: 25\nflags\t\t: fpu avx2 avx512f\n\n"


@pytest.mark.parametrize(
    ("cpuinfo", "chosen", "given"),
    [
        (ZEN4, None, "X86_V4 AVX512_ICL"),
        (ZEN4, "", ""),
        (ZEN4.replace("25", "26"), None, None),
        (ZEN4.replace(" avx512f", ""), None, None),
        (ZEN4.replace("AuthenticAMD", "GenuineIntel"), None, None),
        ("Processor\t: ARMv8\n", None, None),
        (None, None, None),
    ],
)
def test_kernels_that_a_processor_is_slow_at_are_left(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cpuinfo: str | None,
    chosen: str | None,
    given: str | None,
) -> None:
    if cpuinfo is not None:
        (tmp_path / "cpuinfo").write_text(cpuinfo, encoding="utf-8")
    monkeypatch.setattr(system, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.delenv(system.DISABLED, raising=False)
    if chosen is not None:
        monkeypatch.setenv(system.DISABLED, chosen)
    system.choose_numpy_kernels()
    assert os.environ.get(system.DISABLED) == chosen, "NumPy is imported: it is too late"
    monkeypatch.delitem(sys.modules, "numpy")
    system.choose_numpy_kernels()
    assert os.environ.get(system.DISABLED) == given

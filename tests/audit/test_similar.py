"""The index: what it finds among real adapters, how it grows, resumes, and fails."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from copies import adapters, brain, file_modules, half, rounded, set_adapters, split_anew
from factories import shared_data
from safetensors.numpy import load_file
from tolerances import rounding

from lora_ws.adapters import read_adapter
from lora_ws.audit import index_store, similar
from lora_ws.audit.similar import NEAR, Index, adapter_modules, same_update, signature
from lora_ws.errors import AdapterError, ConfigError, DataError, NotAvailableError
from lora_ws.functional.sketch import sketch


@pytest.fixture(scope="module")
def index(mini, tmp_path_factory):
    return Index.build(tmp_path_factory.mktemp("similar") / "index", set_adapters(mini))


@pytest.fixture(scope="module")
def few(mini, tmp_path_factory):
    """Of every tenth of them."""
    folder = tmp_path_factory.mktemp("few") / "index"
    return Index.build(folder, list(set_adapters(mini))[::10])


def synthetic(n, seed=0, start=0):
    """Adapters of one small module."""
    found = []
    for k in range(start, n):
        rng = np.random.default_rng([seed, k])
        module = ("to_v", rng.standard_normal((2, 9)), rng.standard_normal((8, 2)), 1.0)
        found.append((f"a{k}", [module]))
    return found


def cosines(zoo, others):
    """Of the updates of rank 1 of two collections, row by row, from dense matrices."""
    found = []
    for mine, theirs in zip(zoo.weights, others.weights, strict=True):
        dot, squares = 0.0, np.zeros(2)
        for layer, down, up in zoo.layout.pairs():
            x, y = (
                np.outer(row[up].astype(float), row[down].astype(float)) for row in (mine, theirs)
            )
            assert x.shape == (layer.out_features, layer.in_features)
            dot += np.sum(x * y)
            squares += np.sum(x * x), np.sum(y * y)
        found.append(dot / np.sqrt(squares.prod()))
    return np.array(found)


@pytest.mark.slow
def test_each_of_500_adapters_finds_itself_first(mini, index):
    sketches = np.array([sketch(modules) for _, modules in set_adapters(mini)])
    found = index.search(sketches, top=2)
    np.testing.assert_array_equal(found.rows[:, 0], np.arange(500))
    np.testing.assert_allclose(found.cosine[:, 0], 1, rtol=rounding(sketches.shape[1]))
    # No two of these share more than chance.
    assert found.cosine[:, 1].max() < NEAR


@pytest.mark.parametrize("copy", [half, split_anew, pytest.param(brain, marks=pytest.mark.slow)])
def test_copies_in_another_spelling_are_found_and_are_equal(mini, few, copy):
    for name, modules in list(adapters(mini).items())[::10]:
        again = copy(modules) if copy is split_anew else rounded(modules, copy)
        mine = signature(again)
        best, second = few.query(mine.sketch, top=2)
        assert best.name == name
        assert same_update(best.cosine, best.norm, mine.norm)
        assert second.cosine < NEAR


@pytest.mark.slow
def test_adapters_of_the_same_images_and_another_prompt_are_near_but_not_equal(mini, twins, index):
    exact = cosines(mini, twins)
    signatures = [signature(modules) for _, modules in set_adapters(twins)]
    found = index.search(np.array([one.sketch for one in signatures]), top=1)
    np.testing.assert_array_equal(found.rows[:, 0], np.arange(500))
    assert np.mean(found.cosine[:, 0] >= NEAR) >= 0.99
    norms = index.rows["norm"].to_numpy()
    assert not same_update(found.cosine[:, 0], norms, [one.norm for one in signatures]).any()
    assert np.std(found.cosine[:, 0] - exact) < 0.02


@pytest.mark.slow
def test_a_copy_at_another_strength_is_near_but_not_equal(mini, index):
    modules = adapters(mini)["7"]
    mine = signature([(name, down, up, 1.5 * s) for name, down, up, s in modules])
    best = index.query(mine.sketch, top=1)[0]
    assert best.name == "7"
    assert best.cosine == pytest.approx(1, rel=rounding(mine.sketch.size))
    assert not same_update(best.cosine, best.norm, mine.norm)


@pytest.mark.slow
def test_a_little_more_training_stays_near(mini, index):
    rng = np.random.default_rng(0)
    further = []
    for name, down, up, scale in adapters(mini)["3"]:
        more, less = rng.standard_normal(down.shape), rng.standard_normal(up.shape)
        size = np.linalg.norm(down) * np.linalg.norm(up) / np.linalg.norm(more)
        less *= 0.3 * size / np.linalg.norm(less)
        further.append((name, np.vstack([down, more]), np.hstack([up, less]), scale))
    best = index.query(sketch(further), top=1)[0]
    assert best.name == "3"
    assert NEAR < best.cosine < 0.99


@pytest.mark.slow
def test_a_selection_is_its_rows_in_their_order_under_new_names(mini, twins, index):
    rows = [400, 7, 7, 11]
    part = index.select(rows, [f"mine {k}" for k in range(4)])
    assert part.rows["name"].to_pylist() == ["mine 0", "mine 1", "mine 2", "mine 3"]
    np.testing.assert_array_equal(part.sketches, index.sketches[rows])
    whole = index.rows.to_pylist()
    for one, row in zip(part.rows.to_pylist(), rows, strict=True):
        assert (one["norm"], one["hash"]) == (whole[row]["norm"], whole[row]["hash"])
    asked = sketch(adapters(twins)["11"])
    assert part.query(asked, top=1)[0].name == "mine 3"
    assert index.select(rows).rows["name"].to_pylist() == ["400", "7", "7", "11"]
    # Graphs of neighbours of two selections must not be taken for each other.
    assert index.select([7, 400]).folder != index.select([400, 7]).folder
    assert len(index.select([])) == 0


def test_strangers_files_are_recognised_under_other_spellings(tmp_path):
    folder = shared_data("real_adapters")
    first = folder / "catundchat_sd15_attnprocs_r4.safetensors"
    paths = [first, folder / "hyper07_sd14_peft"]
    index = Index.build(tmp_path, ((path.name, file_modules(path)) for path in paths))
    brain16 = signature(file_modules(folder / "catundchat_bf16.safetensors"))
    original, other = index.query(brain16.sketch, top=2)
    assert original.name == first.name
    assert same_update(original.cosine, original.norm, brain16.norm)
    assert original.hash != brain16.hash
    assert abs(other.cosine) < 0.3
    # kohya's names are those of the modules with underscores; to_out has its index there.
    tensors = load_file(folder / "catundchat_as_kohya.safetensors")
    kohya = []
    for name, *_ in adapter_modules(read_adapter(first)):
        stem = "lora_unet_" + name.replace(".", "_")
        stem += "" if f"{stem}.alpha" in tensors else "_0"
        down, up = (tensors[f"{stem}.lora_{role}.weight"] for role in ("down", "up"))
        kohya.append((name, down, up, tensors[f"{stem}.alpha"].item() / len(down)))
    assert len(kohya) * 3 == len(tensors)
    assert signature(kohya).hash == original.hash


def test_search_is_a_sort_of_dense_cosines_across_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(similar, "_BLOCK_ROWS", 7)
    monkeypatch.setattr(similar, "_BLOCK_QUERIES", 2)
    monkeypatch.setattr(index_store, "PART_ROWS", 5)
    index = Index.build(tmp_path, synthetic(33), side=4)
    queries = np.random.default_rng(1).standard_normal((5, 16))
    raw = np.array([sketch(modules, 4) for _, modules in synthetic(33)])
    dense = queries @ raw.T / np.outer(*(np.linalg.norm(v, axis=1) for v in (queries, raw)))
    for top in (1, 9, 100):
        found = index.search(queries, top)
        order = np.argsort(-dense, axis=1)[:, :top]
        np.testing.assert_array_equal(found.rows, order)
        np.testing.assert_allclose(
            found.cosine, np.take_along_axis(dense, order, 1), atol=rounding(16)
        )
    assert index.rows["name"].to_pylist() == [f"a{k}" for k in range(33)]


def test_adapters_that_are_there_are_neither_doubled_nor_read(tmp_path):
    index = Index.build(tmp_path, synthetic(5), batch=2)

    def unread():
        raise AssertionError("read again")
        yield

    later = index.add([*((f"a{k}", unread()) for k in range(5)), *synthetic(8, start=5)], batch=2)
    assert later.rows["name"].to_pylist() == [f"a{k}" for k in range(8)]
    again = Index.build(tmp_path / "other", synthetic(8))
    np.testing.assert_array_equal(later.sketches, again.sketches)
    assert later.rows.equals(again.rows)
    # What was opened before stays as it was.
    assert len(index) == 5
    with pytest.raises(DataError, match="new names"):
        later.append(["a3"], [signature(synthetic(1)[0][1])])
    twice = later.add([("b", synthetic(1)[0][1])] * 2)
    assert len(twice) == 9


SLOWLY = """
import sys, time
import numpy as np
from lora_ws.audit.similar import Index

def slowly():
    for k in range(40):
        time.sleep(float(sys.argv[2]))
        rng = np.random.default_rng([0, k])
        module = ("to_v", rng.standard_normal((2, 9)), rng.standard_normal((8, 2)), 1.0)
        yield f"a{k}", [module]

print(len(Index.build(sys.argv[1], slowly(), batch=3)))
"""


@pytest.mark.slow
def test_an_index_killed_in_the_middle_goes_on(tmp_path):
    folder, whole = tmp_path / "index", Index.build(tmp_path / "whole", synthetic(40))
    command = [sys.executable, "-c", SLOWLY, str(folder)]
    for least in (1, 12):
        process = subprocess.Popen([*command, "0.05"], env=dict(os.environ))
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if (folder / index_store.HEAD).is_file() and len(Index.open(folder)) >= least:
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert least <= len(Index.open(folder)) < 40
    # As if a batch had been on its way to the disk.
    with (folder / index_store.SKETCHES).open("ab") as file:
        file.write(b"torn" * 77)
    (folder / index_store.ROWS / "000000.partial").write_bytes(b"torn")
    done = subprocess.run([*command, "0"], capture_output=True, check=True, encoding="utf-8")
    assert done.stdout.strip() == "40"
    index = Index.open(folder)
    np.testing.assert_array_equal(index.sketches, whole.sketches)
    assert index.rows.equals(whole.rows)
    assert (folder / index_store.SKETCHES).stat().st_size == 40 * 4 * 256


def test_files_that_cannot_be_read_are_told_and_left_out(tmp_path):
    (tmp_path / "broken.safetensors").write_bytes(b"not one")
    given = [
        *synthetic(2),
        ("broken", file_modules(tmp_path / "broken.safetensors")),
        *synthetic(3, start=2),
    ]
    told = []
    index = Index.build(
        tmp_path / "index", given, on_error=lambda name, error: told.append((name, type(error)))
    )
    assert told == [("broken", AdapterError)]
    assert index.rows["name"].to_pylist() == ["a0", "a1", "a2"]
    with pytest.raises(AdapterError, match=r"broken\.safetensors"):
        index.add([("broken", file_modules(tmp_path / "broken.safetensors"))])


def test_an_empty_index_and_an_update_of_zero_resemble_nothing(tmp_path):
    empty = Index.build(tmp_path)
    assert empty.query(np.ones(256)) == []
    assert empty.search(np.ones((3, 256))).rows.shape == (3, 0)
    (name, modules) = synthetic(1)[0]
    zero = [(place, down, up, 0.0) for place, down, up, _ in modules]
    index = empty.add([(name, modules), ("zero", zero)])
    assert [match.cosine for match in index.query(sketch(zero))] == [0, 0]
    assert index.query(sketch(modules))[1].cosine == 0


def broken(folder: Path, what: str) -> None:
    part = folder / index_store.ROWS / "000000.parquet"
    if what == "head":
        (folder / index_store.HEAD).write_text("{}", encoding="utf-8")
    elif what == "no json":
        (folder / index_store.HEAD).write_bytes(b"\xff\x00")
    elif what == "method":
        (folder / index_store.HEAD).write_text(
            '{"method": "of another version", "side": 16}', encoding="utf-8"
        )
    elif what == "sketches cut":
        with (folder / index_store.SKETCHES).open("r+b") as file:
            file.truncate(1000)
    elif what == "no sketches":
        (folder / index_store.SKETCHES).unlink()
    elif what == "names cut":
        part.write_bytes(part.read_bytes()[:100])
    elif what == "names of something else":
        pq.write_table(pa.table({"name": [1]}), part)
    elif what == "part missing":
        part.rename(part.with_stem("000001"))
    elif what == "part short":
        (folder / index_store.ROWS / "000001.parquet").write_bytes(part.read_bytes())
    elif what == "no table":
        part.unlink()
        part.parent.rmdir()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("head", "choose another folder"),
        ("no json", "choose another folder"),
        ("method", "build the index again with this version"),
        ("sketches cut", "fewer than the 5 rows"),
        ("no sketches", "is damaged"),
        ("names cut", "is damaged"),
        ("names of something else", "has columns name"),
        ("part missing", "a part of the table is missing"),
        ("part short", "is cut short"),
        ("no table", "a part of the table is missing"),
    ],
)
def test_a_damaged_index_says_so(tmp_path, what, message):
    index = Index.build(tmp_path, synthetic(5))
    broken(tmp_path, what)
    with pytest.raises(DataError, match=message) as caught:
        Index.open(tmp_path)
    assert str(tmp_path) in str(caught.value)
    with pytest.raises(DataError, match=message):
        index.add(synthetic(6, start=5))


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "photo.png").write_bytes(b"mine")
    with pytest.raises(NotAvailableError, match=r"found no index\.json"):
        Index.open(tmp_path)
    with pytest.raises(DataError, match=r"found `photo\.png`"):
        Index.build(tmp_path, synthetic(2))
    assert [path.name for path in tmp_path.iterdir()] == ["photo.png"]


def test_a_killed_beginning_is_begun_again(tmp_path):
    (tmp_path / "rows").mkdir()
    (tmp_path / "index.json.partial").write_text('{"meth', encoding="utf-8")
    assert len(Index.build(tmp_path, synthetic(2))) == 2


def test_what_does_not_fit_is_refused(tmp_path):
    index = Index.build(tmp_path, synthetic(2), side=4)
    with pytest.raises(DataError, match="the index has 4"):
        Index.build(tmp_path, side=8)
    with pytest.raises(ConfigError, match="side: expected at least 1"):
        Index.build(tmp_path / "other", side=0)
    with pytest.raises(ConfigError, match="sketch with side=4"):
        index.search(np.ones((2, 256)))
    with pytest.raises(ConfigError, match="top of at least 1"):
        index.query(np.ones(16), top=0)
    with pytest.raises(DataError, match=r"expected finite sketches \[1, 16\]"):
        index.append(["b"], [signature(synthetic(1)[0][1])])
    nan = [("to_v", np.full((1, 3), np.nan), np.ones((3, 1)), 1.0)]
    with pytest.raises(DataError, match="finite"):
        index.add([("nan", nan)])
    assert len(Index.open(tmp_path)) == 2


def test_one_writer_at_a_time(tmp_path):
    index = Index.build(tmp_path, synthetic(2))

    def meanwhile():
        with pytest.raises(DataError, match="another process"):
            Index.open(tmp_path).add(synthetic(4, start=2))
        yield from synthetic(3, start=2)

    assert len(index.add(meanwhile())) == 3

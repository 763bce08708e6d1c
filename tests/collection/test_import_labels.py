"""Labels from tables, sidecars and headers; ranks and modules brought into one layout."""

import codecs
import json
import re
import warnings
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from factories import SMALL, list_column, matrices, weights, write_adapter
from safetensors.numpy import save_file

from lora_ws import load
from lora_ws.cli import main
from lora_ws.collection import AdapterSet, adapters_from, import_collection
from lora_ws.errors import DataError, Notice

LINES = ["file_name,label,steps", "a.safetensors,cat,10", "sub/b,dog,20", "c.safetensors,,30"]


def write_three(root: Path) -> None:
    for name, vector in zip(("a", "c", "sub/b"), weights(3), strict=True):
        write_adapter(root / f"{name}.safetensors", vector)


@pytest.mark.parametrize("name", ["metadata.csv", "labels.csv", "metadata.jsonl"])
def test_table_beside_the_files(name: str, tmp_path: Path):
    write_three(tmp_path / "in")
    text = "\n".join(LINES)
    if name.endswith("jsonl"):
        rows = [("a.safetensors", "cat", 10), ("sub/b", "dog", 20), ("c.safetensors", None, 30)]
        keys = ("file_name", "label", "steps")
        text = "\n".join(json.dumps(dict(zip(keys, row, strict=True))) for row in rows)
    (tmp_path / "in" / name).write_text(text, encoding="utf-8-sig")
    zoo = import_collection(tmp_path / "in", tmp_path / "s")
    assert zoo.card.label == "label"
    told = dict(
        zip(
            zoo.column("source"),
            zip(*(zoo.rows[k].to_pylist() for k in ("label", "steps")), strict=True),
            strict=True,
        )
    )
    assert told == {
        "a.safetensors": ("cat", 10),
        "sub/b.safetensors": ("dog", 20),
        "c.safetensors": (None, 30),
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "name,label\na.safetensors,cat\n",
            "not used, as a table of labels has a column `file_name`",
        ),
        ("file_name,label\na.safetensors,cat\nx,dog\n", "1 of its files are not here, such as `x`"),
        ("file_name,label\n", "not used, as it holds no rows"),
    ],
)
def test_what_a_table_says_in_vain_is_said(text: str, message: str, tmp_path: Path):
    write_three(tmp_path / "in")
    (tmp_path / "in" / "t.csv").write_text(text, encoding="utf-8")
    with pytest.warns(Notice, match=re.escape(message)):
        import_collection(tmp_path / "in", tmp_path / "s")


TABLES = {
    "semicolons": ("csv", "file_name;label\na;cat\nc;dog\nsub/b;cat\n"),
    "tabs": ("csv", "file_name\tlabel\na\tcat\nc\tdog\nsub/b\tcat\n"),
    "spaces": ("csv", "file_name , label\n a, cat \nc,dog\nsub/b,cat\n"),
    "strokes of Windows": ("csv", "file_name,label\na,cat\nc,dog\nsub\\b.safetensors,cat\n"),
    "rows of nothing": ("csv", "file_name,label\na,cat\n\n,\nc,dog\nsub/b,cat\n"),
    "a column without a name": ("csv", "file_name,,label\na,1,cat\nc,2,dog\nsub/b,3,cat\n"),
    "lines in a cell": ("csv", 'file_name,label,x\na,cat,"1\n2\u2028"\nc,dog,\nsub/b,cat,\n'),
    "ends of lines in JSON": (
        "jsonl",
        '{"file_name": "a", "label": "cat", "x": "1\u20282\x85"}\r\n'
        '{"file_name": "c", "label": "dog"}\n\n{"file_name": "sub/b", "label": "cat"}',
    ),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("case", TABLES)
def test_tables_as_people_have_them(case: str, tmp_path: Path):
    write_three(tmp_path / "in")
    suffix, text = TABLES[case]
    (tmp_path / "in" / f"t.{suffix}").write_bytes(text.encode())
    zoo = import_collection(tmp_path / "in", tmp_path / "s")
    told = dict(zip(zoo.column("source"), zoo.rows["label"].to_pylist(), strict=True))
    assert told == {"a.safetensors": "cat", "c.safetensors": "dog", "sub/b.safetensors": "cat"}


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (("007", "008", "007"), ["007", "008", "007"]),
        (("nan", "inf", "nan"), ["nan", "inf", "nan"]),
        (("1_0", "2_0", "1_0"), ["1_0", "2_0", "1_0"]),
        (("1.5", "-2e3", ""), [1.5, -2000.0, None]),
    ],
)
def test_names_that_look_like_numbers_stay_names(
    cells: tuple[str, ...], expected: list[object], tmp_path: Path
):
    write_three(tmp_path / "in")
    rows = "\n".join(f"{n},{c}" for n, c in zip(("a", "c", "sub/b"), cells, strict=True))
    (tmp_path / "in" / "t.csv").write_text(f"file_name,label\n{rows}\n", encoding="utf-8")
    zoo = import_collection(tmp_path / "in", tmp_path / "s")
    assert zoo.rows["label"].to_pylist() == expected


def test_labels_that_are_lists_are_no_classes(tmp_path: Path):
    write_three(tmp_path / "in")
    lines = ('{"file_name": "a", "label": ["x", "y"]}', '{"file_name": "c", "label": []}')
    (tmp_path / "in" / "t.jsonl").write_text("\n".join(lines), encoding="utf-8")
    zoo = import_collection(tmp_path / "in", tmp_path / "s")
    with pytest.raises(DataError, match="expected one class each"):
        zoo.select([0, 1]).labels()


@pytest.mark.filterwarnings("error")
def test_a_table_above_the_folders_that_were_named_counts_where_it_names_their_files(
    tmp_path: Path,
):
    folders = [tmp_path / "in" / name for name in ("good", "bad")]
    for folder, vector in zip(folders, weights(2), strict=True):
        write_adapter(folder / "a.safetensors", vector)
    (tmp_path / "in" / "rows.jsonl").write_text('{"loss": 1}\n', encoding="utf-8")
    (tmp_path / "in" / "other.csv").write_text("file_name,label\nx,cat\nx\n", encoding="utf-8")
    zoo = import_collection(folders, tmp_path / "s")
    assert "label" not in zoo.rows.column_names
    (tmp_path / "in" / "t.csv").write_text("file_name,label\nbad/a,cat\n", encoding="utf-8")
    zoo = import_collection(folders, tmp_path / "t")
    told = dict(zip(zoo.column("source"), zoo.rows["label"].to_pylist(), strict=True))
    assert told == {"good/a.safetensors": None, "bad/a.safetensors": "cat"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file_name,label\na,cat\na.safetensors,dog\n", "a second one for `a.safetensors`"),
        ("file_name,label\na,cat,dog\n", "line 2: expected 2 cells"),
        ("file_name,label,label\na,cat,dog\n", "got `label` twice"),
        (f"file_name,label\na,{'x' * 200_000}\n", "expected a CSV with a header"),
    ],
)
def test_damaged_tables_are_refused(text: str, message: str, tmp_path: Path):
    write_three(tmp_path / "in")
    (tmp_path / "in" / "t.csv").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        import_collection(tmp_path / "in", tmp_path / "s")


def test_sidecars_and_headers(tmp_path: Path):
    tensors = {k: np.ascontiguousarray(v) for k, v in matrices(weights(1)[0], SMALL).items()}
    tags = {"3_x": {"fur": 1, "cat": 4}, "1_y": {"fur": 2}}
    header = {"ss_tag_frequency": json.dumps(tags), "modelspec.title": "My\x1bcat"}
    save_file(tensors, tmp_path / "a.safetensors", metadata=header)
    (tmp_path / "a.json").write_text('{"label": "cat", "nested": {"x": 1}}', encoding="utf-8")
    record = {"trainedWords": ["sks"], "model": {"nsfw": True, "id": 7}}
    (tmp_path / "a.civitai.info").write_text(json.dumps(record), encoding="utf-8")
    with pytest.warns(Notice, match="the label is `label` of what stands beside"):
        (row,) = import_collection(tmp_path, tmp_path / "s").rows.to_pylist()
    told = {k: row[k] for k in ("tags", "modelspec.title", "label", "civitai.trainedWords")}
    assert told == {
        "tags": ["cat", "fur"],
        "modelspec.title": "My\\x1bcat",
        "label": "cat",
        "civitai.trainedWords": ["sks"],
    }
    assert row["civitai.model.nsfw"] is True
    assert "nested" not in row


LISTS = (["cat", "red"], [], ["dog"], ["red"])
NAMES = ("cat", "dog", "red")


def as_jsonl(root: Path, rows: list[dict]) -> None:
    (root / "t.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def as_sidecars(root: Path, rows: list[dict]) -> None:
    for row in rows:
        (root / f"{row.pop('file_name')}.json").write_text(json.dumps(row), encoding="utf-8")


def as_columns(root: Path, rows: list[dict]) -> None:
    """Numbers in the first, and in the others words that pandas writes for true and false."""
    flags: dict[str, Any] = {name: [name in row["label"] for row in rows] for name in NAMES}
    flags["cat"] = [int(flag) for flag in flags["cat"]]
    table = pd.DataFrame({"file_name": [row["file_name"] for row in rows], **flags})
    table.to_csv(root / "t.csv", index=False)


FOLDERS = {"JSON lines": as_jsonl, "sidecars": as_sidecars, "columns": as_columns}


def arrow(kind: pa.DataType, **columns: pa.Array) -> pa.Table:
    values = {name: list_column(m) for name, m in matrices(weights(len(LISTS)), SMALL).items()}
    return pa.table({"label": pa.array(list(LISTS), kind), **columns, **values})


def frame() -> pd.DataFrame:
    values = {name: list(m) for name, m in matrices(weights(len(LISTS)), SMALL).items()}
    return pd.DataFrame({"label": list(LISTS), **values})


def dataset(label: Any) -> datasets.Dataset:
    made = datasets.Dataset(arrow(pa.list_(pa.string())))
    kind: Any = datasets.Sequence(label)
    if isinstance(label, datasets.ClassLabel):
        codes = [[NAMES.index(name) for name in row] for row in LISTS]
        made = made.remove_columns("label").add_column("label", codes)  # pyright: ignore[reportArgumentType, reportCallIssue]
    return made.cast_column("label", kind)


TABLES_IN_PYTHON = {
    "arrow": lambda: arrow(pa.list_(pa.string())),
    "large lists": lambda: arrow(pa.large_list(pa.large_string())),
    "dictionaries": lambda: arrow(pa.list_(pa.string())).set_column(
        0,
        "label",
        pa.ListArray.from_arrays(
            [0, 2, 2, 3, 4], pa.array(["cat", "red", "dog", "red"]).dictionary_encode()
        ),
    ),
    "frame": frame,
    "text of datasets": lambda: dataset(datasets.Value("string")),
    "classes of datasets": lambda: dataset(datasets.ClassLabel(names=["cat", "dog", "red"])),
}


def same_labels(zoo: AdapterSet) -> None:
    """Reading weights and targets without a word of which column holds them."""
    np.testing.assert_array_equal(zoo.weights, weights(len(LISTS)))
    targets, names = zoo.label_lists()
    assert names == NAMES
    assert targets.tolist() == [[name in row for name in NAMES] for row in LISTS]
    assert zoo.split("label" if "label" in zoo.rows.column_names else None).train.size


@pytest.mark.parametrize("way", FOLDERS)
def test_several_labels_a_file_from_where_people_keep_them(way: str, tmp_path: Path):
    for k, vector in enumerate(weights(len(LISTS))):
        write_adapter(tmp_path / "in" / f"{k}.safetensors", vector)
    rows = [{"file_name": f"{k}", "label": row} for k, row in enumerate(LISTS)]
    FOLDERS[way](tmp_path / "in", rows)
    with warnings.catch_warnings(record=True) as said:
        zoo = import_collection(tmp_path / "in", tmp_path / "s")
    same_labels(zoo)
    expected = ["the label is `label` of what stands"] if way == "sidecars" else []
    assert len(said) == len(expected)
    assert all(text in str(one.message) for one, text in zip(said, expected, strict=True))
    with pytest.raises(DataError, match="--task multilabel"):
        zoo.labels()


@pytest.mark.parametrize("way", TABLES_IN_PYTHON)
def test_several_labels_a_row_of_any_table(way: str, tmp_path: Path):
    zoo = adapters_from(TABLES_IN_PYTHON[way]())
    same_labels(AdapterSet.open(zoo.save(tmp_path / "s")))


def test_several_labels_a_row_of_parquet(tmp_path: Path):
    pq.write_table(
        arrow(pa.list_(pa.string()), steps=pa.array([1, 2, 3, 4])), tmp_path / "a.parquet"
    )
    same_labels(import_collection(tmp_path / "a.parquet", tmp_path / "s"))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([["cat", "red"], "dog", ["dog"], []], "its metadata is of another kind"),
        ([[0, 1], [1], [], [0]], r"expected lists of text, got list.*--label cat,red"),
        (["cat, red", "dog", "", "red"], "expected lists of text, got string.*such as"),
    ],
)
def test_what_may_be_one_label_or_several_is_refused(rows: list, message: str, tmp_path: Path):
    for k, vector in enumerate(weights(len(rows))):
        write_adapter(tmp_path / "in" / f"{k}.safetensors", vector)
    as_jsonl(tmp_path / "in", [{"file_name": f"{k}", "label": row} for k, row in enumerate(rows)])
    with pytest.raises(DataError, match=message):
        import_collection(tmp_path / "in", tmp_path / "s").label_lists()


def test_columns_of_other_numbers_are_no_labels(tmp_path: Path):
    write_three(tmp_path / "in")
    lines = "file_name,cat,dog\na,1,0\nc,2,1\nsub/b,0,1\n"
    (tmp_path / "in" / "t.csv").write_text(lines, encoding="utf-8")
    zoo = import_collection(tmp_path / "in", tmp_path / "s")
    assert zoo.card.label == "category_label"
    with pytest.raises(DataError, match="expected 0 and 1 in each of cat, dog, got 2"):
        zoo.label_lists("cat, dog")
    with pytest.raises(DataError, match="has no column `cow`"):
        zoo.label_lists("cat,cow")


def write_sidecars(root: Path, **said: object) -> None:
    for k, vector in enumerate(weights(3)):
        file = write_adapter(root / f"{k}.safetensors", vector)
        file.with_suffix(".json").write_text(json.dumps(said), encoding="utf-8")


def test_sidecars_without_an_obvious_label_are_said(tmp_path: Path):
    write_sidecars(tmp_path / "in", notes="x", subject="cat")
    with pytest.warns(
        Notice, match="no column is the label by its name; --label takes one of notes"
    ):
        zoo = import_collection(tmp_path / "in", tmp_path / "s")
    assert zoo.labels("subject")[1] == ("cat",)
    write_sidecars(tmp_path / "only", subject="cat")
    with pytest.warns(Notice, match="the label is `subject` of what stands beside"):
        assert import_collection(tmp_path / "only", tmp_path / "t").card.label == "subject"


@pytest.mark.filterwarnings("error")
def test_folders_are_the_label_before_sidecars(tmp_path: Path):
    for folder in ("good", "bad"):
        write_sidecars(tmp_path / "in" / folder, label="x")
    zoo = import_collection(tmp_path / "in", tmp_path / "s", on_error="skip")
    assert zoo.card.label == "category_label"


WRITTEN = {
    "UTF-16, little end first": ("utf-16-le", codecs.BOM_UTF16_LE),
    "UTF-16, big end first": ("utf-16-be", codecs.BOM_UTF16_BE),
    "UTF-8 with a mark": ("utf-8", codecs.BOM_UTF8),
}


@pytest.mark.parametrize("mark", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", WRITTEN)
def test_tables_as_spreadsheets_write_them(encoding: str, mark: str, tmp_path: Path):
    write_three(tmp_path / "in")
    lines = [["file_name", "label"], ["a", "Käse"], ["c", "dog"], ["sub/b", "Käse"]]
    text = "".join(f"{mark.join(line)}\r\n" for line in lines)
    name, first = WRITTEN[encoding]
    file = tmp_path / "in" / ("t.tsv" if mark == "\t" else "t.csv")
    file.write_bytes(first + text.encode(name))
    zoo = import_collection(tmp_path / "in", tmp_path / "s")
    assert zoo.rows["label"].to_pylist() == ["Käse", "dog", "Käse"]
    file.write_bytes(text.encode("utf-16-le"))
    with pytest.raises(DataError, match=r"t\.[ct]sv: expected text in UTF-8, or in UTF-16 with a"):
        import_collection(tmp_path / "in", tmp_path / "t")


@pytest.mark.slow
@pytest.mark.parametrize("way", FOLDERS)
def test_a_folder_of_several_labels_trains(
    way: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    rows = []
    for k, vector in enumerate(weights(40)):
        row = LISTS[k % len(LISTS)]
        vector[:10] += 3 * np.isin(np.arange(10) % 3, [NAMES.index(name) for name in row])
        write_adapter(tmp_path / "in" / f"{k:02}.safetensors", vector)
        rows.append({"file_name": f"{k:02}", "label": row})
    FOLDERS[way](tmp_path / "in", rows)
    asked = f"train --dataset {tmp_path / 'in'} --task multilabel --featurizer StatsLayer --seeds 1"
    assert main([*asked.split(), "--out", str(tmp_path / "run")]) == 0
    assert "average precision" in capsys.readouterr().out.lower()


def mixed(root: Path) -> dict[str, np.ndarray]:
    """Files of ranks 1, 2 and 4, one without the second layer; returns updates of the first."""
    rng, updates = np.random.default_rng(0), {}
    for k, rank in enumerate((1, 2, 4, 4)):
        layers = SMALL[:1] if k == 3 else SMALL
        size = sum(rank * (inputs + outputs) for _, inputs, outputs in layers)
        vector = rng.standard_normal(size, dtype=np.float32)
        tensors = matrices(vector, layers, rank)
        root.mkdir(exist_ok=True)
        named = {name: np.ascontiguousarray(m) for name, m in tensors.items()}
        save_file(named, root / f"r{k}.safetensors")
        down, up = list(named.values())[:2]
        updates[f"r{k}.safetensors"] = up @ down
    return updates


def test_ranks_and_modules_come_into_one_layout(tmp_path: Path):
    updates = mixed(tmp_path / "in")
    with pytest.raises(DataError, match="--project auto"):
        import_collection(tmp_path / "in", tmp_path / "s")
    zoo = import_collection(tmp_path / "in", tmp_path / "s", project=True)
    assert [layer.rank for layer in zoo.layout.layers] == [4, 4]
    assert zoo.rows["layers_missing"].to_pylist() == [0, 0, 0, 1]
    assert zoo.rows["layer_mask"].to_pylist() == [[True, True]] * 3 + [[True, False]]
    np.testing.assert_allclose(zoo.rows["retained_energy"].to_pylist(), 1, atol=1e-6)
    down, up = zoo.layer(SMALL[0][0])
    for row, name in enumerate(zoo.column("source")):
        # Two float32 matrices out of a decomposition: a few roundings of the largest number.
        scale = np.abs(updates[name]).max()
        np.testing.assert_allclose(up[row] @ down[row], updates[name], atol=1e-5 * scale)
    assert not zoo.layer(SMALL[1][0])[0][3].any()


def test_energy_that_does_not_fit_is_a_column_and_a_threshold(tmp_path: Path):
    mixed(tmp_path / "in")
    layout = import_collection(tmp_path / "in", tmp_path / "s", project=True).layout.at_rank(1)
    zoo = import_collection(tmp_path / "in", tmp_path / "t", layout=layout, project=True)
    energy = np.array(zoo.rows["retained_energy"].to_pylist())
    assert energy[0] == 1
    assert (energy[1:] < 1).all()
    least = float(energy[1:].max()) + 1e-6
    some = import_collection(
        tmp_path / "in",
        tmp_path / "u",
        layout=layout,
        project=True,
        min_energy=least,
        on_error="skip",
    )
    assert some.column("source").tolist() == ["r0.safetensors"]
    assert some.manifest["quarantined"] == 3


def test_load_imports_a_folder_once_and_again_when_it_changed(tmp_path: Path):
    mixed(tmp_path / "in")
    first = load(tmp_path / "in")
    assert len(first) == 4
    assert load(tmp_path / "in").version == first.version
    (tmp_path / "in" / "r0.safetensors").write_bytes(b"no adapter")
    with pytest.warns(Notice, match=r"1 of 4 files are left out, such as r0\.safetensors"):
        assert len(load(tmp_path / "in")) == 3

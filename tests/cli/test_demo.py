"""The first command of a new user: it answers, and what it prints can be typed."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from lora_ws.adapters import read_adapter
from lora_ws.audit.examples import CLASSES, FACTS, FOLDER, examples, write_examples
from lora_ws.bundle import Bundle
from lora_ws.cli import find_command, main
from lora_ws.collection import load
from lora_ws.commands.next_steps import command
from lora_ws.commands.table import COMMANDS


def test_demo_judges_the_files_that_are_shipped_and_names_commands_that_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["demo"]) == 0
    out = capsys.readouterr().out
    bundle = Bundle.from_pretrained("tiny-sd")
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    for example in examples():
        adapter = read_adapter(example.file)
        said = bundle.predict_batch(adapter.flat()[None], adapter.layout)[0]
        (line,) = [line for line in out.splitlines() if example.file.name in line and "(" in line]
        assert (said.label or "abstains") in line
        assert f"{said.confidence:.2f}" in line
        assert f"{example.leaf} ({example.label})" in line
        assert line.rstrip() in readme
    lines = [line.strip() for line in out.partition("Next:")[2].splitlines()]
    typed = [shlex.split(line) for line in lines if line and not line.startswith("#")]
    assert len(typed) == 3
    for words in typed:
        name, rest = find_command(words[words.index("lora_ws") + 1 if "-m" in words else 1 :])
        assert name in COMMANDS
        assert Path(rest[0]).exists()
    assert not list(tmp_path.iterdir()), "it leaves nothing behind"


def test_the_files_are_test_rows_of_the_collection_as_written_anew(tmp_path: Path) -> None:
    write_examples(tmp_path)
    assert (tmp_path / FACTS).read_text(encoding="utf-8") == (FOLDER / FACTS).read_text("utf-8")
    facts = json.loads((FOLDER / FACTS).read_text(encoding="utf-8"))
    zoo = load("lora-ws-mini", subset="per_adapter/constant")
    known = {row["source"]: k for k, row in enumerate(zoo.rows.to_pylist())}
    assert [fact["class"] for fact in facts.values()] == list(CLASSES)
    for name, fact in facts.items():
        row = known[fact["row"].partition(", ")[2]]
        assert row in zoo.split().test
        held, anew = load_file(FOLDER / name), load_file(tmp_path / name)
        assert {key: value.tobytes() for key, value in held.items()} == {
            key: value.tobytes() for key, value in anew.items()
        }
        np.testing.assert_array_equal(read_adapter(FOLDER / name).row(zoo.layout), zoo.weights[row])
        assert (FOLDER / name).stat().st_size < 50_000


def test_a_command_line_survives_a_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    line = command("predict", tmp_path / "a b.safetensors", "--top", "2")
    assert shlex.split(line)[-4:] == ["predict", "a b.safetensors", "--top", "2"]

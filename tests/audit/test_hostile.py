"""Files written to silence a scan: each is a row of its own and stops no other."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from lora_ws.adapters import find_adapters, read_adapter
from lora_ws.audit.scan import ScanSpec, scan
from lora_ws.cli import main
from lora_ws.errors import AdapterError

STEM = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_v"
Tensors = dict[str, np.ndarray]


def lora(down: float = 0.5, up: float = 0.5, rank: int = 2, **more: Any) -> Tensors:
    """One module of SD1.5's width of text, of constant matrices."""
    a, b = np.full((rank, 768), down, np.float32), np.full((64, rank), up, np.float32)
    named = {"lora_down.weight": a, "lora_up.weight": b, **more}
    return {f"{STEM}.{role}": np.asarray(value, np.float32) for role, value in named.items()}


def of(**shapes_and_values: tuple[tuple[int, ...], float]) -> Tensors:
    return {
        f"{STEM}.{role}": np.full(shape, value, np.float32)
        for role, (shape, value) in shapes_and_values.items()
    }


SCALED = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 1e308})}
NOT_FINITE: dict[str, tuple[Tensors, dict[str, str]]] = {
    "product": (lora(1e30, 1e30), {}),
    "product, rank 8": (lora(1e19, 1e19, rank=8), {}),
    "alpha": (lora(1.0, 1e20, alpha=1e30), {}),
    "alpha of another sign": (lora(-1.0, 1e20, alpha=-1e38), {}),
    "alpha in the header": (lora(), SCALED),
    "sum over inputs": (lora(3e38, 1.0), {}),
    "LoHa": (
        of(
            hada_w1_a=((64, 2), 1e20),
            hada_w1_b=((2, 768), 1e20),
            hada_w2_a=((64, 2), 1e20),
            hada_w2_b=((2, 768), 1e20),
        ),
        {},
    ),
    "LoKr": (of(lokr_w1=((8, 8), 1e25), lokr_w2=((8, 96), 1e25)), {}),
    "whole": (of(diff=((64, 768), 3e38)), {}),
}


def strict(text: str) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    return json.loads(text, parse_constant=refuse)


def rows(file: Path) -> dict[str, dict[str, Any]]:
    found = map(strict, file.read_text(encoding="utf-8").splitlines())
    return {Path(row["file"]).name: row for row in found}


@pytest.mark.parametrize("case", NOT_FINITE)
def test_an_update_beyond_float32_is_refused(case: str, tmp_path: Path) -> None:
    tensors, metadata = NOT_FINITE[case]
    assert all(np.isfinite(values).all() for values in tensors.values())
    save_file(tensors, tmp_path / "a.safetensors", metadata)
    with pytest.raises(AdapterError, match="beyond float32") as error:
        read_adapter(tmp_path / "a.safetensors")
    assert error.value.reason == "not-finite"


@pytest.mark.parametrize("size", [1e-30, 1e15, 1e17])
def test_a_large_or_small_update_that_float32_holds_is_read(size: float, tmp_path: Path) -> None:
    save_file(lora(size, size), tmp_path / "a.safetensors")
    (module,) = read_adapter(tmp_path / "a.safetensors").modules.values()
    assert np.isfinite(module.scaled_up @ module.down).all()


def test_no_file_silences_a_scan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home, out = tmp_path / "set", tmp_path / "out.jsonl"
    home.mkdir()
    for name in ("a good", "z good"):
        save_file(lora(), home / f"{name}.safetensors")
    for case, (tensors, metadata) in NOT_FINITE.items():
        save_file(tensors, home / f"{case}.safetensors", metadata)
    args = ["scan", str(home), "--cache", str(tmp_path / "cache"), "--json", str(out)]
    page = ["--out", str(tmp_path / "page.html"), "--csv", str(tmp_path / "table.csv")]
    for again in (False, True):
        assert main([*args, *page]) == 3
        said = capsys.readouterr().out
        assert ("0 read now" in said) == again
        found = rows(out)
        assert len(found) == len(NOT_FINITE) + 2
        for name, row in found.items():
            assert row["reason"] == ("" if "good" in name else "not-finite")
    cache = ["--cache", str(tmp_path / "cache")]
    assert main(["dedup", str(home), *cache]) == 0
    assert "groups of equal updates: 1," in capsys.readouterr().out
    assert main(["similar", str(home / "a good.safetensors"), "--index", str(home), *cache]) == 0
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("poison", [b"NaN", b"-Infinity", b"", b"{"])
def test_a_poisoned_line_of_the_ledger_is_dropped_and_read_anew(
    poison: bytes, tmp_path: Path
) -> None:
    save_file(lora(), tmp_path / "a.safetensors")
    save_file(lora(0.25), tmp_path / "b.safetensors")
    spec = ScanSpec(cache=tmp_path / "cache")
    refs = find_adapters(str(tmp_path))
    right = list(scan(refs, spec))
    (journal,) = tmp_path.glob("cache/*/findings.jsonl")
    first, second = journal.read_bytes().splitlines(keepends=True)
    norm = f'"norm": {right[0].facts.norm}'.encode() if right[0].facts else b""
    assert norm in first
    journal.write_bytes(first.replace(norm, b'"norm": ' + poison) + second)
    again = scan(refs, spec)
    assert again.new == 1
    assert list(again) == right
    assert scan(refs, spec).new == 0


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are any bytes on Linux alone")
def test_names_that_are_not_utf8_are_rows_and_none_is_lost(tmp_path: Path) -> None:
    home = os.fsencode(tmp_path / "set")
    Path(os.fsdecode(home + b"/d\xff")).mkdir(parents=True)
    # The readable form of the one is the name of the other.
    for name in (b"\xff.safetensors", rb"\xff.safetensors", b"d\xff/a.safetensors"):
        save_file(lora(), os.fsdecode(home + b"/" + name))
    Path(os.fsdecode(home + b"/d\xff/bad.safetensors")).write_bytes(b"none")
    out = tmp_path / "o.jsonl"
    args = ["--json", str(out), "--csv", str(tmp_path / "o.csv"), "--out", str(tmp_path / "o.html")]
    assert main(["scan", os.fsdecode(home), "--cache", str(tmp_path / "c"), *args]) == 3
    found = [strict(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [bool(row["reason"]) for row in found].count(False) == 3
    assert len(found) == 4
    named = os.fsdecode(home + b"/d\xff/a.safetensors")
    assert main(["inspect", named]) == 0


ODD = "\x1b[2J\x1b[31m\u202e\u00a0\ufeff\n\rX"


def test_words_of_a_file_reach_no_terminal_raw(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "set"
    home.mkdir()
    extra = {f"{STEM}{ODD}.bias": np.ones(2, np.float32)}
    metadata = {f"ss_{ODD}": ODD, "modelspec.title": ODD * 100}
    save_file({**lora(), **extra}, home / "beside.safetensors", metadata)
    save_file({f"{ODD}.lora_A.weight": np.ones((2, 2))}, home / "unmapped.safetensors")
    dots = f"unet.down_blocks.{ODD}.to_v"
    down, up = np.ones((2, 4), np.float32), np.ones((4, 2), np.float32)
    save_file({f"{dots}.lora_A.weight": down}, home / "incomplete.safetensors")
    save_file(
        {f"{dots}.lora_A.weight": 0 * down, f"{dots}.lora_B.weight": up},
        home / "silent.safetensors",
    )
    (home / f"name{ODD}.safetensors").write_bytes(b"none")
    files = sorted(str(file) for file in home.iterdir())
    cache = ["--cache", str(tmp_path / "cache")]
    out = ["--csv", str(tmp_path / "o.csv"), "--out", str(tmp_path / "o.html")]
    commands = [["inspect", file] for file in files]
    commands += [["scan", str(home), *cache, *out], ["dedup", str(home), *cache]]
    commands += [["similar", files[0], "--index", str(home), *cache], ["predict", *files]]
    for command in commands:
        main(command)
        said = capsys.readouterr()
        for text in (said.out, said.err):
            assert all(c.isprintable() or c == "\n" for c in text), (command, text)
    page = (tmp_path / "o.html").read_text(encoding="utf-8")
    assert "\x1b" not in page
    assert "\u202e" not in page
    table = (tmp_path / "o.csv").read_bytes().decode()
    assert all(c.isprintable() for c in table.replace("\r\n", "")), table
    # A list may name what no file can be called.
    (home / "l.txt").write_text("n" * 5000 + "\n", encoding="utf-8")
    main(["scan", str(home / "l.txt"), *cache])
    assert max(map(len, capsys.readouterr().out.splitlines())) < 600

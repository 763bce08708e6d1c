"""Folders of every kind of file, policies, kills, and the page that tells of it."""

import base64
import csv
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from browser import open_page
from factories import write_adapter as write_row
from hub_server import Fault, HubServer
from warm import COMMAND, Warm

from lora_ws.adapters import find_adapters, read_adapter
from lora_ws.adapters.writer import write_adapter
from lora_ws.audit.ledger import TABLE, code_hash
from lora_ws.audit.lookup import DedupSpec, SimilarSpec, find_copies, find_similar
from lora_ws.audit.scan import ScanSpec, scan
from lora_ws.audit.triage import triage
from lora_ws.cli import main
from lora_ws.collection import AdapterSet
from lora_ws.errors import DataError

Layers = tuple[tuple[str, int, int], ...]
FOREIGN = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
HOSTILE = "<script>alert(1)<&script>.safetensors"


@pytest.fixture
def folder(mini: AdapterSet, layers: Layers, tmp_path: Path) -> Path:
    """Good, foreign, broken and hostile files."""
    home = tmp_path / "loras"
    for row in (400, 401, 402):
        write_row(home / f"good-{row}.safetensors", mini.weights[row], layers)
    first = home / "good-400.safetensors"
    for spelling in ("peft", "kohya"):
        write_adapter(read_adapter(first), home / spelling, spelling)  # type: ignore[arg-type]
    write_row(home / "foreign.safetensors", np.ones(768 + 1280), ((FOREIGN, 768, 1280),))
    noise = np.random.default_rng(0).standard_normal(mini.weights.shape[1])
    write_row(home / "noise.safetensors", noise.astype(np.float32), layers)
    bad = home / "bad"
    bad.mkdir()
    (bad / "page.safetensors").write_text("<!DOCTYPE html><html></html>", encoding="utf-8")
    (bad / "cut.safetensors").write_bytes(first.read_bytes()[:-4])
    (bad / "old.ckpt").write_bytes(b"\x80\x02}q\x00.")
    (bad / HOSTILE).write_bytes(b"")
    (home / "notes.txt").write_text("no adapter", encoding="utf-8")
    return home


EXPECTED = {
    "good-400.safetensors": "judged",
    "good-401.safetensors": "judged",
    "good-402.safetensors": "judged",
    "peft/adapter_model.safetensors": "judged",
    "kohya/good-400.safetensors": "judged",
    "foreign.safetensors": "silent",
    "noise.safetensors": "abstains",
    "bad/page.safetensors": "html",
    "bad/cut.safetensors": "truncated",
    "bad/old.ckpt": "pickle",
    f"bad/{HOSTILE}": "empty",
}


def became(line: dict) -> str:
    if line["reason"]:
        return line["reason"]
    if line["verdict"] is None:
        return "silent"
    return "judged" if line["verdict"]["label"] else "abstains"


def run(*args: object) -> int:
    return main(["scan", *map(str, args)])


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_every_file_of_a_mixed_folder_is_told_of(
    workers: int, folder: Path, bundle: Path, tmp_path: Path
) -> None:
    out, table = tmp_path / "out.jsonl", tmp_path / "out.csv"
    options = ("--model", bundle, "--json", out, "--csv", table, "--cache", tmp_path / "cache")
    assert run(folder, *options, "--workers", workers, "--batch", 2) == 3
    found = {str(Path(line["file"]).relative_to(folder)): line for line in lines(out)}
    assert {name: became(line) for name, line in found.items()} == EXPECTED
    flagged = {name for name, line in found.items() if line["flags"]}
    assert flagged == {name for name in EXPECTED if name.startswith("bad/")}
    copies = [name for name in EXPECTED if "good-400" in name or "peft" in name]
    assert len({found[name]["update_hash"] for name in copies}) == 1
    assert len({found[name]["verdict"]["label"] for name in copies}) == 1
    with table.open(newline="", encoding="utf-8") as opened:
        rows = {row["file"]: row for row in csv.DictReader(opened)}
    assert {str(Path(name).relative_to(folder)) for name in rows} == set(EXPECTED)
    for line in found.values():
        assert rows[line["file"]]["reason"] == line["reason"]
        assert rows[line["file"]]["label"] == ((line["verdict"] or {}).get("label") or "")


@pytest.mark.slow
def test_the_page_tells_all_of_it_and_runs_nothing_of_it(
    folder: Path, bundle: Path, tmp_path: Path
) -> None:
    page, cache = tmp_path / "report.html", tmp_path / "cache"
    args = ("--model", bundle, "--out", page, "--index", folder / "kohya", "--cache", cache)
    assert run(folder, *args) == 3
    dom, probe = open_page(page, tmp_path)
    assert probe["fetched"] == []
    assert not probe["wide"]
    text = re.sub(r"<[^>]*>", " ", dom.replace("<wbr>", ""))
    for said in ("certifies nothing", "truncated", "pickle", "no verdict", "the same"):
        assert said in text
    assert "alert(1)" in text
    assert "<script>alert" not in dom
    assert dom.count('class="heat"') == 2
    # What it was made with, the rules and the table; a group per verdict, a link per file.
    held = hashlib.sha256((bundle / "bundle.json").read_bytes()).hexdigest()
    for part in (held, version("lora_ws"), "refused: true", str(bundle)):
        assert part in text
    table = re.search(r'download="findings.csv" href="data:[^,]*base64,([^"]*)"', dom)
    assert table
    assert len(base64.b64decode(table[1]).splitlines()) == 1 + len(EXPECTED)
    anchors = set(re.findall(r'href="#(file-\d+)"', dom))
    assert anchors == set(re.findall(r'<details id="(file-\d+)"', dom))
    assert len(anchors) == len(EXPECTED)
    assert len(re.findall(r"<summary>abstains: [a-z-]+: 1</summary>", dom)) == 1
    # A coloured cell per layer for every file that was answered.
    assert len(re.findall(r'<td class="[hl]\d', dom)) >= 64 * 5
    assert "kohya/good-400.safetensors (1.00)" in text


def test_triage_from_python_is_what_the_command_does(
    folder: Path, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache, files = tmp_path / "cache", [tmp_path / "command.jsonl", tmp_path / "python.jsonl"]
    assert run(folder, "--model", bundle, "--json", files[0], "--cache", cache) == 3
    shown = capsys.readouterr().out
    found = triage([str(folder)], ScanSpec(str(bundle), json=files[1], cache=cache))
    assert lines(files[0]) == lines(files[1])
    assert (len(found.scan), found.report.counts["flagged"]) == (len(EXPECTED), 4)
    assert found.copies
    assert f"copies: groups of equal updates: {len(found.copies.equal)}, of near" in shown
    for names in found.copies.equal[:5]:
        assert f"  equal: {', '.join(names[:6])}" in shown


def test_what_is_known_is_not_read_again(folder: Path, bundle: Path, tmp_path: Path) -> None:
    spec, places = (
        ScanSpec(str(bundle), evidence=False, cache=tmp_path / "cache"),
        find_adapters(str(folder)),
    )
    first = scan(places, spec)
    again = scan(places, spec)
    assert list(first) == list(again)
    # Nothing is known of a file that is refused unopened.
    assert (first.new, again.new) == (len(places), 1)
    (folder / "good-401.safetensors").rename(folder / "renamed.safetensors")
    (folder / "good-402.safetensors").write_bytes((folder / "foreign.safetensors").read_bytes())
    (folder / "bad" / "cut.safetensors").rename(folder / "cut too.safetensors")
    third = scan(find_adapters(str(folder)), spec)
    assert third.new == 1
    names = {Path(finding.file).name: finding for finding in third}
    assert names["renamed.safetensors"].verdict
    assert names["good-402.safetensors"].no_prediction_reason
    assert "cut too.safetensors: " in names["cut too.safetensors"].message
    assert "bad" not in names["cut too.safetensors"].message


@pytest.mark.slow
def test_a_killed_scan_goes_on(
    mini: AdapterSet, layers: Layers, bundle: Path, tmp_path: Path, warm_all: Warm
) -> None:
    home, cache, out = tmp_path / "loras", tmp_path / "cache", tmp_path / "out.jsonl"
    for row in range(60):
        write_row(home / f"{row:03}.safetensors", mini.weights[row], layers)
    args = (home, "--model", bundle, "--cache", cache, "--batch", 2, "--json", out)

    def found() -> bool:
        return any(file.read_bytes().count(b"\n") > 5 for file in cache.glob("*/findings.jsonl"))

    warm_all.start(COMMAND, "scan", *args).kill(found)
    assert not out.exists()
    (kept,) = cache.glob("*/findings.jsonl")
    # As a kill in the middle of a line leaves it.
    kept.write_bytes(kept.read_bytes() + b'{"key": "')
    before = len(kept.read_bytes().splitlines()) - 1
    said = warm_all.run(COMMAND, "scan", *args)
    assert f"{60 - before} read now, {before} known already" in said
    keys = [json.loads(line)["key"] for line in kept.read_text(encoding="utf-8").splitlines()]
    assert len(keys) == len(set(keys)) == len(lines(out)) == 60


def test_two_scans_at_once_do_not_mix(folder: Path, bundle: Path, tmp_path: Path) -> None:
    spec, places = (
        ScanSpec(str(bundle), evidence=False, cache=tmp_path / "cache", batch=1),
        find_adapters(str(folder)),
    )
    refused = []

    def second(_: int) -> None:
        with pytest.raises(DataError, match="written by another process") as error:
            scan(places, spec)
        refused.append(error)

    scan(places, spec, second)
    assert len(refused) == len(places)


def test_findings_do_not_outlive_the_code_that_made_them(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = find_adapters(str(folder))
    spec = ScanSpec(model=None, hashes=False, cache=tmp_path / "cache")
    first, again = scan(places, spec), scan(places, spec)
    assert again.new < first.new
    monkeypatch.setattr("lora_ws.audit.scan.code_hash", lambda: "of other code")
    assert scan(places, spec).new == first.new


@pytest.mark.parametrize("changed", ["models/deep/net.py", "audit/judge.py", TABLE])
def test_the_hash_of_the_code_is_of_its_content(changed: str, tmp_path: Path) -> None:
    def code(name: str, text: str) -> str:
        root = tmp_path / name
        for file in ("models/deep/net.py", "audit/judge.py", "report/page.py", TABLE):
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            (root / file).write_text("1", encoding="utf-8")
        (root / changed).write_text(text, encoding="utf-8")
        (root / "report/page.py").write_text(name, encoding="utf-8")
        return code_hash(root)

    assert code("here", "1") == code("there", "1") != code("elsewhere", "2")


def test_rules_in_the_folder_of_a_model_count_unless_others_are_asked_for(tmp_path: Path) -> None:
    assert ScanSpec(model=str(tmp_path)).rules is None
    (tmp_path / "policy.yaml").write_text("abstained: true\n", encoding="utf-8")
    assert ScanSpec(model=str(tmp_path)).rules == tmp_path / "policy.yaml"
    assert ScanSpec(model=str(tmp_path), policy=Path("other.yaml")).rules == Path("other.yaml")
    assert ScanSpec(model="none").rules is None


def test_a_policy_decides_what_is_flagged(folder: Path, bundle: Path, tmp_path: Path) -> None:
    out, cache, policy = tmp_path / "o.jsonl", tmp_path / "cache", tmp_path / "policy.yaml"
    options = ("--model", bundle, "--json", out, "--cache", cache)
    assert run(folder, *options) == 3
    found = {Path(line["file"]).name: line for line in lines(out)}
    first = found["good-400.safetensors"]
    label = found["good-401.safetensors"]["verdict"]["label"]
    policy.write_text(
        f"deny: [{first['update_hash']}]\n"
        f"allow: [{found['cut.safetensors']['sha256']}]\n"
        f"classes: {{{label}: 0.0}}\n"
        "bases: [tiny-sd]\n"
        "abstained: true\n"
        "similar: 0.9\n",
        encoding="utf-8",
    )
    args = ("--policy", policy, "--index", folder / "good-402.safetensors")
    assert run(folder, *options, *args) == 3
    flags = {Path(line["file"]).name: line["flags"] for line in lines(out)}
    for name in ("good-400.safetensors", "adapter_model.safetensors"):
        assert "on the deny list" in flags[name]
    assert flags["cut.safetensors"] == []
    assert flags["page.safetensors"] == ["refused: html"]
    assert flags["foreign.safetensors"] == ["base: SD1.x"]
    assert any(flag.startswith("abstained: ") for flag in flags["noise.safetensors"])
    assert not any(flag.startswith("class: ") for flag in flags["noise.safetensors"])
    assert any(flag.startswith(f"class: {label} ") for flag in flags["good-401.safetensors"])
    near = [flag for flag in flags["good-402.safetensors"] if flag.startswith("similar: ")]
    assert near == [f"similar: {folder / 'good-402.safetensors'} 1.000"]
    policy.write_text("refused: [pickle, html]\n", encoding="utf-8")
    assert run(folder, *options, "--policy", policy) == 3
    flags = {Path(line["file"]).name: line["flags"] for line in lines(out) if line["flags"]}
    assert flags.pop("page.safetensors") == ["refused: html"]
    assert all(found == ["refused: pickle"] for found in flags.values())
    policy.write_text("refused: false\n", encoding="utf-8")
    assert run(folder, *options, "--policy", policy) == 0
    assert not any(line["flags"] for line in lines(out))


HASH = "0" * 64
WRONG = {
    "no such file": (["/no/such/folder"], "found none of that name"),
    "nothing in it": (["{empty}"], "expected adapter files, found none"),
    "no folder to write to": (["{loras}", "--out", "{empty}/no/report.html"], "make it"),
    "workers": (["{loras}", "--workers", "0"], "workers: expected at least 1"),
    "class": (["{loras}", "--policy", "{class}"], "no class `dragon`"),
    "similar": (["{loras}", "--policy", "{similar}"], "needs --index"),
    "hash": (["{loras}", "--policy", "{hash}"], "64 hexadecimal digits"),
    "both": (["{loras}", "--policy", "{both}"], "choose one"),
    "share": (["{loras}", "--policy", "{share}"], "from 0 to 1"),
    "key": (["{loras}", "--policy", "{key}"], "denied"),
    "reason": (["{loras}", "--policy", "{reason}"], "did you mean `pickle`?"),
    "no policy": (["{loras}", "--policy", "{empty}/p.yaml"], "p.yaml"),
    "no model": (["{loras}", "--model", "{empty}"], "no bundle here"),
    "nothing known": (["{loras}", "--index", "{empty}"], "expected adapter files"),
}
POLICIES = {
    "class": "classes: {dragon: 0.5}",
    "similar": "similar: 0.9",
    "hash": "deny: [xyz]",
    "both": f"deny: ['{HASH}']\nallow: ['{HASH}']",
    "share": "classes: {carnivore: 7}",
    "key": f"denied: ['{HASH}']",
    "reason": "refused: [pickel]",
}


@pytest.mark.parametrize("wrong", WRONG)
def test_bad_input_is_named(
    wrong: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = {"empty": tmp_path / "empty", "loras": folder}
    paths["empty"].mkdir()
    for name, text in POLICIES.items():
        paths[name] = tmp_path / f"{name}.yaml"
        paths[name].write_text(text, encoding="utf-8")
    args, expected = WRONG[wrong]
    assert run(*(arg.format(**paths) for arg in args)) == 2
    assert expected in capsys.readouterr().err


def test_a_hub_repository_is_scanned_in_parts(
    server: HubServer,
    as_hub_user: Callable[..., None],
    folder: Path,
    bundle: Path,
    tmp_path: Path,
) -> None:
    repository = tmp_path / "hub" / "models" / "someone" / "loras"
    repository.mkdir(parents=True)
    for name in ("good-400.safetensors", "foreign.safetensors", "bad/page.safetensors"):
        (repository / Path(name).name).write_bytes((folder / name).read_bytes())
    out = tmp_path / "o.jsonl"
    as_hub_user()
    for what in ("someone/loras", "hub:someone", "hf://someone/loras@main"):
        assert run(what, "--model", bundle, "--json", out, "--cache", tmp_path / what) == 3
        found = {line["file"].rpartition("/")[2]: line for line in lines(out)}
        assert {name: became(line) for name, line in found.items()} == {
            "good-400.safetensors": "judged",
            "foreign.safetensors": "silent",
            "page.safetensors": "html",
        }
        assert len(found["good-400.safetensors"]["revision"]) == 40


def test_a_hub_that_fails_in_the_middle_stops_nothing(
    server: HubServer,
    as_hub_user: Callable[..., None],
    folder: Path,
    bundle: Path,
    tmp_path: Path,
) -> None:
    repository = tmp_path / "hub" / "models" / "someone" / "loras"
    repository.mkdir(parents=True)
    good = (folder / "good-400.safetensors").read_bytes()
    (repository / "good.safetensors").write_bytes(good)
    names = ("good", "gone")
    listed = tmp_path / "list.txt"
    lines_of = [f"hub:someone/loras/{name}.safetensors" for name in names]
    listed.write_text("\n".join([*lines_of, "hub:nobody/loras/a.safetensors"]), encoding="utf-8")
    out = tmp_path / "o.jsonl"
    as_hub_user()
    assert run(listed, "--model", bundle, "--json", out, "--cache", tmp_path / "cache") == 3
    assert [became(line) for line in lines(out)] == ["judged", "missing", "remote"]


def test_a_failure_on_the_hub_names_the_file_once_as_the_user_does(
    server: HubServer,
    as_hub_user: Callable[..., None],
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    repository = tmp_path / "hub" / "models" / "someone" / "loras"
    repository.mkdir(parents=True)
    for name in ("good-400", "bad/page"):
        shutil.copy(folder / f"{name}.safetensors", repository)
    as_hub_user()
    # A revision is no part of the file's kind.
    assert main(["predict", "hub:someone/loras/good-400.safetensors@main"]) == 0
    capsys.readouterr()
    for name in ("page", "gone", "good-400"):
        if name == "good-400":
            server.faults.append(Fault("^GET .*resolve/", "short", times=9))
        file = f"hub:someone/loras/{name}.safetensors"
        assert main(["predict", file]) == 1
        assert main(["inspect", file]) == 2
        for said in capsys.readouterr().err.splitlines():
            assert said.startswith(f"lora-ws: {file}: expected") or name == "gone"
            assert said.count(f"{name}.safetensors") == 1
    # A repository without a bundle is called by its name too.
    assert main(["predict", str(folder / "good-400.safetensors"), "--model", "someone/loras"]) == 2
    assert "someone/loras: no bundle there" in capsys.readouterr().err


def test_similar_and_dedup_see_through_spellings(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = ("--cache", str(tmp_path / "cache"), "--as_json", "true")
    asked = str(folder / "kohya" / "good-400.safetensors")
    assert main(["similar", asked, "--index", str(folder), "--top", "4", *cache]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    same = {"good-400.safetensors", "adapter_model.safetensors"}
    assert {Path(line["name"]).name for line in found[:3]} == same
    assert [line["likeness"] for line in found] == ["the same"] * 3 + [""]
    spec = SimilarSpec(str(folder), top=4, cache=tmp_path / "cache")
    assert [one.to_dict() for one in find_similar(asked, spec)] == found
    assert main(["dedup", str(folder), *cache]) == 0
    (group,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert group["likeness"] == "the same"
    assert {Path(name).name for name in group["files"]} == same
    assert len(group["files"]) == 3
    _, copies = find_copies([str(folder)], DedupSpec(cache=tmp_path / "cache"))
    assert copies == ([group["files"]], [])

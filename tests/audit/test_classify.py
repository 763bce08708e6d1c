"""One batch of files in, one finding a file out, whatever the files are."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import write_adapter as write_row
from safetensors.numpy import load_file, save_file
from tolerances import rounding

import lora_ws.audit.judge
from lora_ws.adapters import AdapterRef, read_adapter
from lora_ws.adapters.header import LIMITS
from lora_ws.adapters.writer import write_adapter
from lora_ws.audit import classify
from lora_ws.audit.classify import NO_UPDATE, FileResult, Finding, classify_files
from lora_ws.bundle import Bundle
from lora_ws.bundle.evidence import layer_evidence
from lora_ws.collection import AdapterSet
from lora_ws.errors import DeprecatedName

Layers = tuple[tuple[str, int, int], ...]


@pytest.fixture(scope="module")
def classifier(bundle: Path) -> Bundle:
    return Bundle.load(bundle)


def findings(refs: list[AdapterRef], bundle: Bundle | None = None, **options: Any) -> list[Finding]:
    found = [one.finding for one in classify_files(refs, bundle, **options)]
    assert all(found)
    return [one for one in found if one]


def test_a_file_that_cannot_be_measured_is_the_only_one_refused(
    mini: AdapterSet, layers: Layers, tmp_path: Path
) -> None:
    files = [write_row(tmp_path / f"{k}.safetensors", mini.weights[k], layers) for k in range(3)]
    refs = [AdapterRef.parse(file) for file in files]
    held = [classify._open(ref, None, None, (), LIMITS) for ref in refs]
    name, module = next(iter(held[1].adapter.modules.items()))  # type: ignore[union-attr]
    broken = {name: replace(module, up=module.up[:, :0])}
    held[1] = held[1]._replace(adapter=replace(held[1].adapter, modules=broken))  # type: ignore
    found = [one.judged for one in classify._describe(held, hashes=True)]
    assert [one.finding.reason for one in found if one.finding] == ["", "unreadable", ""]
    for one, alone in zip(found[::2], classify_files(refs[::2]), strict=True):
        assert one.finding == alone.finding


@pytest.mark.parametrize("spelling", ["peft", "kohya", "diffusers"])
def test_another_spelling_gets_the_same_verdict(
    spelling: str, mini: AdapterSet, layers: Layers, classifier: Bundle, tmp_path: Path
) -> None:
    rows = range(400, 412)
    plain = [write_row(tmp_path / f"{row}.safetensors", mini.weights[row], layers) for row in rows]
    other = [
        write_adapter(read_adapter(file), tmp_path / file.stem, spelling)  # type: ignore[arg-type]
        for file in plain
    ]
    was = findings([AdapterRef.parse(file) for file in plain], classifier)
    now = findings([AdapterRef.parse(file) for file in other], classifier)
    for one, again in zip(was, now, strict=True):
        assert one.verdict
        assert again.verdict
        assert (one.verdict.label, one.verdict.reason) == (
            again.verdict.label,
            again.verdict.reason,
        )
        bound = rounding(classifier.layout.size)
        assert again.verdict.confidence == pytest.approx(one.verdict.confidence, abs=bound)
        assert one.sha256 != again.sha256
        assert one.update_hash == again.update_hash


def test_verdicts_are_those_of_the_weights(
    mini: AdapterSet, layers: Layers, classifier: Bundle, tmp_path: Path
) -> None:
    rows = list(range(0, 500, 25))
    files = [write_row(tmp_path / f"{row}.safetensors", mini.weights[row], layers) for row in rows]
    expected = classifier.predict_batch(np.asarray(mini.weights[rows]))
    found = findings([AdapterRef.parse(file) for file in files], classifier)
    assert [one.verdict and one.verdict.label for one in found] == [one.label for one in expected]
    assert len({one.verdict.label for one in found if one.verdict}) > 5


def test_what_is_read_of_a_layer_is_what_it_needs(
    mini: AdapterSet, layers: Layers, classifier: Bundle, tmp_path: Path
) -> None:
    file = write_row(tmp_path / "a.safetensors", mini.weights[0], layers)
    more = {
        f"unet.{name}_out.0.lora.{role}.weight": np.ones(shape, np.float32)
        for name in ("mid_block.attentions.0.transformer_blocks.0.attn1.to",)
        for role, shape in (("down", (1, 64)), ("up", (64, 1)))
    }
    save_file({**load_file(file), **more}, file)
    (whole,) = findings([AdapterRef.parse(file)], classifier)
    (part,) = findings([AdapterRef.parse(file)], classifier, whole=False)
    assert (whole.modules_ignored, part.modules_ignored) == (1, 1)
    assert part.verdict == whole.verdict
    assert whole.update_hash
    assert not part.update_hash
    assert part.bytes_read <= whole.bytes_read


def test_without_a_classifier_a_file_is_told_of(
    mini: AdapterSet, layers: Layers, tmp_path: Path
) -> None:
    file = write_row(tmp_path / "a.safetensors", mini.weights[0], layers)
    ((key, finding, signature),) = classify_files([AdapterRef.parse(file)])
    assert finding
    assert finding.facts
    assert signature
    assert finding.no_prediction_reason.startswith("content: no detector for this base")
    assert (finding.facts.base, finding.facts.ranks) == ("tiny-sd", {"1": 64})
    assert finding.update_hash == signature.hash
    assert classify_files([AdapterRef.parse(file)], known={key}) == [(key, None, None)]


def test_a_file_of_another_base_is_named_and_not_judged(
    mini: AdapterSet, layers: Layers, classifier: Bundle, tmp_path: Path
) -> None:
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
    file = write_row(tmp_path / "a.safetensors", np.ones(768 + 1280), ((name, 768, 1280),))
    (finding,) = findings([AdapterRef.parse(file)], classifier)
    assert finding.verdict is None
    assert finding.no_prediction_reason.startswith(
        "content: no detector for this base: it is SD1.x"
    )
    assert finding.facts


@pytest.mark.parametrize("zeroed", ["by its factors", "by its scale"])
def test_an_update_of_zero_has_no_verdict(
    zeroed: str, mini: AdapterSet, layers: Layers, classifier: Bundle, tmp_path: Path
) -> None:
    row = mini.weights[0] * np.float32(zeroed == "by its scale")
    file = write_row(tmp_path / "a.safetensors", row, layers)
    save_file(load_file(file), file, {"lora_adapter_metadata": '{"unet.lora_alpha": 0}'})
    (finding,) = findings([AdapterRef.parse(file)], classifier)
    assert (finding.verdict, finding.no_prediction_reason) == (None, NO_UPDATE)


def test_a_bad_file_stops_no_other(
    mini: AdapterSet, layers: Layers, classifier: Bundle, tmp_path: Path
) -> None:
    good = write_row(tmp_path / "good.safetensors", mini.weights[0], layers)
    bad = {
        "html": b"<!DOCTYPE html><html></html>",
        "empty": b"",
        "truncated": good.read_bytes()[:-4],
        "lfs-pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    }
    for reason, content in bad.items():
        (tmp_path / f"{reason}.safetensors").write_bytes(content)
    refs = [
        AdapterRef.parse(tmp_path / f"{name}.safetensors") for name in (*bad, "good", "missing")
    ]
    refs.append(AdapterRef.parse(tmp_path / "a.ckpt"))
    (tmp_path / "a.ckpt").write_bytes(b"\x80\x02}q\x00.")
    found = findings(refs, classifier)
    assert [one.reason for one in found] == [*bad, "", "missing", "pickle"]
    assert found[len(bad)].verdict is not None
    assert all(
        str(ref.path) in one.message for ref, one in zip(refs, found, strict=True) if one.reason
    )


def test_a_reader_that_fails_in_a_way_not_foreseen_is_a_finding(
    mini: AdapterSet, layers: Layers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_row(tmp_path / "a.safetensors", mini.weights[0], layers)

    def fail(*_: object) -> None:
        raise ZeroDivisionError("of a file")

    monkeypatch.setattr("lora_ws.audit.classify.summarize", fail)
    (finding,) = findings([AdapterRef.parse(file)])
    assert finding.reason == "failed"
    assert finding.message == f"{file}: ZeroDivisionError: of a file"


def test_settings_beside_a_file_are_part_of_its_content(
    mini: AdapterSet, layers: Layers, tmp_path: Path
) -> None:
    file = write_row(tmp_path / "a.safetensors", mini.weights[0], layers)
    folder = tmp_path / "peft"
    write_adapter(read_adapter(file), folder, "peft")
    ((key, finding, _),) = classify_files([AdapterRef.parse(folder)])
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    (folder / "adapter_config.json").write_text(
        json.dumps({**config, "lora_alpha": 7}), encoding="utf-8"
    )
    ((other, again, _),) = classify_files([AdapterRef.parse(folder)])
    assert finding
    assert again
    assert key != other
    assert finding.sha256 == again.sha256
    assert finding.update_hash != again.update_hash


def test_findings_survive_json(
    mini: AdapterSet, layers: Layers, classifier: Bundle, tmp_path: Path
) -> None:
    file = write_row(tmp_path / "a.safetensors", mini.weights[460], layers)
    refs = [AdapterRef.parse(file), AdapterRef.parse(tmp_path / "missing.safetensors")]
    for finding in findings(refs, classifier, evidence=True):
        assert Finding.from_dict(json.loads(json.dumps(finding.to_dict()))) == finding


def test_evidence_is_the_fall_of_the_log_odds(mini: AdapterSet, classifier: Bundle) -> None:
    row = np.asarray(mini.weights[460])
    found = layer_evidence(classifier, row)
    assert set(found) == set(classifier.layers)
    layer, down, up = next(p for p in classifier.layout.pairs() if "attn2.to_q" in p[0].name)
    without = row.copy()
    without[down] = without[up] = 0
    both = classifier.predict_proba(np.stack([row, without]))
    best = both[0].argmax()
    odds = np.log(both[:, best] / (1 - both[:, best]))
    # Probabilities are float32, and what is left of 1 stands in the odds.
    bound = rounding(classifier.layout.size) / (1 - both[:, best]).min()
    assert found[layer.name] == pytest.approx(odds[0] - odds[1], abs=bound)


@pytest.mark.parametrize("old", ["judge", "Judged", "Finding"])
def test_old_names_still_work_and_say_the_new_ones(old: str) -> None:
    new = {"judge": classify_files, "Judged": FileResult, "Finding": Finding}[old]
    with pytest.warns(DeprecatedName, match=r"use `lora_ws\.audit\.classify\."):
        assert getattr(lora_ws.audit.judge, old) is new
    with pytest.raises(AttributeError, match="no attribute `judged`"):
        _ = lora_ws.audit.judge.judged


def test_old_keys_stand_beside_the_new_ones_and_are_still_read(
    mini: AdapterSet, layers: Layers, classifier: Bundle, tmp_path: Path
) -> None:
    file = write_row(tmp_path / "a.safetensors", mini.weights[400], layers)
    (judged,) = findings([AdapterRef.parse(file)], classifier)
    (unread,) = findings([AdapterRef.parse(tmp_path / "none.safetensors")], classifier)
    (unasked,) = findings([AdapterRef.parse(file)])
    renamed = {
        "silence": "no_prediction_reason",
        "energy": "retained_energy",
        "missing": "layers_missing",
        "beyond": "modules_ignored",
    }
    for finding in (judged, unread, unasked):
        plain = json.loads(json.dumps(finding.to_dict()))
        for old, new in renamed.items():
            assert plain[old] == plain[new] == getattr(finding, new)
        # As written by the version before.
        for new in renamed.values():
            del plain[new]
        if plain["facts"]:
            assert plain["facts"]["odd"] == plain["facts"].pop("warnings")
        assert Finding.from_dict(plain) == finding
    assert unasked.no_prediction_reason
    assert judged.retained_energy == 1

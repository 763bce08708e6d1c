"""Sidecars: files beside an adapter in which model managers look for what to show of it."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lora_ws.adapters.source import tensor_sha256
from lora_ws.audit.output import others
from lora_ws.audit.policy import Reviewed
from lora_ws.journal import replacing

OURS = "lora_ws"
# Longer ones are no sidecars.
MAX_BYTES = 1 << 22
TRIAGE = "Triage from weights alone; it certifies nothing."


def write_sidecars(file: Path, one: Reviewed, model: str | None) -> tuple[Path, ...]:
    """Write ``<name>.json`` and ``<name>.civitai.info`` beside an adapter file.

    The first is what webui's cards show, the second the record of a model's version that Civitai
    gives out and helpers keep. What others wrote into them stays; a file that is no JSON object is
    left alone.

    Args:
        file: the adapter.
        one: what is known of it.
        model: the classifier's name, if there was one.

    Returns:
        The files that were written.
    """
    said = _said(one)
    ours = {
        "said": said,
        "flags": list(one.flags),
        "model": model,
        "version": version(OURS),
        "verdict": one.finding.verdict and one.finding.verdict.to_dict(),
        "no_prediction_reason": one.finding.no_prediction_reason,
        "reason": one.finding.reason,
    }
    base = one.finding.facts.base if one.finding.facts else ""
    names = {".json": {"notes": said}, ".civitai.info": _version(file, one, base, said)}
    written = []
    for suffix, fields in names.items():
        beside = file.with_suffix(suffix)
        held = _held(beside)
        if held is None:
            continue
        wrote = _dict(_dict(held.pop(OURS, None)).get("wrote"))
        kept = {k: v for k, v in held.items() if k not in wrote or wrote[k] != v}
        new = {name: value for name, value in fields.items() if name not in kept}
        text = json.dumps({**kept, **new, OURS: {**ours, "wrote": new}}, indent=2, allow_nan=False)
        with replacing(beside) as partial:
            partial.write_text(text + "\n", encoding="utf-8")
        written.append(beside)
    return tuple(written)


def _said(one: Reviewed) -> str:
    """The verdict, and why the file is flagged, as a person reads it."""
    finding, verdict = one.finding, one.finding.verdict
    if finding.reason:
        text = f"not read: {finding.reason}"
    elif verdict is None:
        text = f"no verdict: {finding.no_prediction_reason}"
    elif verdict.label is None:
        text = f"abstains: {verdict.reason}"
    else:
        named = [f"{verdict.label} ({verdict.confidence:.2f})"]
        text = "; ".join([*named, *(f"{task}: {found}" for task, found in others(finding).items())])
    flags = f"; flagged: {', '.join(one.flags)}" if one.flags else ""
    return f"{OURS}: {text}{flags}. {TRIAGE}"


def _version(file: Path, one: Reviewed, base: str, said: str) -> dict[str, Any]:
    """A model's version in the fields that Civitai's interface has."""
    hashes = {}
    if not one.finding.reason and one.finding.sha256:
        sha256 = one.finding.sha256.upper()
        autov3 = tensor_sha256(file)[:12].upper()
        hashes = {"SHA256": sha256, "AutoV2": sha256[:10], "AutoV3": autov3}
    return {
        "name": file.stem,
        "description": said,
        "baseModel": base,
        "trainedWords": [],
        "model": {"name": file.stem, "type": "LORA"},
        "files": [{"name": file.name, "type": "Model", "hashes": hashes}],
    }


def _held(beside: Path) -> dict[str, Any] | None:
    """What a sidecar holds: nothing where there is none, None where it is another kind of file."""
    if not beside.exists():
        return {}
    # Reading a pipe would wait for its other end for ever.
    if not beside.is_file():
        return None
    try:
        if beside.stat().st_size > MAX_BYTES:
            return None
        held = json.loads(beside.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError):
        return None
    return held if isinstance(held, dict) else None


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}

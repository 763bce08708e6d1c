"""The model card of a bundle."""

from pathlib import Path
from typing import Any

from lora_ws.adapters import Layout
from lora_ws.bundle.confidence import Confidence
from lora_ws.bundle.heads import Head
from lora_ws.report.metrics import metric_of

TEXT = """---
{metadata}
---

# {name} on {dataset}

Names the class of a LoRA adapter from its weights: {classes}.
{heads}
```python
import lora_ws

bundle = lora_ws.Bundle.from_pretrained("{repo_id}")
adapter = lora_ws.read_adapter("file.safetensors")
bundle.predict_batch(adapter.flat()[None], adapter.layout)
```

Trained on `{dataset}`{subset} ({n_train} adapters, data version `{data_version}`), seed {seed},
protocol {protocol}. It reads {layers} layers ({size} numbers, layout `{fingerprint}`) and refuses
other adapters. {gauge} Its arrays take {size_mb:.1f} MiB.

Test metrics of this seed on {n_test} adapters, shares in percent:

| metric | value |
|---|--:|
{metrics}
{confidence}
Use it to sort what people should look at, never to certify that an adapter is harmless.
"""
GAUGES = {
    "invariant": "It sees updates B·A, however they are split into B and A.",
    "raw": "It sees the numbers of B and A, of which one update can have many; it abstains from "
    "projected weights.",
}
LABELS = """Labels do not exclude each other; each applies from its own probability on, chosen by
the validation adapters: {}.

"""
UNCALIBRATED = "Probabilities are not calibrated, and the bundle abstains from every verdict."
VALIDATION = "validation adapters, which also chose the epoch"
OUT_OF_FOLD = "training adapters, each by a reader that was fitted without it"
CALIBRATED = """Probabilities are calibrated (temperature {temperature:.3g}) on the {rows}
{source}. It abstains where an adapter agrees with none of
the classes, and where its features are much smaller or larger than known ones. The first flags at
most {rate} % of adapters like these; a concept it was never shown can still pass.
Conformal sets (LAC) are to hold the class of {held} % of known adapters. On the test adapters:

| measure | value |
|---|--:|
{measures}"""
MEASURES = {
    "ece_raw": "expected calibration error of the softmax, %",
    "ece": "expected calibration error, %",
    "abstained": "share abstained from, %",
    "accuracy_answered": "accuracy of the answers, %",
    "coverage": "share whose class is in the conformal set, %",
    "set_size": "mean classes in a conformal set",
}


def card_text(
    record: dict[str, Any],
    classes: tuple[str, ...],
    layout: Layout,
    confidence: Confidence,
    *,
    heads: tuple[Head, ...] = (),
    gauge: str,
    size_mb: float,
    repo_id: str = "...",
) -> str:
    """Say what a bundle is, how good it is, and what not to use it for.

    Args:
        record: the record of the seed that made it.
        classes: what it names.
        layout: what it reads.
        confidence: how far to believe it, if that was measured.
        heads: its further predictions.
        gauge: ``raw`` or ``invariant``.
        size_mb: MiB of its arrays.
        repo_id: where on the Hub it will be found.
    """
    return TEXT.format(
        metadata=_metadata(record),
        repo_id=repo_id,
        name=record["name"],
        dataset=record["dataset"],
        subset=f", subset `{record['subset']}`" if record["subset"] else "",
        classes=", ".join(classes),
        heads="".join(map(_head, heads)),
        n_train=record["n_train"],
        n_test=record["n_test"],
        data_version=record["data_version"][:12],
        seed=record["seed"],
        protocol=record["protocol"],
        layers=len(layout.layers),
        size=layout.size,
        fingerprint=layout.fingerprint,
        gauge=GAUGES[gauge],
        size_mb=size_mb,
        metrics="".join(map(_metric, record["test"].items())),
        confidence=_confidence(confidence, classes),
    )


def _metadata(record: dict[str, Any]) -> str:
    """What the Hub indexes and shows beside the card: library, tags, data, results on the test."""
    from huggingface_hub import EvalResult, ModelCardData

    dataset = Path(record["dataset"]).name
    config = {"dataset_config": record["subset"]} if record["subset"] else {}
    results = [
        EvalResult(
            task_type="other",
            task_name=f"{record.get('task', 'classification')} of LoRA adapters",
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_split="test",
            metric_type=name,
            metric_value=round(value, 6),
            **config,
        )
        for name, value in record["test"].items()
    ]
    data = ModelCardData(
        library_name="lora_ws",
        tags=["lora", "weight-space", "weight-space-learning"],
        datasets=[dataset],
        metrics=list(record["test"]),
        model_name=record["name"],
        eval_results=results,
    )
    return data.to_yaml()


def _head(head: Head) -> str:
    """What a further task predicts."""
    return f"\nIts `{head.name}`: {', '.join(head.classes) or 'a number'}.\n"


def _metric(found: tuple[str, float]) -> str:
    name, value = found
    share = 100 * value if metric_of(name).percent else value
    return f"| {name} | {share:.2f} |\n"


def measure_text(name: str, value: float | None) -> str:
    """A measure of `Calibration.test` as its table has it: percent, except for sizes."""
    if value is None:
        return "none answered"
    return f"{value:.2f}" if name == "set_size" else f"{100 * value:.2f}"


def _confidence(confidence: Confidence, classes: tuple[str, ...]) -> str:
    calibration = confidence.calibration
    if calibration is None:
        return UNCALIBRATED + "\n"
    test, labels = calibration.test, ""
    if confidence.thresholds:
        shown = zip(classes, confidence.thresholds, strict=True)
        labels = LABELS.format(", ".join(f"{name} {least:.2f}" for name, least in shown))
    return labels + CALIBRATED.format(
        temperature=calibration.temperature,
        rows=calibration.rows,
        source=OUT_OF_FOLD if calibration.out_of_fold else VALIDATION,
        rate=f"{100 * calibration.abstention_rate:.3g}",
        held=f"{100 * (1 - calibration.alpha):.3g}",
        measures="".join(
            f"| {text} | {measure_text(name, test[name])} |\n"
            for name, text in MEASURES.items()
            if name in test
        ),
    )

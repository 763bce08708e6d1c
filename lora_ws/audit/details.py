"""All that is known of one file, as a part of a page that opens and closes."""

from collections.abc import Iterator, Mapping

from lora_ws.audit.classify import Finding
from lora_ws.audit.policy import Reviewed
from lora_ws.bundle.heads import Answer
from lora_ws.errors import printable
from lora_ws.report.grid import Cell, Grid
from lora_ws.report.page import Details, Facts, Part

# Layers and classes that are named.
NAMED = 5


def details(one: Reviewed, title: str, anchor: str, *, opened: bool = False) -> Details:
    """Facts, verdict, and what the file claims.

    Args:
        one: the file.
        title: what it is called.
        anchor: what links lead here by.
        opened: whether the details stand open.
    """
    return Details(title, tuple(_parts(one)), anchor, opened)


def _parts(one: Reviewed) -> Iterator[Part]:
    values = {"file": one.finding.file, **_identity(one.finding), **_judged(one)}
    yield Facts({name: Cell(printable(value)) for name, value in values.items() if value})
    if one.finding.verdict:
        shares = one.finding.verdict.probabilities
        caption = "Calibrated; the most probable {}, given that it is a class of the model."
        yield _likeliest("class", shares, caption)
        for column, answer in one.finding.verdict.answers.items():
            yield from _answer(column, answer)
    if one.finding.facts and (claims := one.finding.facts.claims):
        cells = tuple((Cell(name), Cell(value)) for name, value in claims.items())
        yield Grid(("name", "value"), cells, "What the file claims of itself, unchecked.", left=2)


def _answer(column: str, answer: Answer) -> Iterator[Part]:
    """What a further task of the classifier predicts."""
    yield Facts({column: Cell(answer.label or "abstains")})
    if answer.probabilities:
        yield _likeliest(column, answer.probabilities, "Calibrated; the most probable {}.")


def _likeliest(title: str, probabilities: Mapping[str, float], caption: str) -> Grid:
    rows = list(probabilities.items())[:NAMED]
    cells = tuple((Cell(name), Cell(f"{share:.3f}")) for name, share in rows)
    return Grid((title, "probability"), cells, caption.format(len(rows)))


def _identity(finding: Finding) -> dict[str, str]:
    facts = finding.facts
    known = {
        "sha256": finding.sha256,
        "hash of the update": finding.update_hash,
        "revision": finding.revision,
        "not read": f"{finding.reason}: {finding.message}" if finding.reason else "",
    }
    if facts is None:
        return known
    return known | {
        "base": f"{facts.base} ({facts.evidence})",
        "modules": _counts(facts.modules),
        "methods": _counts(facts.methods),
        "ranks": ", ".join(facts.ranks),
        "scales": _counts(facts.scales),
        "norm": f"{facts.norm:.4g}" if facts.norms else "",
        "warnings": "; ".join(facts.warnings),
        "read in part": "holds tensors that are in no update" if finding.partly_read else "",
    }


def _judged(one: Reviewed) -> dict[str, str]:
    finding, verdict = one.finding, one.finding.verdict
    told = {
        "flags": "; ".join(one.flags),
        "no verdict": finding.no_prediction_reason,
        "nearest known": ", ".join(f"{near.name} ({near.cosine:.3f})" for near in one.nearest),
    }
    if verdict is None:
        return told
    retained = finding.retained_energy
    strongest = sorted((finding.evidence or {}).items(), key=lambda item: -abs(item[1]))[:NAMED]
    return told | {
        "verdict": verdict.label or f"abstains: {verdict.reason}",
        "could be": ", ".join(verdict.conformal_set),
        "out of distribution": "" if verdict.ood_score is None else f"{verdict.ood_score:.2f}",
        "update that fits the ranks": "" if retained is None else f"{100 * retained:.1f} %",
        "layers missing": f"{finding.layers_missing}" if finding.layers_missing else "",
        "modules not judged": f"{finding.modules_ignored}" if finding.modules_ignored else "",
        "rests most on": ", ".join(f"{name} ({value:+.2f})" for name, value in strongest),
    }


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} of {name}" for name, count in counts.items())

"""What tells adapters of unknown concepts, and garbage, from known ones: scores compared.

On ``per_adapter/class`` of lora-ws-mini two of ten classes, drawn anew by every seed, are hidden
from training and validation. Compared on DeltaPCA features, over seeds:

* ours: `lora_ws.bundle.confidence`, agreement with a class and the norm of the features;
* the highest probability (Hendrycks and Gimpel 2017) and the energy (Liu et al. 2020) of the
  network, at the temperature of the validation rows;
* Mahalanobis distance to the nearest class with a shared, shrunk covariance (Lee et al. 2018), and
  relative to that of all rows (Ren et al. 2021);
* distance to the fifth nearest training row, of features as they are and of unit length (Sun et
  al. 2022).

Each cell: AUROC against known test adapters, and the share rejected where 5 % of them are. Features
of the kernel make random weights look close to everything: see the distances.
"""

from collections.abc import Mapping
from dataclasses import replace

import common
import numpy as np
import torch
from sklearn.covariance import LedoitWolf
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors

from lora_ws import DeltaPCA, Layout
from lora_ws.bundle.confidence import reads_by
from lora_ws.collection import Split
from lora_ws.functional.calibrate import energy
from lora_ws.learn.calibration import fit_confidence
from lora_ws.learn.features import Prepared, prepare, represent, with_layout
from lora_ws.learn.run import fit_seed
from lora_ws.learn.spec import ExperimentSpec, FitSpec
from lora_ws.learn.tasks import Classification
from lora_ws.models import InputSpec
from lora_ws.models.normalizers import ColumnScaler

SPEC = ExperimentSpec(subset="per_adapter/class", featurizer=DeltaPCA(), fit=FitSpec(max_epochs=60))
STRANGE = ("unknown concept", "random weights", "half noise", "untrained")


def hide(whole: Prepared, hidden: np.ndarray) -> tuple[Prepared, np.ndarray]:
    """The data without some classes, and the rows of these."""
    held = np.setdiff1d(np.arange(len(whole.task.classes)), hidden)
    known = np.isin(whole.labels, held)
    split = Split(*(part[known[part]] for part in whole.split))
    featurizer = with_layout(DeltaPCA(), whole.adapters)
    features = represent(featurizer, np.asarray(whole.adapters.weights), split.train)
    labels = np.searchsorted(held, whole.labels) % len(held)
    kept = replace(
        whole,
        featurizer=featurizer,
        features=torch.from_numpy(features),
        labels=labels,
        task=Classification().fit(labels, tuple(whole.task.classes[k] for k in held)),
        split=split,
        inputs=InputSpec(features.shape[1]),
        normalizer=ColumnScaler(features.shape[1]).fit(features, split.train),
    )
    return kept, np.flatnonzero(~known)


def noise(rows: np.ndarray, layout: Layout, random: np.random.Generator) -> np.ndarray:
    """Normal numbers with the norm of every matrix."""
    found = random.standard_normal(rows.shape, dtype=np.float32)
    for matrix in layout.matrices:
        part = found[:, matrix.columns]
        norms = np.linalg.norm(rows[:, matrix.columns], axis=1, keepdims=True)
        part *= norms / np.linalg.norm(part, axis=1, keepdims=True)
    return found


def features_of(data: Prepared, unknown: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Features of the training rows, and of known and strange adapters to score."""
    weights, layout = np.asarray(data.adapters.weights), data.adapters.layout
    test = weights[data.split.test]
    random = noise(test, layout, np.random.default_rng(seed))
    untrained = test.copy()
    for _, _, up in layout.pairs():
        untrained[:, up] = 0
    strange = (weights[unknown], random, test + random, untrained)
    raw = {"train": np.asarray(data.features)[data.split.train]}
    raw["known"] = np.asarray(data.features)[data.split.test]
    raw |= zip(STRANGE, map(data.featurizer.transform, strange), strict=True)
    return raw


def mahalanobis(rows: np.ndarray, means: np.ndarray, precision: np.ndarray) -> np.ndarray:
    """Squared distance to the nearest mean."""
    gaps = rows[None] - means[:, None]
    return np.einsum("cnd,de,cne->cn", gaps, precision, gaps).min(axis=0)


def precision(fitted: LedoitWolf) -> np.ndarray:
    """The inverse of a fitted covariance."""
    return np.asarray(fitted.get_precision())


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows of length 1."""
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def scored(data: Prepared, unknown: np.ndarray, seed: int) -> dict[str, dict[str, np.ndarray]]:
    """Scores, the higher the stranger, by way and by kind of adapter."""
    fitted = fit_seed(SPEC, data, seed)
    confidence = fit_confidence(data, fitted.network).confidence
    assert confidence.calibration is not None
    temperature = confidence.calibration.temperature
    sets = features_of(data, unknown, seed)
    scale = data.normalizer
    train = scale(torch.from_numpy(sets.pop("train"))).numpy()
    labels = data.labels[data.split.train]
    means = np.stack([train[labels == k].mean(axis=0) for k in range(len(data.task.classes))])
    within = precision(LedoitWolf(assume_centered=True).fit(train - means[labels]))
    total, centre = precision(LedoitWolf().fit(train)), train.mean(axis=0, keepdims=True)
    near = NearestNeighbors(n_neighbors=5).fit(train)
    near_unit = NearestNeighbors(n_neighbors=5).fit(unit(train))
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, raw in sets.items():
        tensor = torch.from_numpy(raw.astype(np.float32))
        rows = scale(tensor).numpy()
        seen = confidence.run(reads_by(fitted.network), tensor.numpy())
        judged = confidence.predict(seen)
        distance = mahalanobis(rows, means, within)
        ways = {
            common.OURS: judged.ood_scores,
            "alignment alone": -seen.alignment,
            "highest probability": -judged.probabilities.max(axis=1),
            "energy": energy(seen.logits / temperature),
            "Mahalanobis": distance,
            "relative Mahalanobis": distance - mahalanobis(rows, centre, total),
            "5th neighbour": near.kneighbors(rows)[0][:, -1],
            "5th neighbour, unit length": near_unit.kneighbors(unit(rows))[0][:, -1],
        }
        for way, scores in ways.items():
            found.setdefault(way, {})[name] = scores
        found.setdefault("", {})[name] = judged.reasons != ""
    return found


def cell(scores: Mapping[str, np.ndarray], kind: str) -> tuple[float, float]:
    """AUROC, and the share rejected where 5 % of the known are."""
    known, strange = scores["known"], scores[kind]
    truth = np.r_[np.zeros(len(known)), np.ones(len(strange))]
    limit = np.quantile(known, 0.95, method="higher")
    return float(roc_auc_score(truth, np.r_[known, strange])), float((strange > limit).mean())


def main() -> None:
    """Print the table."""
    args = common.arguments(__doc__, repeats=20)
    whole, cells, flagged = prepare(SPEC), {}, []
    for turn in range(args.repeats):
        random = np.random.default_rng(args.seed + turn)
        data, unknown = hide(whole, random.permutation(len(whole.task.classes))[:2])
        found = scored(data, unknown, args.seed + turn)
        flagged.append([found[""][kind].mean() for kind in ("known", *STRANGE)])
        del found[""]
        for way, scores in found.items():
            cells.setdefault(way, []).append([cell(scores, kind) for kind in STRANGE])
    rows = [
        [way, *(f"{a:.3f} / {100 * r:.0f} %" for a, r in np.mean(values, axis=0))]
        for way, values in cells.items()
    ]
    common.print_table(["score", *STRANGE], rows)
    shares = 100 * np.mean(flagged, axis=0)
    names = ("known", *STRANGE)
    said = ", ".join(f"{name} {share:.1f} %" for name, share in zip(names, shares, strict=True))
    print(f"\nAbstained from at the threshold of the validation rows: {said}")
    common.facts("scikit-learn", seeds=args.repeats)


if __name__ == "__main__":
    main()

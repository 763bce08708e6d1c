"""Baselines of a collection, which every result on it is to be compared with.

Logistic regression on plain inputs, once with parts that share no image and once with parts that
share no leaf class. Inputs per adapter: A alone, B alone, both, the norm of each matrix alone, and,
without any weight, the mean latent of the photos it was trained on; beside them the image oracle.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from lora_ws.collection.adapter_set import AdapterSet
from lora_ws.collection.splits import Split
from lora_ws.diffusion.pipeline import encode_images, image_size, load_pipeline
from lora_ws.errors import DataError
from lora_ws.featurizers import Norms
from lora_ws.report.progress import progress
from lora_ws.threads import threads
from lora_ws.zoo.oracle import oracle_accuracy, photo_features
from lora_ws.zoo.photos import PhotoSpec, load_photos

MEAN_LATENT = "mean latent of the images"
ORACLE = "image oracle"
# Parts that share no image, and parts that share no leaf class.
SPLITS = ("part", "leaf_part")
# Inverse strengths of the regularisation, chosen by the validation rows.
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


class PhotoInputs(NamedTuple):
    """What is known of the photos behind a collection, by content hash.

    Attributes:
        latents: of the base's autoencoder.
        features: what its U-Net makes of them; see `lora_ws.zoo.oracle`.
    """

    latents: Mapping[str, np.ndarray]
    features: Mapping[str, np.ndarray]


class Baseline(NamedTuple):
    """One measurement: test accuracy of a plain input of one subset, by one kind of parts."""

    subset: str
    inputs: str
    numbers: int
    split: str
    accuracy: float
    n_test: int


def measure_baselines(adapters: AdapterSet, photos: PhotoInputs | None = None) -> list[Baseline]:
    """Measure every baseline of a collection that `build_zoo` made.

    Args:
        adapters: with columns ``part``, ``leaf_part`` and, for photos, ``images``.
        photos: the photos; without them their baselines are left out.

    Returns:
        One entry per subset, input and kind of parts; "chance" is the largest class of the test
        rows.

    Raises:
        DataError: the collection does not record its parts.
    """
    missing = [name for name in SPLITS if name not in adapters.rows.column_names]
    if missing:
        raise DataError(
            f"`{adapters.card.name}` has no column `{missing[0]}`; expected a collection made by "
            "`lora-ws zoo build`"
        )
    subsets = adapters.card.subsets or ("",)
    found = []
    with threads(1), progress("baselines", len(subsets)) as advance:
        for subset in subsets:
            own = adapters.subset(subset) if subset else adapters
            labels, _ = own.labels()
            if photos is not None:
                images = own.rows["images"].to_pylist()
                for split in SPLITS:
                    parts = own.split_by(split).split()
                    accuracy = oracle_accuracy(photos.features, images, labels, parts)
                    found.append(Baseline(subset, ORACLE, 0, split, accuracy, len(parts.test)))
            for name, features in _inputs(own, photos).items():
                for split in SPLITS:
                    parts = own.split_by(split).split()
                    accuracy = _accuracy(features, labels, parts)
                    found.append(
                        Baseline(subset, name, features.shape[1], split, accuracy, len(parts.test))
                    )
            advance()
    return found


def photo_inputs(adapters: AdapterSet, source: str | None = None) -> PhotoInputs:
    """What is to be known of the photos that a collection's recipe names.

    Args:
        adapters: with its recipe in the manifest.
        source: where the photos are here, instead of the recipe's source.

    Raises:
        NotAvailableError: photos or base are not here.
        DataError: the collection has no recipe, or these are other photos.
    """
    recipe = adapters.manifest.get("recipe")
    if not recipe:
        raise DataError(f"`{adapters.card.name}` does not record which photos it was made from")
    spec = PhotoSpec(**recipe["photos"])
    pipeline = load_pipeline(recipe["base"])
    photos = load_photos(replace(spec, source=source or spec.source), image_size(pipeline))
    hashes = photos.hashes()
    used = {digest for images in adapters.rows["images"].to_pylist() for digest in images}
    if lost := used - set(hashes):
        raise DataError(
            f"{source or spec.source} lacks {len(lost)} of the {len(used)} images behind "
            f"`{adapters.card.name}`; name the photos it was made from"
        )
    latents = encode_images(pipeline, photos.tensor()).flatten(1).numpy()
    features = photo_features(pipeline, photos.tensor())
    return PhotoInputs(
        dict(zip(hashes, latents, strict=True)), dict(zip(hashes, features, strict=True))
    )


def baselines_markdown(found: list[Baseline]) -> str:
    """A row per input, a column per subset; image-disjoint / leaf-disjoint, in percent."""
    subsets = list(dict.fromkeys(entry.subset for entry in found))
    values = {(e.inputs, e.subset, e.split): e for e in found}
    lines = [
        "| Input | Numbers | " + " | ".join(name or "accuracy" for name in subsets) + " |",
        "|---|--:|" + "--:|" * len(subsets),
    ]
    for name in dict.fromkeys(entry.inputs for entry in found):
        cells = []
        for subset in subsets:
            pair = [values[name, subset, split].accuracy for split in SPLITS]
            cells.append(" / ".join(f"{100 * value:.1f}" for value in pair))
        numbers = values[name, subsets[0], SPLITS[0]].numbers
        lines.append(f"| {name} | {numbers or ''} | {' | '.join(cells)} |")
    tests = {split: values[found[0].inputs, subsets[0], split].n_test for split in SPLITS}
    lines += [
        "",
        f"Test accuracy in percent: parts that share no image (n = {tests['part']}) / parts that "
        f"share no leaf class (n = {tests['leaf_part']}). Logistic regression, strength of the "
        "penalty chosen by the validation rows, fitted once; `lora_ws.zoo.oracle` reads "
        "photos one by one.",
    ]
    return "\n".join(lines)


def _inputs(
    adapters: AdapterSet, photos: PhotoInputs | None
) -> dict[str, Float[np.ndarray, "adapters features"]]:
    weights, layout = np.asarray(adapters.weights), adapters.layout
    inputs = {"chance": np.empty((len(adapters), 0), np.float32)}
    if photos is not None:
        means = [
            np.mean([photos.latents[k] for k in row], 0)
            for row in adapters.rows["images"].to_pylist()
        ]
        inputs[MEAN_LATENT] = np.stack(means)
    return inputs | {
        "norms only": Norms(layout=layout).fit_transform(weights),
        "A only": weights[:, layout.choose(["*.down"]).columns],
        "B only": weights[:, layout.choose(["*.up"]).columns],
        "A and B": weights,
    }


def _accuracy(features: np.ndarray, labels: np.ndarray, parts: Split) -> float:
    if not features.shape[1]:
        return float(np.bincount(labels[parts.test]).max() / len(parts.test))
    models: list[Any] = []
    for strength in STRENGTHS:
        model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000))
        models.append(model.fit(features[parts.train], labels[parts.train]))
    best = max(models, key=lambda m: m.score(features[parts.val], labels[parts.val]))
    return float(best.score(features[parts.test], labels[parts.test]))

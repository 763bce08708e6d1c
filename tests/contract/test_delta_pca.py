"""DeltaPCA: invariances, agreement with formed updates, landmarks, bundles, refusals."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.decomposition import PCA, KernelPCA
from tolerances import EXACT, rounding, terms_of

from lora_ws.adapters import LayerSpec, Layout
from lora_ws.bundle import Bundle
from lora_ws.collection import AdapterSet
from lora_ws.errors import ConfigError
from lora_ws.featurizers import DeltaPCA
from lora_ws.functional import delta_gram
from lora_ws.learn.features import prepare
from lora_ws.learn.pack import make_bundle
from lora_ws.learn.run import fit_seed
from lora_ws.learn.spec import ExperimentSpec, FitSpec
from lora_ws.models import MLP

LAYOUT = Layout.from_layers(
    [LayerSpec("a", 6, 5, 3), LayerSpec("b", 4, 8, 2), LayerSpec("c", 7, 6, 1)]
)
RANK1 = Layout.from_layers([LayerSpec("a", 6, 5), LayerSpec("b", 4, 8)])
KERNELS = ["left", "right", "delta", "left+delta", "left+right+delta"]
WAYS = [{"kernel": kernel, "whiten": whiten} for kernel in KERNELS for whiten in (None, 0.3)]
every_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: f"{way['kernel']} {way['whiten']}")


def rows(n: int = 20, layout: Layout = LAYOUT, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, layout.size))


def split(X: np.ndarray, layout: Layout = LAYOUT) -> list[tuple[np.ndarray, np.ndarray]]:
    return [
        (X[:, down].reshape(-1, *layer.down_shape), X[:, up].reshape(-1, *layer.up_shape))
        for layer, down, up in layout.pairs()
    ]


def joined(pairs: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    return np.concatenate([m.reshape(len(m), -1) for pair in pairs for m in pair], axis=1)


def test_scores_are_those_of_principal_components_of_formed_updates() -> None:
    X, new = rows(), rows(5, seed=4)
    updates = [
        np.concatenate([(up @ down).reshape(len(up), -1) for down, up in split(some)], axis=1)
        for some in (X, new)
    ]
    reference = PCA(6, svd_solver="full").fit(updates[0])
    ours = DeltaPCA(
        layout=LAYOUT, n_components=6, kernel="delta", normalize=False, whiten=None
    ).fit(X)
    for some, update in zip((X, new), updates, strict=True):
        expected = np.abs(reference.transform(update))
        np.testing.assert_allclose(np.abs(ours.transform(some)), expected, atol=EXACT)


@every_way
def test_scores_are_those_of_scikit_learn_on_the_summed_kernel(way: dict[str, Any]) -> None:
    X = rows()
    gram = sum(
        delta_gram(down, up, kernel, whiten=way["whiten"])  # type: ignore[arg-type]
        for down, up in split(X)
        for kernel in way["kernel"].split("+")
    )
    reference = KernelPCA(5, kernel="precomputed", eigen_solver="dense").fit_transform(gram)
    ours = DeltaPCA(layout=LAYOUT, n_components=5, **way)
    np.testing.assert_allclose(np.abs(ours.fit_transform(X)), np.abs(reference), atol=EXACT)
    np.testing.assert_allclose(np.abs(ours.transform(X)), np.abs(reference), atol=EXACT)


@every_way
@pytest.mark.parametrize("normalize", [True, False])
def test_what_leaves_the_updates_leaves_the_features(way: dict[str, Any], normalize: bool) -> None:
    X, new = rows(), rows(6, seed=4)
    fitted = DeltaPCA(layout=LAYOUT, n_components=5, normalize=normalize, **way).fit(X)
    expected = fitted.transform(new)
    rng = np.random.default_rng(8)
    mixed, flipped = [], []
    for down, up in split(new):
        rank = down.shape[1]
        mixing = rng.standard_normal((len(new), rank, rank)) + 2 * np.eye(rank)
        mixed.append((np.linalg.inv(mixing) @ down, up @ mixing))
        flipped.append((-down, -up))
    for other in (mixed, flipped):
        np.testing.assert_allclose(fitted.transform(joined(other)), expected, atol=EXACT)


@every_way
def test_size_of_layers_does_not_matter_when_normalised(way: dict[str, Any]) -> None:
    X = rows()
    scales = np.exp(np.random.default_rng(3).standard_normal((len(X), 3)))
    scaled = joined(
        [(down, scales[:, k, None, None] * up) for k, (down, up) in enumerate(split(X))]
    )
    expected = DeltaPCA(layout=LAYOUT, n_components=5, **way).fit_transform(X)
    got = DeltaPCA(layout=LAYOUT, n_components=5, **way).fit_transform(scaled)
    np.testing.assert_allclose(got, expected, atol=EXACT)


@every_way
def test_padded_rank_gives_the_same_features(way: dict[str, Any]) -> None:
    X = rows(layout=RANK1)
    wide = Layout.from_layers([LayerSpec("a", 6, 5, 3), LayerSpec("b", 4, 8, 2)])
    padded = []
    for (down, up), layer in zip(split(X, RANK1), wide.layers, strict=True):
        more = ((0, 0), (0, layer.rank - 1), (0, 0))
        padded.append((np.pad(down, more), np.pad(up, (more[0], more[2], more[1]))))
    expected = DeltaPCA(layout=RANK1, n_components=5, **way).fit_transform(X)
    got = DeltaPCA(layout=wide, n_components=5, **way).fit_transform(joined(padded))
    np.testing.assert_allclose(got, expected, atol=EXACT)


@every_way
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("landmarks", [None, 9])
def test_zeros_give_finite_features(
    way: dict[str, Any], normalize: bool, landmarks: int | None
) -> None:
    X = rows()
    X[3] = 0  # an adapter
    X[:, LAYOUT.matrices[1].columns] = 0  # a layer of every adapter
    X[5, LAYOUT.matrices[5].columns] = 0  # a layer of one
    options = {"layout": LAYOUT, "n_components": 5, "normalize": normalize, "landmarks": landmarks}
    assert np.isfinite(DeltaPCA(**options, **way).fit_transform(X)).all()
    assert not DeltaPCA(**options, **way).fit_transform(np.zeros_like(X)).any()


@every_way
def test_rounding_noise_in_a_dead_layer_does_not_count(way: dict[str, Any]) -> None:
    dead, noisy = rows(), rows()
    dead[:, LAYOUT.matrices[3].columns] = 0
    noisy[:, LAYOUT.matrices[3].columns] *= 1e-8
    expected = DeltaPCA(layout=LAYOUT, n_components=5, **way).fit(dead)
    got = DeltaPCA(layout=LAYOUT, n_components=5, **way).fit(noisy)
    np.testing.assert_allclose(got.transform(noisy), expected.transform(dead), atol=EXACT)
    small = 1e-8 * rows()  # small everywhere is not dead
    np.testing.assert_allclose(
        DeltaPCA(layout=LAYOUT, n_components=5, **way).fit_transform(small),
        DeltaPCA(layout=LAYOUT, n_components=5, **way).fit_transform(rows()),
        atol=EXACT,
    )


def test_new_rows_are_whitened_by_the_training_rows_alone() -> None:
    fitted = DeltaPCA(layout=LAYOUT, n_components=5, whiten=0.3).fit(rows())
    new = rows(8, seed=4)
    one_by_one = np.concatenate([fitted.transform(row[None]) for row in new])
    np.testing.assert_allclose(one_by_one, fitted.transform(new), atol=EXACT)


def test_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"layout": LAYOUT, "n_components": 5, "whiten": 0.3}
    expected = DeltaPCA(**options).fit(rows()).transform(rows(8, seed=4))
    monkeypatch.setattr("lora_ws.featurizers.updates.BLOCK_ROWS", 3)
    monkeypatch.setattr("lora_ws.featurizers.update_parts.BLOCK_BYTES", 1)
    got = DeltaPCA(**options).fit(rows()).transform(rows(8, seed=4))
    np.testing.assert_allclose(got, expected, atol=EXACT)


@pytest.mark.parametrize("panel", [1, 4, 128])
def test_panels_of_whitening_do_not_matter(panel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"layout": LAYOUT, "n_components": 5, "kernel": "left+right", "whiten": 0.3}
    expected = DeltaPCA(**options).fit(rows()).transform(rows(8, seed=4))
    monkeypatch.setattr("lora_ws.functional.whitening.PANEL", panel)
    got = DeltaPCA(**options).fit(rows()).transform(rows(8, seed=4))
    np.testing.assert_allclose(got, expected, atol=EXACT)


def test_whole_whitening_matrices_of_earlier_bundles_are_read() -> None:
    layout = Layout.from_layers([LayerSpec("a", 6, 150, 2), LayerSpec("b", 4, 8)])
    options = {"layout": layout, "n_components": 5, "kernel": "left", "whiten": 0.3}
    fitted = DeltaPCA(**options).fit(rows(layout=layout))
    expected = fitted.transform(rows(8, layout, seed=4))
    whole = []
    for (_, width), (_, panels) in zip(fitted._sides(), fitted._stored_whiteners(), strict=True):
        matrix, start = np.zeros((width, width)), 0
        for panel in panels:
            matrix[: len(panel), start : start + panel.shape[1]] = panel
            start += panel.shape[1]
        whole.append(matrix.ravel())
    assert len(fitted.whiteners_) < sum(map(len, whole))
    fitted.whiteners_ = np.concatenate(whole)
    np.testing.assert_allclose(fitted.transform(rows(8, layout, seed=4)), expected, atol=EXACT)


def test_landmarks_keep_few_rows_and_are_drawn_by_the_seed() -> None:
    X = rows(40)
    exact = DeltaPCA(layout=RANK1, n_components=3, kernel="delta", normalize=False)
    few = DeltaPCA(
        layout=RANK1, n_components=3, kernel="delta", normalize=False, whiten=None, landmarks=12
    )
    X = rows(40, RANK1)
    scores = few.fit_transform(X)
    assert few.landmarks_.shape == (12, RANK1.size)
    np.testing.assert_allclose(few.transform(X), scores, atol=EXACT)
    np.testing.assert_array_equal(few.fit_transform(X), scores)
    assert not np.array_equal(few.set_params(seed=1).fit_transform(X), scores)
    all_kept = few.set_params(landmarks=400).fit_transform(X)
    expected = exact.set_params(whiten=None).fit_transform(X)
    np.testing.assert_array_equal(all_kept, expected)


def test_landmarks_that_span_the_updates_are_exact() -> None:
    layout = Layout.from_layers([LayerSpec("a", 3, 2), LayerSpec("b", 2, 2)])
    X = rows(60, layout)
    options: dict[str, Any] = {"layout": layout, "n_components": 8, "kernel": "delta"}
    exact = DeltaPCA(**options).fit_transform(X)
    few = DeltaPCA(**options, landmarks=25).fit_transform(X)
    np.testing.assert_allclose(np.abs(few), np.abs(exact), atol=EXACT)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"whiten": None}, {"kernel": "right", "whiten": 0.5}, {"landmarks": 20}]
)
def test_bundle_gives_the_scores_of_the_classifier(
    make_zoo: Callable[..., AdapterSet], tmp_path: Path, options: dict[str, Any]
) -> None:
    store = make_zoo(n=80).save(tmp_path / "store")
    fit = FitSpec(max_epochs=3)
    featurizer = DeltaPCA(n_components=10, **options)
    spec = ExperimentSpec(str(store), featurizer=featurizer, model=MLP(hidden=(16, 8)), fit=fit)
    prepared = prepare(spec)
    fitted = fit_seed(spec, prepared, 0)
    bundle = make_bundle(fitted)
    restored = Bundle.load(bundle.save(tmp_path / "bundle"))
    some = prepared.split.test
    assert bundle.confidence.calibration is not None
    logits = fitted.network(prepared.features[some]).detach()
    logits = logits / bundle.confidence.calibration.temperature
    ours = restored.predict_proba(prepared.adapters.weights[some], prepared.adapters.layout)
    atol = rounding(terms_of(fitted.network), size=1 + float(logits.abs().max()))
    np.testing.assert_allclose(ours, logits.softmax(1), rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": "both"}, r"kernel='both'.*left, right, delta"),
        ({"kernel": "left+left"}, "each once"),
        ({"n_components": 20}, "expected 1 to 19 components"),
        ({"n_components": 0}, "expected 1 to 19 components"),
        ({"landmarks": 5, "n_components": 6}, "5 landmarks; use n_components <= 5"),
        ({"landmarks": 0}, "use None to keep all"),
        ({"whiten": 0.0}, "above 0 and up to 1"),
        ({"whiten": 2.0}, "above 0 and up to 1"),
        ({"max_memory_mb": 0}, "no number of landmarks fits"),
    ],
)
def test_wrong_parameters_are_refused_at_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DeltaPCA(layout=LAYOUT, **options).fit(rows())
    with pytest.raises(ConfigError, match="at least 2 training rows"):
        DeltaPCA(layout=LAYOUT).fit(rows(1))


def test_too_many_rows_for_the_memory_name_the_landmarks_that_fit() -> None:
    layout = Layout.from_layers([LayerSpec("a", 2, 2)])
    X = np.random.default_rng(0).standard_normal((400, layout.size))
    with pytest.raises(ConfigError, match=r"set landmarks lower \(landmarks=(\d+) fits\)") as error:
        DeltaPCA(layout=layout, max_memory_mb=2).fit(X)
    fits = int(str(error.value).split("landmarks=")[1].split(" ")[0])
    DeltaPCA(layout=layout, max_memory_mb=2, landmarks=fits, n_components=2).fit(X)

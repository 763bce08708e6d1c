"""UpdateKernel: the kernel of formed updates, that of DeltaPCA, and what a kernel SVM takes."""

from typing import Any

import numpy as np
import pytest
from scipy.optimize import nnls
from sklearn.decomposition import KernelPCA
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.svm import SVC
from tolerances import EXACT, rounding

from lora_ws import UpdateKernel
from lora_ws.adapters import LayerSpec, Layout
from lora_ws.errors import ConfigError
from lora_ws.featurizers import DeltaPCA
from lora_ws.functional import delta_gram
from lora_ws.models.estimators import fit_estimator
from lora_ws.models.normalizers import ColumnScaler

LAYOUT = Layout.from_layers(
    [LayerSpec("a", 6, 5, 3), LayerSpec("b", 4, 8, 2), LayerSpec("c", 7, 6, 1)]
)
WAYS = [
    {"kernel": kernel, "whiten": whiten}
    for kernel in ("left", "right", "delta", "left+delta")
    for whiten in (None, 0.3)
]
every_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: f"{way['kernel']} {way['whiten']}")


def rows(n: int = 20, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, LAYOUT.size))


def factors(X: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    return [
        (X[:, down].reshape(-1, *layer.down_shape), X[:, up].reshape(-1, *layer.up_shape))
        for layer, down, up in LAYOUT.pairs()
    ]


@pytest.mark.parametrize("kernel", ["left", "right", "delta"])
@pytest.mark.parametrize("normalize", [True, False])
def test_values_are_inner_products_of_formed_updates(kernel: str, normalize: bool) -> None:
    X, new = rows(), rows(5, seed=4)
    expected = np.zeros((5, 20))
    for (down, up), (own_down, own_up) in zip(factors(new), factors(X), strict=True):
        mine, theirs = up @ down, own_up @ own_down
        if kernel != "delta":
            square = {"left": "nij,nkj->nik", "right": "nji,njk->nik"}[kernel]
            mine, theirs = (np.einsum(square, m, m) for m in (mine, theirs))
        values = np.einsum("nij,mij->nm", mine, theirs)
        if normalize:
            sizes = [np.sqrt(np.square(m).sum((1, 2))) for m in (mine, theirs)]
            values /= np.outer(*sizes)
        expected += values
    fitted = UpdateKernel(layout=LAYOUT, kernel=kernel, normalize=normalize).fit(X)
    # Of raw updates, entries sum products of up to 12 factors of normal numbers.
    scale = 1 if normalize else np.abs(expected).max()
    np.testing.assert_allclose(fitted.transform(new), expected, rtol=0, atol=EXACT * scale)


@every_way
def test_training_rows_give_the_symmetric_kernel_of_the_layers(way: dict[str, Any]) -> None:
    X = rows()
    expected = sum(
        delta_gram(down, up, kernel, whiten=way["whiten"])  # type: ignore[arg-type]
        for down, up in factors(X)
        for kernel in way["kernel"].split("+")
    )
    got = UpdateKernel(layout=LAYOUT, **way).fit_transform(X)
    np.testing.assert_allclose(got, expected, rtol=0, atol=EXACT)
    np.testing.assert_allclose(got, got.T, rtol=0, atol=EXACT)
    assert np.linalg.eigvalsh(got).min() > -EXACT * len(X)


@every_way
@pytest.mark.parametrize("landmarks", [None, 9])
def test_it_is_the_kernel_whose_components_delta_pca_takes(
    way: dict[str, Any], landmarks: int | None
) -> None:
    X, new = rows(), rows(5, seed=4)
    kernel = UpdateKernel(layout=LAYOUT, landmarks=landmarks, seed=3, **way).fit(X)
    scores = DeltaPCA(layout=LAYOUT, n_components=4, landmarks=landmarks, seed=3, **way).fit(X)
    np.testing.assert_array_equal(kernel.landmarks_, scores.landmarks_)
    np.testing.assert_array_equal(
        kernel.transform(new) @ scores.dual_ - scores.offset_, scores.transform(new)
    )
    if landmarks is None:
        reference = KernelPCA(4, kernel="precomputed", eigen_solver="dense")
        expected = np.abs(reference.fit_transform(kernel.transform(X)))
        atol = EXACT * expected.max()
        np.testing.assert_allclose(np.abs(scores.transform(X)), expected, rtol=0, atol=atol)


def test_a_kernel_machine_takes_it_and_a_grid_search_may_vary_it() -> None:
    X, y = planted()
    model = make_pipeline(UpdateKernel(layout=LAYOUT), SVC(kernel="precomputed"))
    grid = {"updatekernel__kernel": ["left", "right"], "svc__C": [0.1, 1.0]}
    search = GridSearchCV(model, grid, cv=3).fit(X, y)
    # Classes differ in what updates write.
    assert search.best_params_["updatekernel__kernel"] == "left"
    assert search.best_score_ > 0.8


def planted() -> tuple[np.ndarray, np.ndarray]:
    X, y = rows(60), np.arange(60) % 3
    directions = np.random.default_rng(7).standard_normal((3, 6))
    _, up = factors(X)[2]
    X[:, -up.shape[1] :] = directions[y] + 0.3 * up[:, :, 0]
    return X, y


def test_without_landmarks_alone_the_columns_are_the_training_rows() -> None:
    X, y = planted()
    train, svc = np.arange(40), SVC(kernel="precomputed")
    for landmarks in (None, 25):
        kernel = UpdateKernel(layout=LAYOUT, landmarks=landmarks).fit(X[train]).transform(X)
        scaler = ColumnScaler(kernel.shape[1])
        values = kernel.astype(np.float32)
        if landmarks:
            with pytest.raises(ConfigError, match="UpdateKernel with landmarks null"):
                fit_estimator(svc, scaler, values, y, train, 3, seed=0)
        else:
            fit_estimator(svc, scaler, values, y, train, 3, seed=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": "both"}, r"UpdateKernel\(kernel='both'\).*left, right, delta, probe"),
        ({"probes": 0}, r"UpdateKernel\(probes=0\): expected at least 1"),
        ({"weights": "best"}, r"UpdateKernel\(weights='best'\): expected equal, alignment or"),
        ({"landmarks": 0}, r"UpdateKernel\(landmarks=0\).*use None to keep all"),
        ({"whiten": 2.0}, "above 0 and up to 1"),
        ({"max_memory_mb": 0}, "UpdateKernel.*no number of landmarks fits"),
    ],
)
def test_wrong_parameters_are_refused_at_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        UpdateKernel(layout=LAYOUT, **options).fit(rows())
    with pytest.raises(ConfigError, match="UpdateKernel: expected at least 2 training rows"):
        UpdateKernel(layout=LAYOUT).fit(rows(1))


def text_layout(rank: int) -> Layout:
    """Two modules that read the text, one in a block of its own, and one that reads an image."""
    return Layout.from_layers(
        [
            LayerSpec("down.0.attn2.to_v", 9, 10, rank),
            LayerSpec("mid.0.attn1.to_v", 12, 9, rank),
            LayerSpec("up.0.attn2.to_v", 9, 11, rank),
        ]
    )


def dense_probe_kernel(
    updates: list[np.ndarray], names: list[str], y: np.ndarray, new: list[np.ndarray], probes: int
) -> list[np.ndarray]:
    """Each layer's cosine of dW P, from updates that are formed."""
    moments: dict[str, Any] = {}
    for name, update in zip(names, updates, strict=True):
        unit = update / np.sqrt(np.square(update).sum((1, 2), keepdims=True))
        source = "text" if "attn2" in name else name
        pairs = [
            unit[i].T @ unit[j]
            for i in range(len(y))
            for j in range(len(y))
            if i != j and y[i] == y[j]
        ]
        moments[source] = moments.get(source, 0) + np.sum(pairs, axis=0)
    kernels = []
    for name, update, other in zip(names, updates, new, strict=True):
        values, vectors = np.linalg.eigh(moments["text" if "attn2" in name else name])
        P = vectors[:, -probes:] * np.sqrt(np.maximum(values[-probes:], 0))
        mine, theirs = ((u @ P).reshape(len(u), -1) for u in (other, update))
        own, others = (np.linalg.norm(m, axis=1) for m in (mine, theirs))
        kernels.append(mine @ theirs.T / np.outer(own, others))
    return kernels


@pytest.mark.parametrize("rank", [1, 4, 8])
def test_probe_compares_what_formed_updates_answer_to_common_inputs(rank: int) -> None:
    layout, rng, y = text_layout(rank), np.random.default_rng(rank), np.arange(12) % 3
    X, new = rng.standard_normal((12, layout.size)), rng.standard_normal((5, layout.size))
    updates, others = (
        [
            rows[:, up].reshape(-1, *layer.up_shape) @ rows[:, down].reshape(-1, *layer.down_shape)
            for layer, down, up in layout.pairs()
        ]
        for rows in (X, new)
    )
    names = [layer.name for layer in layout.layers]
    expected = dense_probe_kernel(updates, names, y, others, probes=3)
    equal = UpdateKernel(layout=layout, kernel="probe", probes=3, weights="equal").fit(X, y)
    np.testing.assert_allclose(equal.transform(new), sum(expected), rtol=0, atol=1e-10)
    assert equal.probes_.size == 3 * (9 + 12)
    weighed = UpdateKernel(layout=layout, kernel="probe", probes=3).fit(X, y)
    mixed = sum(w * k for w, k in zip(weighed.weights_, expected, strict=True))
    np.testing.assert_allclose(weighed.transform(new), mixed, rtol=0, atol=1e-10)
    same = (y[:, None] == y).astype(float)
    trained = dense_probe_kernel(updates, names, y, updates, probes=3)
    by_hand = [max(0.0, reference_alignment(k, same)) / np.trace(centred(k)) for k in trained]
    by_hand = np.array(by_hand) / np.mean(by_hand)
    np.testing.assert_allclose(weighed.weights_, by_hand, atol=1e-8)


def centred(gram: np.ndarray) -> np.ndarray:
    H = np.eye(len(gram)) - 1 / len(gram)
    return H @ gram @ H


def reference_alignment(gram: np.ndarray, same: np.ndarray) -> float:
    pairs = np.triu_indices(len(gram), 1)
    a, b = centred(gram)[pairs], centred(same)[pairs]
    return float(a @ b / np.sqrt(a @ a * (b @ b)))


@pytest.mark.parametrize("rank", [1, 4])
def test_joint_weights_are_non_negative_least_squares_on_the_kernel_of_labels(rank: int) -> None:
    layout, y = text_layout(rank), np.arange(14) % 3
    X = np.random.default_rng(rank).standard_normal((14, layout.size))
    pairs = np.triu_indices(14, 1)
    grams = []
    for layer in layout.layers:
        for kernel in ("left", "right", "delta"):
            one = UpdateKernel(layout=layout, matrices=(layer.name,), kernel=kernel)
            gram = one.set_params(weights="equal").fit_transform(X)
            # The same kernel twice: together they count once.
            grams += [gram, gram] if layer.name.startswith("mid") and kernel == "left" else [gram]
    parts = np.stack([centred(gram)[pairs] / np.trace(centred(gram)) for gram in grams], axis=1)
    target = centred((y[:, None] == y).astype(float))[pairs]
    best, distance = nnls(parts, target)
    fitted = UpdateKernel(layout=layout, kernel="left+right+delta", weights="alignf").fit(X, y)
    assert 0 < np.count_nonzero(fitted.weights_) < 9
    got = fitted.transform(X)
    wanted = sum(w / np.trace(centred(k)) * k for w, k in zip(best, grams, strict=True))
    np.testing.assert_allclose(got / np.trace(got), wanted / np.trace(wanted), atol=1e-9)
    # No other weights bring the sum of kernels nearer to the labels.
    cosine = reference_alignment(got, (y[:, None] == y).astype(float))
    assert cosine == pytest.approx(np.sqrt(1 - distance**2 / (target @ target)), abs=1e-9)
    for weights in ("equal", "alignment"):
        other = UpdateKernel(layout=layout, kernel="left+right+delta", weights=weights)
        theirs = reference_alignment(other.fit(X, y).transform(X), (y[:, None] == y).astype(float))
        assert theirs <= cosine + 1e-9


def test_joint_weights_in_blocks_are_those_of_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    X, y = planted()
    fitted = UpdateKernel(layout=LAYOUT, kernel="left", weights="alignf").fit(X, y)
    monkeypatch.setattr("lora_ws.featurizers.updates.BLOCK_BYTES", 8 * 60 * 3 * 7)
    blocks = UpdateKernel(layout=LAYOUT, kernel="left", weights="alignf").fit(X, y)
    np.testing.assert_allclose(blocks.weights_, fitted.weights_, rtol=0, atol=EXACT)
    assert fitted.weights_.argmax() == 2
    assert not UpdateKernel(layout=LAYOUT, weights="alignf").fit(X, np.zeros(60)).weights_.size


def test_weights_take_the_layer_that_tells_classes_and_drop_noise() -> None:
    X, y = planted()
    fitted = UpdateKernel(layout=LAYOUT, kernel="left").fit(X, y)
    assert fitted.weights_.argmax() == 2
    assert fitted.weights_[2] > 5 * fitted.weights_[:2].max()
    assert not UpdateKernel(layout=LAYOUT, kernel="left").fit(X).weights_.size
    # Several labels a row: those of equal ones are a class.
    several = np.eye(3, dtype=int)[y]
    alike = UpdateKernel(layout=LAYOUT, kernel="left").fit(X, several)
    np.testing.assert_array_equal(alike.weights_, fitted.weights_)
    assert not UpdateKernel(layout=LAYOUT).fit(X, np.arange(60)).weights_.size
    # One class says nothing about layers.
    assert not UpdateKernel(layout=LAYOUT).fit(X, np.zeros(60)).weights_.size


def test_probes_find_the_sign_that_a_random_start_hides() -> None:
    """Updates G_c A with random A: what they write has the sign of A's part along one input."""
    layout, rng = Layout.from_layers([LayerSpec("0.attn2.to_v", 12, 8)]), np.random.default_rng(0)
    y, text, written = np.arange(240) % 2, rng.standard_normal(12), rng.standard_normal(8)
    a = rng.standard_normal((240, 12))
    sign = np.where(y, 1.0, -1.0)
    b = (sign * (a @ text))[:, None] * written + 0.5 * rng.standard_normal((240, 8))
    X, train, test = np.hstack([a, b]), np.arange(160), np.arange(160, 240)
    score = {}
    for kernel in ("left", "probe"):
        model = make_pipeline(
            UpdateKernel(layout=layout, kernel=kernel, probes=1), SVC(kernel="precomputed")
        )
        score[kernel] = model.fit(X[train], y[train]).score(X[test], y[test])
    assert score["probe"] > 0.9
    # Chance of a fair coin over 80 rows to exceed this is below 1e-4.
    assert score["left"] < 0.72


def test_labels_that_are_not_one_a_row_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"one label for each of the 20 rows, got \(3,\)"):
        UpdateKernel(layout=LAYOUT).fit(rows(), np.arange(3))


@pytest.mark.parametrize("kernel", ["left+delta", "left+right+delta+probe", "right", "probe"])
@pytest.mark.parametrize("whiten", [None, 0.3])
def test_single_precision_gives_the_kernel_of_double(kernel: str, whiten: float | None) -> None:
    X, new = rows().astype(np.float32), rows(7, seed=4).astype(np.float32)
    a = LAYOUT.matrices[0]
    new[2, a.columns] = np.tile(new[2, a.columns][: a.shape[1]], a.shape[0])  # A of rank 1
    new[3, a.columns] = 0
    options: dict[str, Any] = {"layout": LAYOUT, "kernel": kernel, "whiten": whiten, "probes": 2}
    y = np.arange(len(X)) % 2
    single, double = (UpdateKernel(**options).fit(some, y) for some in (X, X.astype(np.float64)))
    # Whitening divides by as little as the root of 0.3, and each side is in a kernel twice.
    bound = rounding(8 * 3 * 3, size=len(LAYOUT.layers) * 4 / 0.3)
    got, expected = single.transform(new), double.transform(new.astype(np.float64))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=0, atol=bound)

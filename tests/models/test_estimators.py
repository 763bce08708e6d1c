"""Classifiers and regressors of scikit-learn as tensors compute what scikit-learn computes.

Networks compute in float32, scikit-learn in float64 from the same rows, so bounds follow from
float32 alone: a sum of n products errs by at most (n + 1) eps times the sum of their sizes.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.base import BaseEstimator, clone
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import (
    LinearRegression,
    LogisticRegression,
    Perceptron,
    Ridge,
    RidgeClassifier,
    RidgeClassifierCV,
    SGDClassifier,
)
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.multiclass import OneVsRestClassifier
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from sklearn.pipeline import make_pipeline
from sklearn.svm import SVC, LinearSVC, NuSVC
from tolerances import rounding

from lora_ws.errors import ConfigError
from lora_ws.models import InputSpec
from lora_ws.models.estimators import EstimatorModule, fit_estimator, to_network
from lora_ws.models.fitted import Identity
from lora_ws.models.gaussian_process import GaussianProcess
from lora_ws.models.kernel_machine import KernelMachine
from lora_ws.models.kernel_machine_module import KernelMachineModule
from lora_ws.models.neighbours import Neighbours
from lora_ws.models.normalizers import ColumnScaler
from lora_ws.models.one_vs_rest import OneVsRestSVC

EPS = float(np.finfo(np.float32).eps)
WIDTH = 12
CLASSES = [2, 3, 10]
some_classes = pytest.mark.parametrize("classes", CLASSES)


def blobs(classes: int, each: int = 15, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Overlapping classes, so that no classifier is right everywhere and votes tie."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((classes, WIDTH))
    labels = np.arange(classes * each) % classes
    rows = centres[labels] + 1.5 * rng.standard_normal((len(labels), WIDTH))
    return rows.astype(np.float32), labels


def tensors_of(estimator: Any, width: int, classes: int) -> Any:
    return to_network(estimator, InputSpec(width), classes)[1]


def outputs(module: torch.nn.Module, rows: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return module(torch.from_numpy(rows)).numpy()


SVCS = {
    "linear": SVC(kernel="linear", C=3),
    "rbf": SVC(C=10),
    "rbf auto": SVC(gamma="auto"),
    "rbf gamma": SVC(gamma=0.1),
    "poly": SVC(kernel="poly", coef0=0.5),
    "quadratic": SVC(kernel="poly", degree=2, gamma=0.1),
    "sigmoid": SVC(kernel="sigmoid", gamma=0.02, coef0=-0.1),
    "nu": NuSVC(nu=0.2),
    "weighted": SVC(class_weight="balanced"),
}


def kernel_bound(module: KernelMachineModule, rows: np.ndarray) -> np.ndarray:
    """How far float32 margins may be off ``[rows, pairs]``."""
    own = module.options
    weight, bias = (np.abs(v.numpy().astype(np.float64)) for v in (module.weight, module.bias))
    sizes, steps = np.abs(rows).astype(np.float64), WIDTH + 4
    if own.kernel == "rbf":
        # |d exp(-t)| = exp(-t) dt, and t exp(-t) < 1 turns the relative error of t into this.
        sizes = np.ones((len(rows), own.vectors))
    elif own.kernel in ("poly", "sigmoid"):
        sizes = own.gamma * sizes @ np.abs(module.vectors.numpy().T) + abs(own.coef0)
        if own.kernel == "poly":
            sizes, steps = sizes**own.degree, steps * own.degree
    return EPS * (weight.shape[1] + steps + 4) * (sizes @ weight.T + bias)


@some_classes
@pytest.mark.parametrize("estimator", SVCS.values(), ids=SVCS)
def test_support_vector_machines_give_margins_scores_and_classes(
    estimator: Any, classes: int
) -> None:
    rows, labels = blobs(classes)
    new, _ = blobs(classes, seed=1)
    fitted = clone(estimator).set_params(break_ties=True).fit(rows, labels)
    check_machine(fitted, tensors_of(fitted, WIDTH, classes), new, classes)


@some_classes
def test_precomputed_kernels_need_no_vectors(classes: int) -> None:
    rows, labels = blobs(classes)
    new, _ = blobs(classes, seed=1)
    train, test = (rbf_kernel(some, rows, gamma=0.05).astype(np.float32) for some in (rows, new))
    fitted = SVC(kernel="precomputed", C=10, break_ties=True).fit(train, labels)
    module = tensors_of(fitted, len(rows), classes)
    assert isinstance(module.normalizer, Identity)
    assert not module.vectors.numel()
    check_machine(fitted, module, test, classes)


def check_machine(fitted: Any, module: Any, new: np.ndarray, classes: int) -> None:
    bound, got = kernel_bound(module, new), outputs(module, new)
    with torch.no_grad():
        margins = module.margins(torch.from_numpy(new)).numpy()
    if classes == 2:
        margin = fitted.decision_function(new)[:, None]
        assert (np.abs(got - margin / 2 * [-1, 1]) <= bound).all()
        np.testing.assert_array_equal(margins[:, 0] < 0, fitted.predict(new) == 1)
        return
    fitted.set_params(decision_function_shape="ovo")
    expected = fitted.decision_function(new)
    assert (np.abs(margins - expected) <= bound).all()
    clear = (np.abs(expected) > bound).all(axis=1)
    assert clear.mean() > 0.5
    # s / (3 |s| + 3) has slopes up to 1/3; votes count up to the number of classes.
    loose = bound.sum(axis=1, keepdims=True) / 3 + 4 * EPS * classes
    fitted.set_params(decision_function_shape="ovr")
    assert (np.abs(got - fitted.decision_function(new)) <= loose)[clear].all()
    np.testing.assert_array_equal(got.argmax(1)[clear], fitted.predict(new)[clear])


@some_classes
def test_one_machine_a_class_is_that_of_scikit_learn(classes: int) -> None:
    rows, labels = blobs(classes)
    new, _ = blobs(classes, seed=1)
    train, test = (rbf_kernel(some, rows, gamma=0.05).astype(np.float32) for some in (rows, new))
    fitted = OneVsRestSVC(C=10).fit(train, labels)
    theirs = OneVsRestClassifier(SVC(kernel="precomputed", C=10)).fit(train, labels)
    expected = theirs.decision_function(test)
    # Both add the same float64 products, in another order.
    size = np.abs(fitted.coef_).sum(axis=1).max()
    np.testing.assert_allclose(fitted.decision_function(test), expected, rtol=0, atol=1e-9 * size)
    np.testing.assert_array_equal(fitted.predict(test), theirs.predict(test))
    scaler = ColumnScaler(len(rows)).fit(train, np.arange(len(rows)))
    every = np.arange(len(rows))
    module: Any = fit_estimator(OneVsRestSVC(C=10), scaler, train, labels, every, classes, 0)
    got = outputs(module, test)
    if classes == 2:
        expected = expected[:, None] / 2 * [-1, 1]
    np.testing.assert_allclose(got, expected, rtol=0, atol=rounding(len(rows), size=size))
    assert isinstance(module.normalizer, Identity)
    assert module.network.normalize is False


LINEAR = {
    "logistic": LogisticRegression(C=0.5),
    "logistic without intercept": LogisticRegression(fit_intercept=False),
    "ridge": RidgeClassifier(),
    "ridge, alpha chosen": RidgeClassifierCV(),
    "linear svc": LinearSVC(dual=False),
    "linear svc without intercept": LinearSVC(fit_intercept=False),
    "sgd": SGDClassifier(random_state=0),
    "perceptron": Perceptron(),
    "discriminant": LinearDiscriminantAnalysis(),
}


@some_classes
@pytest.mark.parametrize("estimator", LINEAR.values(), ids=LINEAR)
def test_linear_classifiers_give_decisions_and_classes(estimator: Any, classes: int) -> None:
    rows, labels = blobs(classes)
    new, _ = blobs(classes, seed=1)
    fitted = clone(estimator).fit(rows, labels)
    got = outputs(tensors_of(fitted, WIDTH, classes), new)
    sizes = np.abs(new) @ np.abs(np.atleast_2d(fitted.coef_)).T + np.abs(fitted.intercept_)
    # Twice, as some fit and predict in float32 themselves.
    bound = 2 * EPS * (WIDTH + 2) * sizes.max(axis=1, keepdims=True)
    expected = fitted.decision_function(new)
    if classes == 2:
        expected = expected[:, None] / 2 * [-1, 1]
    assert (np.abs(got - expected) <= bound).all()
    np.testing.assert_array_equal(got.argmax(1), fitted.predict(new))
    if isinstance(estimator, LogisticRegression | LinearDiscriminantAnalysis):
        proba = torch.from_numpy(got).softmax(1).numpy()
        # Rows of the softmax's Jacobian have absolute sums of at most 1/2.
        loose = bound / 2 + EPS * (classes + 2)
        assert (np.abs(proba - fitted.predict_proba(new)) <= loose).all()


@some_classes
def test_nearest_centroid_is_linear(classes: int) -> None:
    rows, labels = blobs(classes)
    new, _ = blobs(classes, seed=1)
    for shrink in (None, 0.3):
        fitted = NearestCentroid(shrink_threshold=shrink).fit(rows, labels)
        got = outputs(tensors_of(fitted, WIDTH, classes), new)
        distances = np.square(new[:, None] - fitted.centroids_).sum(axis=2)
        expected = (np.square(new).sum(axis=1, keepdims=True) - distances) / 2
        bound = EPS * (WIDTH + 2) * (np.square(new).sum(axis=1, keepdims=True) + 2 * distances)
        assert (np.abs(got - expected) <= bound).all()
        np.testing.assert_array_equal(got.argmax(1), fitted.predict(new))


NEIGHBOURS = {
    "five": KNeighborsClassifier(),
    "one": KNeighborsClassifier(1),
    "manhattan": KNeighborsClassifier(7, p=1),
    "minkowski": KNeighborsClassifier(4, p=3),
    "weighted": KNeighborsClassifier(6, weights="distance"),
    "by name": KNeighborsClassifier(metric="euclidean", weights=None),
}


@some_classes
@pytest.mark.parametrize("estimator", NEIGHBOURS.values(), ids=NEIGHBOURS)
def test_neighbours_give_probabilities(estimator: Any, classes: int) -> None:
    rows, labels = blobs(classes)
    # With training rows among them, whose own distance is 0.
    new = np.concatenate([blobs(classes, seed=1)[0], rows[:5]])
    fitted = clone(estimator).fit(rows, labels)
    got = outputs(tensors_of(fitted, WIDTH, classes), new)
    expected = np.maximum(fitted.predict_proba(new), EPS)
    # A distance errs by about (width + 3) eps of itself; a share sums k and divides once.
    bound = EPS * (2 * (WIDTH + 3) + estimator.n_neighbors + 4)
    assert np.isfinite(got).all()
    assert (np.abs(np.exp(got) - expected) <= bound).all()
    if estimator.weights == "distance":
        np.testing.assert_array_equal(got.argmax(1), fitted.predict(new))


REGRESSORS = {
    "kernel ridge": KernelRidge(alpha=0.3, kernel="precomputed"),
    "linear kernel ridge": KernelRidge(alpha=0.3),
    "Gaussian process": GaussianProcess(),
    "ridge": Ridge(),
    "least squares": LinearRegression(),
    "rbf kernel ridge": KernelRidge(kernel="rbf"),
    "forest": RandomForestRegressor(5, random_state=7),
}


@pytest.mark.parametrize("outputs_", [1, 3])
@pytest.mark.parametrize("name", REGRESSORS)
def test_regressors_predict_what_differs_from_the_mean(name: str, outputs_: int) -> None:
    rows, labels = blobs(3)
    new, _ = blobs(3, seed=1)
    numbers = np.eye(3)[labels][:, :outputs_] + 5
    scaler = ColumnScaler(WIDTH).fit(rows, np.arange(len(rows)))
    if pairwise := name in ("kernel ridge", "Gaussian process"):
        rows, new = (rbf_kernel(some, rows, gamma=0.05).astype(np.float32) for some in (rows, new))
    every, given = np.arange(len(rows)), REGRESSORS[name]
    module: Any = fit_estimator(given, scaler, rows, numbers, every, outputs_, seed=7)
    mine, theirs = (
        some if pairwise else scaler(torch.from_numpy(some)).numpy() for some in (rows, new)
    )
    wanted = numbers - numbers.mean(axis=0)
    # A column is refused, or warned about, by some.
    fitted: Any = clone(given).fit(mine, wanted if outputs_ > 1 else wanted[:, 0])
    expected = fitted.predict(theirs).reshape(len(new), -1) + numbers.mean(axis=0)
    got = outputs(module, new)
    size = 6.0
    if pairwise:
        size += (np.abs(theirs) @ np.abs(fitted.dual_coef_.reshape(len(rows), -1))).max()
    np.testing.assert_allclose(got, expected, rtol=0, atol=rounding(len(rows), size=size))
    assert isinstance(module.normalizer, Identity) == pairwise
    stored = not isinstance(module, EstimatorModule)
    assert stored == (name not in ("rbf kernel ridge", "forest"))
    if not stored:
        with pytest.raises(ConfigError, match=r"cannot be stored as tensors.*KernelRidge"):
            _ = module.network


STORED = {**SVCS, **LINEAR, **NEIGHBOURS, "centroid": NearestCentroid()}


@pytest.mark.parametrize("estimator", STORED.values(), ids=STORED)
def test_a_network_is_restored_from_its_arguments_and_tensors(
    estimator: Any, tmp_path: Path
) -> None:
    rows, labels = blobs(3)
    scaler = ColumnScaler(WIDTH).fit(rows, np.arange(len(rows)))
    module: Any = fit_estimator(estimator, scaler, rows, labels, np.arange(len(rows)), 3, 0)
    save_file(module.state_dict(), tmp_path / "model.safetensors")
    told = json.loads(json.dumps(module.network.get_params()))
    again = type(module.network)(**told).build(InputSpec(WIDTH), 3)
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    np.testing.assert_array_equal(outputs(again, rows), outputs(module, rows))


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["array", "tensor"])
def test_fitting_looks_at_normalized_training_rows_alone(kind: Any) -> None:
    rows, labels = blobs(3)
    rows = 7 * rows + 3
    train = np.arange(0, len(rows), 2)
    scaler = ColumnScaler(WIDTH).fit(rows, train)
    reference = SVC(break_ties=True).fit(
        scaler(torch.from_numpy(rows[train])).numpy(), labels[train]
    )
    spoilt = rows.copy()
    spoilt[1::2] = np.nan
    module = fit_estimator(SVC(), scaler, kind(spoilt), labels, train, 3, seed=0)
    expected = reference.predict(scaler(torch.from_numpy(rows)).numpy())
    np.testing.assert_array_equal(outputs(module, rows).argmax(1), expected)
    assert module.normalizer is not scaler
    raw = torch.from_numpy(rows)
    assert module.embed(raw) is raw


def test_kernels_are_not_scaled_and_must_be_with_all_training_rows() -> None:
    rows, labels = blobs(3)
    train = np.arange(30)
    kernel = rbf_kernel(rows, rows[train], gamma=0.05).astype(np.float32)
    scaler = ColumnScaler(30).fit(kernel, train)
    svc = SVC(kernel="precomputed", break_ties=True)
    module = fit_estimator(svc, scaler, kernel, labels, train, 3, seed=0)
    assert isinstance(module.normalizer, Identity)
    reference = svc.fit(kernel[train], labels[train])
    np.testing.assert_array_equal(outputs(module, kernel).argmax(1), reference.predict(kernel))
    with pytest.raises(ConfigError, match="each of the 30 training rows, got 20 columns"):
        fit_estimator(svc, scaler.select(slice(20)), kernel[:, :20], labels, train, 3, seed=0)


WRAPPED = {
    "forest": RandomForestClassifier(10),
    "one against the rest": OneVsRestClassifier(LinearSVC()),
    "pipeline": make_pipeline(PCA(4, svd_solver="randomized"), SVC()),
    "kernel of its own": SVC(kernel=rbf_kernel),
    "metric of its own": KNeighborsClassifier(metric="cosine"),
    "centroids of the medians": NearestCentroid(metric="manhattan"),
}


@some_classes
@pytest.mark.parametrize("name", [name for name in WRAPPED if "medians" not in name])
def test_other_classifiers_are_asked_and_not_stored(name: str, classes: int) -> None:
    rows, labels = blobs(classes)
    every, scaler = np.arange(len(rows)), ColumnScaler(WIDTH)
    module: Any = fit_estimator(WRAPPED[name], scaler, rows, labels, every, classes, seed=3)
    got = outputs(module, rows)
    assert got.shape == (len(rows), classes)
    assert np.isfinite(got).all()
    assert got.dtype == np.float32
    assert isinstance(module, EstimatorModule)
    np.testing.assert_array_equal(got.argmax(1), break_ties(module.estimator).predict(rows))
    with pytest.raises(ConfigError, match=r"cannot be stored as tensors.*a bundle holds SVC"):
        _ = module.network


def break_ties(estimator: Any) -> Any:
    tied = [key for key in estimator.get_params() if key.endswith("break_ties")]
    return estimator.set_params(**dict.fromkeys(tied, True))


@pytest.mark.parametrize("name", WRAPPED)
def test_why_a_classifier_is_not_stored(name: str) -> None:
    rows, labels = blobs(3)
    fitted = clone(WRAPPED[name]).fit(rows, labels)
    with pytest.raises(ConfigError, match=rf"{type(fitted).__name__} cannot be stored as tensors"):
        to_network(fitted, InputSpec(WIDTH), 3)


def test_every_random_state_is_the_seed_and_the_given_classifier_stays() -> None:
    rows, labels = blobs(3)
    every, scaler = np.arange(len(rows)), ColumnScaler(WIDTH)
    given = make_pipeline(PCA(3, svd_solver="randomized"), RandomForestClassifier(5))
    modules: list[Any] = [
        fit_estimator(given, scaler, rows, labels, every, 3, seed) for seed in (4, 4, 5)
    ]
    params = modules[0].estimator.get_params()
    assert params["pca__random_state"] == params["randomforestclassifier__random_state"] == 4
    assert not hasattr(given[0], "components_")
    assert given.get_params()["pca__random_state"] is None
    first, again, other = (outputs(module, rows) for module in modules)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize(
    ("estimator", "message"),
    [
        (PCA(), "predict_proba or decision_function, or a regressor, got PCA"),
        (KNeighborsClassifier(100), r"k=100, vectors=45.*k from 1 to vectors"),
        (SVC(C=-1), "SVC cannot be fitted: The 'C' parameter"),
    ],
)
def test_what_cannot_be_fitted_is_refused(estimator: BaseEstimator, message: str) -> None:
    rows, labels = blobs(3)
    every, scaler = np.arange(len(rows)), ColumnScaler(WIDTH)
    with pytest.raises(ConfigError, match=message):
        fit_estimator(estimator, scaler, rows, labels, every, 3, seed=0)


def test_a_class_without_training_rows_is_refused() -> None:
    rows, labels = blobs(3)
    train = np.flatnonzero(labels < 2)
    with pytest.raises(ConfigError, match="expected training rows of each from 0 to 2"):
        fit_estimator(SVC(), ColumnScaler(WIDTH), rows, labels, train, 3, seed=0)


def test_machines_without_tensors_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"at least 1 vector.*sklearn\.svm\.SVC"):
        KernelMachine().build(InputSpec(WIDTH), 3)
    with pytest.raises(ConfigError, match="at least 2 classes"):
        KernelMachine(vectors=4).build(InputSpec(WIDTH), 1)
    with pytest.raises(ConfigError, match=r"k from 1 to vectors.*KNeighborsClassifier"):
        Neighbours(k=3, vectors=2).build(InputSpec(WIDTH), 3)

"""Classifiers and regressors that scikit-learn fits, as networks on the same rows.

Most of those in use become tensors: a `KernelMachine`, a `Linear` layer or `Neighbours`, which a
bundle can hold and which need no scikit-learn to predict. Any other one is wrapped: it trains and
is measured, but no bundle holds it. A regressor fits numbers by least squares; what they mean, a
class or an amount, is the caller's affair.
"""

import copy
from collections.abc import Callable
from itertools import combinations
from typing import Any, NoReturn, final

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from sklearn.base import BaseEstimator, clone, is_classifier, is_regressor
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
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
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from sklearn.svm import SVC, LinearSVC, NuSVC
from sklearn.utils import get_tags
from torch import Tensor

from lora_ws.errors import ConfigError
from lora_ws.functional.scores import LINEAR
from lora_ws.models.base import Metanetwork
from lora_ws.models.fitted import FittedModule, Identity
from lora_ws.models.gaussian_process import GaussianProcess
from lora_ws.models.inputs import InputSpec
from lora_ws.models.kernel_machine import KernelMachine
from lora_ws.models.linear import Linear
from lora_ws.models.module import MetanetModule
from lora_ws.models.neighbours import Neighbours, log_shares
from lora_ws.models.normalizers import Normalizer
from lora_ws.models.one_vs_rest import OneVsRestSVC

Tensors = dict[str, np.ndarray]


class NotStorableError(ConfigError):
    """No network computes what a classifier does."""


def fit_estimator(
    estimator: BaseEstimator,
    normalizer: Normalizer,
    features: Float[np.ndarray, "adapters features"] | Float[Tensor, "adapters features"],
    targets: Shaped[np.ndarray, "..."],
    train_rows: Int[np.ndarray, " chosen"],
    outputs: int,
    seed: int,
) -> MetanetModule:
    """Fit a copy of an estimator on normalized training rows.

    Args:
        estimator: a classifier with ``predict_proba`` or ``decision_function``, or a regressor;
            left as it is.
        normalizer: fitted; not used where the estimator takes a kernel (``precomputed``).
        features: of all rows.
        targets: of a classifier, the class of each row, from 0 up ``[adapters]``; of a regressor,
            numbers ``[adapters, outputs]``, of which it fits what differs from their mean.
        train_rows: which rows to fit on.
        outputs: how many classes or numbers there are.
        seed: becomes every ``random_state`` of the estimator.

    Returns:
        A network of tensors where `to_network` makes one, else an `EstimatorModule`.

    Raises:
        ConfigError: it is no such estimator, scikit-learn refuses its parameters or the rows, a
            class has no training row, or a kernel is not one with all training rows.
    """
    name = type(estimator).__name__
    fitted: Any = _copy(estimator, seed)
    pairwise = get_tags(fitted).input_tags.pairwise
    normalizer = Identity() if pairwise else copy.deepcopy(normalizer)
    with torch.no_grad():
        rows = normalizer(torch.as_tensor(features[train_rows])).numpy()
    if pairwise and rows.shape[0] != rows.shape[1]:
        raise ConfigError(
            f"model: {name} takes a kernel with each of the {rows.shape[0]} training rows, got "
            f"{rows.shape[1]} columns; use --featurizer UpdateKernel with landmarks null"
        )
    wanted, offset = targets[train_rows], np.zeros(outputs)
    if is_regressor(fitted):
        offset = wanted.mean(axis=0)
        # Many regressors of scikit-learn refuse a column.
        wanted = wanted[:, 0] - offset if outputs == 1 else wanted - offset
    try:
        fitted.fit(rows, wanted)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"model: {name} cannot be fitted: {error}") from error
    inputs = InputSpec(rows.shape[1])
    module: MetanetModule
    try:
        _, module = to_network(fitted, inputs, outputs, offset)
    except NotStorableError:
        module = EstimatorModule(fitted, inputs, offset)
    module.normalizer = normalizer
    return module.eval()


def to_network(
    estimator: BaseEstimator,
    inputs: InputSpec,
    outputs: int,
    offset: Float[np.ndarray, " outputs"] | float = 0.0,
) -> tuple[Metanetwork, FittedModule]:
    """Turn a fitted classifier or regressor into tensors.

    Args:
        estimator: fitted; a classifier on labels from 0 to ``outputs - 1``.
        inputs: what its rows are.
        outputs: classes or numbers.
        offset: added to what a regressor predicts.

    Returns:
        A spec, and the module that it builds, filled; its normalizer is not fitted. The class of
        the largest output is that of ``predict``, of an ``SVC`` that of ``break_ties=True``. The
        softmax of the outputs is ``predict_proba`` of a `LogisticRegression` and, up to rounding
        zeros to eps, of a `KNeighborsClassifier`. Outputs of a regressor are its predictions.

    Raises:
        NotStorableError: no network computes what it does.
        ConfigError: a class is missing.
    """
    _check_classes(estimator, outputs)
    convert = next((make for kinds, make in CONVERTERS if isinstance(estimator, kinds)), _refuse)
    network, tensors = convert(estimator)
    if is_regressor(estimator):
        tensors["layer.bias"] = tensors["layer.bias"] + offset
    module = network.build(inputs, outputs)
    assert isinstance(module, FittedModule)
    filled = {name: torch.tensor(value) for name, value in tensors.items()}
    module.load_state_dict({**module.state_dict(), **filled})
    return network, module


@final
class EstimatorModule(MetanetModule):
    """A fitted classifier or regressor of scikit-learn that no tensors stand for.

    Args:
        estimator: the estimator.
        inputs: what its rows are.
        offset: added to what a regressor predicts ``[outputs]``.
    """

    def __init__(self, estimator: Any, inputs: InputSpec, offset: np.ndarray) -> None:
        super().__init__(inputs)
        self.estimator = estimator
        self.offset = offset

    @property
    def network(self) -> Metanetwork:
        """Nothing builds this module.

        Raises:
            NotStorableError: always, for whoever makes a bundle.
        """
        _refuse(self.estimator)

    def embed(self, rows: Float[Tensor, "rows features"]) -> Float[Tensor, "rows features"]:
        """Return the row."""
        return rows

    def head(self, embedding: Float[Tensor, "rows features"]) -> Float[Tensor, "rows outputs"]:
        """Predictions, logarithms of ``predict_proba`` if there is one, or decisions."""
        rows = self.normalizer(embedding).detach().cpu().numpy()
        if is_regressor(self.estimator):
            found = torch.as_tensor(self.estimator.predict(rows).reshape(len(rows), -1))
            found = found + torch.as_tensor(self.offset)
        elif hasattr(self.estimator, "predict_proba"):
            found = log_shares(torch.as_tensor(self.estimator.predict_proba(rows)))
        else:
            found = torch.as_tensor(self.estimator.decision_function(rows))
            if found.ndim == 1:
                found = torch.stack([-found / 2, found / 2], dim=1)
        return found.to(embedding)


def _copy(estimator: BaseEstimator, seed: int) -> BaseEstimator:
    """Clone, with the seed wherever it draws."""
    gives = ("predict_proba", "decision_function")
    classifies = is_classifier(estimator) and any(hasattr(estimator, name) for name in gives)
    if not classifies and not is_regressor(estimator):
        raise ConfigError(
            f"model: expected a classifier with {' or '.join(gives)}, or a regressor, got "
            f"{type(estimator).__name__}; use sklearn.svm.SVC, say"
        )
    copied: Any = clone(estimator)
    draws = [key for key in copied.get_params() if key.rpartition("__")[2] == "random_state"]
    return copied.set_params(**dict.fromkeys(draws, seed))


def _check_classes(estimator: Any, classes: int) -> None:
    if is_classifier(estimator) and not np.array_equal(estimator.classes_, np.arange(classes)):
        raise ConfigError(
            f"model: {type(estimator).__name__} was fitted on the classes "
            f"{list(estimator.classes_)}, expected training rows of each from 0 to {classes - 1}"
        )


def _support_vectors(estimator: Any) -> tuple[Metanetwork, Tensors]:
    """The classifiers of pairs, positive for the first class of each."""
    kernel = estimator.kernel
    if callable(kernel):
        _refuse(estimator, "its kernel is a function")
    weight, bias = _pair_weights(estimator), estimator.intercept_
    if len(bias) == 1:
        # With two classes scikit-learn's signs are positive for the second.
        weight, bias = -weight, -bias
    if kernel == "precomputed":
        terms = np.zeros((len(bias), estimator.n_features_in_))
        terms[:, estimator.support_] = weight
    else:
        terms = weight @ estimator.support_vectors_ if kernel == "linear" else weight
    tensors = {"weight": terms, "bias": bias}
    if kernel in LINEAR:
        return KernelMachine(kernel=kernel), tensors
    vectors = estimator.support_vectors_
    network = KernelMachine(
        kernel=kernel,
        gamma=float(estimator._gamma),
        coef0=float(estimator.coef0),
        degree=estimator.degree,
        vectors=len(vectors),
    )
    return network, {"vectors": vectors, **tensors}


def _pair_weights(estimator: Any) -> Float[np.ndarray, "pairs vectors"]:
    """Coefficients of the support vectors, which libsvm holds class by class."""
    dual, ends = estimator.dual_coef_, np.cumsum(estimator.n_support_)
    own = [slice(end - n, end) for n, end in zip(estimator.n_support_, ends, strict=True)]
    pairs = list(combinations(range(len(own)), 2))
    if len(pairs) == 1:
        return dual
    weights = np.zeros((len(pairs), dual.shape[1]))
    for row, (first, second) in zip(weights, pairs, strict=True):
        row[own[first]] = dual[second - 1, own[first]]
        row[own[second]] = dual[first, own[second]]
    return weights


def _linear(estimator: Any) -> tuple[Metanetwork, Tensors]:
    weight = np.atleast_2d(estimator.coef_)
    bias = np.broadcast_to(estimator.intercept_, len(weight))
    if len(weight) == 1:
        weight, bias = (np.concatenate([-value / 2, value / 2]) for value in (weight, bias))
    network = Linear(normalize=not isinstance(estimator, OneVsRestSVC))
    return network, {"layer.weight": weight, "layer.bias": bias}


def _regression(estimator: Any) -> tuple[Metanetwork, Tensors]:
    weight = np.atleast_2d(estimator.coef_)
    bias = np.broadcast_to(estimator.intercept_, len(weight))
    return Linear(), {"layer.weight": weight, "layer.bias": bias}


def _kernel_regression(estimator: Any) -> tuple[Metanetwork, Tensors]:
    """On a kernel that is the row itself, or made of products with it, a linear layer."""
    kernel = getattr(estimator, "kernel", "precomputed")
    if kernel not in LINEAR:
        _refuse(estimator, "its kernel is neither linear nor precomputed")
    dual = estimator.dual_coef_
    weight = dual.reshape(len(dual), -1).T
    if kernel == "linear":
        weight = weight @ estimator.X_fit_
    network = Linear(normalize=kernel != "precomputed")
    return network, {"layer.weight": weight, "layer.bias": np.zeros(len(weight))}


def _centroids(estimator: Any) -> tuple[Metanetwork, Tensors]:
    """Of two centroids the nearer is the one with the larger c·x - |c|²/2."""
    if estimator.metric != "euclidean" or np.ptp(estimator.class_prior_) > 0:
        _refuse(estimator, "its metric is not euclidean, or its priors differ")
    centroids = estimator.centroids_
    bias = -np.square(centroids).sum(axis=1) / 2
    return Linear(), {"layer.weight": centroids, "layer.bias": bias}


def _neighbours(estimator: Any) -> tuple[Metanetwork, Tensors]:
    told = estimator.effective_metric_params_
    p = {"euclidean": 2, "manhattan": 1, "minkowski": told.get("p")}.get(
        estimator.effective_metric_
    )
    weights = estimator.weights or "uniform"
    if p is None or told.get("w") is not None or callable(weights):
        _refuse(estimator, "its metric or its weights are its own")
    vectors = estimator._fit_X
    network = Neighbours(k=estimator.n_neighbors, vectors=len(vectors), p=float(p), weights=weights)
    return network, {"vectors": vectors, "labels": estimator._y}


def _refuse(estimator: Any, why: str = "") -> NoReturn:
    names = ", ".join(kind.__name__ for kinds, _ in CONVERTERS for kind in kinds)
    raise NotStorableError(
        f"model: {type(estimator).__name__} cannot be stored as tensors"
        f"{why and f' ({why})'}; a bundle holds {names}, and networks"
    )


CONVERTERS: tuple[tuple[tuple[type, ...], Callable[[Any], tuple[Metanetwork, Tensors]]], ...] = (
    ((SVC, NuSVC), _support_vectors),
    (
        (
            LogisticRegression,
            RidgeClassifier,
            RidgeClassifierCV,
            LinearSVC,
            OneVsRestSVC,
            SGDClassifier,
            Perceptron,
            LinearDiscriminantAnalysis,
        ),
        _linear,
    ),
    ((KernelRidge, GaussianProcess), _kernel_regression),
    ((Ridge, LinearRegression), _regression),
    ((KNeighborsClassifier,), _neighbours),
    ((NearestCentroid,), _centroids),
)

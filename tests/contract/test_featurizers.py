"""One suite over every featurizer: adding one adds a line to `FEATURIZERS`."""

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from sklearn import config_context
from sklearn.base import BaseEstimator, TransformerMixin, clone
from sklearn.decomposition import PCA
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import estimator_html_repr, get_tags
from sklearn.utils.estimator_checks import parametrize_with_checks
from tolerances import EXACT, rounding

from lora_ws.adapters import LayerSpec, Layout
from lora_ws.errors import ConfigError, LayoutError
from lora_ws.featurizers import (
    PAPER,
    DeltaPCA,
    FlatVec,
    FlatVecPCA,
    Norms,
    StatsFlatVec,
    StatsLayer,
    StatsLayerDense,
    UpdateKernel,
)

LAYOUT = Layout.from_layers(
    [
        LayerSpec("down_blocks.0.to_q", 5, 4),
        LayerSpec("mid_block.to_v", 3, 6),
        LayerSpec("up_blocks.1.to_q", 7, 7),
    ]
)
RANK3 = Layout.from_layers([LayerSpec("a", 6, 5, 3), LayerSpec("b", 4, 8, 2)])
FEATURIZERS = {
    "FlatVec": FlatVec(layout=LAYOUT),
    "FlatVecPCA": FlatVecPCA(n_components=4),
    "FlatVecPCA krylov": FlatVecPCA(n_components=3, solver="krylov"),
    "StatsFlatVec": StatsFlatVec(),
    "StatsFlatVec five": StatsFlatVec(statistics=("mean", "std", "median", "min", "max")),
    "StatsLayer": StatsLayer(layout=LAYOUT),
    "StatsLayerDense": StatsLayerDense(layout=LAYOUT),
    "Norms": Norms(layout=LAYOUT),
    "FlatVec of all B": FlatVec(layout=LAYOUT, matrices=("*.up",)),
    "FlatVecPCA of a layer": FlatVecPCA(n_components=4, layout=LAYOUT, matrices=("mid_block.*",)),
    "StatsFlatVec of a layer": StatsFlatVec(layout=LAYOUT, matrices=("mid_block.to_v",)),
    "StatsLayer of a matrix": StatsLayer(layout=LAYOUT, matrices=("*to_v.down",)),
    "StatsLayerDense of two": StatsLayerDense(layout=LAYOUT, matrices=("*to_q",)),
    "DeltaPCA": DeltaPCA(layout=LAYOUT, n_components=6),
    "DeltaPCA whitened": DeltaPCA(layout=LAYOUT, n_components=6, kernel="left+right", whiten=0.3),
    "DeltaPCA of a layer": DeltaPCA(layout=LAYOUT, n_components=5, matrices=("mid_block.*",)),
    "DeltaPCA raw landmarks": DeltaPCA(
        layout=LAYOUT, n_components=4, kernel="delta", normalize=False, landmarks=12
    ),
    "UpdateKernel": UpdateKernel(layout=LAYOUT),
    "UpdateKernel whitened": UpdateKernel(layout=LAYOUT, kernel="left+right", whiten=0.3),
    "UpdateKernel of a layer": UpdateKernel(layout=LAYOUT, matrices=("mid_block.*",), landmarks=9),
}
every = pytest.mark.parametrize("featurizer", FEATURIZERS.values(), ids=FEATURIZERS)


def rows(n: int = 24, dtype: type = np.float32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, LAYOUT.size)).astype(dtype)


def bound(features: np.ndarray) -> float:
    """Of sums over the numbers of an adapter in float32."""
    return rounding(LAYOUT.size, size=float(np.abs(features).max()))


@parametrize_with_checks([FlatVec(), FlatVecPCA(), StatsFlatVec(), StatsLayer(), Norms()])
def test_scikit_learn_checks(estimator: Any, check: Callable[[Any], None]) -> None:
    check(estimator)
    assert estimator is not None


@every
def test_clone_and_pickle_keep_parameters_and_results(featurizer: Any) -> None:
    X = rows()
    fitted = clone(featurizer).fit(X)
    again = pickle.loads(pickle.dumps(fitted))
    assert repr(clone(featurizer)) == repr(featurizer)
    np.testing.assert_array_equal(again.transform(X), fitted.transform(X))


@every
def test_as_many_names_as_columns(featurizer: Any) -> None:
    fitted = clone(featurizer).fit(rows())
    names = fitted.get_feature_names_out()
    assert len(names) == fitted.transform(rows()).shape[1]
    assert len(set(names)) == len(names)


@every
def test_unfitted_is_refused(featurizer: Any) -> None:
    with pytest.raises(NotFittedError):
        clone(featurizer).transform(rows())


@every
def test_rows_are_independent_of_order_and_company(featurizer: Any) -> None:
    X = rows()
    fitted = clone(featurizer).fit(X)
    everything = fitted.transform(X)
    some = np.array([7, 3, 20])
    np.testing.assert_allclose(fitted.transform(X[some]), everything[some], atol=bound(everything))


@every
def test_refit_forgets(featurizer: Any) -> None:
    twice = clone(featurizer).fit(100 * rows(seed=1)).fit(rows())
    once = clone(featurizer).fit(rows())
    np.testing.assert_array_equal(twice.transform(rows()), once.transform(rows()))


@every
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_kind_and_precision_are_kept(featurizer: Any, dtype: type) -> None:
    X = rows(dtype=dtype)
    expected = clone(featurizer).fit_transform(X)
    tensor = clone(featurizer).fit_transform(torch.from_numpy(X))
    assert expected.dtype == dtype
    assert isinstance(tensor, torch.Tensor)
    np.testing.assert_array_equal(tensor.numpy(), expected)


@every
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_tensors_come_back_on_the_device(featurizer: Any) -> None:
    tensor = clone(featurizer).fit_transform(torch.from_numpy(rows()).cuda())
    assert tensor.is_cuda


@every
def test_fit_transform_is_fit_then_transform(featurizer: Any) -> None:
    X = rows()
    direct, apart = clone(featurizer).fit_transform(X), clone(featurizer).fit(X).transform(X)
    np.testing.assert_allclose(direct, apart, atol=bound(apart))


@every
def test_memory_map_gives_the_same(featurizer: Any, tmp_path: Any) -> None:
    np.save(tmp_path / "x.npy", rows())
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    expected = clone(featurizer).fit(rows()).transform(rows())
    np.testing.assert_array_equal(clone(featurizer).fit(mapped).transform(mapped), expected)


@every
def test_input_is_left_alone(featurizer: Any) -> None:
    X = rows()
    clone(featurizer).fit(X).transform(X)
    np.testing.assert_array_equal(X, rows())


@every
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(featurizer: Any, value: float) -> None:
    X = rows()
    X[3, 5] = value
    with pytest.raises(ValueError, match=r"NaN|infinity"):
        clone(featurizer).fit(X)


@every
def test_other_width_is_refused(featurizer: Any) -> None:
    fitted = clone(featurizer).fit(rows())
    with pytest.raises(ValueError, match="features"):
        fitted.transform(rows()[:, :-1])


@every
def test_pandas_output(featurizer: Any) -> None:
    frame = clone(featurizer).set_output(transform="pandas").fit(rows()).transform(rows())
    assert isinstance(frame, pd.DataFrame)
    assert frame.shape[0] == len(rows())


@every
@pytest.mark.parametrize("wanted", ["default", "pandas"])
def test_output_of_the_configuration_is_that_of_set_output(featurizer: Any, wanted: str) -> None:
    fitted = clone(featurizer).fit(rows())
    expected = clone(featurizer).set_output(transform=wanted).fit(rows()).transform(rows())
    with config_context(transform_output=wanted):
        found = fitted.transform(rows())
    assert type(found) is type(expected)
    np.testing.assert_array_equal(found, expected)


@every
def test_tags_are_those_of_a_transformer_that_inherits(featurizer: Any) -> None:
    class Inherits(TransformerMixin, BaseEstimator):
        pass

    expected = get_tags(Inherits())
    assert expected.transformer_tags is not None
    expected.transformer_tags.preserves_dtype = ["float64", "float32"]
    assert get_tags(featurizer) == expected


@every
def test_pipeline_with_scaler_and_classifier(featurizer: Any) -> None:
    y = np.arange(24) % 2
    X = rows() + 4 * y[:, None].astype(np.float32)
    model = make_pipeline(clone(featurizer), StandardScaler(), LogisticRegression())
    assert model.fit(X, y).score(X, y) > 0.9


def test_grid_search_over_components() -> None:
    y = np.arange(24) % 2
    X = rows() + 4 * y[:, None].astype(np.float32)
    model = make_pipeline(FlatVecPCA(), LogisticRegression())
    search = GridSearchCV(model, {"flatvecpca__n_components": [1, 3]}, cv=3).fit(X, y)
    assert search.best_params_["flatvecpca__n_components"] in (1, 3)


def test_pipeline_passes_on_parameters_frames_names_and_metadata() -> None:
    model = make_pipeline(FlatVecPCA(), StandardScaler()).set_output(transform="pandas")
    model.set_params(flatvecpca__n_components=2)
    with config_context(enable_metadata_routing=True):
        frame = model.fit(rows()).transform(rows())
    assert list(frame.columns) == list(model.get_feature_names_out()) == ["pca0", "pca1"]
    assert "FlatVecPCA(n_components=2)" in repr(model)
    assert "FlatVecPCA" in estimator_html_repr(model)


@every
def test_parameters_print_and_change_as_those_of_scikit_learn(featurizer: Any) -> None:
    params = featurizer.get_params()
    assert list(params) == sorted(params)
    assert type(featurizer)(**params).get_params() == params
    copied = clone(featurizer).set_params(layout=None)
    assert copied.layout is None
    assert "layout" not in repr(copied)
    with pytest.raises(ValueError, match=r"no parameter `sharp`; expected one of .*layout"):
        copied.set_params(sharp=True)


@pytest.mark.parametrize("kind", [FlatVec, StatsLayer, StatsLayerDense, DeltaPCA, UpdateKernel])
def test_layout_of_other_width_is_refused_at_fit(kind: Any) -> None:
    with pytest.raises(LayoutError, match=f"expected {LAYOUT.size} columns"):
        kind(layout=LAYOUT).fit(rows()[:, :-2])


@pytest.mark.parametrize("kind", [StatsLayerDense, DeltaPCA, UpdateKernel])
def test_updates_need_a_layout(kind: Any) -> None:
    with pytest.raises(ConfigError, match=r"layout=adapters\.layout"):
        kind().fit(rows())


@pytest.mark.parametrize("kind", [StatsFlatVec, StatsLayer])
def test_unknown_statistic_is_refused_at_fit(kind: Any) -> None:
    with pytest.raises(ConfigError, match="meen"):
        kind(statistics=("meen",)).fit(rows())


@pytest.mark.parametrize("components", [0, 24, 500])
def test_impossible_number_of_components_is_refused(components: int) -> None:
    with pytest.raises(ConfigError, match="expected 1 to 23 components"):
        FlatVecPCA(n_components=components).fit(rows())


def test_default_number_of_components_fits_the_data() -> None:
    assert FlatVecPCA().fit_transform(rows()).shape == (24, 23)
    wide = np.random.default_rng(0).standard_normal((230, 260))
    assert FlatVecPCA().fit_transform(wide).shape == (230, 200)


def test_paper_dimensions_on_sd15() -> None:
    layout = Layout.sd15_qv()
    X = np.random.default_rng(0).standard_normal((4, layout.size), dtype=np.float32)
    dims = {}
    for kind in PAPER:
        featurizer = kind()
        if "layout" in featurizer.get_params():
            featurizer.set_params(layout=layout)
        if kind is FlatVecPCA:
            featurizer.set_params(n_components=3)
        dims[kind.__name__] = featurizer.fit_transform(X).shape[1]
    assert dims == {
        "FlatVec": 99_648,
        "FlatVecPCA": 3,
        "StatsFlatVec": 7,
        "StatsLayer": 896,
        "StatsLayerDense": 448,
    }
    five = StatsFlatVec(statistics=("mean", "std", "median", "min", "max"))
    assert five.fit_transform(X).shape[1] == 5


def test_flat_vec_of_a_memory_map_is_a_view(tmp_path: Any) -> None:
    np.save(tmp_path / "x.npy", rows())
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert np.shares_memory(FlatVec().fit(mapped).transform(mapped), mapped)


def reference_statistics(values: np.ndarray) -> np.ndarray:
    """The definitions of the documentation, from scipy and a full sort."""
    values = values.astype(np.float64)
    n = len(values)
    s = values.std(ddof=1)
    ratio = np.sqrt((n - 1) / n)  # scipy divides by the biased deviation
    return np.array(
        [
            values.mean(),
            s,
            np.sort(values)[(n - 1) // 2],
            values.min(),
            values.max(),
            (stats.kurtosis(values) + 3) * ratio**4 - 3,
            stats.skew(values) * ratio**3,
        ]
    )


def test_stats_layer_matches_scipy_on_each_matrix() -> None:
    X = rows(6, np.float64)
    got = StatsLayer(layout=LAYOUT).fit_transform(X)
    for k, adapter in enumerate(X):
        expected = [reference_statistics(adapter[m.columns]) for m in LAYOUT.matrices]
        np.testing.assert_allclose(got[k], np.concatenate(expected), rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("layout", [LAYOUT, RANK3], ids=["rank 1", "ranks 2 and 3"])
def test_stats_layer_dense_matches_scipy_on_the_materialised_update(layout: Layout) -> None:
    X = np.random.default_rng(3).standard_normal((5, layout.size))
    got = StatsLayerDense(layout=layout).fit_transform(X)
    for k, adapter in enumerate(X):
        expected = []
        for layer, down, up in layout.pairs():
            update = adapter[up].reshape(layer.up_shape) @ adapter[down].reshape(layer.down_shape)
            expected.append(reference_statistics(update.ravel()))
        np.testing.assert_allclose(got[k], np.concatenate(expected), rtol=EXACT, atol=EXACT)


def test_without_a_layout_stats_layer_is_stats_flat_vec() -> None:
    np.testing.assert_array_equal(
        StatsLayer().fit_transform(rows()), StatsFlatVec().fit_transform(rows())
    )


def test_pca_matches_scikit_learn_on_standardised_columns() -> None:
    X = rows(40, np.float64)
    test = rows(5, np.float64, seed=9)
    scaler = StandardScaler().fit(X)
    factor = np.sqrt(39 / 40)  # ours scales by the sample deviation
    reference = PCA(6, svd_solver="full").fit(scaler.transform(X) * factor)
    ours = FlatVecPCA(n_components=6).fit(X)
    expected = reference.transform(scaler.transform(test) * factor)
    np.testing.assert_allclose(np.abs(ours.transform(test)), np.abs(expected), atol=EXACT)
    np.testing.assert_allclose(ours.singular_values_, reference.singular_values_, rtol=EXACT)


def test_constant_adapters_give_finite_features() -> None:
    X = np.zeros((4, LAYOUT.size), np.float32)
    for featurizer in (StatsFlatVec(), StatsLayer(layout=LAYOUT), StatsLayerDense(layout=LAYOUT)):
        assert np.isfinite(featurizer.fit_transform(X)).all()


def test_chosen_matrices_are_the_columns_of_their_names() -> None:
    X = rows()
    (matrix,) = [m for m in LAYOUT.matrices if m.name == "mid_block.to_v.up"]
    alone = FlatVec(layout=LAYOUT, matrices=("mid_block.to_v.up",)).fit(X)
    np.testing.assert_array_equal(alone.transform(X), X[:, matrix.columns])
    assert alone.get_feature_names_out()[0] == "mid_block.to_v.up[0,0]"
    both = FlatVec(layout=LAYOUT, matrices=("down_blocks*", "up_blocks*")).fit_transform(X)
    outside = np.r_[0:9, 18:32]
    np.testing.assert_array_equal(both, X[:, outside])


def test_statistics_of_a_chosen_layer_equal_those_within_the_whole() -> None:
    X = rows()
    whole = StatsLayerDense(layout=LAYOUT).fit(X)
    part = StatsLayerDense(layout=LAYOUT, matrices=("up_blocks.1.to_q",)).fit(X)
    wanted = [k for k, n in enumerate(whole.get_feature_names_out()) if "up_blocks" in n]
    np.testing.assert_array_equal(part.transform(X), whole.transform(X)[:, wanted])


@pytest.mark.parametrize(
    ("featurizer", "text"),
    [
        (FlatVec(layout=LAYOUT, matrices=("attn9.*",)), "attn9"),
        (FlatVec(layout=LAYOUT, matrices=()), "at least one"),
        (FlatVec(matrices=("*.up",)), "pass layout"),
        (StatsLayerDense(layout=LAYOUT, matrices=("*.up",)), "whole layers"),
    ],
)
def test_wrong_choices_of_matrices_are_refused(featurizer: Any, text: str) -> None:
    with pytest.raises(LayoutError, match=text):
        featurizer.fit(rows())

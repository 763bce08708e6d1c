"""`Featurizer`: the scikit-learn shell around pure functions on rows of weights.

A subclass is final. It says which columns it makes and how a block of rows becomes them; checking,
torch tensors, data frames and feature counts are dealt with here. It is a scikit-learn transformer
by protocol, not by inheritance: a bundle transforms its rows without importing scikit-learn.
"""

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

import numpy as np

from lora_ws.adapters.layout import LayerSpec, Layout, Selection
from lora_ws.errors import ConfigError, LayoutError
from lora_ws.functional.rows import Rows
from lora_ws.parameters import Parametrized

PRECISIONS = (np.float32, np.float64)
# np.ndarray, np.memmap or torch.Tensor, and the result is of the same kind; or rows of a store.
Array = Any


class Featurizer(Parametrized, ABC):
    """Turns weights ``[adapters, params]`` into a representation ``[adapters, features]``.

    numpy arrays (memory maps too) give numpy arrays; torch tensors give torch tensors on the same
    device, computed on the host. Constructors only store; ``fit`` validates.

    Attributes:
        learns: whether ``fit`` looks at values; if not, a few rows are enough to fit.
        reads: whether ``transform`` reads values; if not, those of a memory map are not checked,
            as the values of a store were when it was imported.
        blockwise: whether ``fit`` takes rows block by block, so that those of a store need no copy.
        invariant: whether features depend on the updates ``B @ A`` alone, and so stay the same when
            B becomes ``B @ G`` and A ``inv(G) @ A``.

    Example:
        >>> from lora_ws.featurizers import StatsFlatVec
        >>> StatsFlatVec().fit_transform(np.ones((2, 5))).shape
        (2, 7)
    """

    learns: ClassVar[bool] = True
    reads: ClassVar[bool] = True
    blockwise: ClassVar[bool] = False
    invariant: ClassVar[bool] = False
    n_features_in_: int
    _sklearn_auto_wrap_output_keys: ClassVar[frozenset[str]] = frozenset({"transform"})

    def fit(self, X: Array, y: object = None) -> Self:
        """Learn from training rows.

        Args:
            X: weights ``[adapters, params]``, finite.
            y: ignored.

        Raises:
            LayoutError: ``X`` has not the columns of ``layout``.
            ConfigError: a parameter cannot be used with this ``X``.
        """
        self._fit(self._read(X, reset=True))
        return self

    def transform(self, X: Array) -> Array:
        """Represent rows of weights.

        Args:
            X: weights ``[adapters, params]`` with the columns seen at ``fit``.

        Returns:
            ``[adapters, features]``, of the kind, device and precision of ``X``.
        """
        self._check_fitted()
        return self._like(self._transform(self._read(X, reset=False)), X)

    def fit_transform(self, X: Array, y: object = None) -> Array:
        """Fit, and represent the training rows, which some fits give for free."""
        return self._like(self._fit_transform(self._read(X, reset=True)), X)

    def set_output(
        self, *, transform: Literal["default", "pandas", "polars"] | None = None
    ) -> Self:
        """Choose what numpy rows become: arrays, or data frames with named columns.

        Args:
            transform: kind of the output; None leaves it as it is.
        """
        if transform is not None:
            self._sklearn_output_config = {"transform": transform}
        return self

    def get_feature_names_out(self, input_features: Sequence[str] | None = None) -> np.ndarray:
        """Name of each output column.

        Args:
            input_features: ignored, as the names follow from the layout.
        """
        self._check_fitted()
        return np.asarray(self._names(), dtype=object)

    @abstractmethod
    def _fit(self, rows: np.ndarray) -> None: ...

    @abstractmethod
    def _transform(self, rows: np.ndarray) -> np.ndarray: ...

    @abstractmethod
    def _names(self) -> Sequence[str]: ...

    def _fit_transform(self, rows: np.ndarray) -> np.ndarray:
        self._fit(rows)
        return self._transform(rows)

    @property
    def _selection(self) -> Selection | None:
        """The matrices that the rows hold; None where nothing says which columns are which."""
        layout: Layout | None = getattr(self, "layout", None)
        patterns: Sequence[str] | None = getattr(self, "matrices", None)
        if layout is not None:
            return layout.choose(patterns)
        if patterns is not None:
            raise LayoutError(
                f"{type(self).__name__}(matrices=..., layout=None): expected a layout, because "
                "only a layout has names; pass layout=adapters.layout"
            )
        return None

    def _pairs(self) -> list[tuple[LayerSpec, slice, slice]]:
        """The chosen layers with the columns of their A and of their B."""
        selection = self._selection
        if selection is None:
            raise ConfigError(
                f"{type(self).__name__}(layout=None): expected a layout, because only a layout "
                "tells which columns are B and A; pass layout=adapters.layout"
            )
        return list(selection.pairs())

    def _read(self, X: Array, reset: bool) -> Any:
        """Checked rows of the chosen matrices."""
        rows: Any = self._check(X, reset)
        selection = self._selection
        if selection is None:
            return rows
        columns = selection.columns
        return rows.of(columns) if isinstance(rows, Rows) else rows[:, columns]

    def _check(self, X: Array, reset: bool) -> Any:
        given: Any = X
        if is_tensor(X):
            host = X.detach().cpu()
            given = (host if host.dtype.itemsize > 2 else host.float()).numpy()
        finite = self.reads or not isinstance(X, np.memmap)
        rows: Any = X if isinstance(X, Rows) else np.asarray(given)
        if isinstance(X, Rows):
            # Of a store, whose values were checked when it was imported.
            self.n_features_in_ = X.shape[1]
        elif reset or not self._fits(given, finite):
            from sklearn.utils.validation import validate_data

            rows = validate_data(
                self, given, reset=reset, dtype=list(PRECISIONS), ensure_all_finite=finite
            )
        layout: Layout | None = getattr(self, "layout", None)
        if layout is not None and rows.shape[1] != layout.size:
            raise LayoutError(
                f"{type(self).__name__}(layout=...): expected {layout.size} columns for this "
                f"layout, got {rows.shape[1]}; pass the layout of the adapters that X holds"
            )
        return rows

    def _fits(self, given: Any, finite: bool) -> bool:
        """Whether these are plain rows as fitted on; of others scikit-learn says what is wrong."""
        if type(given) not in (np.ndarray, np.memmap) or given.dtype not in PRECISIONS:
            return False
        if given.shape[1:] != (self.n_features_in_,) or not len(given):
            return False
        if hasattr(self, "feature_names_in_"):
            return False
        with np.errstate(over="ignore", invalid="ignore"):
            return not finite or bool(np.isfinite(given.sum()))

    def _check_fitted(self) -> None:
        if not hasattr(self, "n_features_in_"):
            from sklearn.exceptions import NotFittedError

            raise NotFittedError(f"{type(self).__name__} is not fitted; call `fit` first")

    def _like(self, features: np.ndarray, X: Array) -> Array:
        """Features of the kind of ``X``, or in the data frame that was asked for."""
        if is_tensor(X):
            return sys.modules["torch"].from_numpy(np.ascontiguousarray(features)).to(X.device)
        # Where scikit-learn is not loaded, its configuration asks for nothing.
        if "sklearn" not in sys.modules and not hasattr(self, "_sklearn_output_config"):
            return features
        from sklearn.utils._set_output import _wrap_data_with_container

        return _wrap_data_with_container("transform", features, X, self)

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import Tags, TargetTags, TransformerTags

        return Tags(
            estimator_type=None,
            target_tags=TargetTags(required=False),
            transformer_tags=TransformerTags(preserves_dtype=["float64", "float32"]),
        )


def is_tensor(value: Any) -> bool:
    """Whether something is a tensor of torch, which is loaded where there are tensors."""
    return "torch" in sys.modules and isinstance(value, sys.modules["torch"].Tensor)


def narrow(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Round to the precision of the input; what is too large for it becomes its largest number."""
    limits = np.finfo(dtype)
    return np.clip(values, limits.min, limits.max).astype(dtype)

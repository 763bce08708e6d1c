"""FlatVecPCA@K: the weights projected on their principal components."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from lora_ws.adapters.layout import Layout
from lora_ws.errors import ConfigError
from lora_ws.featurizers.base import Featurizer
from lora_ws.functional.gram_pca import PcaResult, pca, project
from lora_ws.memory import memory_limit

DEFAULT_COMPONENTS = 200
Solver = Literal["auto", "gram", "krylov"]


class FlatVecPCA(Featurizer):
    """Principal components of the flat vectors (paper section 4; K numbers).

    Fitted on training rows only, in passes over them, so a store larger than memory will do.

    Args:
        n_components: K; None takes 200, or as many as the training rows and columns allow.
        standardize: scale every column to unit variance first, as the paper's pipeline does.
        solver: "gram" is exact to rounding; "krylov" takes six passes over the rows, after which
            a singular value is at most 2 % too low; "auto" takes gram up to 5000 rows (or columns).
        max_memory_mb: bound on the memory taken for fitting, in MiB, below the command's.
        seed: start of the Krylov solver.
        layout: which columns are which matrix; needed to choose some.
        matrices: names of the layers or matrices to read, ``*`` standing for anything (see
            `Layout.choose`); None reads all.

    Example:
        >>> FlatVecPCA(n_components=2).fit_transform(np.random.rand(5, 40)).shape
        (5, 2)
    """

    solver: Solver

    def __init__(
        self,
        *,
        n_components: int | None = None,
        standardize: bool = True,
        solver: Solver = "auto",
        max_memory_mb: int = 4096,
        seed: int = 0,
        layout: Layout | None = None,
        matrices: Sequence[str] | None = None,
    ) -> None:
        self.n_components = n_components
        self.standardize = standardize
        self.solver = solver
        self.max_memory_mb = max_memory_mb
        self.seed = seed
        self.layout = layout
        self.matrices = matrices

    def _fit(self, rows: np.ndarray) -> None:
        self._solve(rows)

    def _fit_transform(self, rows: np.ndarray) -> np.ndarray:
        return self._solve(rows).scores

    def _solve(self, rows: np.ndarray) -> PcaResult:
        limit = min(len(rows) - 1, rows.shape[1])
        if limit < 1:
            raise ConfigError(
                f"FlatVecPCA: expected at least 2 training rows, got n_samples = {len(rows)}"
            )
        wanted = min(DEFAULT_COMPONENTS, limit) if self.n_components is None else self.n_components
        if not 1 <= wanted <= limit:
            raise ConfigError(
                f"FlatVecPCA(n_components={wanted}): expected 1 to {limit} components for "
                f"{len(rows)} training rows of {rows.shape[1]} numbers; use n_components <= {limit}"
            )
        result = pca(
            rows,
            wanted,
            standardize=self.standardize,
            solver=self.solver,
            max_memory_mb=self._memory_mb(),
            seed=self.seed,
        )
        self.mean_, self.scale_ = result.mean, result.scale
        self.components_ = result.components
        self.singular_values_ = result.singular_values
        self.explained_variance_ratio_ = result.explained_variance_ratio
        self.solver_ = result.solver
        return result

    def _transform(self, rows: np.ndarray) -> np.ndarray:
        memory = self._memory_mb()
        return project(rows, self.mean_, self.scale_, self.components_, max_memory_mb=memory)

    def _memory_mb(self) -> int:
        return min(self.max_memory_mb, memory_limit() >> 20)

    def _names(self) -> Sequence[str]:
        return [f"pca{k}" for k in range(len(self.components_))]

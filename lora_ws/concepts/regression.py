"""Scores of whole matrices or blocks by ablating and fitting: the slow reference, no gradients.

Shah et al. 2024 (COAR, "Decomposing and editing predictions by modeling model computation"): set
random sets of components to zero, measure each time, and fit what was measured by a linear model
of what was off. A coefficient is the mean effect of a component among ablations of that size, where
`contributions` says what happens next to the full model.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from sklearn.linear_model import LinearRegression, Ridge
from sklearn.metrics import r2_score
from sklearn.model_selection import KFold, cross_val_predict
from torch import nn

from lora_ws.concepts.objective import Objective, restored
from lora_ws.concepts.scores import block_of
from lora_ws.config import nearest
from lora_ws.errors import ConfigError

Coarse = Literal["matrix", "block"]
COARSE: tuple[Coarse, ...] = ("matrix", "block")


class RegressionFit(NamedTuple):
    """A linear model of what ablations do.

    Attributes:
        scores: component -> by how much J falls when it is set to zero, times the sign of the
            objective: positive supports the concept.
        r2: share of the variance of ``falls`` explained where they were left out of the fit; at
            most 1, below 0 for worse than their mean, nan where they do not vary.
        masks: what was set to zero ``[masks, components]``, components in the order of ``scores``.
        falls: of J, times the sign, as measured ``[masks]``.
    """

    scores: dict[str, float]
    r2: float
    masks: Bool[np.ndarray, "masks components"]
    falls: Float[np.ndarray, " masks"]


def regression(
    objective: Objective,
    unet: nn.Module,
    weights: Mapping[str, nn.Parameter],
    *,
    by: Coarse = "matrix",
    share: float = 0.1,
    masks: int = 200,
    ridge: float = 0.0,
    folds: int = 10,
    seed: int = 0,
) -> RegressionFit:
    """Score components from random ablations; J is measured ``masks + 1`` times.

    Args:
        objective: what the concept is measured by.
        unet: left as found.
        weights: that components are made of, by name; see `eligible_weights`.
        by: what a component is: a matrix, or all matrices of a block.
        share: chance of each component to be set to zero in a mask; small ones ask what `grouped`
            scores ask, large ones what is left when much is gone.
        masks: how many.
        ridge: penalty of squared scores; 0 for ordinary least squares.
        folds: the masks are left out of the fit in as many parts, to measure ``r2``.
        seed: of the masks and the parts.

    Raises:
        ConfigError: no such component; a number out of range; masks that do not tell all of the
            components apart.

    Source: Shah et al. 2024 (COAR), with an intercept as there.
    """
    _check(by, share, masks, ridge, folds)
    parts = components(weights, by)
    generator = np.random.default_rng(seed)
    off = generator.random((masks, len(parts))) < share
    # What a fit with all masks cannot tell apart, it cannot without some of them either.
    known = np.linalg.matrix_rank(np.c_[np.ones(masks), off])
    if not ridge and (known <= len(parts) or masks - -(-masks // folds) <= len(parts)):
        raise ConfigError(
            f"masks: expected enough to tell {len(parts)} components apart, got {masks}; take "
            "more, another share, or a ridge above 0"
        )
    falls = _falls(objective, unet, weights, list(parts.values()), off)
    model = Ridge(ridge) if ridge else LinearRegression()
    guessed = cross_val_predict(model, off, falls, cv=KFold(folds, shuffle=True, random_state=seed))
    with np.errstate(invalid="ignore", divide="ignore"):
        r2 = float(r2_score(falls, guessed, force_finite=False))
    scores = dict(zip(parts, map(float, model.fit(off, falls).coef_), strict=True))
    return RegressionFit(scores, r2, off, falls)


def components(weights: Mapping[str, nn.Parameter], by: Coarse) -> dict[str, list[str]]:
    """Component -> names of the weights it is made of."""
    found: dict[str, list[str]] = {}
    for name in weights:
        found.setdefault(block_of(name) if by == "block" else name, []).append(name)
    return found


def _falls(
    objective: Objective,
    unet: nn.Module,
    weights: Mapping[str, nn.Parameter],
    parts: list[list[str]],
    off: Bool[np.ndarray, "masks components"],
) -> Float[np.ndarray, " masks"]:
    """How far J falls under each mask, times the sign of the objective."""
    before, found = objective.value(unet), np.empty(len(off))
    for k, mask in enumerate(off):
        with restored(weights):
            for at in mask.nonzero()[0]:
                for name in parts[at]:
                    weights[name].data.zero_()
            found[k] = objective.sign * (before - objective.value(unet))
    return found


def _check(by: str, share: float, masks: int, ridge: float, folds: int) -> None:
    if by not in COARSE:
        raise ConfigError(f"by: there is no component `{by}`{nearest(by, COARSE)}")
    if not 0 < share < 1:
        raise ConfigError(f"share: expected a number between 0 and 1, got {share:g}")
    if not 2 <= folds <= masks:
        raise ConfigError(f"folds: expected 2 to {masks}, as many as masks, got {folds}")
    if ridge < 0:
        raise ConfigError(f"ridge: expected 0 or more, got {ridge:g}")

"""Is a mixture of adapters the sum of them inside the model? Through sparse codes, and without.

Were it so, the change that a mixture makes to an activation would be a weighted sum of the changes
that each adapter makes alone, and least squares would return the scales. Sparse codes are said to
make that so. The same on raw activations tells whether codes are to blame where it is not, and
references at the scales of the mixture, whose weights would be 1, whether the sizes are.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import nnls
from sklearn.linear_model import RidgeCV
from sklearn.metrics import r2_score
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from lora_ws.attribution.autoencoder import SparseAutoencoder
from lora_ws.attribution.trajectory import Moment, record, watched
from lora_ws.diffusion.families import denoiser_of
from lora_ws.diffusion.generation import GenerationSpec
from lora_ws.diffusion.pipeline import denoise, initial_noise
from lora_ws.diffusion.prompts import check_prompts
from lora_ws.diffusion.schedulers import timesteps_for
from lora_ws.diffusion.stack import AdapterStack
from lora_ws.errors import ConfigError
from lora_ws.report.grid import Cell, Grid

# What the middle of the U-Net's attention returns.
MIDDLE = "mid_block.attentions.0"


@dataclass(frozen=True, eq=False)
class Fit:
    """Weights of references in a mixture.

    Attributes:
        least_squares: ordinary.
        non_negative: none of them below 0.
        r2: share of the mixture's squared norm that ordinary least squares explain.
        condition: number of the references; large where some are alike, inf where they do not
            determine the weights.
    """

    least_squares: Float[np.ndarray, " k"]
    non_negative: Float[np.ndarray, " k"]
    r2: float
    condition: float


@dataclass(frozen=True, eq=False)
class Superposition:
    """How far changes add up.

    Attributes:
        unit: weights of references at scale 1; the scales, did they add up.
        own: of references at the scales of the mixture; ones, did they add up.
        additivity: ``||mixture - sum of references at its scales|| / ||mixture||``; 0 for sums.
    """

    unit: Fit
    own: Fit
    additivity: float


@dataclass(frozen=True, eq=False)
class Decomposition:
    """A mixture of adapters taken apart.

    Attributes:
        names: of the k adapters.
        scales: of the mixture.
        codes: by sparse codes.
        raw: by the activations themselves.
    """

    names: tuple[str, ...]
    scales: tuple[float, ...]
    codes: Superposition
    raw: Superposition

    def grid(self) -> Grid:
        """True scales and those recovered."""
        parts = {"codes": self.codes, "activations": self.raw}
        columns = {"scale": [f"{scale:g}" for scale in self.scales]}
        for name, part in parts.items():
            columns[name] = [f"{weight:.3f}" for weight in part.unit.least_squares]
            columns[f"{name}, not negative"] = [f"{w:.3f}" for w in part.unit.non_negative]
            columns[f"{name}, of 1"] = [f"{weight:.3f}" for weight in part.own.least_squares]
        rows = zip(self.names, *columns.values(), strict=True)
        caption = (
            "Weights of the change that each adapter makes alone, in the change of the mixture: at "
            "scale 1, where they would be the scales did changes add up, and at its own scale, "
            "where they would be 1. "
        ) + " ".join(
            f"By {name}: residual R2 {part.unit.r2:.3f}, condition {part.unit.condition:.3g}, "
            f"distance from a sum {part.additivity:.3f}."
            for name, part in parts.items()
        )
        cells = tuple(tuple(map(Cell, row)) for row in rows)
        return Grid(("adapter", *columns), cells, caption)


def record_base(
    pipeline: Any,
    generation: GenerationSpec,
    *,
    steps: Sequence[int],
    batch: int = 25,
    module: str = MIDDLE,
) -> Float[Tensor, "pictures steps width"]:
    """Draw without adapters, and keep what the middle of the U-Net returns.

    Args:
        pipeline: the base; left as found.
        generation: what is drawn, an image per prompt; image k starts from the noise of
            ``seed + k``.
        steps: which are kept, from 0.
        batch: images at once.
        module: see `record_middle`.

    Returns:
        Means over places, with the prompt.

    Raises:
        ConfigError: no such step or module, or a prompt is too long.
    """
    check_prompts(pipeline, generation.texts)
    kept = _steps(steps, len(timesteps_for(pipeline, generation)))
    prompts = generation.prompts()
    found = []
    for first in range(0, len(prompts), batch):
        part = replace(generation, prompt=tuple(prompts[first : first + batch]))
        seeds = range(generation.seed + first, generation.seed + first + len(part.prompts()))
        with watched(denoiser_of(pipeline), [module]) as seen:
            run = denoise(pipeline, initial_noise(pipeline, seeds), part)
            every = [_mean_of_places(seen[module][-len(seeds) :]) for _ in run]
        found.append(torch.stack([every[step] for step in kept], dim=1))
    return torch.cat(found)


def record_middle(
    pipeline: Any,
    stack: AdapterStack,
    generations: Sequence[GenerationSpec],
    scales: Any,
    *,
    steps: Sequence[int] | None = None,
    forced: bool = False,
    module: str = MIDDLE,
) -> Float[Tensor, "generations mixtures steps width"]:
    """Draw with several mixtures, and keep what the middle of the U-Net returns.

    Args:
        pipeline: the base; left as found.
        stack: the k adapters.
        generations: each is drawn with every mixture, from the same noise; of as many steps each.
        scales: how much of each adapter, one row ``[k]`` per mixture.
        steps: which are kept, from 0; None for all.
        forced: every mixture sees the latents of the full stack, rather than its own.
        module: what is listened to; returns ``[batch, width, height, width of the image]``.

    Returns:
        Means over places, with the prompt.

    Raises:
        ConfigError: no generations, generations of different length, no such step or module, or a
            prompt is too long.
        LayoutError: the adapters are of another base.
    """
    counts = {len(timesteps_for(pipeline, each)) for each in generations}
    counts = sorted(counts)
    if len(counts) != 1:
        raise ConfigError(f"generations: expected some of as many steps each, got steps {counts}")
    kept = _steps(range(counts[0]) if steps is None else steps, counts[0])

    def pooled(moment: Moment) -> Tensor:
        # The last part is that with the prompt, be there guidance or not.
        return _mean_of_places(moment.outputs[module][:, -1])

    found = [
        record(pipeline, stack, generation, scales, [module], pooled, forced=forced)
        for generation in generations
    ]
    return torch.stack([torch.stack([own[step] for step in kept], dim=1) for own in found])


def _steps(steps: Sequence[int], count: int) -> list[int]:
    kept = list(steps)
    if not kept or not set(kept) <= set(range(count)):
        raise ConfigError(f"steps: expected numbers from 0 to {count - 1}, got {kept}")
    return kept


def _mean_of_places(outputs: Tensor) -> Tensor:
    return outputs.flatten(2).mean(dim=2).cpu()


def decomposition_rows(scales: Sequence[float]) -> Float[Tensor, "rows k"]:
    """The mixtures that `superposition` wants: none, each at 1, each at its scale, all at theirs.

    Example:
        >>> decomposition_rows([0.5]).tolist()
        [[0.0], [1.0], [0.5], [0.5]]
    """
    own = torch.tensor(scales, dtype=torch.float32)
    return torch.cat([torch.zeros(1, len(own)), torch.eye(len(own)), own.diag(), own[None]])


def decompose_middle(
    pipeline: Any,
    stack: AdapterStack,
    generation: GenerationSpec,
    autoencoder: SparseAutoencoder,
    *,
    step: int | None = None,
    forced: bool = False,
) -> Decomposition:
    """Take the stack apart by what each adapter does alone to the middle of the U-Net.

    Args:
        pipeline: the base; left as found.
        stack: the k adapters, at the scales that are looked for.
        generation: what is drawn.
        autoencoder: of such activations.
        step: at which is looked; None for half of the way.
        forced: see `record_middle`.

    Raises:
        ConfigError: see `record_middle`.
        LayoutError: the adapters are of another base.
    """
    rows = decomposition_rows(stack.scales)
    steps = len(timesteps_for(pipeline, generation))
    at = steps // 2 if step is None else step
    found = record_middle(pipeline, stack, [generation], rows, steps=[at], forced=forced)
    raw = found[0, :, 0]
    codes = autoencoder.encode(raw)
    return Decomposition(stack.names, stack.scales, superposition(codes), superposition(raw))


def superposition(outputs: Float[Tensor, "rows width"]) -> Superposition:
    """Take a mixture apart, from outputs of the mixtures of `decomposition_rows`.

    Raises:
        ConfigError: there are not as many rows as for any number of adapters.
    """
    k, odd = divmod(len(outputs) - 2, 2)
    if k < 1 or odd:
        raise ConfigError(
            f"outputs: expected 2 k + 2 rows for k adapters, got {len(outputs)}; run the mixtures "
            "of decomposition_rows"
        )
    values = outputs.double().numpy()
    changes = values[1:] - values[0]
    unit, own, mixture = changes[:k], changes[k:-1], changes[-1]
    return Superposition(
        fit_changes(mixture, unit), fit_changes(mixture, own), additivity(mixture, own)
    )


def fit_changes(
    mixture: Float[np.ndarray, " width"], references: Float[np.ndarray, "k width"]
) -> Fit:
    """Weights of references whose sum is nearest to a mixture.

    Example:
        >>> fit_changes(np.array([2.0, 6.0]), np.eye(2)).least_squares.tolist()
        [2.0, 6.0]
    """
    columns = references.T.astype(np.float64)
    weights, _, rank, singular = np.linalg.lstsq(columns, mixture, rcond=None)
    left = np.square(mixture - columns @ weights).sum()
    whole = np.square(mixture).sum()
    condition = singular[0] / singular[-1] if rank == len(references) else np.inf
    positive, _ = nnls(columns, mixture)
    return Fit(weights, positive, float(1 - left / whole) if whole else 1.0, float(condition))


def additivity(
    mixture: Float[np.ndarray, " width"], references: Float[np.ndarray, "k width"]
) -> float:
    """``||mixture - sum of references|| / ||mixture||``; 0 where there is nothing to add.

    Example:
        >>> additivity(np.array([3.0, 4.0]), np.array([[3.0, 0.0]]))
        0.8
    """
    apart = np.linalg.norm(mixture - references.sum(axis=0))
    return float(apart / np.linalg.norm(mixture)) if apart else 0.0


def code_r2(
    activations: Float[Tensor, "generations mixtures steps width"],
    autoencoder: SparseAutoencoder,
    *,
    folds: int = 5,
) -> float:
    """How much of the changes of activations follows from the changes of their codes, linearly.

    Changes are those from the first mixture, which should be the one without adapters. The
    regression is ridge; R2 is of rows that it was not fitted on, and rows of a generation stay
    together.

    Args:
        activations: what `record_middle` returned, of at least two generations and two mixtures.
        autoencoder: of such activations.
        folds: of the cross-validation; at most as many as generations are used.

    Raises:
        ConfigError: there are fewer.
    """
    generations, mixtures = activations.shape[:2]
    if generations < 2 or mixtures < 2 or folds < 2:
        raise ConfigError(
            "expected at least 2 generations, 2 mixtures and 2 folds, got "
            f"{generations}, {mixtures} and {folds}"
        )
    codes = autoencoder.encode(activations.flatten(0, 2)).unflatten(0, activations.shape[:3])
    inputs, wanted = (
        (values[:, 1:] - values[:, :1]).flatten(0, 2).double().numpy()
        for values in (codes, activations)
    )
    predicted = cross_val_predict(
        make_pipeline(StandardScaler(), RidgeCV(np.logspace(-3, 4, 15))),
        inputs,
        wanted,
        groups=np.arange(generations).repeat(len(wanted) // generations),
        cv=GroupKFold(min(folds, generations)),
    )
    return float(r2_score(wanted, predicted, multioutput="variance_weighted"))

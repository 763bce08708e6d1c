"""Contributions of weights: ``w * dJ/dw``, with one sign: positive supports the concept.

To first order J falls by the sum of the scores of the weights that are set to zero. That holds for
small edits alone, and `validity` says how well. `integrated` scores sum to what happens when all
go.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_ws.concepts.objective import Objective, restored
from lora_ws.diffusion.families import denoiser_of
from lora_ws.diffusion.stack import AdapterStack
from lora_ws.errors import ConfigError

Scores = dict[str, Tensor]
Group = Literal["row", "column", "matrix", "block"]


def contributions(
    objective: Objective, unet: nn.Module, weights: Mapping[str, nn.Parameter]
) -> Scores:
    """Score every weight from one pass.

    Args:
        objective: what the concept is measured by.
        unet: the model.
        weights: of it, by name; see `eligible_weights`.

    Returns:
        Name -> scores of the shape of the weight, float32.
    """
    grads = objective.gradients(unet, weights)
    return {
        name: objective.sign * weight.detach().float() * grads[name]
        for name, weight in weights.items()
    }


def integrated(
    objective: Objective, unet: nn.Module, weights: Mapping[str, nn.Parameter], points: int = 8
) -> Scores:
    """Score every weight by its gradient averaged on the way from all weights off to all on.

    ``w * integral of dJ/dw(a w) da`` from 0 to 1, against saturation: a weight whose work others
    would take over has no gradient at the full model. Where gradients are those of J (constants to
    compare with, or no `stop_gradient`) scores sum to what setting all of the weights to zero does.

    Args:
        objective: what the concept is measured by.
        unet: the model, left as found.
        weights: of it, by name; all of them go the way together.
        points: gradients on the way, a pass each; Gauss-Legendre, exact where J is a polynomial of
            degree up to ``2 * points`` in ``a``.

    Returns:
        Name -> scores of the shape of the weight, float32.

    Raises:
        ConfigError: there are no points.

    Source: Sundararajan et al. 2017 (integrated gradients), with zeros for the baseline.
    """
    if points < 1:
        raise ConfigError(f"points: expected at least 1, got {points}")
    found = {name: torch.zeros_like(w, dtype=torch.float32) for name, w in weights.items()}
    with restored(weights) as full:
        for place, share in zip(*np.polynomial.legendre.leggauss(points), strict=True):
            for name, weight in weights.items():
                weight.data.copy_(full[name] * float(1 + place) / 2)
            for name, grad in objective.gradients(unet, weights).items():
                found[name] += float(share) / 2 * objective.sign * full[name].float() * grad
    return found


METHODS = {"taylor": contributions, "integrated": integrated}


def contrast(concept: Scores, others: Sequence[Scores]) -> Scores:
    """What supports a concept more than it supports others that are to be kept.

    Args:
        concept: scores of the concept.
        others: scores of those to keep; the mean of their positive parts is taken off.

    Raises:
        ConfigError: there are none.
    """
    if not others:
        raise ConfigError("preserve: expected at least one concept to keep, got none")
    return {
        name: score - torch.stack([other[name].clamp(min=0) for other in others]).mean(dim=0)
        for name, score in concept.items()
    }


def block_of(name: str) -> str:
    """The block of a U-Net that a weight is in, such as ``down_blocks.1.attentions.0``."""
    return ".".join(name.split(".")[:4])


def grouped(scores: Scores, by: Group) -> dict[str, Tensor]:
    """Sums over rows, columns, matrices, or blocks of the model.

    Returns:
        Name -> sums: one per row (output) or column (input) of a matrix; one per matrix or block.
    """
    if by == "block":
        blocks: dict[str, Tensor] = {}
        for name, score in scores.items():
            block = block_of(name)
            blocks[block] = blocks.get(block, torch.zeros(())) + score.sum()
        return blocks
    flat = {name: score.flatten(1) for name, score in scores.items()}
    sums = {"row": lambda x: x.sum(1), "column": lambda x: x.sum(0), "matrix": lambda x: x.sum()}
    return {name: sums[by](score) for name, score in flat.items()}


def adapter_scores(
    objective: Objective, pipeline: Any, stack: AdapterStack
) -> dict[str, Float[Tensor, "k rank"]]:
    """Scores of every rank of every adapter, from one pass with all of them on.

    ``s[i, m, r] = scale_i * <dJ/dW_m, b_r a_r^T>``; the sum over m and r is the derivative of J by
    the scale of adapter i, times the scale: what taking the adapter away would do, to first order.

    Returns:
        Module -> scores, one row per adapter.
    """
    unet, bank = denoiser_of(pipeline), stack.bank
    modules = zip(bank.layout.layers, bank.modules_of(unet), strict=True)
    weights = {layer.name: module.get_parameter("weight") for layer, module in modules}
    scales = torch.tensor(stack.scales)
    with bank.attach(unet, scales):
        grads = objective.gradients(unet, weights)
    found = {}
    for layer, down, up in bank.layout.pairs():
        rows = bank.rows()
        a = rows[:, down].reshape(len(stack), *layer.down_shape)
        b = rows[:, up].reshape(len(stack), *layer.up_shape)
        effect = torch.einsum("oi,kor,kri->kr", grads[layer.name].flatten(1), b, a)
        found[layer.name] = objective.sign * scales[:, None] * effect
    return found


class Validity(NamedTuple):
    """How well scores predict.

    Attributes:
        correlation: Pearson's, of predicted and true changes of J; nan where they do not vary.
        predicted: changes of J that scores predict ``[masks]``.
        true: those that are measured.
    """

    correlation: float
    predicted: Float[np.ndarray, " masks"]
    true: Float[np.ndarray, " masks"]


def validity(
    objective: Objective,
    unet: nn.Module,
    weights: Mapping[str, nn.Parameter],
    scores: Scores,
    *,
    share: float = 0.01,
    masks: int = 20,
    seed: int = 0,
) -> Validity:
    """Set random weights to zero, and compare what happens with what scores predict.

    Args:
        objective: what the scores are of.
        unet: left as found.
        weights: that were scored.
        scores: of them.
        share: of the weights that are set to zero.
        masks: how many times.
        seed: of the masks.
    """
    generator = torch.Generator().manual_seed(seed)
    before, predicted, true = objective.value(unet), [], []
    for _ in range(masks):
        total = 0.0
        with restored(weights):
            for name, weight in weights.items():
                off = torch.rand(weight.shape, generator=generator) < share
                total += float(scores[name][off].sum())
                weight.data[off] = 0
            true.append(objective.sign * (before - objective.value(unet)))
        predicted.append(total)
    with np.errstate(invalid="ignore", divide="ignore"):
        correlation = float(np.corrcoef(predicted, true)[0, 1])
    return Validity(correlation, np.array(predicted), np.array(true))


def single_weight_errors(
    objective: Objective,
    unet: nn.Module,
    weights: Mapping[str, nn.Parameter],
    scores: Scores,
    others: Mapping[str, Scores],
    count: int = 10,
) -> dict[str, Float[np.ndarray, " count"]]:
    """Set single weights to zero, and compare what happens with what scores of them predict.

    Args:
        objective: what the scores are of.
        unet: left as found.
        weights: that were scored.
        scores: the weights of largest magnitude in these are taken.
        others: scores that are compared, by name.
        count: how many weights.

    Returns:
        Name -> ``|predicted - true| / |true|``.
    """
    flat = {name: score.flatten() for name, score in scores.items()}
    joined = torch.cat(list(flat.values())).abs()
    starts = np.cumsum([0, *map(len, flat.values())])
    names, before, found = list(flat), objective.value(unet), dict[str, list[float]]()
    for place in joined.topk(count).indices.tolist():
        k = int(np.searchsorted(starts, place, side="right")) - 1
        name, at = names[k], place - int(starts[k])
        with restored({name: weights[name]}):
            weights[name].data.view(-1)[at] = 0
            true = objective.sign * (before - objective.value(unet))
        for method, own in others.items():
            error = abs(float(own[name].flatten()[at]) - true) / abs(true)
            found.setdefault(method, []).append(error)
    return {method: np.array(errors) for method, errors in found.items()}


def concentration(scores: Scores, shares: Sequence[float]) -> list[float]:
    """Share of the sum of positive scores that the highest weights hold.

    Args:
        scores: of all eligible weights.
        shares: of the weights, from the highest on.

    Example:
        >>> concentration({"a": torch.tensor([3.0, -5.0, 1.0, 0.0])}, [0.25, 0.5])
        [0.75, 1.0]
    """
    joined = torch.cat([score.flatten() for score in scores.values()]).double()
    ranked = joined.clamp(min=0).sort(descending=True).values.cumsum(0)
    return [float(ranked[int(share * len(ranked)) - 1] / ranked[-1]) for share in shares]

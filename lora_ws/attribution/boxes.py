"""Which adapter made what stands in a box of an image, by gradients of the prediction in it.

The image is noised again, and the loss is the mean squared error of what the model predicts
within the box, the prompt given and without guidance. Four ways to make scores of its gradients:

- "norm", as published: norm of the gradient by an adapter's update, over the norm of the update.
  It cannot work. Of ``W + sum_j a_j dW_j`` the gradient by ``dW_i`` is ``a_i dL/dW``: at equal
  scales the same matrix for every adapter, whatever the box. What is left is the order of
  ``a_i / ||dW_i||``, which knows no box.
- "factor_norm": the same by the factors, of gradients ``a_i G A_i^T`` and ``a_i B_i^T G``. They
  differ by adapter, but say how much an adapter could do in the box, not what it did.
- "directional": ``a_i <dL/dW, dW_i>``, the derivative of the loss by the scale, times the scale.
  What leaving the adapter out does, to first order.
- "integrated": the mean of that along the scale from 0 to ``a_i``, times ``a_i``: what leaving the
  adapter out does to the loss.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Float, Real
from torch import Tensor, nn
from torch.nn import functional as F

from lora_ws.attribution.trajectory import trajectory
from lora_ws.config import nearest
from lora_ws.diffusion.families import StableDiffusion, denoiser_of, family_of
from lora_ws.diffusion.family import Conditioning, Family, repeated
from lora_ws.diffusion.generation import GenerationSpec
from lora_ws.diffusion.gradients import requires_grad
from lora_ws.diffusion.pipeline import size_of
from lora_ws.diffusion.schedulers import timesteps_for, training_pair
from lora_ws.diffusion.stack import AdapterStack
from lora_ws.errors import ConfigError

BoxMethod = Literal["norm", "factor_norm", "directional", "integrated"]
Target = Literal["base", "noise"]
# Points on the way of a scale; exact for polynomials of degree 11.
_NODES = 6


class Box(NamedTuple):
    """A part of an image in pixels; right and bottom are the first ones beyond it."""

    left: int
    top: int
    right: int
    bottom: int


@dataclass(frozen=True, eq=False)
class Probe:
    """Noised latents of an image, and what predictions on them are compared with.

    Attributes:
        latents: noised.
        times: to which each is noised.
        told: what the model is told of the prompt, a single row.
        target: what is compared with.
        sign: 1 where what an adapter does raises the loss, -1 where it lowers it.
        picture: height and width of it, in pixels.
        family: of the model.
    """

    latents: Float[Tensor, "n channels h w"]
    times: Real[Tensor, " n"]
    told: Conditioning
    target: Float[Tensor, "n channels h w"]
    sign: int
    picture: tuple[int, int]
    family: type[Family] = StableDiffusion


@dataclass(frozen=True, eq=False)
class BoxScores:
    """Scores of adapters for boxes.

    Attributes:
        names: of the k adapters.
        boxes: of the image.
        method: how they are scored.
        scores: the higher, the more of what stands in the box is the adapter's; below 0 (only by
            "directional" and "integrated") it works against it.
    """

    names: tuple[str, ...]
    boxes: tuple[Box, ...]
    method: BoxMethod
    scores: Float[Tensor, "boxes k"]

    @property
    def shares(self) -> Float[Tensor, "boxes k"]:
        """Positive parts of the scores over their sum; zeros where none is positive."""
        positive = self.scores.clamp(min=0)
        total = positive.sum(dim=1, keepdim=True)
        return torch.where(total > 0, positive / total, 0)

    @property
    def top(self) -> tuple[str, ...]:
        """The adapter with the highest score of each box."""
        return tuple(self.names[k] for k in self.scores.argmax(dim=1).tolist())


def attribute_boxes(
    pipeline: Any,
    stack: AdapterStack,
    generation: GenerationSpec,
    boxes: Sequence[Box | tuple[int, int, int, int]],
    *,
    method: BoxMethod = "directional",
    target: Target = "base",
    levels: int = 8,
    seed: int = 0,
) -> BoxScores:
    """Draw an image, and attribute regions of it to adapters.

    Args:
        pipeline: the base; left as found.
        stack: the adapters.
        generation: what is drawn.
        boxes: left, top, right, bottom in pixels.
        method: see the module.
        target: see `renoise`.
        levels: of noise that are averaged over.
        seed: of the noise.

    Raises:
        ConfigError: there is no such method or target, a box is empty or beyond the image, or
            the prompt is too long.
        LayoutError: the adapters are of another base.
    """
    width, height = size_of(pipeline, generation)
    chosen = _checked(boxes, (height, width), method)
    if method == "norm":
        warnings.warn(
            "the method `norm` gives the same order of adapters for every box; `directional` "
            "does not",
            stacklevel=2,
        )
    probe = renoise(pipeline, stack, generation, target=target, levels=levels, seed=seed)
    return box_scores(denoiser_of(pipeline), stack, probe, chosen, method=method)


def renoise(
    pipeline: Any,
    stack: AdapterStack,
    generation: GenerationSpec,
    *,
    target: Target = "base",
    levels: int = 8,
    seed: int = 0,
) -> Probe:
    """Draw an image with all adapters, and noise its latents again to several levels.

    Args:
        pipeline: the base; left as found.
        stack: the adapters.
        generation: what is drawn.
        target: "base" compares with what the base predicts without adapters, "noise" with what it
            should predict, by the noise that was added.
        levels: timesteps of the generation, evenly chosen.
        seed: of the noise.

    Raises:
        ConfigError: there is no such target, more levels than timesteps, the scheduler does not say
            the noise levels of training, or the prompt is too long.
        LayoutError: the adapters are of another base.
    """
    if target not in get_args(Target):
        raise ConfigError(f"target: expected `base` or `noise`, got `{target}`")
    family, times = family_of(pipeline), timesteps_for(pipeline, generation)
    width, height = family.size(generation)
    if not 1 <= levels <= len(times):
        raise ConfigError(f"levels: expected 1 to {len(times)}, one per step, got {levels}")
    clean = trajectory(pipeline, stack, generation)[-1].repeat(levels, 1, 1, 1)
    chosen = torch.linspace(0, len(times) - 1, levels, dtype=torch.float64).round().long()
    times = times[chosen].to(clean.device)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(clean.shape, generator=generator).to(clean)
    latents, wanted = training_pair(pipeline.scheduler, clean, noise, times)
    with stack.attach(pipeline, torch.tensor(stack.scales)):
        told = family.told_of(generation)
    if target == "base":
        with torch.no_grad():
            wanted = family.predict(latents, times, repeated(told, levels))
    sign = 1 if target == "base" else -1
    return Probe(latents, times, told, wanted, sign, (height, width), type(family))


def box_scores(
    unet: nn.Module,
    stack: AdapterStack,
    probe: Probe,
    boxes: Sequence[Box | tuple[int, int, int, int]],
    *,
    method: BoxMethod = "directional",
) -> BoxScores:
    """Score adapters for boxes of an image that is noised already.

    Args:
        unet: the model; left as found.
        stack: the adapters.
        probe: see `renoise`.
        boxes: left, top, right, bottom in pixels.
        method: see the module.

    Raises:
        ConfigError: there is no such method, or a box is empty or beyond the image.
        LayoutError: the adapters are of another base.
    """
    chosen = _checked(boxes, probe.picture, method)
    masks = [
        box_mask(box, probe.picture, probe.latents.shape[-2:]).to(probe.latents) for box in chosen
    ]
    score = {
        "norm": _norms,
        "factor_norm": _norms,
        "directional": _directional,
        "integrated": _integrated,
    }[method]
    with torch.enable_grad():
        scores = score(unet, stack, probe, masks, method)
    return BoxScores(stack.names, chosen, method, scores.detach().cpu())


def box_mask(box: Box, picture: tuple[int, int], size: Sequence[int]) -> Float[Tensor, "h w"]:
    """How much of each cell of the latents lies in a box, from 0 to 1.

    Example:
        >>> box_mask(Box(0, 0, 3, 4), (4, 4), (2, 2)).tolist()
        [[1.0, 0.5], [1.0, 0.5]]
    """
    mask = torch.zeros(1, 1, *picture)
    mask[..., box.top : box.bottom, box.left : box.right] = 1
    return F.interpolate(mask, tuple(size), mode="area")[0, 0]


def _directional(
    unet: nn.Module, stack: AdapterStack, probe: Probe, masks: Sequence[Tensor], _: BoxMethod
) -> Float[Tensor, "boxes k"]:
    scales = torch.tensor(stack.scales, requires_grad=True)
    with stack.bank.attach(unet, scales):
        error = _errors(unet, probe, 1)
        grads = [grad for (grad,) in _backward(error, masks, [scales])]
    return probe.sign * scales * torch.stack(grads)


def _integrated(
    unet: nn.Module, stack: AdapterStack, probe: Probe, masks: Sequence[Tensor], _: BoxMethod
) -> Float[Tensor, "boxes k"]:
    points, weights = np.polynomial.legendre.leggauss(_NODES)
    along, weight = (torch.tensor(x / 2, dtype=torch.float32) for x in (points + 1, weights))
    columns = []
    for k, scale in enumerate(stack.scales):
        rows = torch.tensor(stack.scales).repeat(_NODES, 1)
        rows[:, k] *= along
        rows.requires_grad_(True)
        with stack.bank.attach(unet, rows):
            error = _errors(unet, probe, _NODES)
            grads = [grad[:, k] for (grad,) in _backward(error, masks, [rows])]
        columns.append(probe.sign * scale * torch.stack(grads) @ weight)
    return torch.stack(columns, dim=1)


def _norms(
    unet: nn.Module, stack: AdapterStack, probe: Probe, masks: Sequence[Tensor], method: BoxMethod
) -> Float[Tensor, "boxes k"]:
    bank = stack.bank
    modules = zip(bank.layout.layers, bank.modules_of(unet), strict=True)
    weights = {layer.name: module.get_parameter("weight") for layer, module in modules}
    with requires_grad(weights.values()), bank.attach(unet, torch.tensor(stack.scales)):
        error = _errors(unet, probe, 1)
        found = [
            _norms_of(stack, dict(zip(weights, grads, strict=True)), method)
            for grads in _backward(error, masks, list(weights.values()))
        ]
    return torch.stack(found)


def _norms_of(
    stack: AdapterStack, grads: Mapping[str, Tensor], method: BoxMethod
) -> Float[Tensor, " k"]:
    """Norms of gradients over norms of what they are by, from gradients by the weights."""
    rows, gradient, own = stack.bank.rows(), torch.zeros(len(stack)), torch.zeros(len(stack))
    adapted = [{layer.name for layer in layout.layers} for layout in stack.bank.layouts]
    for layer, down, up in stack.bank.layout.pairs():
        grad = grads[layer.name].float().flatten(1)
        a = rows[:, down].unflatten(1, layer.down_shape).to(grad)
        b = rows[:, up].unflatten(1, layer.up_shape).to(grad)
        if method == "norm":
            mine = torch.tensor([layer.name in names for names in adapted])
            gradient += (mine * grad.square().sum().cpu()).detach()
            own += (b @ a).square().sum(dim=(1, 2)).cpu()
        else:
            parts = grad @ a.mT, b.mT @ grad
            gradient += sum(part.square().sum(dim=(1, 2)).cpu() for part in parts)
            own += (a.square().sum(dim=(1, 2)) + b.square().sum(dim=(1, 2))).cpu()
    scores = torch.tensor(stack.scales).abs() * gradient.sqrt() / own.sqrt()
    # An adapter of zeros does nothing.
    return torch.where(own > 0, scores, 0)


def _errors(unet: nn.Module, probe: Probe, rows: int) -> Float[Tensor, "h w"]:
    """Squared errors of each cell, means over latents and channels, sums over rows of scales."""
    # The bank gives sample b the row b modulo their number.
    latents = probe.latents.repeat_interleave(rows, dim=0)
    times, told = probe.times.repeat_interleave(rows), repeated(probe.told, len(latents))
    said = probe.family.ask(unet, latents, times, told)
    error = (said - probe.target.repeat_interleave(rows, dim=0)).square()
    return error.mean(dim=(0, 1)) * rows


def _backward(
    error: Float[Tensor, "h w"], masks: Sequence[Tensor], by: Sequence[Tensor]
) -> Iterator[tuple[Tensor, ...]]:
    """Gradients of the mean error within each mask."""
    for mask in masks:
        loss = (mask * error).sum() / mask.sum()
        yield torch.autograd.grad(loss, by, retain_graph=True)


def _checked(
    boxes: Sequence[Sequence[int]], picture: tuple[int, int], method: str
) -> tuple[Box, ...]:
    methods = get_args(BoxMethod)
    if method not in methods:
        raise ConfigError(
            f"method: expected one of {', '.join(methods)}, got `{method}`"
            f"{nearest(method, list(methods))}"
        )
    if not boxes:
        raise ConfigError("boxes: expected at least one, got none")
    height, width = picture
    for box in boxes:
        if len(box) != 4:
            raise ConfigError(f"boxes: expected left, top, right, bottom, got {tuple(box)}")
    for box in map(Box._make, boxes):
        if not (0 <= box.left < box.right <= width and 0 <= box.top < box.bottom <= height):
            raise ConfigError(
                f"boxes: expected left, top, right, bottom within an image {width} pixels wide "
                f"and {height} high, left before right and top before bottom, got {tuple(box)}"
            )
    return tuple(map(Box._make, boxes))

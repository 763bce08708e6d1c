"""Optimizers, learning rates and early stopping, of one network or of each of many."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_ws.learn.spec import FitSpec

BETAS, EPS = (0.9, 0.999), 1e-8
# Defaults of torch's ReduceLROnPlateau: a lower loss counts from this share on, and a smaller
# change of the learning rate is not made.
THRESHOLD, SMALLEST = 1e-4, 1e-8
# What torch's clip_grad_norm_ adds to the norm.
CLIP_EPS = 1e-6


def make_optimizer(parameters: Iterable[nn.Parameter], fit: FitSpec) -> torch.optim.Optimizer:
    """Adam or AdamW; fused where torch has such a kernel."""
    weights = list(parameters)
    kind = torch.optim.Adam if fit.optimizer == "adam" else torch.optim.AdamW
    fused = all(weight.device.type in ("cpu", "cuda") for weight in weights)
    return kind(weights, fit.lr, weight_decay=fit.weight_decay, fused=fused)


def lr_share(fit: FitSpec, epochs: float) -> float | None:
    """The share of ``fit.lr`` that a step takes; None where plateaus alone decide.

    Args:
        fit: schedule and warm-up.
        epochs: how many have passed at the end of the step, a fraction of one included.

    Example:
        >>> lr_share(FitSpec(warmup=2), 0.5), lr_share(FitSpec(warmup=2), 3.0)
        (0.25, None)
        >>> round(lr_share(FitSpec(schedule="cosine", max_epochs=10), 5.0), 3)
        0.5
    """
    if 0 < epochs <= fit.warmup:
        return epochs / fit.warmup
    if fit.schedule == "cosine":
        passed = (epochs - fit.warmup) / max(fit.max_epochs - fit.warmup, 1e-9)
        return (1 + math.cos(math.pi * min(passed, 1))) / 2
    return 1.0 if fit.schedule == "constant" else None


class ManyAdam:
    """Adam or AdamW on stacked parameters, with a learning rate for each model.

    The updates of `torch.optim.Adam` and `torch.optim.AdamW` with their default betas, after each
    model's gradient is clipped as `torch.nn.utils.clip_grad_norm_` does.

    Args:
        parameters: each ``[models, ...]``.
        fit: which of the two, weight decay and clipping; None takes plain Adam.

    Example:
        >>> weights = [torch.zeros(2, 3)]
        >>> ManyAdam(weights).step([torch.ones(2, 3)], torch.tensor([0.1, 0.2]))
        >>> weights[0][:, 0]
        tensor([-0.1000, -0.2000])
    """

    def __init__(self, parameters: Sequence[Tensor], fit: FitSpec | None = None) -> None:
        self.parameters, self.fit = list(parameters), fit or FitSpec()
        # All parameters of a model side by side, so that one call updates all.
        self._widths = [p[0].numel() for p in self.parameters]
        self.mean = self.parameters[0].new_zeros(len(self.parameters[0]), sum(self._widths))
        self.square, self._scratch = self.mean.clone(), self.mean.repeat(2, 1, 1)
        self.steps = 0

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], lr: Tensor) -> None:
        """Update the parameters in place.

        Args:
            gradients: one per parameter.
            lr: learning rates ``[models]``.
        """
        self.steps += 1
        # Into memory that is there: fresh pages cost a quarter of the time on a CPU.
        gradient, scale = self._scratch
        torch.cat([value.flatten(1) for value in gradients], 1, out=gradient)
        if self.fit.grad_clip is not None:
            norms = gradient.norm(dim=1, keepdim=True)
            gradient.mul_((self.fit.grad_clip / (norms + CLIP_EPS)).clamp(max=1))
        self._decay(gradient, lr)
        self.mean.lerp_(gradient, 1 - BETAS[0])
        self.square.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        # The correction of the second average, taken out of the root and the quotient.
        root = math.sqrt(1 - BETAS[1] ** self.steps)
        torch.sqrt(self.square, out=scale).add_(EPS * root)
        sizes = lr * (root / (1 - BETAS[0] ** self.steps))
        update = torch.div(self.mean, scale, out=scale).mul_(sizes[:, None])
        parts = update.split(self._widths, 1)
        for parameter, part in zip(self.parameters, parts, strict=True):
            parameter.sub_(part.view_as(parameter))

    def _decay(self, gradient: Tensor, lr: Tensor) -> None:
        """Take weight decay into the gradients (Adam) or off the parameters (AdamW)."""
        decay = self.fit.weight_decay
        parts = gradient.split(self._widths, 1) if decay else ()
        for parameter, part in zip(self.parameters, parts, strict=bool(decay)):
            if self.fit.optimizer == "adam":
                part.add_(parameter.flatten(1), alpha=decay)
            else:
                parameter.mul_((1 - lr * decay).view(-1, *[1] * (parameter.ndim - 1)))

    def keep(self, models: Tensor) -> None:
        """Forget all models but these; the parameters are compacted by their owner."""
        self.mean, self.square = self.mean[models], self.square[models]
        self._scratch = self._scratch[:, : len(models)].clone()

    def state_dict(self) -> dict[str, Any]:
        """All that decides the next step."""
        return {"mean": self.mean, "square": self.square, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.mean.copy_(state["mean"])
        self.square.copy_(state["square"])
        self.steps = state["steps"]


class PlateauAndStop:
    """Learning rates and early stopping of each model, from its validation losses.

    The rules of torch's `ReduceLROnPlateau` and of Lightning's `EarlyStopping` (which also stops at
    a loss that is not finite), in float64 on the CPU.

    Args:
        models: how many.
        fit: learning rate, factor and patiences.

    Example:
        >>> rule = PlateauAndStop(2, FitSpec(patience=1))
        >>> for losses in ([1.0, 1.0], [0.5, 1.0]):
        ...     better, done = rule.step(torch.tensor(losses))
        >>> better, done
        (tensor([ True, False]), tensor([False,  True]))
    """

    NAMES = ("lr", "best", "waits", "plateau_best", "plateau_waits")

    def __init__(self, models: int, fit: FitSpec) -> None:
        self.fit = fit
        self.lr = torch.full((models,), fit.lr, dtype=torch.float64)
        self.best = torch.full((models,), math.inf, dtype=torch.float64)
        self.waits = torch.zeros(models, dtype=torch.long)
        self.plateau_best, self.plateau_waits = self.best.clone(), self.waits.clone()

    def step(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        """Take an epoch's losses ``[models]``; say which are the lowest so far, and who is done."""
        losses = losses.double().cpu()
        better = losses < self.best
        self.best = torch.where(better, losses, self.best)
        self.waits = torch.where(better, 0, self.waits + 1)
        lower = losses < self.plateau_best * (1 - THRESHOLD)
        self.plateau_best = torch.where(lower, losses, self.plateau_best)
        self.plateau_waits = torch.where(lower, 0, self.plateau_waits + 1)
        plateau = self.plateau_waits > self.fit.lr_patience
        if self.fit.schedule != "plateau":
            plateau = torch.zeros_like(plateau)
        self.plateau_waits = torch.where(plateau, 0, self.plateau_waits)
        lr = self.lr * self.fit.lr_factor
        self.lr = torch.where(plateau & (self.lr - lr > SMALLEST), lr, self.lr)
        return better, (self.waits >= self.fit.patience) | ~losses.isfinite()

    def keep(self, models: Tensor) -> None:
        """Forget all models but these."""
        self.load_state_dict({name: getattr(self, name)[models] for name in self.NAMES})

    def state_dict(self) -> dict[str, Tensor]:
        """All that decides the next step."""
        return {name: getattr(self, name) for name in self.NAMES}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a state."""
        for name in self.NAMES:
            setattr(self, name, state[name])

"""`Stack`: many classifiers of one shape in training at once, each as if it were alone."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lora_ws.learn.data import EVAL_BYTES
from lora_ws.learn.outcome import History, diverged
from lora_ws.learn.pace import ManyAdam, Patience
from lora_ws.learn.spec import FitSpec
from lora_ws.models import ManyMLP


@dataclass(frozen=True, eq=False)
class StackData:
    """Rows of one or several experiments, and which model reads which.

    Attributes:
        features: ``[rows, features]`` of all experiments, one below the other; a mapped array is
            read batch by batch.
        labels: ``[rows]``.
        parts: row numbers by name of the part, each ``[experiments, rows of the part]``.
        mean: of the features over the training rows ``[experiments, 1, features]``.
        scale: their standard deviation, alike.
        owner: the experiment of each model ``[models]``.
    """

    features: Tensor | np.ndarray
    labels: Tensor
    parts: dict[str, Tensor]
    mean: Tensor
    scale: Tensor
    owner: Tensor

    def rows(self, part: str) -> Tensor:
        """Row numbers of a part: ``[models, rows]``, or ``[1, rows]`` where all share them."""
        return self._own(self.parts[part])

    def take(self, rows: Tensor) -> Tensor:
        """Standardised features ``[models, batch, features]`` of rows ``[models, batch]``."""
        if isinstance(self.features, Tensor):
            values = self.features[rows]
        else:
            values = torch.from_numpy(self.features[rows.cpu().numpy()]).to(rows.device)
        return (values - self._own(self.mean)) / self._own(self.scale)

    def keep(self, models: Tensor) -> "StackData":
        """The same rows for some of the models."""
        return replace(self, owner=self.owner[models])

    def _own(self, values: Tensor) -> Tensor:
        return values if len(values) == 1 else values[self.owner]


class Stack:
    """Models in training; those that are done leave it, with the weights of their best epoch.

    Each has its own order of rows (that of `FeatureData`), learning rate and patience, so it takes
    the steps that it would take alone, up to rounding.

    Args:
        models: with their initial weights, on the device of the data.
        data: what they read.
        seeds: of each model's order of rows.
        fit: batches, learning rate and patience.
        names: of each model, for errors.

    Attributes:
        best: the weights of each model's epoch with the lowest validation loss.
        histories: losses and accuracy of each model by epoch.
    """

    def __init__(
        self,
        models: ManyMLP,
        data: StackData,
        seeds: Sequence[int],
        fit: FitSpec,
        names: Sequence[str],
    ) -> None:
        self.models, self.data, self.fit, self.names = models, data, fit, names
        self.best = [parameter.detach().clone() for parameter in models.parameters()]
        self.histories: list[History] = [[] for _ in seeds]
        self.epoch = 0
        self._all = data
        self._running = torch.arange(len(seeds))
        self._orders = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._adam = ManyAdam(list(models.parameters()))
        self._patience = Patience(len(seeds), fit)

    def train(self, file: Path | None = None, every: int = 100) -> None:
        """Train until every model is done.

        Args:
            file: where the state is kept every few epochs and at the end; read if it is there.
            every: after how many epochs.

        Raises:
            TrainingError: a model's validation loss was not finite from the start.
        """
        if file is not None and file.is_file():
            self.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        while not self.done:
            self._run_epoch()
            if file is not None and (self.done or self.epoch % every == 0):
                half = file.with_suffix(".half")
                torch.save(self.state_dict(), half)
                half.replace(file)

    @property
    def done(self) -> bool:
        """Whether no model is left in training."""
        return not len(self._running) or self.epoch >= self.fit.max_epochs

    def scores(self, part: str) -> Tensor:
        """Class probabilities of all models at their best: ``[models, rows of the part, classes]``.

        They take the place of the models that trained.
        """
        for parameter, best in zip(self.models.parameters(), self.best, strict=True):
            parameter.data = best
        self.data = self._all
        return torch.cat([logits.softmax(2) for _, logits in self._predict(part)], 1)

    def state_dict(self) -> dict[str, Any]:
        """All that decides the result, as tensors, numbers and text."""
        return {
            "epoch": self.epoch,
            "running": self._running,
            "histories": self.histories,
            "orders": [order.get_state() for order in self._orders],
            "models": [parameter.detach() for parameter in self.models.parameters()],
            "best": self.best,
            "adam": self._adam.state_dict(),
            "patience": self._patience.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state of a stack of the same models."""
        self._keep(state["running"])
        for parameter, value in zip(self.models.parameters(), state["models"], strict=True):
            parameter.data.copy_(value)
        for best, value in zip(self.best, state["best"], strict=True):
            best.copy_(value)
        for order, value in zip(self._orders, state["orders"], strict=True):
            order.set_state(value)
        self.epoch, self.histories = state["epoch"], state["histories"]
        self._adam.load_state_dict(state["adam"])
        self._patience.load_state_dict(state["patience"])

    def _run_epoch(self) -> None:
        self.epoch += 1
        train_loss = self._train_epoch()
        val_loss, accuracy = self._validate()
        self._note(train_loss=train_loss, val_loss=val_loss, val_accuracy=accuracy)
        better, done = self._patience.step(val_loss)
        if self.epoch == 1 and not better.all():
            raise diverged(self.names[int(better.long().argmin())])
        device = self.data.owner.device
        numbers, where = self._running[better].to(device), better.to(device)
        for best, parameter in zip(self.best, self.models.parameters(), strict=True):
            best[numbers] = parameter.detach()[where]
        if done.any():
            self._keep((~done).nonzero()[:, 0])

    def _train_epoch(self) -> Tensor:
        """All steps of an epoch; returns the mean loss of each model."""
        device = self.data.owner.device
        rows = self.data.rows("train")
        orders = [torch.randperm(rows.shape[1], generator=order) for order in self._orders]
        rows = rows.expand(len(orders), -1).gather(1, torch.stack(orders).to(device))
        parameters = list(self.models.parameters())
        lr = self._patience.lr.to(device, parameters[0].dtype)
        total = torch.zeros_like(lr)
        for part in rows.split(self.fit.batch_size, 1):
            losses = self._losses(self.models(self.data.take(part)), part).mean(1)
            # Each loss depends on its own model's weights only: the gradient of the sum is theirs.
            self._adam.step(torch.autograd.grad(losses.sum(), parameters), lr)
            total += losses.detach() * part.shape[1]
        return total / rows.shape[1]

    def _validate(self) -> tuple[Tensor, Tensor]:
        """Loss and accuracy of each model on its validation rows."""
        losses, hits = [], []
        for part, logits in self._predict("val"):
            losses.append(self._losses(logits, part))
            hits.append(logits.argmax(2) == self.data.labels[part])
        loss = torch.cat(losses, 1)
        return loss.sum(1) / loss.shape[1], torch.cat(hits, 1).to(loss.dtype).mean(1)

    @torch.no_grad()
    def _predict(self, part: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows and logits ``[models, some rows, classes]``, in bounded memory."""
        widths = [weight.shape[1] for weight in self.models.weights]
        step = max(1, EVAL_BYTES // (4 * len(self.models) * max(widths)))
        for rows in self.data.rows(part).split(step, 1):
            yield rows, self.models(self.data.take(rows))

    def _losses(self, logits: Tensor, rows: Tensor) -> Tensor:
        """Cross-entropy ``[models, rows]``."""
        labels = self.data.labels[rows].expand(logits.shape[:2])
        flat = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        return flat.view(logits.shape[:2])

    def _note(self, **values: Tensor) -> None:
        columns = zip(*(value.tolist() for value in values.values()), strict=True)
        for number, column in zip(self._running.tolist(), columns, strict=True):
            entry = dict(zip(values, column, strict=True))
            self.histories[number].append({"epoch": self.epoch, **entry})

    def _keep(self, places: Tensor) -> None:
        """Go on with the models at these places of the stack."""
        there = places.to(self.data.owner.device)
        self.models.keep(there)
        self._adam.keep(there)
        self._patience.keep(places)
        self.data = self.data.keep(there)
        self._orders = [self._orders[place] for place in places.tolist()]
        self._running = self._running[places]

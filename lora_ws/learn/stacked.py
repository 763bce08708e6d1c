"""`StackedTrainer`: many networks of one shape in training at once, each as if it were alone."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_ws.functional.rows import Rows
from lora_ws.learn.optim import ManyAdam, PlateauAndStop, lr_share
from lora_ws.learn.result import History, diverged
from lora_ws.learn.spec import FitSpec
from lora_ws.learn.tasks import Task
from lora_ws.memory import BLOCK_BYTES
from lora_ws.models import MetanetModule
from lora_ws.models.many import Stacked


@dataclass(frozen=True, eq=False)
class StackData:
    """Rows of one or several experiments, and which model reads which.

    Attributes:
        features: ``[rows, features]`` of all experiments, one below the other; a mapped array is
            read batch by batch.
        labels: ``[rows]``.
        parts: row numbers by name of the part, each ``[experiments, rows of the part]``.
        owner: the experiment of each model ``[models]``.
    """

    features: Tensor | np.ndarray
    labels: Tensor
    parts: dict[str, Tensor]
    owner: Tensor

    def rows(self, part: str) -> Tensor:
        """Row numbers of a part: ``[models, rows]``, or ``[1, rows]`` where all share them."""
        return self._own(self.parts[part])

    def take(self, rows: Tensor) -> Tensor:
        """Features ``[models, batch, features]`` of rows ``[models, batch]``."""
        if isinstance(self.features, Tensor):
            return self.features[rows]
        taken = Rows(self.features, rows.cpu().numpy().ravel())[:]
        return torch.from_numpy(taken.reshape(*rows.shape, -1)).to(rows.device)

    @property
    def dtype(self) -> torch.dtype:
        """Of the features."""
        return self.features.dtype if isinstance(self.features, Tensor) else torch.float32

    def keep(self, models: Tensor) -> "StackData":
        """The same rows for some of the models."""
        return replace(self, owner=self.owner[models])

    def _own(self, values: Tensor) -> Tensor:
        return values if len(values) == 1 else values[self.owner]


class StackedTrainer:
    """Models in training; those that are done leave it, with the weights of their best epoch.

    Each has its own order of rows (that of `FeatureData`), learning rate and patience, so it takes
    the steps that it would take alone, up to rounding.

    Args:
        models: with their initial weights, on the device of the data.
        data: what they read.
        seeds: of each model's order of rows.
        task: of all of them.
        fit: batches, learning rate and patience.
        names: of each model, for errors.

    Attributes:
        best: the weights of each model's epoch with the lowest validation loss.
        histories: losses and quality of each model by epoch.
    """

    def __init__(
        self,
        models: Stacked[MetanetModule],
        data: StackData,
        seeds: Sequence[int],
        task: Task,
        fit: FitSpec,
        names: Sequence[str],
    ) -> None:
        self.models, self.data, self.task = models, data, task
        self.fit, self.names = fit, names
        self.best = [parameter.detach().clone() for parameter in models.parameters()]
        # Constants such as those of normalizers leave with their models, as weights do.
        self._constants = [buffer.clone() for buffer in models.buffers()]
        self.histories: list[History] = [[] for _ in seeds]
        self.epoch = 0
        self._all = data
        self._running = torch.arange(len(seeds))
        self._orders = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._adam = ManyAdam(list(models.parameters()), fit)
        self._patience = PlateauAndStop(len(seeds), fit)

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

    def predictions(self, part: str) -> Tensor:
        """Predictions of all models at their best: ``[models, rows of the part, ...]``.

        They take the place of the models that trained.
        """
        for parameter, best in zip(self.models.parameters(), self.best, strict=True):
            parameter.data = best
        for buffer, whole in zip(self.models.buffers(), self._constants, strict=True):
            buffer.data = whole
        self.data = self._all
        return torch.cat([self.task.predict(outputs) for _, outputs in self._outputs(part)], 1)

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
        val_loss, quality = self._validate()
        curves = {"train_loss": train_loss, "val_loss": val_loss}
        self._note({**curves, f"val_{self.task.quality}": quality})
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
        self.models.train()
        device = self.data.owner.device
        rows = self.data.rows("train")
        orders = [torch.randperm(rows.shape[1], generator=order) for order in self._orders]
        rows = rows.expand(len(orders), -1).gather(1, torch.stack(orders).to(device))
        parameters = list(self.models.parameters())
        total = torch.zeros(len(orders), device=device, dtype=parameters[0].dtype)
        lr, seen = self._patience.lr.to(total), 0
        for part in rows.split(self.fit.batch_size, 1):
            seen += part.shape[1]
            share = lr_share(self.fit, self.epoch - 1 + seen / rows.shape[1])
            if share is not None:
                for rates in (lr, self._patience.lr):
                    rates.fill_(share * self.fit.lr)
            losses = self._losses(self.models(self.data.take(part)), part).mean(1)
            # Each loss depends on its own model's weights only: the gradient of the sum is theirs.
            self._adam.step(torch.autograd.grad(losses.sum(), parameters), lr)
            total += losses.detach() * part.shape[1]
        return total / rows.shape[1]

    def _validate(self) -> tuple[Tensor, Tensor]:
        """Loss and quality of each model on its validation rows."""
        losses, scores = [], []
        for part, outputs in self._outputs("val"):
            losses.append(self._losses(outputs, part))
            scores.append(self.task.score(outputs, self._labels(outputs, part)))
        loss = torch.cat(losses, 1)
        return loss.sum(1) / loss.shape[1], torch.cat(scores, 1).to(loss.dtype).mean(1)

    @torch.no_grad()
    def _outputs(self, part: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows and outputs ``[models, some rows, outputs]``, in bounded memory."""
        self.models.eval()
        step = max(1, BLOCK_BYTES // (4 * len(self.models) * self.models.width))
        for rows in self.data.rows(part).split(step, 1):
            yield rows, self.models(self.data.take(rows))

    def _losses(self, outputs: Tensor, rows: Tensor) -> Tensor:
        """Loss of each row ``[models, rows]``."""
        return self.task.loss(outputs, self._labels(outputs, rows), "none")

    def _labels(self, outputs: Tensor, rows: Tensor) -> Tensor:
        """Targets ``[models, rows, ...]``."""
        targets = self.data.labels[rows]
        return targets.expand(*outputs.shape[:2], *targets.shape[2:])

    def _note(self, values: dict[str, Tensor]) -> None:
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

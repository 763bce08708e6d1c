"""A network with its loss, optimizer and metrics, wired into Lightning.

`LoraModule` is what all have in common; `LoraClassifier` names a class, `LoraRegressor` a number.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, final

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics.utilities.distributed import gather_all_tensors

from lora_ws.learn.data import Batch
from lora_ws.learn.features import Prepared
from lora_ws.learn.metrics import metrics, number_metrics
from lora_ws.learn.spec import FitSpec


class LoraModule(L.LightningModule, ABC):
    """A network on standardised representations.

    Args:
        model: maps standardised features to outputs.
        mean: mean of each feature over the training rows.
        scale: standard deviation of each feature over the training rows, 1 where it is 0.
        metrics: of predictions and labels.
        fit: learning rate and schedule.
    """

    mean: Tensor
    scale: Tensor
    quality: str  # what `score` sums, as a key of the curves

    def __init__(
        self,
        model: nn.Module,
        mean: np.ndarray,
        scale: np.ndarray,
        metrics: MetricCollection,
        fit: FitSpec,
    ) -> None:
        super().__init__()
        # A training step may run an epoch, so it steps the optimizer itself.
        self.automatic_optimization = False
        self.model = model
        self.register_buffer("mean", torch.as_tensor(mean, dtype=torch.float32))
        self.register_buffer("scale", torch.as_tensor(scale, dtype=torch.float32))
        self.fit_spec = fit
        self.metrics = metrics
        self.tested: tuple[Tensor, Tensor] = (torch.empty(0, 0), torch.empty(0))
        self._tested: list[tuple[Tensor, Tensor]] = []
        self._train_sum, self._train_rows = torch.zeros(()), 0
        self._val_sums = torch.zeros(3)  # loss, score, rows

    @abstractmethod
    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Sum of the loss over rows."""

    @abstractmethod
    def predict(self, outputs: Tensor) -> Tensor:
        """What outputs say: probabilities ``[rows, classes]``, or numbers ``[rows]``."""

    @abstractmethod
    def score(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Sum over rows of what curves show beside the loss."""

    def forward(self, features: Tensor) -> Tensor:
        """Return the network's outputs for raw features."""
        return self.model((features - self.mean) / self.scale)

    def training_step(self, batches: Iterable[Batch], index: int) -> None:
        """All steps of an epoch: Lightning's own bookkeeping for each would cost a third more."""
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, torch.optim.Optimizer)
        total = self._train_sum.to(self.device)
        for features, labels, size in batches:
            features, labels = features.to(self.device), labels.to(self.device)
            optimizer.zero_grad()
            # Ranks average their gradients: the average of these is that of the whole batch's mean.
            loss = self.loss(self(features), labels) / (size / self.trainer.world_size)
            self.manual_backward(loss)
            optimizer.step()
            total += loss.detach() * size
            self._train_rows += size
        self._train_sum = total

    def on_train_epoch_end(self) -> None:
        """Lower the learning rate at plateaus of the validation loss."""
        schedule = self.lr_schedulers()
        assert isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau)
        schedule.step(float(self.trainer.callback_metrics["val_loss"]))

    def on_validation_epoch_start(self) -> None:
        """Forget the last epoch's sums."""
        self._val_sums = torch.zeros(3, device=self.device)

    def validation_step(self, batch: Batch, index: int) -> None:
        """Sum the loss and the score."""
        features, labels, _ = batch
        outputs = self(features)
        self._val_sums[0] += self.loss(outputs, labels)
        self._val_sums[1] += self.score(outputs, labels)
        self._val_sums[2] += len(labels)

    def on_validation_epoch_end(self) -> None:
        """Log the epoch: exact means over the rows of all ranks, not means of batch means."""
        strategy = self.trainer.strategy
        total, score, rows = strategy.reduce(self._val_sums, reduce_op="sum")
        self.log_dict({"val_loss": total / rows, f"val_{self.quality}": score / rows})
        if self._train_rows:
            self.log("train_loss", strategy.reduce(self._train_sum) / self._train_rows)
        self._train_sum, self._train_rows = torch.zeros(()), 0

    def test_step(self, batch: Batch, index: int) -> None:
        """Gather predictions for the metrics."""
        features, labels, _ = batch
        self._tested.append((self.predict(self(features)), labels))

    def on_test_epoch_end(self) -> None:
        """Measure the predictions of all ranks, which have different numbers of them, or none."""
        parts = [torch.cat(part) for part in zip(*self._tested, strict=True)]
        self._tested.clear()
        if self.trainer.world_size > 1:
            parts = [torch.cat(gather_all_tensors(part)) for part in parts]
        self.tested = (parts[0], parts[1])

    def configure_optimizers(self) -> Any:
        """Adam, and a lower learning rate at plateaus of the validation loss."""
        fused = self.device.type in ("cpu", "cuda")
        optimizer = torch.optim.Adam(self.model.parameters(), self.fit_spec.lr, fused=fused)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, factor=self.fit_spec.lr_factor, patience=self.fit_spec.lr_patience
        )
        return [optimizer], [schedule]


@final
class LoraClassifier(LoraModule):
    """Names the class of an adapter: cross-entropy, the paper's metrics.

    Args:
        model: maps standardised features to logits.
        mean: mean of each feature over the training rows.
        scale: standard deviation of each feature over the training rows, 1 where it is 0.
        num_classes: length of the logits.
        fit: learning rate and schedule.
    """

    quality = "accuracy"

    def __init__(
        self, model: nn.Module, mean: np.ndarray, scale: np.ndarray, num_classes: int, fit: FitSpec
    ) -> None:
        super().__init__(model, mean, scale, metrics(num_classes), fit)

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(outputs, labels, reduction="sum")

    def predict(self, outputs: Tensor) -> Tensor:
        """Probabilities."""
        return outputs.softmax(1)

    def score(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Hits."""
        return (outputs.argmax(1) == labels).sum()


@final
class LoraRegressor(LoraModule):
    """Tells a number of an adapter, such as how many images it saw: squared error.

    Args:
        model: maps standardised features to one output, in standard deviations of the labels.
        mean: mean of each feature over the training rows.
        scale: standard deviation of each feature over the training rows, 1 where it is 0.
        centre: mean of the labels over the training rows.
        unit: their standard deviation, 1 where it is 0.
        fit: learning rate and schedule.
    """

    quality = "mae"

    def __init__(
        self,
        model: nn.Module,
        mean: np.ndarray,
        scale: np.ndarray,
        centre: float,
        unit: float,
        fit: FitSpec,
    ) -> None:
        super().__init__(model, mean, scale, number_metrics(), fit)
        self.centre, self.unit = centre, unit

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Squared error, in squares of the labels' standard deviation."""
        return ((self.predict(outputs) - labels) / self.unit).square().sum()

    def predict(self, outputs: Tensor) -> Tensor:
        """Numbers in the labels' unit."""
        return outputs[:, 0] * self.unit + self.centre

    def score(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Absolute errors."""
        return (self.predict(outputs) - labels).abs().sum()


def module_for(prepared: Prepared, model: nn.Module, fit: FitSpec) -> LoraModule:
    """The module of prepared data: a classifier, or a regressor where there are no classes."""
    if prepared.classes:
        return LoraClassifier(model, prepared.mean, prepared.scale, len(prepared.classes), fit)
    known = prepared.labels[prepared.split.train]
    return LoraRegressor(
        model, prepared.mean, prepared.scale, float(known.mean()), float(known.std()) or 1.0, fit
    )

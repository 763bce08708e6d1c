"""`LoraClassifier`: wires a network, its loss, optimizer and metrics into Lightning."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.utilities.distributed import gather_all_tensors

from lora_ws.learn.data import Batch
from lora_ws.learn.metrics import metrics
from lora_ws.learn.spec import FitSpec


class LoraClassifier(L.LightningModule):
    """A network on standardised representations.

    Args:
        model: maps standardised features to logits.
        mean: mean of each feature over the training rows.
        scale: standard deviation of each feature over the training rows, 1 where it is 0.
        num_classes: length of the logits.
        fit: learning rate and schedule.
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self, model: nn.Module, mean: np.ndarray, scale: np.ndarray, num_classes: int, fit: FitSpec
    ) -> None:
        super().__init__()
        # A training step may run an epoch, so it steps the optimizer itself.
        self.automatic_optimization = False
        self.model = model
        self.register_buffer("mean", torch.as_tensor(mean, dtype=torch.float32))
        self.register_buffer("scale", torch.as_tensor(scale, dtype=torch.float32))
        self.fit_spec = fit
        self.metrics = metrics(num_classes)
        self.tested: tuple[Tensor, Tensor] = (torch.empty(0, 0), torch.empty(0))
        self._tested: list[tuple[Tensor, Tensor]] = []
        self._train_sum, self._train_rows = torch.zeros(()), 0
        self._val_sums = torch.zeros(3)  # loss, hits, rows

    def forward(self, features: Tensor) -> Tensor:
        """Return logits of raw features."""
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
            loss = F.cross_entropy(self(features), labels, reduction="sum")
            loss = loss / (size / self.trainer.world_size)
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
        """Sum the loss and the hits."""
        features, labels, _ = batch
        logits = self(features)
        self._val_sums[0] += F.cross_entropy(logits, labels, reduction="sum")
        self._val_sums[1] += (logits.argmax(1) == labels).sum()
        self._val_sums[2] += len(labels)

    def on_validation_epoch_end(self) -> None:
        """Log the epoch: exact means over the rows of all ranks, not means of batch means."""
        strategy = self.trainer.strategy
        total, hits, rows = strategy.reduce(self._val_sums, reduce_op="sum")
        self.log_dict({"val_loss": total / rows, "val_accuracy": hits / rows})
        if self._train_rows:
            self.log("train_loss", strategy.reduce(self._train_sum) / self._train_rows)
        self._train_sum, self._train_rows = torch.zeros(()), 0

    def test_step(self, batch: Batch, index: int) -> None:
        """Gather predictions for the metrics."""
        features, labels, _ = batch
        self._tested.append((self(features).softmax(1), labels))

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


class KeepBest(Callback):
    """Keeps the weights of the epoch with the lowest validation loss, and puts them back.

    Args:
        restore: put them back at the end; the published scripts measure the last weights.
    """

    def __init__(self, *, restore: bool = True) -> None:
        self.restore = restore
        self.loss = float("inf")
        self.epoch = 0
        self.history: list[dict[str, float]] = []
        self._weights: dict[str, Tensor] = {}

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the epoch, and copy the weights if it is the best so far."""
        values = {k: float(v) for k, v in trainer.callback_metrics.items()}
        self.history.append({"epoch": trainer.current_epoch + 1, **values})
        if values["val_loss"] < self.loss:
            self.loss, self.epoch = values["val_loss"], trainer.current_epoch + 1
            for name, value in _network(pl_module).state_dict().items():
                if name in self._weights:
                    self._weights[name].copy_(value)
                else:
                    self._weights[name] = value.clone()

    def state_dict(self) -> dict[str, Any]:
        """All of it, for a checkpoint."""
        return {name: getattr(self, name) for name in ("loss", "epoch", "history", "_weights")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        vars(self).update(state_dict)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the epochs before a checkpoint again: loggers start with empty files."""
        for entry in self.history:
            step = entry["epoch"] * trainer.num_training_batches - 1
            for logger in trainer.loggers:
                logger.log_metrics({**entry, "epoch": entry["epoch"] - 1}, int(step))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restore the best weights."""
        if self._weights and self.restore:
            _network(pl_module).load_state_dict(self._weights)


class KeepLast(Checkpoint):
    """Writes a checkpoint every few epochs, over the last one; a kill leaves the last one whole.

    Args:
        file: of the checkpoint.
        every: epochs.
    """

    def __init__(self, file: Path, every: int) -> None:
        self.file, self.every = file, every

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save; not the epoch that ends training, as a checkpoint does not hold that it ended."""
        done = trainer.current_epoch + 1
        ended = trainer.should_stop or done == trainer.max_epochs
        if done % self.every == 0 and not ended:
            trainer.save_checkpoint(self.file)


def _network(module: L.LightningModule) -> nn.Module:
    assert isinstance(module.model, nn.Module)
    return module.model

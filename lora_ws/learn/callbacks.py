"""Lightning callbacks that keep weights: those of the best epoch, and checkpoints."""

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, Checkpoint
from torch import Tensor

from lora_ws.learn.module import LoraModule


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

    def on_validation_end(self, trainer: L.Trainer, pl_module: LoraModule) -> None:  # type: ignore[override]
        """Note the epoch, and copy the weights if it is the best so far."""
        values = {k: float(v) for k, v in trainer.callback_metrics.items()}
        self.history.append({"epoch": trainer.current_epoch + 1, **values})
        if values["val_loss"] < self.loss:
            self.loss, self.epoch = values["val_loss"], trainer.current_epoch + 1
            for name, value in pl_module.network.state_dict().items():
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

    def on_fit_end(self, trainer: L.Trainer, pl_module: LoraModule) -> None:  # type: ignore[override]
        """Restore the best weights."""
        if self._weights and self.restore:
            pl_module.network.load_state_dict(self._weights)


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

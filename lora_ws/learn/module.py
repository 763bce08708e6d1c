"""`LoraModule`: a network with its task and optimizer, wired into Lightning."""

from collections.abc import Iterable
from typing import Any, final

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchmetrics.utilities.distributed import gather_all_tensors

from lora_ws.learn.augment import Augment
from lora_ws.learn.data import Batch
from lora_ws.learn.flat import FlatMLP
from lora_ws.learn.optim import lr_share, make_optimizer
from lora_ws.learn.spec import FitSpec
from lora_ws.learn.tasks import Task
from lora_ws.models import MetanetModule
from lora_ws.models.mlp_module import MLPModule
from lora_ws.models.tokens import TokenModule


@final
class LoraModule(L.LightningModule):
    """A network in training: loss, schedule and what is measured.

    Args:
        model: the network, on raw rows.
        task: its loss, predictions and metrics.
        fit: optimizer and schedule.
        augment: changes the rows of training steps.
        flat: whether gradients are written out, of an MLP (`lora_ws.learn.trainer.flattens`).

    Attributes:
        tested: predictions and targets of the last test.
    """

    def __init__(
        self,
        model: MetanetModule,
        task: Task,
        fit: FitSpec,
        augment: Augment | None = None,
        flat: bool = False,
    ) -> None:
        super().__init__()
        # A training step may run an epoch, so it steps the optimizer itself.
        self.automatic_optimization = False
        self.model = model
        self.average: AveragedModel | None = None
        if fit.ema is not None:
            average = get_ema_multi_avg_fn(fit.ema)
            self.average = AveragedModel(model, multi_avg_fn=average).requires_grad_(False)
        self.task = task
        self.fit_spec = fit
        self.augment = augment
        self._flatten = flat
        self._flat: FlatMLP | None = None
        self.tested: tuple[Tensor, Tensor] = (torch.empty(0, 0), torch.empty(0))
        self._tested: list[tuple[Tensor, Tensor]] = []
        self._train_sum, self._train_rows = torch.zeros(()), 0
        self._val_sums = torch.zeros(3)  # loss, score, rows

    @property
    def network(self) -> MetanetModule:
        """The network that is measured and kept: itself, or its moving average."""
        kept = self.model if self.average is None else self.average.module
        assert isinstance(kept, MetanetModule)
        return kept

    def forward(self, rows: Tensor) -> Tensor:
        """Return the outputs of the measured network for rows of a batch."""
        return outputs_of(self.network, rows)

    def training_step(self, batches: Iterable[Batch], index: int) -> None:
        """All steps of an epoch: Lightning's own bookkeeping for each would cost a third more."""
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, torch.optim.Optimizer)
        total = self._train_sum.to(self.device)
        for rows, targets, size in batches:
            rows, targets = rows.to(self.device), targets.to(self.device)
            # Ranks average their gradients: the average of these is that of the whole batch's mean.
            loss = self._backward(rows, targets, size / self.trainer.world_size)
            self._train_rows += size
            self._step(optimizer)
            total += loss * size
        self._train_sum = total

    def on_train_epoch_end(self) -> None:
        """Lower the learning rate at plateaus of the validation loss."""
        if self.fit_spec.schedule == "plateau":
            schedule = self.lr_schedulers()
            assert isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau)
            schedule.step(float(self.trainer.callback_metrics["val_loss"]))

    def on_validation_epoch_start(self) -> None:
        """Forget the last epoch's sums."""
        self._val_sums = torch.zeros(3, device=self.device)

    def validation_step(self, batch: Batch, index: int) -> None:
        """Sum the loss and the score."""
        rows, targets, _ = batch
        outputs = self(rows)
        self._val_sums[0] += self.task.loss(outputs, targets)
        self._val_sums[1] += self.task.score(outputs, targets).sum()
        self._val_sums[2] += len(targets)

    def on_validation_epoch_end(self) -> None:
        """Log the epoch: exact means over the rows of all ranks, not means of batch means."""
        strategy = self.trainer.strategy
        total, score, rows = strategy.reduce(self._val_sums, reduce_op="sum")
        epoch = {"val_loss": total / rows, f"val_{self.task.quality}": score / rows}
        if self._train_rows:
            epoch["train_loss"] = strategy.reduce(self._train_sum) / self._train_rows
        if self._flat is not None and not self.trainer.loggers:
            # Callbacks alone read it; Lightning's bookkeeping would cost a tenth of an epoch.
            self.trainer.callback_metrics.update(epoch)
        else:
            self.log_dict(epoch)
        self._train_sum, self._train_rows = torch.zeros(()), 0

    def test_step(self, batch: Batch, index: int) -> None:
        """Gather predictions for the metrics."""
        rows, targets, _ = batch
        self._tested.append((self.task.predict(self(rows).float()), targets))

    def on_test_epoch_end(self) -> None:
        """Join the predictions of all ranks, which have different numbers of them, or none."""
        parts = [torch.cat(part) for part in zip(*self._tested, strict=True)]
        self._tested.clear()
        if self.trainer.world_size > 1:
            parts = [torch.cat(gather_all_tensors(part)) for part in parts]
        self.tested = (parts[0], parts[1])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep where dropout and augmentation go on drawing from."""
        checkpoint["random"] = torch.get_rng_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on drawing from there; checkpoints of earlier versions do not say."""
        if "random" in checkpoint:
            torch.set_rng_state(checkpoint["random"])

    def configure_optimizers(self) -> Any:
        """The optimizer, and a lower learning rate at plateaus where the schedule says so."""
        weights = self.model.parameters()
        if self._flatten:
            assert isinstance(self.model, MLPModule)
            # Not before: the network is on its device now.
            self._flat = FlatMLP(self.model)
            weights = [self._flat.weights]
        optimizer = make_optimizer(weights, self.fit_spec)
        if self.fit_spec.schedule != "plateau":
            return optimizer
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, factor=self.fit_spec.lr_factor, patience=self.fit_spec.lr_patience
        )
        return [optimizer], [schedule]

    def _backward(self, rows: Tensor, targets: Tensor, share: float) -> Tensor:
        """Make the gradients of the loss divided by a number, and return it."""
        if self._flat is not None:
            return self._flat.backward(
                rows, lambda outputs: self.task.loss(outputs, targets) / share
            )
        self.model.zero_grad()
        loss = self._loss(rows, targets) / share
        self.manual_backward(loss)
        return loss.detach()

    def _loss(self, rows: Tensor, targets: Tensor) -> Tensor:
        """Sum of the loss over augmented rows."""
        if self.augment is None:
            return self.task.loss(outputs_of(self.model, rows), targets)
        rows, mixup = self.augment(rows), self.augment.mixup
        if mixup is None:
            return self.task.loss(self.model(rows), targets)
        shares, others = (drawn.to(rows.device) for drawn in mixup.draw(len(rows)))
        shares, embedding = shares.to(rows), self.model.embed(rows)
        own, other = shares[:, None] * embedding, (1 - shares)[:, None] * embedding[others]
        outputs = self.model.head(own + other)
        first, second = (self.task.loss(outputs, t, "none") for t in (targets, targets[others]))
        return (shares * first + (1 - shares) * second).sum()

    def _step(self, optimizer: torch.optim.Optimizer) -> None:
        """One step at the rate of the moment, from gradients of bounded norm."""
        if self.fit_spec.grad_clip is not None:
            stepped = optimizer.param_groups[0]["params"]
            nn.utils.clip_grad_norm_(stepped, self.fit_spec.grad_clip)
        share = lr_share(self.fit_spec, self._epochs())
        if share is not None:
            for group in optimizer.param_groups:
                group["lr"] = share * self.fit_spec.lr
        optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.model)

    def _epochs(self) -> float:
        """Epochs that have passed, with the share of this one whose rows were seen."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        return self.trainer.current_epoch + self._train_rows / len(data.split.train)


def outputs_of(network: MetanetModule, rows: Tensor) -> Tensor:
    """The outputs for a batch of raw rows ``[rows, params]``, or of `read_once` tokens."""
    if rows.ndim == 2:
        return network(rows)
    assert isinstance(network, TokenModule)
    return network.head(network.embed_tokens(rows))

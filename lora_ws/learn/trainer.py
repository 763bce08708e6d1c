"""The Lightning trainer of a seed: devices, loggers, checkpoints."""

import hashlib
import json
import logging
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import (
    Callback,
    Checkpoint,
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelSummary,
    ProgressBar,
    Timer,
)
from lightning.pytorch.strategies import DDPStrategy

from lora_ws.learn.augment import Augment
from lora_ws.learn.callbacks import KeepBest, KeepLast
from lora_ws.learn.parts import make_callbacks, make_loggers
from lora_ws.learn.ranks import Ranks, check_devices
from lora_ws.learn.result import Fitted
from lora_ws.learn.spec import ExperimentSpec, TrainerSpec
from lora_ws.models import MetanetModule
from lora_ws.models.mlp_module import MLPModule

logger = logging.getLogger("lora_ws")


def make_trainer(spec: ExperimentSpec, best: KeepBest, folder: Path | None) -> L.Trainer:
    """A trainer that stops early, and logs where there is a folder."""
    check_devices(spec.trainer)
    stop = EarlyStopping("val_loss", patience=spec.fit.patience, mode="min")
    several = spec.trainer.world > 1
    own = make_callbacks(spec)
    return L.Trainer(
        accelerator=spec.trainer.accelerator,
        devices=spec.trainer.devices,
        num_nodes=spec.trainer.num_nodes,
        # The buffers are constants, equal on all ranks from the start.
        strategy=DDPStrategy(broadcast_buffers=False) if several else "auto",
        # Lightning's own way to requeue saves in the middle of a step, where no order is kept.
        plugins=[SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else None,
        max_epochs=spec.fit.max_epochs,
        callbacks=[best, stop, *own, *([Interruptible()] if several else [])],
        precision=spec.trainer.precision,
        logger=make_loggers(spec, folder) if folder else False,
        default_root_dir=folder,
        # The features are in memory and the model is small: checks and bars cost more than steps.
        enable_checkpointing=any(isinstance(one, ModelCheckpoint) for one in own),
        enable_progress_bar=any(isinstance(one, ProgressBar) for one in own),
        enable_model_summary=any(isinstance(one, ModelSummary) for one in own),
        num_sanity_val_steps=0,
        log_every_n_steps=1_000_000,
    )


def flattens(network: MetanetModule, trainer: L.Trainer, augment: Augment | None = None) -> bool:
    """Whether the gradients of a network are written out (`FlatMLP`); why not is logged.

    Args:
        network: an MLP may be.
        trainer: must compute on one CPU, exactly, without callbacks that may look into a step.
        augment: changes rows on the way, which is left to autograd.
    """
    if not isinstance(network, MLPModule):
        return False
    kinds = {type(one).__name__: one for one in trainer.callbacks}  # type: ignore[attr-defined]
    strange = [name for name, one in kinds.items() if not isinstance(one, HARMLESS)]
    reasons = {
        f"a {trainer.strategy.root_device.type} device": trainer.strategy.root_device.type != "cpu",
        f"{trainer.world_size} processes": trainer.world_size > 1,
        f"precision {trainer.precision}": trainer.precision not in ("32-true", "64-true"),
        "augmentation": augment is not None,
        f"the callback {', '.join(strange)}": bool(strange),
        "frozen weights": not all(one.requires_grad for one in network.parameters()),
    }
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        logger.info("gradients of the MLP by autograd, slower: %s", ", ".join(found))
    return not found


def engine(trainer: L.Trainer) -> str:
    """Name of what trains: equal seeds give equal records only within one engine."""
    device = trainer.strategy.root_device.type
    world = trainer.world_size
    precision = f"-{trainer.precision}" if trainer.precision != "32-true" else ""
    return f"lightning-{device}" + (f"-ddp{world}" if world > 1 else "") + precision


def checkpoint(
    trainer: L.Trainer, every: int, folder: Path, identity: Any, ranks: Ranks
) -> Path | None:
    """Keep checkpoints in the seed's folder, and clear it of all else.

    Args:
        trainer: will write them.
        every: epochs between them, 0 for none.
        folder: of the seed.
        identity: plain data that says what is trained on what; a checkpoint of anything else, or of
            another engine, goes.
        ranks: who takes part.

    Returns:
        the checkpoint to go on from, if there is one.
    """
    text = json.dumps([identity, engine(trainer)], sort_keys=True)
    file = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.ckpt"
    if every:
        # Last, so that it saves what the others made of the epoch.
        trainer.callbacks.append(KeepLast(file, every))  # type: ignore[attr-defined]

    def clear() -> bool:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob("*"):
            if stale.is_file() and not (every and stale == file):
                stale.unlink()
        return every > 0 and file.is_file()

    return file if ranks.first(clear) else None


def log_history(fitted: Fitted, folder: Path | None) -> None:
    """Write the curves of a network that no Lightning trainer logged, as one would have."""
    if folder is None:
        return
    (curves,) = make_loggers(replace(fitted.job.spec, trainer=TrainerSpec()), folder)
    for step, entry in enumerate(fitted.history):
        curves.log_metrics({**entry, "epoch": step}, step)
    curves.save()


def close(spec: ExperimentSpec) -> None:
    """End the tracked run, so that the next seed gets one of its own."""
    if any("WandbLogger" in str(part) for part in spec.trainer.loggers):
        import wandb

        wandb.finish()


class Interruptible(Callback):
    """SIGTERM ends a rank as Ctrl-C does.

    Lightning answers it with a message to all ranks, which never arrives where some of them wait in
    another call. A checkpoint is as good after a kill.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the signal back."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.default_int_handler)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the signal back."""
        self.on_train_start(trainer, pl_module)


# Other callbacks may look into a step, or change the network on the way.
HARMLESS = (
    *(Checkpoint, EarlyStopping, KeepBest, Interruptible),
    *(LearningRateMonitor, ModelSummary, ProgressBar, Timer),
)

"""Training written out with torch's own parts: what every engine is compared with."""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_ws.learn.result import Job
from lora_ws.learn.tasks import Regression


class Trained(NamedTuple):
    """Validation losses and the learning rate at the end of each epoch, and the best weights."""

    losses: list[float]
    rates: list[float]
    best: dict[str, Tensor]


def train_alone(job: Job) -> Trained:
    """Adam or AdamW, plateaus or a cosine, warm-up, clipping, averaging, early stopping."""
    prepared, fit = job.prepared, job.spec.fit
    x, y, split = (
        torch.as_tensor(prepared.features),
        torch.from_numpy(prepared.labels),
        prepared.split,
    )
    torch.manual_seed(job.seed)
    model = prepared.network(job.spec.model).to(x.dtype)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[fit.optimizer]
    optimizer = kind(model.parameters(), fit.lr, weight_decay=fit.weight_decay)
    plateaus = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=fit.lr_factor, patience=fit.lr_patience
    )
    average = {name: value.clone() for name, value in model.state_dict().items()}
    order = torch.Generator().manual_seed(job.seed)
    batches = math.ceil(len(split.train) / fit.batch_size)
    losses, rates, best, waits, seen = [], [], {}, 0, 0
    while waits < fit.patience and len(losses) < fit.max_epochs:
        shuffled = torch.from_numpy(split.train)[torch.randperm(len(split.train), generator=order)]
        for number, rows in enumerate(shuffled.split(fit.batch_size)):
            optimizer.zero_grad()
            mean_loss(job, model(x[rows]), y[rows]).backward()
            if fit.grad_clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), fit.grad_clip)
            passed = len(losses) + min(1, (number + 1) * fit.batch_size / len(split.train))
            if passed <= fit.warmup:
                optimizer.param_groups[0]["lr"] = fit.lr * passed / fit.warmup
            elif fit.schedule == "cosine":
                share = (passed - fit.warmup) / (fit.max_epochs - fit.warmup)
                optimizer.param_groups[0]["lr"] = fit.lr * (1 + math.cos(math.pi * share)) / 2
            optimizer.step()
            seen += 1
            for name, value in model.state_dict().items():
                keep = 0.0 if fit.ema is None or seen == 1 else fit.ema
                average[name] = keep * average[name] + (1 - keep) * value
        assert number + 1 == batches
        measured = prepared.network(job.spec.model).to(x.dtype)
        measured.load_state_dict(average)
        with torch.no_grad():
            loss = float(mean_loss(job, measured(x[split.val]), y[split.val]))
        rates.append(optimizer.param_groups[0]["lr"])
        if fit.schedule == "plateau":
            plateaus.step(loss)
        waits = 0 if loss < min(losses, default=np.inf) else waits + 1
        losses.append(loss)
        if not waits:
            best = {name: value.clone() for name, value in average.items()}
    return Trained(losses, rates, best)


def mean_loss(job: Job, outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy, or the squared error of standardised numbers."""
    task = job.prepared.task
    if not isinstance(task, Regression):
        return F.cross_entropy(outputs, targets)
    train = job.prepared.labels[job.prepared.split.train]
    standard = (targets - float(train.mean())) / float(train.std())
    return F.mse_loss(outputs[:, 0], standard)

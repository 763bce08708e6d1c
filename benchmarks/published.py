"""What the authors' experiment script does, step by step, for benchmarks to compare with.

Weights are read once, column by column in torch format, into one matrix for each part of the
split, which is written to a file; every representation reads that file again. Statistics are five.
Each seed is trained with a DataLoader of single rows and Adam's default implementation; the loss
and the accuracy are read out after every step; for all representations but the whole weights, every
step also writes a debug log. An epoch ends with one forward pass of all validation rows.

It differs from the script where that does not run on current versions (lazy columns, an option of
the schedule that is gone) or does not do what the paper says (StatsFlatVec defines its statistics
and trains on the whole weights; here they are applied). Left out are plots, prints and progress
bars, and the split, which is ours; seeds are set.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from sklearn.metrics import accuracy_score, classification_report, roc_auc_score
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lora_ws.models import MLP, InputSpec

BATCH, LR, PATIENCE = 32, 1e-3, 20
TOGETHER = 1024  # rows of updates that are formed at once


class Parts(NamedTuple):
    """Something of each part of a split."""

    train: Tensor
    val: Tensor
    test: Tensor


class Problem(NamedTuple):
    """Standardised rows and labels to train and validate on."""

    features: Tensor
    labels: Tensor
    val_features: Tensor
    val_labels: Tensor


def read_weights(
    rows: Dataset, parts: Sequence[np.ndarray], names: list[str], folder: Path
) -> Path:
    """Read all columns of all parts, and write them to one file.

    Args:
        rows: the published schema.
        parts: rows to train on, to validate on and to test on.
        names: of the columns of weights, in their order.
        folder: where files go, one of each column too.
    """
    rows = rows.with_format("torch")
    tensors = {}
    for name, part in zip(Parts._fields, parts, strict=True):
        selected = rows.select(part)
        count, features = len(selected[names[0]][:]), None
        for column in names:
            layer = torch.as_tensor(selected[column][:]).reshape(count, -1)
            save_file({"features": layer}, folder / f"{name}-{column}.safetensors")
            features = layer if features is None else torch.cat([features, layer], 1)
        assert features is not None
        tensors[name] = features
    file = folder / "flattened_weights.safetensors"
    save_file(tensors, file)
    return file


def load_weights(file: Path) -> Parts:
    """What `read_weights` wrote."""
    return Parts(**load_file(file))


def standardise(parts: Parts) -> Parts:
    """By mean and standard deviation of the training rows, in place; a constant column is 0."""
    mean, std = parts.train.mean(0, keepdim=True), parts.train.std(0, keepdim=True)
    for part in parts:
        part.sub_(mean).div_(std).nan_to_num_(0, 0, 0)
    return parts


def five_statistics(values: Tensor) -> Tensor:
    """Mean, standard deviation, median, minimum and maximum of each row ``[rows, 5]``."""
    mean, std = torch.mean(values, dim=1), torch.std(values, dim=1)
    median = torch.median(values, dim=1).values
    low, high = torch.min(values, dim=1).values, torch.max(values, dim=1).values
    return torch.stack([mean, std, median, low, high], dim=1)


def flat_vec_pca(parts: Parts) -> Parts:
    """200 principal components: their incremental PCA is a thin SVD of rows that fit in a batch."""
    parts = standardise(parts)
    centred = parts.train.clone()
    mean = centred.mean(0)
    centred -= mean
    _, _, right = torch.linalg.svd(centred, full_matrices=False)
    return Parts(*((part.clone() - mean) @ right[:200].T for part in parts))


def stats_flat_vec(parts: Parts) -> Parts:
    """Five statistics of all weights."""
    return standardise(Parts(*map(five_statistics, parts)))


def stats_layer(parts: Parts, sizes: Sequence[int]) -> Parts:
    """Five statistics of each matrix."""
    found = [[five_statistics(one) for one in part.split(list(sizes), 1)] for part in parts]
    return standardise(Parts(*(torch.cat(columns, 1) for columns in found)))


def stats_layer_dense(parts: Parts, sizes: Sequence[int]) -> Parts:
    """Five statistics of each update, which is formed for all rows of a batch at once."""

    def of_part(part: Tensor) -> Tensor:
        found, matrices = [], part.split(list(sizes), 1)
        for down, up in zip(matrices[::2], matrices[1::2], strict=True):
            batches = zip(down.split(TOGETHER), up.split(TOGETHER), strict=True)
            updates = (torch.einsum("bi,bo->bio", a, b).flatten(1) for a, b in batches)
            found.append(torch.cat([five_statistics(update) for update in updates]))
        return torch.cat(found, 1)

    return standardise(Parts(*map(of_part, parts)))


def representations(sizes: Sequence[int]) -> dict[str, Callable[[Parts], Parts]]:
    """The five of Table 1, of weights whose matrices have these sizes."""
    return {
        "FlatVec": standardise,
        "FlatVecPCA": flat_vec_pca,
        "StatsFlatVec": stats_flat_vec,
        "StatsLayer": partial(stats_layer, sizes=sizes),
        "StatsLayerDense": partial(stats_layer_dense, sizes=sizes),
    }


def train(
    problem: Problem,
    classes: int,
    epochs: int,
    log: Path | None,
    patience: int = PATIENCE,
    tick: Callable[[], None] = lambda: None,
) -> nn.Module:
    """Train until the validation loss has not fallen for some epochs; the last weights stay.

    Args:
        problem: rows and labels.
        classes: how many.
        epochs: at most.
        log: file of the debug log, which grows with every step; None for none.
        patience: epochs without a lower loss.
        tick: called at the start of every epoch.
    """
    features, labels, val_features, val_labels = problem
    model = MLP().build(InputSpec(features.shape[1]), classes).layers
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=5)
    loss_of = nn.CrossEntropyLoss()
    loader = DataLoader(TensorDataset(features, labels), batch_size=BATCH, shuffle=True)
    lowest, waited = float("inf"), 0
    history: list[tuple[float, float, float, float]] = []
    for epoch in range(epochs):
        tick()
        model.train()
        losses, accuracies = 0.0, 0.0
        with ExitStack() as stack:
            out = stack.enter_context(log.open("a", encoding="utf-8")) if log else None
            for index, (rows, wanted) in enumerate(loader):
                optimizer.zero_grad()
                outputs = model(rows)
                loss = loss_of(outputs, wanted)
                loss.backward()
                optimizer.step()
                found = torch.argmax(outputs, dim=1)
                accuracy = (found == wanted).float().mean().item()
                losses += loss.item()
                accuracies += accuracy
                if out:
                    log_step(out, f"{epoch} {index}", rows, wanted, loss, found, accuracy)
            model.eval()
            with torch.no_grad():
                outputs = model(val_features)
                loss = loss_of(outputs, val_labels)
                found = torch.argmax(outputs, dim=1)
                accuracy = (found == val_labels).float().mean().item()
            if out:
                log_step(out, f"{epoch} val", outputs, val_labels, loss, found, accuracy)
        schedule.step(loss)
        steps = len(loader)
        history.append((losses / steps, accuracies / steps, loss.item(), accuracy))
        lowest, waited = (loss, 0) if loss < lowest else (lowest, waited + 1)
        if waited >= patience:
            break
    return model


def log_step(
    out: IO[str], step: str, rows: Tensor, wanted: Tensor, loss: Tensor, found: Tensor, score: float
) -> None:
    """Write what a step saw and said: five rows, the labels, loss, predictions and accuracy."""
    out.write(f"\n{step}:\n")
    out.write(f"shape: {rows.shape}, values: {rows[:5]}\n")
    out.write(f"labels: {wanted}\n")
    out.write(f"loss: {loss.item()}\n")
    out.write(f"predictions: {found}\n")
    out.write(f"accuracy: {score}\n")


def score(model: nn.Module, features: Parts, labels: Parts) -> float:
    """Test accuracy, beside all that the script takes of a trained model."""
    with torch.no_grad():
        outputs = [model(part) for part in features]
    found = [torch.argmax(one, dim=1).numpy() for one in outputs]
    scores = [accuracy_score(a.numpy(), b) for a, b in zip(labels, found, strict=True)]
    chances = torch.softmax(outputs[2], dim=1).numpy()
    roc_auc_score(labels.test.numpy(), chances, multi_class="ovr")
    classification_report(labels.test.numpy(), found[2], output_dict=True)
    return float(scores[2])

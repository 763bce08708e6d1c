"""Rows on disk are shuffled in chunks: every row once an epoch, and batches as mixed as others."""

import numpy as np
import pytest
import torch

from lora_ws.adapters import Layout
from lora_ws.collection import Split
from lora_ws.featurizers import FlatVec
from lora_ws.learn import data
from lora_ws.learn.data import FeatureData, read_once
from lora_ws.learn.ranks import ALONE, Ranks
from lora_ws.learn.run import run_one
from lora_ws.learn.spec import ExperimentSpec, FitSpec
from lora_ws.memory import bounded
from lora_ws.models import DeepSets, InputSpec, LeftGram, Metanetwork, SketchTransformer

ROWS, WIDTH, CLASSES, BATCH = 4000, 25, 4, 32
# Ten rows to a chunk, forty batches together.
CHUNK, TOGETHER = 10 * 4 * WIDTH, 40 * BATCH * 4 * WIDTH


def epochs(features: object, count: int, ranks: Ranks = ALONE) -> list[list[tuple]]:
    """Batches of training rows; a row holds its own number, and classes follow one another."""
    rows = np.arange(ROWS)
    labels = rows * CLASSES // ROWS
    split = Split(rows[::-1].copy(), rows[:1], rows[:1])
    made = FeatureData(features, labels, split, BATCH, 0, ranks)  # type: ignore[arg-type]
    return [[batch for item in made.train_dataloader() for batch in item] for _ in range(count)]


@pytest.fixture
def features(monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    monkeypatch.setattr(data, "CHUNK_BYTES", CHUNK)
    monkeypatch.setattr(data, "SHUFFLED_BYTES", TOGETHER)
    # No rows are few enough for an order of all of them.
    monkeypatch.setattr(data, "held_bytes", lambda: 0)
    return np.tile(np.arange(ROWS, dtype=np.float32)[:, None], WIDTH)


def test_every_row_comes_once_an_epoch_in_another_order_with_its_label(
    features: np.ndarray,
) -> None:
    orders = []
    for epoch in epochs(features, 2):
        assert [len(rows) for rows, _, _ in epoch] == [BATCH] * (ROWS // BATCH)
        orders.append(torch.cat([rows[:, 0] for rows, _, _ in epoch]).long())
        labels = torch.cat([own for _, own, _ in epoch])
        assert torch.equal(labels, orders[-1] * CLASSES // ROWS)
        assert torch.equal(orders[-1].sort().values, torch.arange(ROWS))
    assert not torch.equal(*orders)


def test_batches_are_about_as_mixed_as_those_of_rows_in_memory(features: np.ndarray) -> None:
    def scatter(kind: object) -> float:
        """Mean squared deviation of the count of a class in a batch."""
        counts = [own.bincount(minlength=CLASSES) for e in epochs(kind, 20) for _, own, _ in e]
        return float(((torch.stack(counts).double() - BATCH / CLASSES) ** 2).mean())

    # Of 128 chunks drawn for each window a class has a share of 1/4 with the variance of so many
    # draws, which adds to that of the batch's own 32 draws: a quarter more. Twice the standard
    # error of 2500 batches is 4 %.
    assert scatter(features) < 1.3 * scatter(torch.from_numpy(features))


def test_ranks_share_the_batches_of_one(features: np.ndarray) -> None:
    (alone,) = epochs(features, 1)
    parts = [epochs(features, 1, Ranks(rank, 2))[0] for rank in range(2)]
    for whole, first, second in zip(alone, *parts, strict=True):
        assert whole[2] == first[2] == second[2] == BATCH
        assert torch.equal(whole[0][::2], first[0])
        assert torch.equal(whole[0][1::2], second[0])


def test_tokens_are_made_once_where_they_fit() -> None:
    layout = Layout.known("tiny_sd_qv")
    rows = np.zeros((500, layout.size), np.float32)
    deep_sets, left_gram = (kind().build(InputSpec.of(layout), 10) for kind in (DeepSets, LeftGram))
    # 500 adapters of 64 modules with 529 numbers take 68 MB, more than a quarter of 256 MiB.
    with bounded("256MiB"):
        assert read_once(deep_sets, rows) is rows
        assert read_once(deep_sets, rows[:2]).shape == (2, 64, 529)
    assert read_once(left_gram, rows) is rows


@pytest.mark.slow
@pytest.mark.parametrize("model", [DeepSets(), SketchTransformer()], ids=lambda m: type(m).__name__)
def test_tokens_made_once_train_as_those_of_every_epoch(model: Metanetwork) -> None:
    fit = FitSpec(optimizer="adamw", schedule="cosine", max_epochs=2)
    spec = ExperimentSpec(featurizer=FlatVec(), model=model, fit=fit)
    once = run_one(spec, seed=0)
    with bounded("256MiB"):
        each = run_one(spec, seed=0)
    # 22 steps on features that differ by rounding.
    assert once.val_loss == pytest.approx(each.val_loss, rel=1e-3)

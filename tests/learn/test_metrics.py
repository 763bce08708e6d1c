"""Metrics of rows that need not be of every class, against scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.metrics import precision_recall_fscore_support, roc_auc_score
from tolerances import rounding

from lora_ws.learn.metrics import present_class_metrics


@pytest.mark.parametrize("classes", [3, 7])
@pytest.mark.parametrize("absent", [(), (0,), (0, 2)])
def test_averages_are_over_the_classes_that_rows_are_of(
    classes: int, absent: tuple[int, ...]
) -> None:
    if classes - len(absent) < 2:
        pytest.skip("AUROC needs two classes")
    random = np.random.default_rng(classes)
    present = [k for k in range(classes) if k not in absent]
    truth = random.permutation(np.resize(present, 60))
    scores = random.dirichlet(np.ones(classes), 60)
    found = present_class_metrics(torch.from_numpy(scores), torch.from_numpy(truth))
    said = scores.argmax(1)
    expected = precision_recall_fscore_support(
        truth,
        said,
        labels=present,
        average="macro",
        zero_division=0,  # pyright: ignore[reportArgumentType]
    )
    each = [roc_auc_score(truth == k, scores[:, k]) for k in present]
    values = dict(zip(("precision", "recall", "f1"), expected[:3], strict=True))
    values |= {"auroc": float(np.mean(each)), "accuracy": float(np.mean(said == truth))}
    assert found.keys() == values.keys()
    for name, value in values.items():
        # torchmetrics counts in float32.
        assert found[name] == pytest.approx(value, abs=rounding(terms=60)), name


def test_one_class_has_no_auroc() -> None:
    scores = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    found = present_class_metrics(scores, torch.tensor([1, 1]))
    assert np.isnan(found["auroc"])
    assert found["accuracy"] == 0.5

"""`Embedding`: adapters of one class close to each other, those of others apart."""

from typing import TYPE_CHECKING, Literal, final

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.nn import functional as F

from lora_ws.collection import AdapterSet
from lora_ws.learn.tasks.base import Parts, Task
from lora_ws.learn.tasks.classification import check_classes

if TYPE_CHECKING:
    from lora_ws.learn.metrics import Measured

# Columns whose equal values make two adapters too alike to be a find.
ALIKE = ("image_set", "seed", "sha256")
# Instead of infinity, whose softmax over a batch of one row has no gradient.
NEVER = -1e9


@final
class Embedding(Task):
    """Embed adapters by a supervised contrastive loss, measured by retrieval.

    The loss is that of Khosla et al. (2020), NT-Xent with all rows of a batch that share the label
    as positives. Test rows are looked up among the training rows: mean average precision beside
    that of a random order, classes by nearest neighbours, and one class against the rest.

    Args:
        width: numbers of an embedding.
        temperature: that cosines are divided by; lower looks at the nearest negatives alone.
        n_neighbors: rows that vote for a class.
        exclude: columns; a row is not looked up among those that share a value of any of them.
            None takes the image set, seed and hash of the row, as far as the table has them.

    Example:
        >>> Embedding(width=32).fit(np.zeros((4, 1), int)).outputs
        32
    """

    name = "embedding"
    quality = "nearest_in_batch"
    selects = "map"
    by_row = False
    stratifies = True

    def __init__(
        self,
        *,
        width: int = 64,
        temperature: float = 0.1,
        n_neighbors: int = 5,
        exclude: tuple[str, ...] | None = None,
    ) -> None:
        self.width = width
        self.temperature = temperature
        self.n_neighbors = n_neighbors
        self.exclude = exclude

    def read(
        self, adapters: AdapterSet, label: str | None
    ) -> tuple[Int[np.ndarray, "adapters keys"], tuple[str, ...]]:
        """Read the class of each adapter, and codes of the columns to exclude by."""
        labels, classes = adapters.labels(label)
        names = self.exclude
        if names is None:
            names = [name for name in ALIKE if name in adapters.rows.column_names]
        keys = [np.unique(adapters.column(name), return_inverse=True)[1] for name in names]
        return np.stack([labels, *keys], axis=1).astype(np.int64), classes

    def check(
        self, name: str, targets: Int[np.ndarray, "rows keys"], classes: tuple[str, ...], least: int
    ) -> None:
        """Refuse classes of fewer rows, and of a single one, which is like no other.

        Raises:
            DataError: there is one.
        """
        check_classes(name, targets[:, 0], classes, max(2, least))

    def learn(self, targets: Int[np.ndarray, "rows keys"], classes: tuple[str, ...]) -> None:
        """Nothing."""

    @property
    def outputs(self) -> int:
        """The width."""
        return self.width

    def loss(
        self,
        outputs: Float[Tensor, "*models rows width"],
        targets: Int[Tensor, "*models rows keys"],
        reduction: Literal["sum", "none"] = "sum",
    ) -> Float[Tensor, "..."]:
        """Contrast each row with the others of its batch, in nats; 0 where none is of its class."""
        cosines, same = self._pairs(outputs, targets)
        log_p = (cosines / self.temperature).log_softmax(-1)
        each = -(log_p * same).sum(-1) / same.sum(-1).clamp(min=1)
        return each if reduction == "none" else each.sum()

    def predict(
        self, outputs: Float[Tensor, "*models rows width"]
    ) -> Float[Tensor, "*models rows width"]:
        """Embeddings of norm 1."""
        return F.normalize(outputs, dim=-1)

    def score(
        self, outputs: Float[Tensor, "*models rows width"], targets: Int[Tensor, "*models rows k"]
    ) -> Shaped[Tensor, "*models rows"]:
        """Whether the nearest other row of the batch has the same class."""
        cosines, same = self._pairs(outputs, targets)
        return same.gather(-1, cosines.argmax(-1, keepdim=True))[..., 0]

    def measure(self, parts: Parts, part: str) -> "Measured":
        """Retrieval among the training rows, nearest neighbours, one class against the rest."""
        from lora_ws.learn.metrics import Measured, embedding_metrics

        known, known_keys = (value.cpu() for value in parts("train"))
        rows, keys = (value.cpu() for value in parts(part))
        arrays = (value.numpy() for value in (known, known_keys, rows, keys))
        return Measured(embedding_metrics(*arrays, n_neighbors=self.n_neighbors), (), rows, keys)

    def _pairs(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines of all pairs of rows, and which are of one class; a row is no pair."""
        found, labels = self.predict(outputs), targets[..., 0]
        itself = torch.eye(outputs.shape[-2], dtype=torch.bool, device=outputs.device)
        cosines = (found @ found.mT).masked_fill(itself, NEVER)
        return cosines, (labels[..., :, None] == labels[..., None, :]) & ~itself

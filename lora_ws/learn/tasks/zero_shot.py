"""`ZeroShot`: classes by their names, also those that no training row shows."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal, final

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from lora_ws.collection import Split
from lora_ws.config import nearest
from lora_ws.errors import ConfigError, DataError
from lora_ws.learn.tasks.base import Parts
from lora_ws.learn.tasks.classification import Classification
from lora_ws.learn.tasks.text_features import read_features
from lora_ws.models import InputSpec, MetanetModule, Metanetwork
from lora_ws.models.text_head import TextHead

if TYPE_CHECKING:
    from lora_ws.learn.metrics import Measured


@final
class ZeroShot(Classification):
    """Match adapters with texts, and so find classes by their names that no training row shows.

    Logits are cosines of what the network makes of an adapter and the features of a class's name,
    over a learned temperature; the loss is cross-entropy among the classes that training rows show.
    Rows of the others, which a split or ``held_out`` leaves out, tell how far names carry.

    Args:
        texts: a file of features, see `lora_ws.learn.tasks.text_features.read_features`; None
            encodes the names.
        encoder: base model whose text encoder makes the features.
        prompt: what is encoded, ``{}`` standing for the name.
        held_out: names of classes that are not trained on: all of their rows are test rows.
        temperature: at the start.
        projection: numbers that a learned linear map makes of a text's features, by which it is
            matched; None matches the features as they are.

    Attributes:
        classes_: all names.
        seen_: which of them training rows show.
        texts_: their features.

    Example:
        >>> parts = Split(np.array([0, 1]), np.array([2]), np.array([3]))
        >>> classes = np.array([0, 1, 1, 0]), ("bear", "wolf")
        >>> ZeroShot(held_out=("wolf",)).assign(parts, *classes).test.tolist()
        [1, 2, 3]
    """

    name = "zero_shot"
    selects = "accuracy"
    takes_classifiers = False
    takes_regressors = False
    stratifies = False

    def __init__(
        self,
        *,
        texts: Path | None = None,
        encoder: str = "tiny-sd",
        prompt: str = "a photo of {}",
        held_out: tuple[str, ...] = (),
        temperature: float = 0.07,
        projection: int | None = None,
    ) -> None:
        self.texts = texts
        self.encoder = encoder
        self.prompt = prompt
        self.held_out = held_out
        self.temperature = temperature
        self.projection = projection

    def check(
        self, name: str, targets: Int[np.ndarray, " rows"], classes: tuple[str, ...], least: int
    ) -> None:
        """Refuse rows of a single class.

        Raises:
            DataError: they are.
        """
        _ = least
        if len(shown := np.unique(targets)) < 2:
            names = ", ".join(classes[code] for code in shown)
            raise DataError(f"{name}: expected adapters of two classes, got {names}; add another")

    def assign(
        self, parts: Split, targets: Int[np.ndarray, " adapters"], classes: tuple[str, ...]
    ) -> Split:
        """Make all rows of held-out classes test rows.

        Raises:
            ConfigError: there is no such class.
        """
        if unknown := sorted(set(self.held_out) - set(classes)):
            known = nearest(unknown[0], classes)
            raise ConfigError(f"task.held_out: no class `{unknown[0]}`{known}")
        held = np.isin(targets, [classes.index(name) for name in self.held_out])
        kept = [part[~held[part]] for part in parts]
        moved = np.concatenate([part[held[part]] for part in parts])
        return Split(kept[0], kept[1], np.sort(np.concatenate([kept[2], moved])))

    def learn(self, targets: Int[np.ndarray, " rows"], classes: tuple[str, ...]) -> None:
        """Take the names, which of them are seen, and the features of all."""
        super().learn(targets, classes)
        self.seen_ = tuple(np.isin(np.arange(len(classes)), targets).tolist())
        if self.texts is None:
            # Here, because diffusers takes seconds to import.
            from lora_ws.diffusion.text_features import encode_names

            self.texts_ = encode_names(self.encoder, self.prompt, classes)
        else:
            self.texts_ = read_features(self.texts, classes)

    def network(self, model: Metanetwork) -> TextHead:
        """The model, matched with texts."""
        own = {} if self.texts else {"encoder": self.encoder, "prompt": self.prompt}
        width = self.texts_.shape[1]
        return TextHead(
            network=model,
            width=width,
            temperature=self.temperature,
            projection=self.projection,
            **own,
        )

    def build(self, model: Metanetwork, inputs: InputSpec) -> MetanetModule:
        """Make the network, with the features of all names."""
        module = self.network(model).build(inputs, self.outputs)
        module.set_texts(torch.from_numpy(self.texts_), torch.tensor(self.seen_))
        return module

    def loss(
        self,
        outputs: Float[Tensor, "*models rows names"],
        targets: Int[Tensor, "*models rows"],
        reduction: Literal["sum", "none"] = "sum",
    ) -> Float[Tensor, "..."]:
        """Cross-entropy of each row among the classes of its kind, seen or unseen, in nats."""
        return super().loss(self._own(outputs, targets), targets, reduction)

    def score(
        self, outputs: Float[Tensor, "*models rows names"], targets: Int[Tensor, "*models rows"]
    ) -> Shaped[Tensor, "*models rows"]:
        """Hits among the classes of the row's kind."""
        return super().score(self._own(outputs, targets), targets)

    def measure(self, parts: Parts, part: str) -> "Measured":
        """Accuracy among the classes of each kind, and *generalised*: among all of them."""
        from lora_ws.learn.metrics import Measured, zero_shot_metrics

        scores, truth = (value.cpu() for value in parts(part))
        values = zero_shot_metrics(scores.numpy(), truth.numpy(), np.asarray(self.seen_))
        return Measured(values, (), scores, truth)

    def _own(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Outputs without those of classes of the other kind."""
        seen = torch.tensor(self.seen_, device=outputs.device)
        return outputs.masked_fill(seen != seen[targets][..., None], -torch.inf)

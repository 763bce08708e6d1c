"""`TextHead`: any network matched with texts; logits are cosines over a learned temperature."""

import math
from typing import Literal, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from lora_ws.errors import ConfigError
from lora_ws.models.base import Metanetwork, Symmetry
from lora_ws.models.inputs import InputSpec
from lora_ws.models.module import MetanetModule
from lora_ws.models.normalizers import Normalizer

# Logits are at most this many times a cosine, as in CLIP.
MAX_SCALE = 100.0


@final
class TextHead(Metanetwork):
    """Match what a network makes of adapters with features of texts (CLIP, Radford et al. 2021).

    A logit is the cosine of the network's output and the features of a text, times exp(s), where s
    is learned. Features are as they are, or go through a learned linear map (``projection``). Texts
    are no part of the spec: `TextHeadModule.set_texts` gives them, and the state keeps them, so a
    trained network can be asked about others.

    Args:
        network: what reads the adapters.
        width: numbers of a text's features.
        temperature: exp(-s) at the start.
        encoder: base model whose text encoder made the features; empty for others.
        prompt: what was encoded, ``{}`` standing for the name.
        projection: numbers that the features of a text are mapped to; None leaves them.

    Example:
        >>> from lora_ws.models import MLP
        >>> network = TextHead(network=MLP(hidden=(8,)), width=4).build(InputSpec(7), outputs=3)
        >>> network.set_texts(torch.randn(3, 4), seen=torch.tensor([True, True, False]))
        >>> network(torch.randn(2, 7)).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        *,
        network: Metanetwork,
        width: int,
        temperature: float = 0.07,
        encoder: str = "",
        prompt: str = "{}",
        projection: int | None = None,
    ) -> None:
        self.network = network
        self.width = width
        self.temperature = temperature
        self.encoder = encoder
        self.prompt = prompt
        self.projection = projection

    @property
    def reads(self) -> Literal["features", "factors"]:  # type: ignore[override]
        """What the network reads."""
        return self.network.reads

    @property
    def symmetries(self) -> frozenset[Symmetry]:  # type: ignore[override]
        """Those of the network."""
        return self.network.symmetries

    def normalizer(self, inputs: InputSpec) -> Normalizer:
        """That of the network."""
        return self.network.normalizer(inputs)

    def build(self, inputs: InputSpec, outputs: int) -> "TextHeadModule":
        """Make the network, with texts of zeros.

        Args:
            inputs: what its rows are.
            outputs: how many texts.

        Raises:
            ConfigError: the temperature is not above 0, or the projection below 1.
        """
        if self.temperature <= 0:
            raise ConfigError(f"temperature: expected above 0, got {self.temperature}")
        if self.projection is not None and self.projection < 1:
            raise ConfigError(f"projection: expected at least 1, or none, got {self.projection}")
        trunk = self.network.build(inputs, self.projection or self.width)
        return TextHeadModule(trunk, outputs, self.width, self.temperature, self.projection)


@final
class TextHeadModule(MetanetModule):
    """A trunk, the features of texts and a temperature.

    Args:
        trunk: maps rows to features of the width of the texts, or of the projection.
        outputs: how many texts.
        width: of their features.
        temperature: at the start.
        projection: numbers that features are mapped to; None leaves them.

    Attributes:
        centre: what is taken off the features of a text ``[width]``.
        texts: features of norm 1 ``[texts, width]``.
    """

    centre: Tensor
    texts: Tensor

    def __init__(
        self,
        trunk: MetanetModule,
        outputs: int,
        width: int,
        temperature: float,
        projection: int | None = None,
    ) -> None:
        # Not that of `MetanetModule`, whose normalizer would stand beside the trunk's.
        nn.Module.__init__(self)
        self.trunk = trunk
        self.log_scale = nn.Parameter(torch.full((1,), -math.log(temperature)))
        self.project = nn.Linear(width, projection, bias=False) if projection else None
        if self.project is not None:
            # A rotation at the start: it keeps cosines, as far as it keeps all numbers.
            nn.init.orthogonal_(self.project.weight)
        self.register_buffer("centre", torch.zeros(width))
        self.register_buffer("texts", torch.zeros(outputs, width))

    @property
    def normalizer(self) -> Normalizer:  # type: ignore[override]
        """The trunk's."""
        return self.trunk.normalizer

    @torch.no_grad()
    def set_texts(
        self, features: Float[Tensor, "texts width"], seen: Bool[Tensor, " texts"]
    ) -> None:
        """Take the features of texts, and the mean of some as their centre.

        Args:
            features: as an encoder gives them.
            seen: texts that are trained on.
        """
        self.centre.copy_(features[seen].mean(0))
        self.texts.copy_(self.directions(features))

    def directions(self, features: Float[Tensor, "n width"]) -> Float[Tensor, "n width"]:
        """Bring features of texts to norm 1, off the centre: one frame leaves most in common."""
        return F.normalize(features.to(self.centre) - self.centre, dim=-1)

    def embed(self, rows: Float[Tensor, "adapters params"]) -> Float[Tensor, "adapters width"]:
        """Embed as the trunk does."""
        return self.trunk.embed(rows)

    def head(self, embedding: Float[Tensor, "adapters width"]) -> Float[Tensor, "adapters texts"]:
        """Return cosines with the texts, over the temperature."""
        found = F.normalize(self.trunk.head(embedding), dim=-1)
        texts = self.texts
        if self.project is not None:
            texts = F.normalize(self.project(texts), dim=-1)
        return self.log_scale.exp().clamp(max=MAX_SCALE) * (found @ texts.mT)

"""GL-net (Putterman et al. 2024, arXiv 2410.04207): layers that commute with changes of basis."""

import math
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lora_ws.errors import ConfigError
from lora_ws.functional.views import outer, project
from lora_ws.models.base import Metanetwork
from lora_ws.models.dropout import Dropout
from lora_ws.models.factors import FactorPair, Factors
from lora_ws.models.inputs import InputSpec
from lora_ws.models.module import MetanetModule


@final
class GLNet(Metanetwork):
    """Equivariant linear layers on both factors of each module, and an MLP on their product.

    The first layer makes ``U = P B`` and ``V = Q Aᵀ``, ``[hidden, rank]``. Each further one lets a
    row of U pass where its inner product with the sum of V's rows is positive, a row of V likewise,
    and maps what passes. The product ``U Vᵀ``, which no change of basis changes, is what the MLP
    reads of a module.

    Args:
        hidden: rows of U and V.
        layers: equivariant layers; the authors' scripts run 1, so that no gate takes part.
        width: of the MLP's hidden layer, which is the embedding.
        norm: whether the product is divided by its norm, and the MLP given the size of each update
            instead.
        input_dropout: share of the products that training hides.

    Example:
        >>> from lora_ws.adapters import Layout
        >>> layout = Layout.known("tiny_sd_qv")
        >>> network = GLNet(hidden=4).build(InputSpec.of(layout), outputs=10)
        >>> network(torch.zeros(2, layout.size)).shape
        torch.Size([2, 10])
    """

    reads = "factors"
    symmetries = frozenset({"gl", "sign"})

    def __init__(
        self,
        *,
        hidden: int = 8,
        layers: int = 1,
        width: int = 128,
        norm: bool = True,
        input_dropout: float = 0.0,
    ) -> None:
        self.hidden = hidden
        self.layers = layers
        self.width = width
        self.norm = norm
        self.input_dropout = input_dropout

    def build(self, inputs: InputSpec, outputs: int) -> "GLNetModule":
        """Make the network.

        Raises:
            ConfigError: an argument cannot be used, or the rows are no factors.
        """
        if min(self.hidden, self.layers, self.width) < 1 or not 0 <= self.input_dropout < 1:
            raise ConfigError(
                f"{self}: expected hidden, layers and width of at least 1 and input_dropout from 0 "
                "to below 1"
            )
        return GLNetModule(inputs, outputs, self)


@final
class GLNetModule(MetanetModule):
    """What `GLNet` builds."""

    def __init__(self, inputs: InputSpec, outputs: int, spec: GLNet) -> None:
        super().__init__(inputs)
        self.factors, self.normed = Factors(inputs.factors), spec.norm
        # Maps of each group: those of B and of A in turn, a layer after another.
        self.maps = nn.ModuleList(
            nn.ParameterList(
                nn.Parameter(torch.randn(shape.modules, width, spec.hidden) / math.sqrt(width))
                for layer in range(spec.layers)
                for width in ((spec.hidden,) * 2 if layer else (shape.outputs, shape.inputs))
            )
            for shape in self.factors.shapes
        )
        self.dropout = Dropout(spec.input_dropout)
        features = spec.hidden**2 + spec.norm
        self.linear = nn.Linear(len(inputs.factors.layers) * features, spec.width)
        self.norm = nn.LayerNorm(spec.width)
        self.output = nn.Linear(spec.width, outputs)

    def embed(self, rows: Float[Tensor, "adapters params"]) -> Float[Tensor, "adapters width"]:
        """Return a linear map of the products of all modules."""
        pairs = self.factors(self.normalizer(rows))
        groups = [self._group(pair, k) for k, pair in enumerate(pairs)]
        return self.linear(self.dropout(self.factors.in_order(groups)).flatten(-2))

    def head(self, embedding: Float[Tensor, "adapters width"]) -> Float[Tensor, "adapters outputs"]:
        """Return outputs of the hidden layer."""
        return self.output(torch.relu(self.norm(embedding)))

    def _group(self, pair: FactorPair, number: int) -> Float[Tensor, "*some modules features"]:
        # Uᵀ and Vᵀ, a row per rank.
        u, v = pair.up.mT, pair.down
        maps = list(self.maps[number])  # type: ignore[call-overload]
        for layer, (write, read) in enumerate(zip(maps[::2], maps[1::2], strict=True)):
            if layer:
                u, v = _gated(u, v), _gated(v, u)
            u, v = project(u, write), project(v, read)
        product = outer(u, v).flatten(-2)
        if not self.normed:
            return product
        # Gates and maps keep factors of size apart, so that one division serves all layers.
        unit = F.normalize(product, dim=-1) * u.shape[-1]
        return torch.cat([unit, pair.log_size[..., None]], -1)


def _gated(
    u: Float[Tensor, "*some rank hidden"], v: Float[Tensor, "*some rank hidden"]
) -> Float[Tensor, "*some rank hidden"]:
    """The columns of u whose inner product with the sum of v's is positive, and zeros."""
    return u * (v.sum(-1, keepdim=True).mT @ u > 0)

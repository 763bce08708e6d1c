"""The left Gram matrix of each update, seen through learned probes, and an MLP."""

import math
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_ws.errors import ConfigError
from lora_ws.functional.views import outer, project
from lora_ws.models.base import Metanetwork
from lora_ws.models.dropout import Dropout
from lora_ws.models.factors import FactorPair, Factors
from lora_ws.models.inputs import InputSpec
from lora_ws.models.module import MetanetModule
from lora_ws.models.pooling import ConcatPool
from lora_ws.models.tokens import FADE


@final
class LeftGram(Metanetwork):
    """``Pᵀ (BA)(BA)ᵀ P`` of each module, divided by the trace, for learned P; then an MLP.

    What an update writes, whatever it reads: adapters whose A started at random can be compared.

    Args:
        probes: columns of P.
        width: of the MLP's hidden layer, which is the embedding.
        input_dropout: share of the matrices' entries that training hides.

    Example:
        >>> from lora_ws.adapters import Layout
        >>> layout = Layout.known("tiny_sd_qv")
        >>> network = LeftGram(probes=4).build(InputSpec.of(layout), outputs=10)
        >>> network(torch.zeros(2, layout.size)).shape
        torch.Size([2, 10])
    """

    reads = "factors"
    symmetries = frozenset({"gl", "sign", "negation"})

    def __init__(self, *, probes: int = 12, width: int = 128, input_dropout: float = 0.0) -> None:
        self.probes = probes
        self.width = width
        self.input_dropout = input_dropout

    def build(self, inputs: InputSpec, outputs: int) -> "LeftGramModule":
        """Make the network.

        Raises:
            ConfigError: an argument cannot be used, or the rows are no factors.
        """
        if min(self.probes, self.width) < 1 or not 0 <= self.input_dropout < 1:
            raise ConfigError(
                f"{self}: expected probes and width of at least 1 and input_dropout from 0 to "
                "below 1"
            )
        return LeftGramModule(inputs, outputs, self)


@final
class LeftGramModule(MetanetModule):
    """What `LeftGram` builds."""

    _upper: Tensor

    def __init__(self, inputs: InputSpec, outputs: int, spec: LeftGram) -> None:
        super().__init__(inputs)
        self.factors = Factors(inputs.factors)
        self.probes = nn.ParameterList(
            nn.Parameter(
                torch.randn(shape.modules, shape.outputs, spec.probes) / math.sqrt(shape.outputs)
            )
            for shape in self.factors.shapes
        )
        rows, columns = torch.triu_indices(spec.probes, spec.probes)
        self.register_buffer("_upper", rows * spec.probes + columns, persistent=False)
        self.dropout = Dropout(spec.input_dropout)
        self.pool = ConcatPool(len(inputs.factors.layers), len(rows) + 1, spec.width)
        self.norm = nn.LayerNorm(spec.width)
        self.output = nn.Linear(spec.width, outputs)

    def embed(self, rows: Float[Tensor, "adapters params"]) -> Float[Tensor, "adapters width"]:
        """Return a linear map of the matrices of all modules."""
        pairs = self.factors(self.normalizer(rows))
        each = zip(pairs, self.probes, strict=True)
        tokens = self.factors.in_order([self._group(pair, probes) for pair, probes in each])
        return self.pool(self.dropout(tokens))

    def head(self, embedding: Float[Tensor, "adapters width"]) -> Float[Tensor, "adapters outputs"]:
        """Return outputs of the hidden layer."""
        return self.output(torch.relu(self.norm(embedding)))

    def _group(
        self, pair: FactorPair, probes: Float[Tensor, "modules outputs p"]
    ) -> Float[Tensor, "*some modules features"]:
        written = project(pair.up.mT, probes)
        gram = outer(written, (pair.down @ pair.down.mT) @ written).flatten(-2)
        size = pair.log_size[..., None]
        upper = gram.index_select(-1, self._upper)
        unit = upper * (pair.up.shape[-2] / (size.expm1() + FADE))
        return torch.cat([unit, size], -1)

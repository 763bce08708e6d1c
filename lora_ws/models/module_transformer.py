"""A transformer encoder (Vaswani et al. 2017, arXiv 1706.03762) over the modules of an adapter."""

from typing import final

from jaxtyping import Float
from torch import Tensor, nn

from lora_ws.errors import ConfigError
from lora_ws.models.base import Metanetwork
from lora_ws.models.dropout import Dropout
from lora_ws.models.inputs import InputSpec
from lora_ws.models.pooling import ModuleEncoder
from lora_ws.models.tokens import ModuleLinear, TokenModule, UpdateTokens


@final
class ModuleTransformer(Metanetwork):
    """One token per module, self-attention among modules, the mean over modules.

    Each module has a linear read-in of its own, whose bias is its embedding; there is no other
    position.

    Args:
        width: numbers per token, and of the embedding; a multiple of ``heads``.
        depth: encoder layers.
        heads: attention heads of each.
        probes: directions in which the network looks at what each module writes.
        input_dropout: share of a token's features that training hides.
        dropout: of the encoder layers.

    Example:
        >>> import torch
        >>> from lora_ws.adapters import Layout
        >>> layout = Layout.known("tiny_sd_qv")
        >>> network = ModuleTransformer(depth=1).build(InputSpec.of(layout), outputs=10)
        >>> network(torch.zeros(2, layout.size)).shape
        torch.Size([2, 10])
    """

    reads = "factors"
    symmetries = frozenset({"gl", "sign", "negation"})

    def __init__(
        self,
        *,
        width: int = 32,
        depth: int = 1,
        heads: int = 4,
        probes: int = 32,
        input_dropout: float = 0.5,
        dropout: float = 0.1,
    ) -> None:
        self.width = width
        self.depth = depth
        self.heads = heads
        self.probes = probes
        self.input_dropout = input_dropout
        self.dropout = dropout

    def build(self, inputs: InputSpec, outputs: int) -> "ModuleTransformerModule":
        """Make the network.

        Raises:
            ConfigError: a width, depth or rate does not fit, or the rows are no factors.
        """
        if min(self.width, self.depth, self.heads) < 1 or self.width % self.heads:
            raise ConfigError(
                f"{self}: expected depth and heads of at least 1, and width a multiple of heads"
            )
        if not (0 <= self.input_dropout < 1 and 0 <= self.dropout < 1):
            raise ConfigError(f"{self}: expected input_dropout and dropout from 0 to below 1")
        return ModuleTransformerModule(inputs, outputs, self)


@final
class ModuleTransformerModule(TokenModule):
    """What `ModuleTransformer` builds; its embedding is the normalised mean over tokens."""

    def __init__(self, inputs: InputSpec, outputs: int, spec: ModuleTransformer) -> None:
        super().__init__(inputs)
        width, layout = spec.width, inputs.factors
        self.tokens = UpdateTokens(layout, spec.probes)
        self.dropout = Dropout(spec.input_dropout)
        self.read_in = ModuleLinear(len(layout.layers), self.tokens.features, width)
        self.encoder = ModuleEncoder(
            width,
            depth=spec.depth,
            heads=spec.heads,
            feedforward=2 * width,
            dropout=spec.dropout,
        )
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, outputs)

    def embed_tokens(
        self, tokens: Float[Tensor, "adapters modules features"]
    ) -> Float[Tensor, "adapters width"]:
        """Return the mean over the tokens of the encoder."""
        return self.norm(self.encoder(self.read_in(self.dropout(tokens))).mean(-2))

    def head(self, embedding: Float[Tensor, "adapters width"]) -> Float[Tensor, "adapters outputs"]:
        """Return outputs."""
        return self.output(embedding)

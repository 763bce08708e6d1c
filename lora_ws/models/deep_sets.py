"""Deep Sets (Zaheer et al. 2017, arXiv 1703.06114) over the modules of an adapter."""

from typing import final

from jaxtyping import Float
from torch import Tensor, nn

from lora_ws.errors import ConfigError
from lora_ws.models.base import Metanetwork
from lora_ws.models.dropout import Dropout
from lora_ws.models.inputs import InputSpec
from lora_ws.models.tokens import ModuleLinear, TokenModule, UpdateTokens


@final
class DeepSets(Metanetwork):
    """One map for all modules, the mean over modules, and a linear layer: the light baseline.

    Modules write into spaces of their own, so each has a linear read-in; all behind it is shared.

    Args:
        width: numbers per module, and of the embedding.
        depth: residual layers of the shared map; with 0, outputs are linear in the tokens but for
            one normalisation.
        probes: directions in which the network looks at what each module writes.
        input_dropout: share of a token's features that training hides.

    Example:
        >>> import torch
        >>> from lora_ws.adapters import Layout
        >>> layout = Layout.known("tiny_sd_qv")
        >>> network = DeepSets(width=16).build(InputSpec.of(layout), outputs=10)
        >>> network(torch.zeros(2, layout.size)).shape
        torch.Size([2, 10])
    """

    reads = "factors"
    symmetries = frozenset({"gl", "sign", "negation"})

    def __init__(
        self, *, width: int = 32, depth: int = 1, probes: int = 32, input_dropout: float = 0.5
    ) -> None:
        self.width = width
        self.depth = depth
        self.probes = probes
        self.input_dropout = input_dropout

    def build(self, inputs: InputSpec, outputs: int) -> "DeepSetsModule":
        """Make the network.

        Raises:
            ConfigError: a width or depth does not fit, or the rows are no factors.
        """
        if self.width < 1 or self.depth < 0 or not 0 <= self.input_dropout < 1:
            raise ConfigError(
                f"{self}: expected width of at least 1, depth of at least 0 and input_dropout from "
                "0 to below 1"
            )
        return DeepSetsModule(inputs, outputs, self)


@final
class DeepSetsModule(TokenModule):
    """What `DeepSets` builds; its embedding is the normalised mean over modules."""

    def __init__(self, inputs: InputSpec, outputs: int, spec: DeepSets) -> None:
        super().__init__(inputs)
        width, layout = spec.width, inputs.factors
        self.tokens = UpdateTokens(layout, spec.probes)
        self.dropout = Dropout(spec.input_dropout)
        self.read_in = ModuleLinear(len(layout.layers), self.tokens.features, width)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
            for _ in range(spec.depth)
        )
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, outputs)

    def embed_tokens(
        self, tokens: Float[Tensor, "adapters modules features"]
    ) -> Float[Tensor, "adapters width"]:
        """Return the mean over modules of what the shared map makes of each."""
        modules = self.read_in(self.dropout(tokens))
        for layer in self.layers:
            modules = modules + layer(modules)
        return self.norm(modules.mean(-2))

    def head(self, embedding: Float[Tensor, "adapters width"]) -> Float[Tensor, "adapters outputs"]:
        """Return outputs."""
        return self.output(embedding)

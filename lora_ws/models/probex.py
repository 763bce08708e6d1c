"""ProbeX (Horwitz et al. 2024, arXiv 2410.13569): updates seen through learned probes."""

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_ws.errors import ConfigError
from lora_ws.models.base import Metanetwork
from lora_ws.models.dropout import Dropout
from lora_ws.models.factors import Factors
from lora_ws.models.inputs import InputSpec
from lora_ws.models.module import MetanetModule
from lora_ws.models.probes import ModuleProbes, Share


@final
class ProbeX(Metanetwork):
    """Learned probes on both sides of each update, a ReLU, and two linear layers.

    The paper reads one module; ``matrices`` of the experiment says which, and ``choose`` has
    validation say it (`training/metanetworks/mvprobe_one_module.yaml`).

    Args:
        probes: columns of the probes on either side; the paper has 128 for its one module.
        width: of the embedding, which is linear in what the probes see; the paper has 512.
        share: ``shape`` gives modules of one shape the same probes.
        input_dropout: share of what the probes see that training hides.

    Example:
        >>> from lora_ws.adapters import Layout
        >>> layout = Layout.known("tiny_sd_qv")
        >>> network = ProbeX(probes=4).build(InputSpec.of(layout), outputs=10)
        >>> network(torch.zeros(2, layout.size)).shape
        torch.Size([2, 10])
    """

    reads = "factors"
    symmetries = frozenset({"gl", "sign"})

    def __init__(
        self,
        *,
        probes: int = 8,
        width: int = 128,
        share: Share = "none",
        input_dropout: float = 0.0,
    ) -> None:
        self.probes = probes
        self.width = width
        self.share: Share = share
        self.input_dropout = input_dropout

    def build(self, inputs: InputSpec, outputs: int) -> "ProbeXModule":
        """Make the network.

        Raises:
            ConfigError: an argument cannot be used, or the rows are no factors.
        """
        if self.width < 1 or not 0 <= self.input_dropout < 1:
            raise ConfigError(
                f"{self}: expected width of at least 1 and input_dropout from 0 to below 1"
            )
        return ProbeXModule(inputs, outputs, self)


@final
class ProbeXModule(MetanetModule):
    """What `ProbeX` builds."""

    def __init__(self, inputs: InputSpec, outputs: int, spec: ProbeX) -> None:
        super().__init__(inputs)
        self.factors = Factors(inputs.factors)
        self.probes = ModuleProbes(self.factors, ("update",), spec.probes, share=spec.share)
        self.dropout = Dropout(spec.input_dropout)
        seen = len(inputs.factors.layers) * self.probes.features
        self.linear = nn.Linear(seen, spec.width)
        self.output = nn.Linear(spec.width, outputs)

    def embed(self, rows: Float[Tensor, "adapters params"]) -> Float[Tensor, "adapters width"]:
        """Return a linear map of what the probes see."""
        seen = torch.relu(self.probes(self.factors(self.normalizer(rows))))
        return self.linear(self.dropout(seen).flatten(-2))

    def head(self, embedding: Float[Tensor, "adapters width"]) -> Float[Tensor, "adapters outputs"]:
        """Return outputs."""
        return self.output(embedding)

"""A multi-layer perceptron on the singular values of updates: what can be read from sizes alone."""

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_ws.errors import ConfigError
from lora_ws.functional.canonical import canonical_form
from lora_ws.models.base import Metanetwork
from lora_ws.models.factors import Factors
from lora_ws.models.inputs import InputSpec
from lora_ws.models.module import MetanetModule
from lora_ws.models.spectra import energy_shares, log_sizes


@final
class SpectralMLP(Metanetwork):
    """Log singular values, log norm, leading share and entropy of each module, one hidden layer.

    The control of every network that reads directions: it sees how large updates are and how their
    size is spread over ranks, and no direction. At rank 1 all four say the same, and one number per
    module is left. "MLP+SVD" of Learning on LoRAs (Putterman et al. 2024, arXiv 2410.04207), with
    sizes beside the training adapters' and three more numbers.

    Args:
        width: of the hidden layer, and of the embedding.

    Example:
        >>> from lora_ws.adapters import Layout
        >>> layout = Layout.known("tiny_sd_qv")
        >>> network = SpectralMLP(width=16).build(InputSpec.of(layout), outputs=10)
        >>> network(torch.zeros(2, layout.size)).shape
        torch.Size([2, 10])
    """

    reads = "factors"
    symmetries = frozenset({"gl", "sign", "negation"})

    def __init__(self, *, width: int = 256) -> None:
        self.width = width

    def build(self, inputs: InputSpec, outputs: int) -> "SpectralMLPModule":
        """Make the network.

        Raises:
            ConfigError: the width is not positive, or the rows are no factors.
        """
        if self.width < 1:
            raise ConfigError(f"{self}: expected width of at least 1")
        return SpectralMLPModule(inputs, outputs, self.width)


@final
class SpectralMLPModule(MetanetModule):
    """What `SpectralMLP` builds; its embedding is the hidden layer."""

    def __init__(self, inputs: InputSpec, outputs: int, width: int) -> None:
        super().__init__(inputs)
        self.factors = Factors(inputs.factors)
        features = sum(s.modules * (s.rank + 3 if s.rank > 1 else 1) for s in self.factors.shapes)
        self.norm = nn.LayerNorm(features)
        self.hidden = nn.Linear(features, width)
        self.output = nn.Linear(width, outputs)

    def embed(self, rows: Float[Tensor, "adapters params"]) -> Float[Tensor, "adapters width"]:
        """Return the hidden layer."""
        pairs = self.factors(self.normalizer(rows))
        spectra = [_spectrum(canonical_form(*pair).values).flatten(-2) for pair in pairs]
        return torch.relu(self.hidden(self.norm(torch.cat(spectra, -1))))

    def head(self, embedding: Float[Tensor, "adapters width"]) -> Float[Tensor, "adapters outputs"]:
        """Return outputs."""
        return self.output(embedding)


def _spectrum(
    values: Float[Tensor, "adapters modules rank"],
) -> Float[Tensor, "adapters modules features"]:
    if values.shape[-1] == 1:
        return log_sizes(values)
    shares = energy_shares(values)
    norms = values.square().sum(-1, keepdim=True)
    # The root has no slope at 0.
    norms = torch.where(norms > 0, norms, 1).sqrt() * (norms > 0)
    entropies = -torch.xlogy(shares, torch.where(shares > 0, shares, 1)).sum(-1, keepdim=True)
    return torch.cat([log_sizes(values), log_sizes(norms), shares[..., :1], entropies], -1)

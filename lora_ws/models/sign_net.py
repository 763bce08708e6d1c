"""SignNet (Lim et al. 2022, arXiv 2202.13013) on the singular vectors of updates."""

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_ws.errors import ConfigError
from lora_ws.functional.canonical import Canonical, canonical_form
from lora_ws.models.base import Metanetwork, Symmetry
from lora_ws.models.factors import Factors, Shape
from lora_ws.models.inputs import InputSpec
from lora_ws.models.module import MetanetModule
from lora_ws.models.pooling import PoolName, make_pool
from lora_ws.models.spectra import START, Side, energy_shares, log_sizes, symmetries_of


@final
class SignNet(Metanetwork):
    """A network φ of each module's own on its singular vectors, even in their common sign.

    A module becomes ``Σ_i ω_i [φ(u_i, v_i, s_i) + φ(-u_i, -v_i, s_i)]``: ``ω_i = σ_i² / Σσ²``, and
    s_i are the logarithms of σ_i and of ``σ_i / σ_1``. So neither signs nor the order of singular
    vectors matter, and what is small fades. Where singular values are equal the vectors are not
    unique, and the output jumps.

    Args:
        side: ``left`` reads u alone, what updates write; ``both`` also v, what they read, which
            for a random start A of each adapter's own is mostly that start.
        hidden: units of φ.
        features: numbers that φ gives per module.
        pool: how modules become one vector: ``concat``, or ``transformer``.
        width: of that vector, the embedding.

    Example:
        >>> from lora_ws.adapters import Layout
        >>> layout = Layout.known("tiny_sd_qv")
        >>> network = SignNet(hidden=8).build(InputSpec.of(layout), outputs=10)
        >>> network(torch.zeros(2, layout.size)).shape
        torch.Size([2, 10])
    """

    reads = "factors"

    def __init__(
        self,
        *,
        side: Side = "left",
        hidden: int = 32,
        features: int = 16,
        pool: PoolName = "concat",
        width: int = 128,
    ) -> None:
        self.side: Side = side
        self.hidden = hidden
        self.features = features
        self.pool: PoolName = pool
        self.width = width

    @property
    def symmetries(self) -> frozenset[Symmetry]:  # type: ignore[override]
        """Of an update, and of neither of its signs where one side is read."""
        return symmetries_of(self.side)

    def build(self, inputs: InputSpec, outputs: int) -> "SignNetModule":
        """Make the network.

        Raises:
            ConfigError: a width or name does not fit, or the rows are no factors.
        """
        if min(self.hidden, self.features, self.width) < 1 or self.side not in ("left", "both"):
            raise ConfigError(
                f"{self}: expected hidden, features and width of at least 1, and side left or both"
            )
        return SignNetModule(inputs, outputs, self)


@final
class SignNetModule(MetanetModule):
    """What `SignNet` builds."""

    def __init__(self, inputs: InputSpec, outputs: int, spec: SignNet) -> None:
        super().__init__(inputs)
        self.factors = Factors(inputs.factors)
        self.maps = nn.ModuleList(EvenMaps(shape, spec) for shape in self.factors.shapes)
        modules = len(inputs.factors.layers)
        self.pool = make_pool(spec.pool, modules, spec.features, spec.width)
        self.output = nn.Sequential(
            nn.LayerNorm(spec.width), nn.ReLU(), nn.Linear(spec.width, outputs)
        )

    def embed(self, rows: Float[Tensor, "adapters params"]) -> Float[Tensor, "adapters width"]:
        """Return the vector of all modules."""
        pairs = self.factors(self.normalizer(rows))
        groups = [even(canonical_form(*pair)) for even, pair in zip(self.maps, pairs, strict=True)]
        return self.pool(self.factors.in_order(groups))

    def head(self, embedding: Float[Tensor, "adapters width"]) -> Float[Tensor, "adapters outputs"]:
        """Return outputs."""
        return self.output(embedding)


@final
class EvenMaps(nn.Module):
    """φ of each module of a group, summed over both signs and over ranks."""

    def __init__(self, shape: Shape, spec: SignNet) -> None:
        super().__init__()
        self.both = spec.side == "both"
        reads = shape.outputs + (shape.inputs if self.both else 0)
        self.directions = nn.Parameter(torch.randn(shape.modules, reads, spec.hidden) * START)
        sizes = torch.randn(shape.modules, 2, spec.hidden) * START
        # Where training saw rank 1 alone, sizes beside the first say nothing about others.
        sizes[:, 1] = 0
        self.sizes = nn.Parameter(sizes)
        self.bias = nn.Parameter(torch.zeros(shape.modules, spec.hidden))
        last = torch.randn(shape.modules, spec.hidden, spec.features)
        self.last = nn.Parameter(last / spec.hidden**0.5)

    def forward(self, update: Canonical) -> Float[Tensor, "adapters modules features"]:
        """Return the features of each module."""
        left, values, right = update
        read = torch.cat([left, right], -2) if self.both else left
        odd = torch.einsum("...mxr,mxh->...mrh", read, self.directions)
        first = values[..., :1]
        ratios = values / torch.where(first > 0, first, 1)
        sizes = torch.stack([log_sizes(values), log_sizes(ratios)], -1)
        same = torch.einsum("...mrs,msh->...mrh", sizes, self.sizes) + self.bias[:, None]
        hidden = torch.relu(same + odd) + torch.relu(same - odd)
        hidden = (energy_shares(values)[..., None] * hidden).sum(-2)
        return torch.einsum("...mh,mhf->...mf", hidden, self.last)

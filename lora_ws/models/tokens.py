"""Modules of adapters as tokens: what networks over modules read in place of raw factors."""

import math
from abc import abstractmethod
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_ws.adapters.layout import Layout
from lora_ws.errors import ConfigError
from lora_ws.functional.views import outer
from lora_ws.models.factors import FactorPair, Factors
from lora_ws.models.module import MetanetModule

# Squared size, beside that of the training adapters, below which an update fades to none.
FADE = 1e-8


class TokenModule(MetanetModule):
    """A network whose tokens no learned weight makes: training makes them once, not every epoch.

    Attributes:
        tokens: makes them of normalized rows, by constants alone.
    """

    tokens: nn.Module

    def tokenize(
        self, rows: Float[Tensor, "adapters params"]
    ) -> Float[Tensor, "adapters modules features"]:
        """Make the tokens of raw rows, modules in the layout's order."""
        return self.tokens(self.normalizer(rows))

    @abstractmethod
    def embed_tokens(
        self, tokens: Float[Tensor, "adapters modules features"]
    ) -> Float[Tensor, "adapters width"]:
        """Embed adapters by their tokens."""

    @final
    def embed(self, rows: Float[Tensor, "adapters params"]) -> Float[Tensor, "adapters width"]:
        """Embed adapters by their tokens."""
        return self.embed_tokens(self.tokenize(rows))


@final
class UpdateTokens(nn.Module):
    """Describes the update ``BA`` of each module by what it writes, and how much.

    The features of a module are the upper triangle of ``Pᵀ(BA)(BA)ᵀP``, for seeded orthonormal
    probes P that modules of one width share, and ``log(1 + |BA|²)``. They depend on the update
    alone, never on its split into B and A, and on A only by ``AAᵀ``, so that adapters with a random
    A each can be compared. No update is formed. Zero rows that pad the rank change nothing, and an
    update of zero, as of a module that a file lacks, gives zeros.

    The matrix is divided by its trace before the probes, and scaled to mean 0 and variance 1 over
    updates of rank 1 that write in random directions.

    Args:
        layout: which columns are which factor.
        probes: columns of P; from the width of the modules up, nothing is lost.

    Raises:
        ConfigError: fewer than 1 probe.

    Example:
        >>> layout = Layout.known("tiny_sd_qv")
        >>> UpdateTokens(layout, probes=4)(torch.zeros(2, layout.size)).shape
        torch.Size([2, 64, 11])
    """

    _upper: Tensor
    _diagonal: Tensor

    def __init__(self, layout: Layout, probes: int) -> None:
        super().__init__()
        if probes < 1:
            raise ConfigError(f"probes: expected at least 1, got {probes}; 32 is a good start")
        self.factors = Factors(layout)
        for number, shape in enumerate(self.factors.shapes):
            self.register_buffer(f"_probes{number}", orthonormal(shape.outputs, probes))
        rows, columns = torch.triu_indices(probes, probes)
        self.register_buffer("_upper", rows * probes + columns, persistent=False)
        self.register_buffer("_diagonal", rows == columns, persistent=False)

    @property
    def features(self) -> int:
        """Numbers per token."""
        return len(self._upper) + 1

    def forward(
        self, rows: Float[Tensor, "*some params"]
    ) -> Float[Tensor, "*some modules features"]:
        """Return the tokens of normalized rows, modules in the layout's order."""
        pairs = self.factors(rows)
        return self.factors.in_order([self._group(pair, k) for k, pair in enumerate(pairs)])

    def _group(self, pair: FactorPair, number: int) -> Float[Tensor, "*some modules features"]:
        # Bᵀ, so that both factors have a row per rank.
        down, up = pair.down, pair.up.mT
        probes = getattr(self, f"_probes{number}")
        width = len(probes)
        read = down @ down.mT
        written = up @ probes
        # |BA|² = tr(BᵀB AAᵀ), negative by rounding alone.
        square = ((up @ up.mT) * read).sum((-2, -1)).clamp(min=0)[..., None]
        scale = width / (square + FADE)
        mean = (probes.mT @ probes / width).flatten()[self._upper]
        gram = outer(written, read @ written).flatten(-2)[..., self._upper]
        unit = torch.addcmul(gram * scale, square * scale, mean, value=-1)
        # Each entry off the diagonal stands for two.
        unit = unit * (1 - (1 - math.sqrt(0.5)) * self._diagonal.to(unit.dtype))
        return torch.cat([unit, square.log1p()], -1)


@final
class ModuleLinear(nn.Module):
    """Gives each module a linear map of its own; its bias is the module's learned embedding.

    Args:
        modules: how many.
        features: numbers per token.
        width: numbers per token after it.

    Example:
        >>> ModuleLinear(64, 11, 32)(torch.zeros(2, 64, 11)).shape
        torch.Size([2, 64, 32])
    """

    def __init__(self, modules: int, features: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(modules, features, width) * 0.02)
        self.bias = nn.Parameter(torch.randn(modules, width) * 0.02)

    def forward(
        self, tokens: Float[Tensor, "*some modules features"]
    ) -> Float[Tensor, "*some modules width"]:
        """Map the tokens."""
        return torch.einsum("...mf,mfw->...mw", tokens, self.weight) + self.bias


def orthonormal(width: int, count: int, seed: int = 0) -> Float[Tensor, "width count"]:
    """Draw orthonormal columns by width and seed alone; zeros from the width up.

    Example:
        >>> columns = orthonormal(32, 4)
        >>> (columns.mT @ columns).round().abs().tolist()[1]
        [0.0, 1.0, 0.0, 0.0]
    """
    generator = torch.Generator().manual_seed(width + (seed << 32))
    normal = torch.randn(width, min(width, count), generator=generator, dtype=torch.float64)
    columns = torch.zeros(width, count)
    columns[:, : min(width, count)] = torch.linalg.qr(normal).Q.float()
    return columns

"""A transformer over seeded sketches of updates, which takes any subset of the modules."""

import math
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_ws.adapters.layout import Layout
from lora_ws.errors import ConfigError
from lora_ws.models.base import Metanetwork, Symmetry
from lora_ws.models.factors import FactorPair, Factors
from lora_ws.models.inputs import InputSpec
from lora_ws.models.pooling import TransformerPool
from lora_ws.models.spectra import Side, log_sizes, symmetries_of
from lora_ws.models.tokens import TokenModule, UpdateTokens, orthonormal


@final
class SketchTransformer(Metanetwork):
    """A token per module from a fixed random sketch of its update; missing modules are masked.

    A module whose update is zero, as of a file that adapts queries alone, is one that is ignored
    at, so that one network serves files that adapt other parts of the same layout; in training
    modules go missing at random. Sketches are drawn by width, not learned, so that two networks
    of this kind see the same tokens.

    Args:
        side: ``both`` sketches the update itself, ``Pᵀ (BA) R`` at unit norm; ``left`` what it
            writes, ``Pᵀ BA (BA)ᵀ P``, all that adapters of a random start A each can share.
        probes: columns of P and of R.
        width: of the embedding.
        token: numbers per token, a multiple of ``heads``.
        depth: Transformer layers.
        heads: attention heads of each.
        dropout: of each.
        module_dropout: share of the modules that go missing in training.

    Example:
        >>> layout = Layout.known("tiny_sd_qv")
        >>> network = SketchTransformer(depth=1).build(InputSpec.of(layout), outputs=10)
        >>> network(torch.zeros(2, layout.size)).shape
        torch.Size([2, 10])
    """

    reads = "factors"

    def __init__(
        self,
        *,
        side: Side = "left",
        probes: int = 32,
        width: int = 128,
        token: int = 32,
        depth: int = 1,
        heads: int = 4,
        dropout: float = 0.1,
        module_dropout: float = 0.1,
    ) -> None:
        self.side: Side = side
        self.probes = probes
        self.width = width
        self.token = token
        self.depth = depth
        self.heads = heads
        self.dropout = dropout
        self.module_dropout = module_dropout

    @property
    def symmetries(self) -> frozenset[Symmetry]:  # type: ignore[override]
        """Of an update, and of neither of its signs where one side is read."""
        return symmetries_of(self.side)

    def build(self, inputs: InputSpec, outputs: int) -> "SketchTransformerModule":
        """Make the network.

        Raises:
            ConfigError: a width, depth, rate or name does not fit, or the rows are no factors.
        """
        sizes = self.probes, self.width, self.token, self.depth, self.heads
        if min(sizes) < 1 or self.token % self.heads or self.side not in ("left", "both"):
            raise ConfigError(
                f"{self}: expected probes, width, depth and heads of at least 1, token a multiple "
                "of heads, and side left or both"
            )
        if not (0 <= self.dropout < 1 and 0 <= self.module_dropout < 1):
            raise ConfigError(f"{self}: expected dropout and module_dropout from 0 to below 1")
        return SketchTransformerModule(inputs, outputs, self)


@final
class SketchTransformerModule(TokenModule):
    """What `SketchTransformer` builds."""

    def __init__(self, inputs: InputSpec, outputs: int, spec: SketchTransformer) -> None:
        super().__init__(inputs)
        layout = inputs.factors
        self.module_dropout = spec.module_dropout
        kind = UpdateTokens if spec.side == "left" else UpdateSketches
        self.tokens = kind(layout, spec.probes)
        self.factors = self.tokens.factors
        self.pool = TransformerPool(
            len(layout.layers),
            self.tokens.features,
            spec.width,
            token=spec.token,
            depth=spec.depth,
            heads=spec.heads,
            dropout=spec.dropout,
        )
        self.output = nn.Sequential(
            nn.LayerNorm(spec.width), nn.ReLU(), nn.Linear(spec.width, outputs)
        )

    def tokenize(
        self, rows: Float[Tensor, "adapters params"]
    ) -> Float[Tensor, "adapters modules features"]:
        """Return the sketches, and as the last number whether the module is there."""
        there = [
            (up.flatten(-2).any(-1) & down.flatten(-2).any(-1))[..., None]
            for up, down in self.factors(rows)
        ]
        present = self.factors.in_order(there).to(rows.dtype)
        return torch.cat([super().tokenize(rows), present], -1)

    def embed_tokens(
        self, tokens: Float[Tensor, "adapters modules features"]
    ) -> Float[Tensor, "adapters width"]:
        """Return the vector of the modules that are there, in training without some of them."""
        sketches, present = tokens[..., :-1], tokens[..., -1] > 0
        if self.training:
            drawn = torch.rand_like(present, dtype=tokens.dtype)
            present = present & (drawn >= self.module_dropout)
        return self.pool(sketches, present)

    def head(self, embedding: Float[Tensor, "adapters width"]) -> Float[Tensor, "adapters outputs"]:
        """Return outputs."""
        return self.output(embedding)


@final
class UpdateSketches(nn.Module):
    """Describes the update of each module by a bilinear sketch at unit norm, and its size.

    The sketch is ``Pᵀ (BA) R / |BA|`` for seeded orthonormal P and R that modules of one shape
    share, times ``sqrt(outputs * inputs)``: numbers of size one. The size is ``log |BA|``, beside
    the training adapters'. No update is formed.

    Args:
        layout: which columns are which factor.
        probes: columns of P and of R.

    Example:
        >>> layout = Layout.known("tiny_sd_qv")
        >>> UpdateSketches(layout, probes=4)(torch.zeros(2, layout.size)).shape
        torch.Size([2, 64, 17])
    """

    def __init__(self, layout: Layout, probes: int) -> None:
        super().__init__()
        self.factors = Factors(layout)
        self.features = probes * probes + 1
        for number, shape in enumerate(self.factors.shapes):
            self.register_buffer(f"_write{number}", orthonormal(shape.outputs, probes))
            self.register_buffer(f"_read{number}", orthonormal(shape.inputs, probes, seed=1))

    def forward(
        self, rows: Float[Tensor, "*some params"]
    ) -> Float[Tensor, "*some modules features"]:
        """Return the tokens of normalized rows, modules in the layout's order."""
        pairs = self.factors(rows)
        return self.factors.in_order([self._group(pair, k) for k, pair in enumerate(pairs)])

    def _group(self, pair: FactorPair, number: int) -> Float[Tensor, "*some modules features"]:
        write, read = getattr(self, f"_write{number}"), getattr(self, f"_read{number}")
        up, down = pair
        square = ((up.mT @ up) * (down @ down.mT)).sum((-2, -1)).clamp(min=0)[..., None]
        # The root has no slope at 0.
        norm = torch.where(square > 0, square, 1).sqrt()
        sketch = ((write.mT @ up) @ (down @ read)).flatten(-2)
        sketch = sketch * (math.sqrt(len(write) * len(read)) / norm)
        return torch.cat([sketch, log_sizes(norm * (square > 0))], -1)

"""One vector from the tokens of an adapter's modules: what networks over modules end in."""

from abc import ABC, abstractmethod
from typing import Literal, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lora_ws.errors import ConfigError
from lora_ws.models.tokens import ModuleLinear

PoolName = Literal["concat", "transformer"]
# Of the tokens that attend to each other.
TOKEN_WIDTH, DEPTH, HEADS = 64, 2, 4


@final
class ModuleEncoder(nn.TransformerEncoder):
    """Lets the modules of an adapter attend to each other, in pre-norm Transformer layers.

    Args:
        width: numbers per token; a multiple of ``heads``.
        depth: layers.
        heads: attention heads of each.
        feedforward: hidden units of each.
        dropout: of each.

    Example:
        >>> ModuleEncoder(32, depth=1, heads=4, feedforward=64)(torch.zeros(2, 64, 32)).shape
        torch.Size([2, 64, 32])
    """

    def __init__(
        self, width: int, *, depth: int, heads: int, feedforward: int, dropout: float = 0.1
    ) -> None:
        # Modules come first: with the batch first, evaluation takes a kernel that vmap cannot.
        layer = nn.TransformerEncoderLayer(
            width, heads, feedforward, dropout, "gelu", norm_first=True
        )
        super().__init__(layer, depth, enable_nested_tensor=False)

    def forward(  # type: ignore[override]
        self,
        tokens: Float[Tensor, "adapters modules width"],
        present: Bool[Tensor, "adapters modules"] | None = None,
        scores: Float[Tensor, "adapters modules"] | None = None,
    ) -> Float[Tensor, "adapters modules width"]:
        """Return the encoded tokens.

        Args:
            tokens: modules in the layout's order.
            present: which of them an adapter has; the others are ignored. None is all.
            scores: added to what every token finds each of them worth, in place of ``present``.
        """
        hidden = scores if present is None else _penalty(present, tokens)
        # Few tokens gain nothing by the fused kernels, of which vmap has no rule for the CPU's.
        with sdpa_kernel(SDPBackend.MATH):
            encoded = super().forward(tokens.transpose(0, 1), src_key_padding_mask=hidden)
        return encoded.transpose(0, 1)


@final
class AttentionPool(nn.Module):
    """Averages tokens by weights that a small network gives each: softmax of one score per token.

    Args:
        width: numbers per token.

    Example:
        >>> AttentionPool(32)(torch.zeros(2, 64, 32)).shape
        torch.Size([2, 32])
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        # A bias of the score would move all tokens alike.
        self.score = nn.Sequential(
            nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1, bias=False)
        )

    def forward(
        self,
        tokens: Float[Tensor, "*some tokens width"],
        present: Bool[Tensor, "*some tokens"] | None = None,
    ) -> Float[Tensor, "*some width"]:
        """Return the average.

        Args:
            tokens: what to average.
            present: which of them count; None is all.
        """
        scores = self.score(tokens).squeeze(-1)
        if present is not None:
            scores = scores + _penalty(present, tokens)
        return (scores.softmax(-1)[..., None] * tokens).sum(-2)


class ModulePool(nn.Module, ABC):
    """Makes one vector of the tokens of all modules of an adapter."""

    @abstractmethod
    def forward(
        self,
        tokens: Float[Tensor, "adapters modules features"],
        present: Bool[Tensor, "adapters modules"] | None = None,
    ) -> Float[Tensor, "adapters width"]:
        """Return the vectors.

        Args:
            tokens: modules in the layout's order.
            present: which of them an adapter has; None is all.
        """


@final
class ConcatPool(ModulePool):
    """All tokens side by side, normalised as one, and a linear layer.

    Args:
        modules: how many.
        features: numbers per token.
        width: of the result.

    Example:
        >>> ConcatPool(64, 11, 128)(torch.zeros(2, 64, 11)).shape
        torch.Size([2, 128])
    """

    def __init__(self, modules: int, features: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(modules * features)
        self.linear = nn.Linear(modules * features, width)

    def forward(
        self,
        tokens: Float[Tensor, "adapters modules features"],
        present: Bool[Tensor, "adapters modules"] | None = None,
    ) -> Float[Tensor, "adapters width"]:
        """Return the vectors; a module that an adapter lacks counts as zeros."""
        if present is not None:
            tokens = tokens * present[..., None]
        return self.linear(self.norm(tokens.flatten(-2)))


@final
class TransformerPool(ModulePool):
    """A linear read-in of each module's own, attention among modules, and their weighted average.

    Args:
        modules: how many.
        features: numbers per token.
        width: of the result.
        token: width of the tokens that attend to each other, a multiple of ``heads``.
        depth: Transformer layers.
        heads: attention heads of each.
        dropout: of each.

    Example:
        >>> TransformerPool(64, 11, 128)(torch.zeros(2, 64, 11)).shape
        torch.Size([2, 128])
    """

    def __init__(
        self,
        modules: int,
        features: int,
        width: int,
        *,
        token: int = TOKEN_WIDTH,
        depth: int = DEPTH,
        heads: int = HEADS,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.read_in = ModuleLinear(modules, features, token)
        self.encoder = ModuleEncoder(
            token, depth=depth, heads=heads, feedforward=4 * token, dropout=dropout
        )
        self.average = AttentionPool(token)
        self.norm = nn.LayerNorm(token)
        self.linear = nn.Linear(token, width)

    def forward(
        self,
        tokens: Float[Tensor, "adapters modules features"],
        present: Bool[Tensor, "adapters modules"] | None = None,
    ) -> Float[Tensor, "adapters width"]:
        """Return the vectors; a module that an adapter lacks is ignored."""
        encoded = self.encoder(self.read_in(tokens), present)
        return self.linear(self.norm(self.average(encoded, present)))


def make_pool(
    pool: PoolName, modules: int, features: int, width: int, *, dropout: float = 0.1
) -> ModulePool:
    """Make the pooling of a name.

    Args:
        pool: ``concat``, or ``transformer``.
        modules: how many tokens an adapter has.
        features: numbers per token.
        width: of the vector that it makes.
        dropout: of the Transformer's layers.

    Raises:
        ConfigError: there is no pooling of this name.

    Example:
        >>> make_pool("transformer", 64, 11, 128)(torch.zeros(2, 64, 11)).shape
        torch.Size([2, 128])
    """
    if pool == "concat":
        return ConcatPool(modules, features, width)
    if pool == "transformer":
        return TransformerPool(modules, features, width, dropout=dropout)
    raise ConfigError(f"pool: expected concat or transformer, got {pool}")


def _penalty(present: Bool[Tensor, "*some"], like: Tensor) -> Float[Tensor, "*some"]:
    """Added to scores, it hides what is absent; finite, so that an empty row has no NaN."""
    return torch.zeros_like(present, dtype=like.dtype).masked_fill(~present, -1e9)

"""Changes of adapters' factors: other splits of one update, and updates changed a little.

Every function takes B ``[..., modules, outputs, rank]`` and A ``[..., modules, rank, inputs]`` of
modules of one shape and returns the new pair; leading axes, as of adapters, draw independently.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lora_ws.errors import ConfigError

Up = Float[Tensor, "*some modules outputs rank"]
Down = Float[Tensor, "*some modules rank inputs"]
Pair = tuple[Tensor, Tensor]
Rounded = Literal["float16", "bfloat16", "float8_e4m3fn", "int8"]
DTYPES: dict[Rounded, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "int8": torch.int8,
}


def flip_signs(up: Up, down: Down, generator: torch.Generator) -> Pair:
    """Flip the signs of columns of B and of the same rows of A, each with probability 1/2.

    The update ``BA`` stays the same.
    """
    signs = torch.randint(0, 2, down.shape[:-1], generator=generator).to(down) * 2 - 1
    return up * signs.unsqueeze(-2), down * signs.unsqueeze(-1)


def permute_ranks(up: Up, down: Down, generator: torch.Generator) -> Pair:
    """Shuffle the columns of B and the rows of A alike; ``BA`` stays the same."""
    order = torch.rand(down.shape[:-1], generator=generator).argsort(-1)
    return (
        up.take_along_dim(order.unsqueeze(-2), -1),
        down.take_along_dim(order.unsqueeze(-1), -2),
    )


def scramble_gauge(up: Up, down: Down, condition: float, generator: torch.Generator) -> Pair:
    """Change the basis between the factors: ``B G`` and ``inv(G) A``; ``BA`` stays the same.

    Args:
        up: B.
        down: A.
        condition: of G, whose singular values lie evenly between 1 and it on a logarithmic scale;
            at rank 1, where every G has condition 1, G is a number of either sign between its
            inverse and it.
        generator: of G.

    Raises:
        ConfigError: the condition is below 1.

    Example:
        >>> rng = torch.Generator().manual_seed(0)
        >>> b, a = torch.randn(3, 5, 2), torch.randn(3, 2, 4)
        >>> moved = scramble_gauge(b, a, 10.0, rng)
        >>> torch.allclose(moved[0] @ moved[1], b @ a, atol=1e-4), torch.allclose(moved[0], b)
        (True, False)
    """
    if condition < 1:
        raise ConfigError(f"condition: expected at least 1, got {condition}")
    rank = down.shape[-2]
    spread = torch.linspace(0, 1, rank, dtype=down.dtype)
    if rank == 1:
        spread = torch.rand(*down.shape[:-1], generator=generator, dtype=down.dtype) * 2 - 1
    sizes = (condition**spread).unsqueeze(-2).to(down.device)
    left, right = (_orthogonal(down, generator) for _ in range(2))
    return up @ (left * sizes) @ right, right.mT @ ((left / sizes).mT @ down)


def add_noise(up: Up, down: Down, size: float, generator: torch.Generator) -> Pair:
    """Add Gaussian noise to both factors, ``size`` times the root mean square of each.

    Example:
        >>> b, a = add_noise(torch.ones(1, 4, 1), torch.zeros(1, 1, 3), 0.1, torch.Generator())
        >>> bool((b != 1).all()), bool((a == 0).all())
        (True, True)
    """
    noisy = []
    for factor in (up, down):
        rms = factor.square().mean((-2, -1), keepdim=True).sqrt()
        noisy.append(factor + size * rms * _normal(factor, generator))
    return noisy[0], noisy[1]


def append_noise(
    up: Up, down: Down, size: float, generator: torch.Generator, rank: int = 8
) -> Pair:
    """Add noise of a rank to each update, as more columns of B and rows of A.

    The noise is a product of two Gaussian factors, scaled to ``size`` times the Frobenius norm of
    the update.

    Example:
        >>> b, a = append_noise(torch.ones(1, 4, 1), torch.ones(1, 1, 3), 0.5, torch.Generator())
        >>> noise = b[..., 1:] @ a[:, 1:]
        >>> b.shape[-1], round(float(noise.norm() / 12**0.5), 4)
        (9, 0.5)
    """
    more_up = _normal(up.new_empty(*up.shape[:-1], rank), generator)
    more_down = _normal(down.new_empty(*down.shape[:-2], rank, down.shape[-1]), generator)
    wanted = size * product_norm(up, down) / product_norm(more_up, more_down)
    return torch.cat([up, more_up * wanted[..., None, None]], -1), torch.cat([down, more_down], -2)


def product_norm(up: Up, down: Down) -> Tensor:
    """Frobenius norm of each ``BA``, which is not formed.

    Example:
        >>> product_norm(torch.ones(1, 4, 1), torch.ones(1, 1, 9)).tolist()
        [6.0]
    """
    return ((up.mT @ up) * (down @ down.mT)).sum((-2, -1)).clamp(min=0).sqrt()


def append_direction(up: Up, down: Down, left: Tensor, right: Tensor, size: float) -> Pair:
    """Add an update of rank 1 to each, ``size`` times the Frobenius norm of its own.

    Args:
        up: B.
        down: A.
        left: what it writes, of norm 1, ``[..., outputs]``.
        right: what it reads, of norm 1, ``[..., inputs]``.
        size: relative to each update.

    Example:
        >>> one = torch.ones(1, 4, 1), torch.ones(1, 1, 4)
        >>> b, a = append_direction(*one, torch.eye(4)[:1], torch.eye(4)[:1], 0.5)
        >>> round(float((b @ a)[0, 0, 0]), 4)
        3.0
    """
    norm = size * product_norm(up, down)
    more = left * norm.reshape(*norm.shape, *[1] * (left.dim() - norm.dim()))
    return torch.cat([up, more[..., None]], -1), torch.cat([down, right[..., None, :]], -2)


def mean_direction(up: Up, down: Down) -> Pair:
    """The largest singular pair of the mean update of adapters, of which none is formed.

    Args:
        up: B ``[adapters, modules, outputs, rank]``.
        down: A ``[adapters, modules, rank, inputs]``.

    Returns:
        Unit vectors ``[modules, outputs]`` and ``[modules, inputs]``.

    Example:
        >>> left, right = mean_direction(torch.ones(3, 1, 4, 1), torch.ones(3, 1, 1, 9))
        >>> [round(float((left[0, 0] * right[0, 0]).abs()), 4)]
        [0.1667]
    """
    wide = up.permute(1, 2, 0, 3).flatten(2) / len(up)
    tall = down.permute(1, 0, 2, 3).flatten(1, 2).mT
    written, left = torch.linalg.qr(wide)
    read, right = torch.linalg.qr(tall)
    u, _, v = torch.linalg.svd(left @ right.mT)
    return (written @ u[..., :1])[..., 0], (read @ v[:, :1].mT)[..., 0]


def spread_ranks(up: Up, down: Down, rank: int, generator: torch.Generator) -> Pair:
    """Write each update with a higher rank: ``B R`` and ``pinv(R) A``; ``BA`` stays the same.

    Args:
        up: B.
        down: A.
        rank: the new one.
        generator: of R ``[old, new]``, with orthonormal rows.

    Raises:
        ConfigError: the rank is lower than that of the factors.

    Example:
        >>> b, a = torch.ones(1, 4, 1), torch.ones(1, 1, 3)
        >>> wide = spread_ranks(b, a, 2, torch.Generator().manual_seed(0))
        >>> wide[0].shape[-1], torch.allclose(wide[0] @ wide[1], b @ a)
        (2, True)
    """
    own = down.shape[-2]
    if rank < own:
        raise ConfigError(f"rank: expected at least {own}, that of the factors, got {rank}")
    normal = _normal(down.new_empty(*down.shape[:-2], rank, own), generator)
    rows = torch.linalg.qr(normal).Q.mT
    return up @ rows, rows.mT @ down


def drop_modules(up: Up, down: Down, share: float, generator: torch.Generator) -> Pair:
    """Set the updates of modules to zero, each with probability ``share``.

    Those that stay are not made larger: a file may lack modules.
    """
    kept = torch.rand(down.shape[:-2], generator=generator) >= share
    return up * kept.to(up)[..., None, None], down


def truncate_rank(up: Up, down: Down, rank: int) -> Pair:
    """Keep the largest singular values of each update (Eckart and Young 1936); zeros fill the rest.

    Args:
        up: B.
        down: A.
        rank: how many to keep.

    Raises:
        ConfigError: the rank is below 1.

    Example:
        >>> sizes = torch.tensor([3.0, 2, 1])
        >>> b, a = truncate_rank(torch.diag(sizes)[None], torch.eye(3)[None], 2)
        >>> (b @ a)[0].diagonal().round(decimals=4).tolist()
        [3.0, 2.0, 0.0]
    """
    if rank < 1:
        raise ConfigError(f"rank: expected at least 1, got {rank}")
    if rank >= down.shape[-2]:
        return up, down
    left = torch.linalg.qr(up).R
    read, right = torch.linalg.qr(down.mT)
    v = torch.linalg.svd(left @ right.mT).Vh[..., :rank, :]
    # In A's own orthonormal rows the update is ``(up @ right.mT) @ read.mT``.
    return up @ right.mT, v.mT @ v @ read.mT


def round_to(up: Up, down: Down, dtype: Rounded) -> Pair:
    """Round both factors to a format of 16 or 8 bits and back.

    Those of 8 bits get one scale per matrix, which takes its largest entry to theirs.

    Example:
        >>> b, _ = round_to(torch.tensor([[1.0], [0.3]])[None], torch.ones(1, 1, 2), "int8")
        >>> [round(127 * value) for value in b.flatten().tolist()]
        [127, 38]
    """
    return _rounded(up, dtype), _rounded(down, dtype)


def _rounded(factor: Tensor, dtype: Rounded) -> Tensor:
    kind = DTYPES[dtype]
    if kind.itemsize > 1:
        return factor.to(kind).to(factor.dtype)
    most = torch.finfo(kind).max if kind.is_floating_point else torch.iinfo(kind).max
    largest = factor.abs().amax((-2, -1), keepdim=True)
    scale = torch.where(largest > 0, largest / most, 1)
    scaled = factor / scale
    scaled = scaled if kind.is_floating_point else scaled.round()
    return scaled.to(kind).to(factor.dtype) * scale


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)


def _orthogonal(down: Tensor, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix per module."""
    shape = (*down.shape[:-1], down.shape[-2])
    normal = torch.randn(shape, generator=generator, dtype=down.dtype)
    q, r = torch.linalg.qr(normal)
    # Signs of R make the distribution uniform.
    return (q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)).to(down.device)

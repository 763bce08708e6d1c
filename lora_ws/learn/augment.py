"""Augmentation: training rows changed at random, each change by name and with a probability."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lora_ws.adapters.layout import Layout
from lora_ws.errors import ConfigError
from lora_ws.functional import perturb
from lora_ws.models.factors import FactorPair, Factors
from lora_ws.parameters import Parametrized

Pairs = Sequence[FactorPair]


class Augmentation(Parametrized, ABC):
    """A random change of adapters' factors, as data; constructors are keyword-only and only store.

    Draws come from torch's global generator.
    """

    probability: float

    @abstractmethod
    def change(self, pairs: Pairs) -> Pairs:
        """Change every adapter in a batch, ``[adapters, modules, ...]`` per shape of modules."""


class _ByShape(Augmentation):
    """A change that modules draw independently."""

    @final
    def change(self, pairs: Pairs) -> Pairs:
        """Change the modules of one shape after those of another."""
        return [FactorPair(*self.move(up, down)) for up, down in pairs]

    @abstractmethod
    def move(self, up: Tensor, down: Tensor) -> perturb.Pair:
        """Change modules of one shape."""


@final
class SignFlips(_ByShape):
    """Flips the sign of a column of B and of the row of A; the update stays the same.

    For networks without the symmetry ``sign``; others do not see it.

    Args:
        probability: of changing an adapter.
    """

    def __init__(self, *, probability: float = 1.0) -> None:
        self.probability = probability

    def move(self, up: Tensor, down: Tensor) -> perturb.Pair:
        """Change modules of one shape."""
        return perturb.flip_signs(up, down, torch.default_generator)


@final
class RankOrder(_ByShape):
    """Shuffles the columns of B and the rows of A alike; the update stays the same.

    Args:
        probability: of changing an adapter.
    """

    def __init__(self, *, probability: float = 1.0) -> None:
        self.probability = probability

    def move(self, up: Tensor, down: Tensor) -> perturb.Pair:
        """Change modules of one shape."""
        return perturb.permute_ranks(up, down, torch.default_generator)


@final
class GaugeScramble(_ByShape):
    """Changes the basis between B and A; the update stays the same. Measures what ``gl`` is worth.

    Args:
        condition: of the change of basis.
        probability: of changing an adapter.
    """

    def __init__(self, *, condition: float = 10.0, probability: float = 1.0) -> None:
        self.condition = condition
        self.probability = probability

    def move(self, up: Tensor, down: Tensor) -> perturb.Pair:
        """Change modules of one shape."""
        return perturb.scramble_gauge(up, down, self.condition, torch.default_generator)


@final
class FactorNoise(_ByShape):
    """Adds Gaussian noise to both factors.

    Args:
        size: of the noise, as a share of the root mean square of the factor.
        probability: of changing an adapter.
    """

    def __init__(self, *, size: float = 0.05, probability: float = 1.0) -> None:
        self.size = size
        self.probability = probability

    def move(self, up: Tensor, down: Tensor) -> perturb.Pair:
        """Change modules of one shape."""
        return perturb.add_noise(up, down, self.size, torch.default_generator)


@final
class ModuleDropout(_ByShape):
    """Sets the updates of some modules to zero, as of a file that lacks them.

    Args:
        share: of the modules.
        probability: of changing an adapter.
    """

    def __init__(self, *, share: float = 0.2, probability: float = 1.0) -> None:
        self.share = share
        self.probability = probability

    def move(self, up: Tensor, down: Tensor) -> perturb.Pair:
        """Change modules of one shape."""
        return perturb.drop_modules(up, down, self.share, torch.default_generator)


@final
class RankTruncation(_ByShape):
    """Keeps the largest singular values of each update.

    Args:
        rank: how many are kept.
        probability: of changing an adapter.
    """

    def __init__(self, *, rank: int = 1, probability: float = 0.5) -> None:
        self.rank = rank
        self.probability = probability

    def move(self, up: Tensor, down: Tensor) -> perturb.Pair:
        """Change modules of one shape."""
        return perturb.truncate_rank(up, down, self.rank)


@final
class Rounding(_ByShape):
    """Rounds factors to a 16-bit format, as files often hold them.

    Args:
        dtype: the format.
        probability: of changing an adapter.
    """

    def __init__(
        self, *, dtype: Literal["float16", "bfloat16"] = "bfloat16", probability: float = 0.5
    ) -> None:
        self.dtype: Literal["float16", "bfloat16"] = dtype
        self.probability = probability

    def move(self, up: Tensor, down: Tensor) -> perturb.Pair:
        """Change modules of one shape."""
        return perturb.round_to(up, down, self.dtype)


@final
class ScaleJitter(Augmentation):
    """Multiplies all updates of an adapter by ``exp(size * N(0, 1))``.

    Args:
        size: standard deviation of the logarithm.
        probability: of changing an adapter.
    """

    def __init__(self, *, size: float = 0.3, probability: float = 1.0) -> None:
        self.size = size
        self.probability = probability

    def change(self, pairs: Pairs) -> Pairs:
        """Scale B of all modules of an adapter alike."""
        up = pairs[0].up
        scales = (self.size * torch.randn(len(up)).to(up)).exp()[:, None, None, None]
        return [FactorPair(scales * pair.up, pair.down) for pair in pairs]


@final
class Mixup(Augmentation):
    """Mixes the embeddings of pairs of adapters, and their losses alike (Verma et al. 2019).

    Embeddings, not factors: signs and order of factors differ between equal updates, so that their
    means mean nothing.

    Args:
        alpha: of the Beta distribution, the same on both sides, that shares are drawn from; small
            values leave most pairs nearly apart.
        probability: of mixing another into an adapter.
    """

    def __init__(self, *, alpha: float = 0.2, probability: float = 1.0) -> None:
        self.alpha = alpha
        self.probability = probability

    def change(self, pairs: Pairs) -> Pairs:
        """Leave the factors as they are."""
        return pairs

    def draw(self, rows: int) -> tuple[Float[Tensor, " rows"], Int[Tensor, " rows"]]:
        """The share that each row keeps of itself, and whose it takes the rest from.

        Raises:
            ConfigError: alpha is not positive.
        """
        if self.alpha <= 0:
            raise ConfigError(f"augment: expected alpha above 0, got {self.alpha} of Mixup")
        shares = torch.distributions.Beta(self.alpha, self.alpha).sample((rows,))
        chosen = torch.rand(rows) < self.probability
        return torch.where(chosen, shares, 1.0), torch.randperm(rows)


@final
class Augment:
    """Applies augmentations, one after another, to batches of raw rows.

    Args:
        augmentations: what is done to an adapter, each with its probability.
        layout: which columns are which factor.

    Attributes:
        mixup: the one that mixes embeddings, which is left to whoever has them.

    Raises:
        ConfigError: a probability is not between 0 and 1, or there are several Mixups.

    Example:
        >>> augment = Augment([FactorNoise(size=0.1)], Layout.known("tiny_sd_qv"))
        >>> rows = torch.ones(2, 7072)
        >>> bool((augment(rows) != rows).all())
        True
    """

    def __init__(self, augmentations: Sequence[Augmentation], layout: Layout) -> None:
        for one in augmentations:
            if not 0 <= one.probability <= 1:
                raise ConfigError(
                    f"augment: expected a probability from 0 to 1, got {one.probability} of "
                    f"{type(one).__name__}"
                )
        mixups = [one for one in augmentations if isinstance(one, Mixup)]
        if len(mixups) > 1:
            raise ConfigError(f"augment: expected one Mixup at most, got {len(mixups)}")
        self.mixup = mixups[0] if mixups else None
        self.augmentations = tuple(one for one in augmentations if one is not self.mixup)
        self.factors = Factors(layout)

    def __call__(self, rows: Float[Tensor, "adapters params"]) -> Float[Tensor, "adapters params"]:
        """Return changed rows; those given stay as they are."""
        factors = self.factors.to(rows.device)
        for one in self.augmentations:
            chosen = torch.rand(len(rows)) < one.probability
            changed = factors.to_rows(one.change(factors(rows)))
            rows = torch.where(chosen.to(rows.device)[:, None], changed, rows)
        return rows

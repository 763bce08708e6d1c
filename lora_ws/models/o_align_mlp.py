"""O-Align: factors turned towards those of one adapter, then a multi-layer perceptron."""

from typing import final

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lora_ws.adapters.layout import Layout
from lora_ws.errors import ConfigError
from lora_ws.functional.procrustes import nearest_orthogonal
from lora_ws.functional.standardize import safe_scale
from lora_ws.models.base import Metanetwork
from lora_ws.models.factors import Factors
from lora_ws.models.inputs import InputSpec
from lora_ws.models.module import MetanetModule
from lora_ws.models.normalizers import Normalizer


@final
class OAlignMLP(Metanetwork):
    """Factors aligned with those of the first training adapter, all side by side, one hidden layer.

    Each module's ``[B; Aᵀ]`` is turned by the orthogonal matrix that brings it nearest to that of
    the template (Putterman et al. 2024, arXiv 2410.04207), after both factors were divided by
    their root mean square over the training adapters. The outputs do not depend on rotations,
    signs or order of ranks; they do on every other split of the update, ``B @ G, inv(G) @ A``: a
    file whose B is ten times as large and A a tenth reads as another adapter.

    At rank 1 a sign is all that there is to align. Of factors as they are, as published, the much
    larger A decides it, which for adapters that start from a random A each is chance; of factors
    of one size B has as much to say.

    Args:
        width: of the hidden layer.

    Example:
        >>> layout = Layout.known("tiny_sd_qv")
        >>> network = OAlignMLP(width=8).build(InputSpec.of(layout), outputs=10)
        >>> network(torch.zeros(2, layout.size)).shape
        torch.Size([2, 10])
    """

    reads = "factors"
    symmetries = frozenset({"sign"})

    def __init__(self, *, width: int = 16) -> None:
        self.width = width

    def normalizer(self, inputs: InputSpec) -> "Aligner":
        """Scale factors, and turn them towards the template."""
        return Aligner(inputs.factors)

    def build(self, inputs: InputSpec, outputs: int) -> "OAlignMLPModule":
        """Make the network.

        Raises:
            ConfigError: the width is not positive, or the rows are no factors.
        """
        if self.width < 1:
            raise ConfigError(f"{self}: expected width of at least 1")
        return OAlignMLPModule(inputs, outputs, self)


@final
class OAlignMLPModule(MetanetModule):
    """What `OAlignMLP` builds; its embedding is the hidden layer."""

    def __init__(self, inputs: InputSpec, outputs: int, spec: OAlignMLP) -> None:
        super().__init__(inputs)
        self.normalizer = spec.normalizer(inputs)
        self.hidden = nn.Sequential(
            nn.Linear(inputs.width, spec.width), nn.LayerNorm(spec.width), nn.ReLU()
        )
        self.output = nn.Linear(spec.width, outputs)

    def embed(self, rows: Float[Tensor, "adapters params"]) -> Float[Tensor, "adapters width"]:
        """Return the hidden layer."""
        return self.hidden(self.normalizer(rows))

    def head(self, embedding: Float[Tensor, "adapters width"]) -> Float[Tensor, "adapters outputs"]:
        """Return outputs."""
        return self.output(embedding)


@final
class Aligner(Normalizer):
    """Divides each factor by its root mean square, and turns each module towards the template's.

    Constants are those root mean squares over the training rows, and the first training row.

    Args:
        layout: which columns are which factor.
    """

    scale: Tensor
    template: Tensor
    _matrix: Tensor

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.factors = Factors(layout)
        self.register_buffer("scale", torch.ones(len(layout.matrices)))
        self.register_buffer("template", torch.zeros(layout.size))
        sizes = [m.columns.stop - m.columns.start for m in layout.matrices]
        matrix = np.repeat(np.arange(len(sizes)), sizes)
        self.register_buffer("_matrix", torch.tensor(matrix), persistent=False)

    def fit(
        self, rows: Float[np.ndarray, "adapters params"], train: Int[np.ndarray, " chosen"]
    ) -> "Aligner":
        """Measure the factors, and keep the first row."""
        matrix = self._matrix.numpy()
        squares = sum(np.bincount(matrix, np.square(rows[row], dtype=np.float64)) for row in train)
        roots = np.sqrt(squares / (np.bincount(matrix) * len(train))).astype(np.float32)
        self.scale = torch.from_numpy(safe_scale(roots))
        first = torch.from_numpy(np.array(rows[train[0]], np.float32))
        self.template = first / self.scale[self._matrix]
        return self

    def forward(self, rows: Float[Tensor, "*some params"]) -> Float[Tensor, "*some params"]:
        """Scale, and turn."""
        scaled = rows / self.scale[self._matrix]
        turned = []
        for (up, down), like in zip(self.factors(scaled), self.factors(self.template), strict=True):
            turn = nearest_orthogonal(up.mT @ like.up + down @ like.down.mT)
            turned.append(torch.cat([(up @ turn).flatten(-2), (turn.mT @ down).flatten(-2)], -1))
        return torch.cat([part.flatten(-2) for part in turned], -1)

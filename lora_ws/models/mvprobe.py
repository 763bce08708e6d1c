"""MVProbe (arXiv 2605.23410): updates and their Gram matrices seen through learned probes."""

from collections.abc import Sequence
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_ws.errors import ConfigError
from lora_ws.functional.views import VIEWS, ViewName
from lora_ws.models.base import Metanetwork, Symmetry
from lora_ws.models.dropout import Dropout
from lora_ws.models.factors import Factors
from lora_ws.models.inputs import InputSpec
from lora_ws.models.module import MetanetModule
from lora_ws.models.pooling import PoolName, make_pool
from lora_ws.models.probes import ModuleProbes, Share


@final
class MVProbe(Metanetwork):
    """Up to four views of each update through learned probes, over all modules at once.

    A view is the update, its transpose, or the Gram matrix of either (`functional.views`). What a
    view makes of the probes is standardised, projected and cut by a ReLU. The authors read one
    module; ``matrices`` of the experiment says which, and ``choose`` has validation say it
    (`training/metanetworks/mvprobe_one_module.yaml`).

    Args:
        views: what to look at; with Gram matrices alone, an update reads as its inverse.
        probes: columns of the probes on either side, per view; the authors have 128 for one module.
        width: of the embedding, from which outputs are linear; the authors have 512.
        share: ``shape`` gives modules of one shape the same probes.
        pool: ``concat`` takes what is seen of all modules through one linear layer, ``transformer``
            lets modules attend to each other.
        standardize: whether to standardise; the size of the update is lost by it.
        sizes: whether the network receives ``log(1 + |BA|²)`` of each module too, in units of the
            training adapters.
        input_dropout: share of what the probes see that training hides.
        dropout: of the Transformer.

    Example:
        >>> from lora_ws.adapters import Layout
        >>> layout = Layout.known("tiny_sd_qv")
        >>> network = MVProbe(views=("left_gram",)).build(InputSpec.of(layout), outputs=10)
        >>> network(torch.zeros(2, layout.size)).shape
        torch.Size([2, 10])
    """

    reads = "factors"

    def __init__(
        self,
        *,
        views: Sequence[ViewName] = tuple(VIEWS),
        probes: int = 8,
        width: int = 128,
        share: Share = "none",
        pool: PoolName = "concat",
        standardize: bool = True,
        sizes: bool = True,
        input_dropout: float = 0.0,
        dropout: float = 0.1,
    ) -> None:
        self.views = views
        self.probes = probes
        self.width = width
        self.share: Share = share
        self.pool: PoolName = pool
        self.standardize = standardize
        self.sizes = sizes
        self.input_dropout = input_dropout
        self.dropout = dropout

    @property
    def symmetries(self) -> frozenset[Symmetry]:  # type: ignore[override]
        """Those of what it looks at."""
        found: set[Symmetry] = {"gl", "sign"}
        if all(VIEWS[view].gram for view in self.views):
            found.add("negation")
        if self.standardize and not self.sizes:
            found.add("scale")
        return frozenset(found)

    def build(self, inputs: InputSpec, outputs: int) -> "MVProbeModule":
        """Make the network.

        Raises:
            ConfigError: an argument cannot be used, or the rows are no factors.
        """
        if self.width < 1 or not (0 <= self.input_dropout < 1 and 0 <= self.dropout < 1):
            raise ConfigError(
                f"{self}: expected width of at least 1, and input_dropout and dropout from 0 to "
                "below 1"
            )
        return MVProbeModule(inputs, outputs, self)


@final
class MVProbeModule(MetanetModule):
    """What `MVProbe` builds."""

    def __init__(self, inputs: InputSpec, outputs: int, spec: MVProbe) -> None:
        super().__init__(inputs)
        self.factors = Factors(inputs.factors)
        self.probes = ModuleProbes(
            self.factors, spec.views, spec.probes, share=spec.share, standardize=spec.standardize
        )
        self.sizes = spec.sizes
        self.dropout = Dropout(spec.input_dropout)
        features = self.probes.features + spec.sizes
        modules = len(inputs.factors.layers)
        self.pool = make_pool(spec.pool, modules, features, spec.width, dropout=spec.dropout)
        self.output = nn.Linear(spec.width, outputs)

    def embed(self, rows: Float[Tensor, "adapters params"]) -> Float[Tensor, "adapters width"]:
        """Return what the pooling makes of all modules."""
        pairs = self.factors(self.normalizer(rows))
        tokens = torch.relu(self.probes(pairs))
        if self.sizes:
            sizes = self.factors.in_order([pair.log_size[..., None] for pair in pairs])
            tokens = torch.cat([tokens, sizes], -1)
        return self.pool(self.dropout(tokens))

    def head(self, embedding: Float[Tensor, "adapters width"]) -> Float[Tensor, "adapters outputs"]:
        """Return outputs."""
        return self.output(embedding)

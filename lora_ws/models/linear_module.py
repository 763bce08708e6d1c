"""What `Linear` builds."""

from typing import final

from jaxtyping import Float
from torch import Tensor, nn

from lora_ws.models.base import Metanetwork
from lora_ws.models.fitted import FittedModule, Identity
from lora_ws.models.inputs import InputSpec


@final
class LinearModule(FittedModule):
    """What `Linear` builds; it can be trained by gradients too."""

    def __init__(
        self, network: Metanetwork, inputs: InputSpec, outputs: int, *, normalize: bool
    ) -> None:
        super().__init__(network, inputs)
        if not normalize:
            self.normalizer = Identity()
        self.layer = nn.Linear(inputs.width, outputs)

    def score(self, rows: Float[Tensor, "rows features"]) -> Float[Tensor, "rows outputs"]:
        """Multiply and add."""
        return self.layer(rows)

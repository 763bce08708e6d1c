"""`InputSpec`: what a network is given."""

from typing import NamedTuple

from lora_ws.adapters.layout import Layout
from lora_ws.errors import ConfigError


class InputSpec(NamedTuple):
    """What a network is given: rows of so many numbers, and what they mean.

    Attributes:
        width: numbers per row.
        layout: which columns are which factor, where the network reads factors; else None.

    Example:
        >>> InputSpec(896).layout is None
        True
    """

    width: int
    layout: Layout | None = None

    @classmethod
    def of(cls, layout: Layout) -> "InputSpec":
        """The input of a network that reads the factors of a layout.

        Example:
            >>> InputSpec.of(Layout.known("tiny_sd_qv")).width
            7072
        """
        return cls(layout.size, layout)

    @property
    def factors(self) -> Layout:
        """The layout.

        Raises:
            ConfigError: the rows are features, whose columns are no factors.
        """
        if self.layout is None:
            raise ConfigError(
                "InputSpec: expected a layout for a network that reads factors, got features; "
                "use InputSpec.of(layout)"
            )
        return self.layout

"""The factor of an update: where files hide it, and which of its places counts."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from lora_ws.adapters.settings import Configs, Settings, read_settings

# Where the scale of a file is said that says none.
UNSAID = "none given, so 1"


class Scale(NamedTuple):
    """The factor, and where the file states it."""

    value: float
    source: str


@dataclass(frozen=True)
class ScaleRules:
    """What a file says of scales beside its alpha tensors.

    Attributes:
        configs: component -> settings of PEFT; "" is for all.
        source: where they stand.
    """

    configs: Mapping[str, Settings] = field(default_factory=dict)
    source: str = ""

    def of(self, component: str, path: str, rank: int, alpha: float | None) -> Scale:
        """The scale of a module: its alpha tensor, else the configuration, else 1.

        Args:
            component: of the module.
            path: of the module.
            rank: of its matrices; 0 where they are whole.
            alpha: the number stored beside it; 0 means the rank, as sd-scripts reads it.

        Example:
            >>> ScaleRules().of("unet", "x", rank=4, alpha=2.0)
            Scale(value=0.5, source='alpha tensor')
        """
        if alpha is not None and rank:
            # LyCORIS with rs_lora stores an alpha that makes this right too.
            return Scale(alpha / rank or 1.0, "alpha tensor")
        if rank and not self.configs:
            return Scale(1.0, UNSAID)
        settings = self.configs.get(component) or self.configs.get("", Settings())
        divisor, alpha = settings.divisor(path, rank), settings.alpha_of(path)
        if not divisor:
            return Scale(1.0, "full matrices have none")
        if alpha is None:
            return Scale(1.0, UNSAID)
        return Scale(alpha / divisor, self.source)


def scale_rules(configs: Configs, file: str, paths: Iterable[str] = ()) -> ScaleRules:
    """Gather what PEFT's settings say of scales.

    Args:
        configs: as they were written down.
        file: what errors call it.
        paths: modules that will be asked for.

    Raises:
        AdapterError: see `read_settings`.
    """
    characters, origin = sum(map(len, paths)), f"{file}: {configs.place}"
    checked = {n: read_settings(one, characters, origin) for n, one in configs.found.items()}
    return ScaleRules(checked, configs.place)

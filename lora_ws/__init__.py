"""Read what a LoRA adapter learned from its weights alone.

Names are loaded on first use, so that importing the package costs next to nothing.
"""

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_ws.adapters import Adapter, LayerSpec, Layout, read_adapter
    from lora_ws.bundle import Bundle
    from lora_ws.collection import (
        AdapterSet,
        DatasetCard,
        adapters_from,
        import_collection,
        load,
    )
    from lora_ws.errors import LoraWsError
    from lora_ws.featurizers import (
        DeltaPCA,
        Featurizer,
        FlatVec,
        FlatVecPCA,
        StatsFlatVec,
        StatsLayer,
        StatsLayerDense,
        UpdateKernel,
    )
    from lora_ws.learn.run import run, run_many, run_one
    from lora_ws.learn.spec import ExperimentSpec
    from lora_ws.report.records import RunRecord

__version__ = version("lora_ws")

_HOMES = {
    "adapters": ("Adapter", "LayerSpec", "Layout", "read_adapter"),
    "collection": ("AdapterSet", "DatasetCard", "adapters_from", "import_collection", "load"),
    "errors": ("LoraWsError",),
    "featurizers": (
        "DeltaPCA",
        "Featurizer",
        "FlatVec",
        "FlatVecPCA",
        "StatsFlatVec",
        "StatsLayer",
        "StatsLayerDense",
        "UpdateKernel",
    ),
    "bundle": ("Bundle",),
    "learn.run": ("run", "run_many", "run_one"),
    "learn.spec": ("ExperimentSpec",),
    "report.records": ("RunRecord",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
__all__ = ["__version__", *_HOME_OF]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module `lora_ws` has no attribute `{name}`")
    return getattr(importlib.import_module(f"lora_ws.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__

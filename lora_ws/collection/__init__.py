"""Many adapters: a matrix, a layout and a table; how they are stored, imported, found, split."""

from lora_ws.collection.adapter_set import AdapterSet
from lora_ws.collection.card import DatasetCard, SplitRule
from lora_ws.collection.ingest import import_collection
from lora_ws.collection.load import load
from lora_ws.collection.splits import Split, make_split
from lora_ws.collection.tables import adapters_from

__all__ = [
    "AdapterSet",
    "DatasetCard",
    "Split",
    "SplitRule",
    "adapters_from",
    "import_collection",
    "load",
    "make_split",
]

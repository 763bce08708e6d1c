"""The trained artefact: a network as tensors and JSON, how far to believe it, and what it saw.

Reading one needs nothing that trains.
"""

from lora_ws.bundle.bundle import Bundle

__all__ = ["Bundle"]

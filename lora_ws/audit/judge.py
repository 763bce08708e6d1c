"""Old names of `lora_ws.audit.classify`, for one release."""

from lora_ws.errors import old_names

__getattr__ = old_names(
    __name__,
    {
        "judge": "lora_ws.audit.classify:classify_files",
        "Judged": "lora_ws.audit.classify:FileResult",
        "Finding": "lora_ws.audit.classify:Finding",
    },
)

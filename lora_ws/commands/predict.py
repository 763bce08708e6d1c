"""`lora-ws predict`: name the class of adapter files."""

import json
import sys

from rich.console import Console
from rich.table import Table

from lora_ws.adapters import read_adapter
from lora_ws.errors import ConfigError, LoraWsError
from lora_ws.learn.bundle import Bundle


def predict(
    files: list[str],
    /,
    *,
    model: str,
    top: int = 3,
    revision: str | None = None,
    as_json: bool = False,
    allow_classes: tuple[str, ...] = (),
) -> int:
    """Name the likeliest classes of adapter files; probabilities are not calibrated.

    A file that cannot be judged is named with the reason, and the exit code is 1.

    Args:
        files: .safetensors files or PEFT folders
        model: folder of a bundle, or its Hub repository.
        top: how many classes to show.
        revision: Hub revision of the bundle.
        allow_classes: dotted paths of representations outside this library that it may name.
        as_json: print one JSON line a file instead of a table.
    """
    if top < 1:
        raise ConfigError(f"--top: expected at least 1, got {top}")
    bundle = Bundle.from_pretrained(model, revision=revision, allow_classes=allow_classes)
    table = Table("file", "class", "probability", box=None)
    failed = 0
    for file in files:
        try:
            adapter = read_adapter(file)
            classes = bundle.predict(adapter)
        except LoraWsError as error:
            failed += 1
            text = str(error) if str(file) in str(error) else f"{file}: {error}"
            print(f"lora-ws: {text}", file=sys.stderr)  # noqa: T201
            continue
        if adapter.beyond_layout:
            said = f"{len(adapter.beyond_layout)} modules or tensors beyond it were not judged"
            print(f"lora-ws: {file}: {said}", file=sys.stderr)  # noqa: T201
        if as_json:
            print(json.dumps({"file": file, "classes": classes}))  # noqa: T201
        for rank, (name, value) in enumerate(list(classes.items())[:top]):
            table.add_row(file if rank == 0 else "", name, f"{value:.3f}")
    if not as_json and failed < len(files):
        Console().print(table)
    return 1 if failed else 0

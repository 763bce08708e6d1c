"""`lora-ws prompt` and `search`: words of the prompt behind adapter files, and files by words."""

import json
import sys

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from lora_ws.adapters import AdapterRef
from lora_ws.audit.prompt import TEMPLATES, PromptReader
from lora_ws.audit.prompt_search import Hit, library_files, read_queries, search_text
from lora_ws.audit.text_search import TextHit, search_bundle
from lora_ws.bundle import Bundle
from lora_ws.errors import ConfigError, LoraWsError

NONE = "(none of these)"


def prompt(
    files: list[str],
    /,
    *,
    words: list[str],
    base: str = "tiny-sd",
    templates: list[str] | None = None,
    top: int = 3,
    device: str = "cpu",
    as_json: bool = False,
) -> int:
    """Predict which words the training prompt of adapters contained, without any training.

    A file that cannot be read is listed with its reason, and the exit code is 1.

    Args:
        files: .safetensors files, PEFT folders, or hf://owner/name/file.safetensors on the Hub
        words: candidate words; a quoted candidate may have several words.
        base: base model: digit-sd, tiny-sd, a pipeline's folder, or its name on the Hub.
        templates: templates of training prompts, with {} for the words; default: five common ones.
        top: number of words to show.
        device: torch device of the base model.
        as_json: print one JSON line per file instead of a table.
    """
    if top < 1:
        raise ConfigError(f"--top: expected at least 1, got {top}")
    reader = PromptReader(base, tuple(templates or TEMPLATES), device=device)
    table = Table(
        Column("file", overflow="fold"), "template", "word", "probability", "nats", box=None
    )
    failed = 0
    for file in files:
        try:
            (found,) = reader.read([read_queries(reader, AdapterRef.parse(file))], words)
        except ConfigError:
            raise
        except LoraWsError as error:
            failed += 1
            print(f"lora-ws: {error}", file=sys.stderr)  # noqa: T201
            continue
        if found.fit < 0:
            why = f"no frame explains it better than noise; is {base} its base?"
            print(f"lora-ws: {file}: {why}", file=sys.stderr)  # noqa: T201
        if as_json:
            print(json.dumps({"file": file, **found._asdict()}))  # noqa: T201
        shown = [*list(found.probabilities.items())[:top], (NONE, found.none)]
        for rank, (word, share) in enumerate(sorted(shown, key=lambda pair: -pair[1])):
            first = (escape(file), escape(found.template)) if rank == 0 else ("", "")
            nats = f"{found.nats[word]:+.1f}" if word in found.nats else ""
            table.add_row(*first, escape(word), f"{share:.3f}", nats)
    if not as_json and failed < len(files):
        Console(highlight=False, soft_wrap=True).print(table)
    return 1 if failed else 0


def search(
    text: str,
    /,
    *,
    index: str,
    model: str | None = None,
    base: str = "tiny-sd",
    templates: list[str] | None = None,
    top: int = 10,
    device: str = "cpu",
    as_json: bool = False,
) -> int:
    """Find the adapters that a text describes: by their prompts, or with a zero-shot bundle.

    Without --model nothing is trained: adapters are ranked by the probability that their training
    prompt contained the text.

    Args:
        text: words, or a phrase such as "a photo of a dog".
        index: adapters to search: a folder, a .txt list, a name on the Hub, or the folder of an
            index
        model: a bundle trained by --task zero_shot, or its Hub repository; adapters are then
            ranked by the probability of the text among its class names.
        base: base model: digit-sd, tiny-sd, a pipeline's folder, or its name on the Hub.
        templates: templates of training prompts, with {} for the words; default: five common ones.
        top: number of adapters to show.
        device: torch device of the base model.
        as_json: print one JSON object per line instead of a table.
    """
    if top < 1:
        raise ConfigError(f"--top: expected at least 1, got {top}")
    if model and templates:
        raise ConfigError(
            "--templates: expected none with --model, which has its own; leave it out"
        )
    failed = 0

    def skipped(_: str, error: LoraWsError) -> None:
        nonlocal failed
        failed += 1
        print(f"lora-ws: {error}", file=sys.stderr)  # noqa: T201

    hits: list[Hit] | list[TextHit]
    if model:
        bundle = Bundle.from_pretrained(model)
        hits = search_bundle(bundle, library_files(index), text, skipped, device)
    else:
        reader = PromptReader(base, tuple(templates or TEMPLATES), device=device)
        hits = search_text(reader, library_files(index), text, skipped)
    why = "abstains" if model else "template"
    table = Table(Column("adapter", overflow="fold"), "probability", why, box=None)
    for hit in hits[:top]:
        if as_json:
            print(json.dumps(hit._asdict()))  # noqa: T201
        name, probability, note = hit
        table.add_row(escape(name), f"{probability:.3f}", escape(note))
    if not as_json and hits:
        Console(highlight=False, soft_wrap=True).print(table)
    return 1 if failed else 0

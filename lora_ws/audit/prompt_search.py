"""Adapters found by a text: which files were trained with such words in the prompt."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from lora_ws.adapters import Adapter, AdapterRef, find_adapters, read_adapter
from lora_ws.audit import index_store
from lora_ws.audit.prompt import PromptReader, subject
from lora_ws.audit.similar import Index
from lora_ws.errors import ConfigError, LoraWsError

# Files whose queries are in memory at once.
BATCH = 64
OnError = Callable[[str, LoraWsError], None]


class Hit(NamedTuple):
    """An adapter file, and how probable it is that its prompt held the words."""

    file: str
    probability: float
    template: str


def library_files(where: str) -> Sequence[AdapterRef]:
    """The files under a name as `find_adapters` takes it, or those that an index names.

    Raises:
        ConfigError: there is none.
    """
    if (Path(where) / index_store.HEAD).is_file():
        return [AdapterRef.parse(name) for name in Index.open(where).rows["name"].to_pylist()]
    found = find_adapters(where)
    if not found:
        raise ConfigError(f"{where}: expected adapter files, found none")
    return found


def search_text(
    reader: PromptReader, refs: Sequence[AdapterRef], text: str, on_error: OnError
) -> list[Hit]:
    """Rank files by the probability that their prompt held the words of a text.

    Args:
        reader: of the files' base.
        refs: the files.
        text: the words; a frame such as "a photo of a" is taken off.
        on_error: called for files that cannot be judged.

    Returns:
        The most probable first.
    """
    words, hits = subject(text), []
    adapters = _readable(reader, refs, on_error)
    while batch := list(islice(adapters, BATCH)):
        readings = reader.read([adapter for _, adapter in batch], [words])
        for (name, _), found in zip(batch, readings, strict=True):
            hits.append(Hit(name, found.probabilities[words], found.template))
    return sorted(hits, key=lambda hit: -hit.probability)


def read_queries(reader: PromptReader, ref: AdapterRef) -> Adapter:
    """Read from a file what a prompt reader needs.

    Raises:
        LoraWsError: it cannot be read, or judged with the reader's base.
    """
    from lora_ws.diffusion.cross_attention import QUERY

    adapter = read_adapter(ref, only=[f"*{QUERY}"])
    reader.check([adapter])
    return adapter


def _readable(
    reader: PromptReader, refs: Sequence[AdapterRef], on_error: OnError
) -> Iterator[tuple[str, Adapter]]:
    for ref in refs:
        try:
            yield ref.name, read_queries(reader, ref)
        except LoraWsError as error:
            on_error(ref.name, error)

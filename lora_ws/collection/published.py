"""The rows of a published collection, wherever and however its repository holds them."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from lora_ws.collection.archives import unpack_members
from lora_ws.collection.card import DatasetCard, SideTable
from lora_ws.collection.facts import RowFacts, read_facts
from lora_ws.collection.hub import fetch
from lora_ws.collection.ingest import find_source
from lora_ws.collection.remote_source import RemoteSource, remote_files
from lora_ws.collection.source import ImportSource
from lora_ws.errors import DataError


@contextmanager
def published_rows(
    card: DatasetCard, revision: str, work: Path
) -> Iterator[tuple[ImportSource, str]]:
    """Fetch what the rows of a collection are made from.

    Args:
        card: of the collection.
        revision: branch, tag or commit.
        work: folder for what is unpacked; removed in the end.

    Yields:
        The source of its rows, and the commit that they are of.

    Raises:
        DataError: the card says that it must not be opened, or a table or archive is damaged.
        NotAvailableError: the Hub cannot be reached, or does not hold it.
    """
    if card.unsafe:
        raise DataError(f"`{card.name}` was not fetched: {card.unsafe}")
    if card.hub_type == "model" and card.modules:
        files = remote_files(card, revision)
        facts = read_facts(card, lambda rule: _table(card, rule, files[0].revision))
        yield RemoteSource(card, files, facts), files[0].revision
        return
    snapshot = fetch(replace(card, files=(card.archive,)) if card.archive else card, revision)
    facts = facts_of(card, snapshot.commit)
    try:
        if card.archive:
            held = [f for one in snapshot.files for f in unpack_members(one, card.files, work)]
        else:
            held = [f for f in snapshot.files if f.suffix in (".safetensors", ".parquet")]
        yield rows_of(held, card, facts), snapshot.commit
    finally:
        shutil.rmtree(work, ignore_errors=True)


def facts_of(card: DatasetCard, commit: str) -> RowFacts | None:
    """What a card says of its rows besides the weights; None where it says nothing."""
    if not card.path_columns and not card.side_tables:
        return None
    return read_facts(card, lambda rule: _table(card, rule, commit))


def rows_of(files: Sequence[Path], card: DatasetCard, facts: RowFacts | None) -> ImportSource:
    """The importer of local files, with what the card says of them."""
    source = find_source(files, card)
    return replace(source, facts=facts) if facts else source


def _table(card: DatasetCard, rule: SideTable, commit: str) -> list[Path]:
    other = replace(
        card,
        hub_id=rule.hub_id or card.hub_id,
        hub_type="dataset" if rule.hub_id else card.hub_type,
        files=rule.files,
    )
    return fetch(other, "main" if rule.hub_id else commit).files

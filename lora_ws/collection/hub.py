"""Fetch the files of a collection from the Hugging Face Hub, pinned to one commit."""

import hashlib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from lora_ws.collection.card import DatasetCard
from lora_ws.collection.parquet_source import missing_shards
from lora_ws.errors import NotAvailableError
from lora_ws.hub import client, insist, is_offline, no_answer, remember


class Snapshot(NamedTuple):
    """Local copies of a repository's files at one commit."""

    files: list[Path]
    commit: str


def fetch(card: DatasetCard, revision: str) -> Snapshot:
    """Download (or find in the Hub's cache) the files of a collection.

    Honours ``HF_ENDPOINT``, ``HF_HUB_OFFLINE``, ``HF_HOME`` and the Hub's token.

    Raises:
        NotAvailableError: the Hub cannot be reached and the files are not cached, or the
            repository, revision or files do not exist. One sentence, with what to do.
    """
    if is_offline():
        return _cached(card, revision, "HF_HUB_OFFLINE is set")
    try:
        snapshot = _download(card, revision)
    except Exception as error:
        return _cached(card, revision, no_answer(error, card.hub_id, revision))
    root = next((p for p in snapshot.files[0].parents if p.name == snapshot.commit), None)
    if root is not None:
        remember(root, revision)
    return snapshot


def _download(card: DatasetCard, revision: str) -> Snapshot:
    api = client()
    kind = card.hub_type
    ask = api.model_info if kind == "model" else api.dataset_info
    info = insist(lambda: ask(card.hub_id, revision=revision, files_metadata=True))
    commit = info.sha or revision
    wanted = {s.rfilename: s for s in info.siblings or [] if _wanted(s.rfilename, card)}
    if not wanted:
        raise NotAvailableError(
            f"{card.hub_id} at {commit[:12]} holds no file that matches {', '.join(card.files)}"
        )
    files = []
    for name in sorted(wanted):
        file = api.hf_hub_download(card.hub_id, name, repo_type=kind, revision=commit)
        files.append(Path(file))
        _verify(files[-1], wanted[name])
    return Snapshot(files, commit)


def _verify(file: Path, listed: Any) -> None:
    """Compare a file with the hash that the Hub lists; the Hub client compares sizes only."""
    size = file.stat().st_size
    if listed.lfs:
        digest, expected = hashlib.sha256(), listed.lfs.sha256
    else:
        digest, expected = hashlib.sha1(b"blob %d\0" % size), listed.blob_id
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, lambda: digest).hexdigest()
    if expected and found != expected:
        # Out of the cache, so that the next try fetches it anew.
        file.resolve().unlink()
        file.unlink(missing_ok=True)
        raise NotAvailableError(
            f"{listed.rfilename} came damaged from the Hub (its hash is {found[:12]}…, the Hub "
            f"lists {expected[:12]}…) and was removed: try again"
        )


def _cached(card: DatasetCard, revision: str, why: str) -> Snapshot:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    advice = (
        f"connect and run `lora-ws data import {card.name}`, or give a local copy of its files: "
        f"`lora-ws data import FOLDER --card {card.name}`"
    )
    try:
        folder = snapshot_download(
            card.hub_id, repo_type=card.hub_type, revision=revision, local_files_only=True
        )
    except (LocalEntryNotFoundError, OSError) as error:
        raise NotAvailableError(
            f"`{card.name}` is not on this machine and {why}: {advice}"
        ) from error
    root = Path(folder)
    names = sorted(f.relative_to(root).as_posix() for f in root.rglob("*") if f.is_file())
    files = [root / name for name in names if _wanted(name, card)]
    if not files or missing_shards(files):
        raise NotAvailableError(
            f"only a part of `{card.name}` is in the Hub's cache and {why}: {advice}"
        )
    return Snapshot(files, root.name)


def _wanted(name: str, card: DatasetCard) -> bool:
    return any(fnmatch(name, pattern) for pattern in card.files)

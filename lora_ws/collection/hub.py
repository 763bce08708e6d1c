"""Fetch the parquet files of a collection from the Hugging Face Hub, pinned to one commit."""

import os
import re
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from lora_ws.collection.card import DatasetCard
from lora_ws.errors import NotAvailableError


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
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return _cached(card, revision, "HF_HUB_OFFLINE is set")
    try:
        return _download(card, revision)
    except NotAvailableError:
        raise
    except Exception as error:
        if reason := _refused(card, revision, error):
            raise NotAvailableError(reason) from error
        if not _unreachable(error):
            raise
        return _cached(card, revision, f"the Hub cannot be reached ({type(error).__name__})")


def _download(card: DatasetCard, revision: str) -> Snapshot:
    from huggingface_hub import HfApi

    # Given explicitly, because the library reads the variable only once, when it is imported.
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    info = api.dataset_info(card.hub_id, revision=revision)
    commit = info.sha or revision
    names = [s.rfilename for s in info.siblings or [] if _wanted(s.rfilename, card)]
    if not names:
        raise NotAvailableError(
            f"{card.hub_id} at {commit[:12]} holds no file that matches {', '.join(card.files)}"
        )
    files = [
        api.hf_hub_download(card.hub_id, name, repo_type="dataset", revision=commit)
        for name in sorted(names)
    ]
    return Snapshot([Path(file) for file in files], commit)


def _cached(card: DatasetCard, revision: str, why: str) -> Snapshot:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    advice = (
        f"connect and run `lora-ws data import {card.name}`, or give a local copy of its files: "
        f"`lora-ws data import FOLDER --card {card.name}`"
    )
    try:
        folder = snapshot_download(
            card.hub_id, repo_type="dataset", revision=revision, local_files_only=True
        )
    except (LocalEntryNotFoundError, OSError) as error:
        raise NotAvailableError(
            f"`{card.name}` is not on this machine and {why}: {advice}"
        ) from error
    root = Path(folder)
    files = sorted(f for f in root.rglob("*") if _wanted(f.relative_to(root).as_posix(), card))
    if not files or _incomplete(files):
        raise NotAvailableError(
            f"only a part of `{card.name}` is in the Hub's cache and {why}: {advice}"
        )
    return Snapshot(files, root.name)


def _wanted(name: str, card: DatasetCard) -> bool:
    return any(fnmatch(name, pattern) for pattern in card.files)


def _incomplete(files: list[Path]) -> bool:
    """Whether shards named ``…-00001-of-00005…`` are missing."""
    totals: dict[str, tuple[int, int]] = {}
    for file in files:
        if match := re.match(r"(.*)-\d+-of-(\d+)", file.name):
            found, total = totals.get(match[1], (0, int(match[2])))
            totals[match[1]] = (found + 1, total)
    return any(found < total for found, total in totals.values())


def _refused(card: DatasetCard, revision: str, error: Exception) -> str:
    """What the Hub's definite no means, or an empty text where it gave none."""
    reasons = {
        "GatedRepoError": "is gated: accept its terms on its page and log in: `hf auth login`",
        "RepositoryNotFoundError": "does not exist, or is private: check the card's hub_id, "
        "or log in: `hf auth login`",
        "RevisionNotFoundError": f"has no revision `{revision}`: check --revision or the card",
        "EntryNotFoundError": "lists a file that it does not hold: try again later",
        "HFValidationError": "is not a valid repository id: check the card's hub_id",
    }
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return next((f"{card.hub_id} {reasons[k]}" for k in reasons if k in kinds), "")


def _unreachable(error: Exception) -> bool:
    # The Hub client changed its HTTP library between versions; the names of the base stayed.
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return isinstance(error, OSError) or bool(kinds & {"TransportError", "HfHubHTTPError"})

"""Bundles on the Hugging Face Hub."""

import re
from pathlib import Path

from lora_ws.errors import NotAvailableError
from lora_ws.hub import client, insist, is_offline, no_answer, remember

FILES = ("bundle.json", "model.safetensors", "README.md")


def fetch_bundle(repo_id: str, revision: str | None) -> tuple[Path, str]:
    """Download a bundle's files at one commit.

    Raises:
        NotAvailableError: the repository or revision does not exist, or cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise NotAvailableError(
            f"`{repo_id}`: no such bundle folder, and not a Hub repository (owner/name)"
        )
    try:
        if is_offline():
            raise NotAvailableError("HF_HUB_OFFLINE is set")
        api = client()
        commit = insist(lambda: api.model_info(repo_id, revision=revision)).sha or str(revision)
        folder = api.snapshot_download(repo_id, revision=commit, allow_patterns=list(FILES))
        remember(Path(folder), revision or "main")
    except Exception as error:
        why = str(error) if is_offline() else no_answer(error, repo_id, revision)
        try:
            folder = snapshot_download(repo_id, revision=revision, local_files_only=True)
        except (LocalEntryNotFoundError, OSError):
            raise NotAvailableError(
                f"`{repo_id}` is neither a bundle's folder nor in the Hub's cache, and {why}: "
                "connect, or give the folder of a bundle"
            ) from error
    return Path(folder), Path(folder).name

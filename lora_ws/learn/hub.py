"""Bundles on the Hugging Face Hub."""

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from lora_ws.errors import NotAvailableError

if TYPE_CHECKING:
    from lora_ws.learn.bundle import Bundle

FILES = ("bundle.json", "model.safetensors", "README.md")


def fetch_bundle(repo_id: str, revision: str | None) -> tuple[Path, str]:
    """Download a bundle's files at one commit.

    Raises:
        NotAvailableError: the repository or revision does not exist, or cannot be reached.
    """
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import HFValidationError

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    try:
        if constants.is_offline_mode():
            folder = snapshot_download(repo_id, revision=revision, local_files_only=True)
            return Path(folder), Path(folder).name
        commit = api.model_info(repo_id, revision=revision).sha or str(revision)
        folder = api.snapshot_download(repo_id, revision=commit, allow_patterns=list(FILES))
    except (OSError, HFValidationError) as error:
        raise NotAvailableError(
            f"`{repo_id}` is no folder here and no bundle that the Hub gives out at revision "
            f"`{revision or 'main'}` ({type(error).__name__}); check the name, the revision and "
            "the connection"
        ) from error
    return Path(folder), commit


def push_bundle(bundle: "Bundle", repo_id: str, private: bool) -> str:
    """Upload a bundle in one commit, and return that commit."""
    from huggingface_hub import HfApi

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    with tempfile.TemporaryDirectory() as folder:
        bundle.save(folder)
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message="Upload lora_ws bundle"
        )
    return str(commit.oid)

"""Bundles on the Hugging Face Hub."""

import re
from importlib.metadata import version
from pathlib import Path

from lora_ws.errors import NotAvailableError
from lora_ws.hub import HF, HubPath, client, insist, is_offline, no_answer, remember

FILES = ("bundle.json", "model.safetensors", "README.md")
# Bundles that come with the library, by the base whose adapters they read.
SHIPPED = Path(__file__).parent.parent / "_assets" / "readers"


def fetch_bundle(repo_id: str, revision: str | None) -> tuple[Path, str]:
    """Download a bundle's files at one commit, or find the one that comes with the library.

    Args:
        repo_id: ``owner/name``, ``hf://owner/name@revision`` or a folder of it, or the name of a
            bundle that is shipped: ``tiny-sd``.
        revision: of the repository.

    Returns:
        The folder, and the commit; of a shipped one the library's version.

    Raises:
        NotAvailableError: the repository or revision does not exist, cannot be reached, or holds no
            bundle.
    """
    shipped = {folder.name: folder for folder in SHIPPED.iterdir()}
    if repo_id in shipped:
        return shipped[repo_id], version("lora_ws")
    place = HubPath(repo_id, revision=revision)
    if repo_id.startswith(HF):
        place = HubPath.parse(repo_id)
        repo_id, revision = place.repo_id, place.revision or revision
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise NotAvailableError(
            f"`{repo_id}`: no such bundle folder, and neither a Hub repository (owner/name) nor "
            f"shipped ({', '.join(sorted(shipped))})"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    wanted = [f"{place.path}/{name}".lstrip("/") for name in FILES]
    try:
        if is_offline():
            raise NotAvailableError("HF_HUB_OFFLINE is set")
        api = client()
        commit = insist(lambda: api.model_info(repo_id, revision=revision)).sha or str(revision)
        folder = api.snapshot_download(repo_id, revision=commit, allow_patterns=wanted)
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
    found = Path(folder, place.path)
    if not (found / FILES[0]).is_file():
        raise NotAvailableError(
            f"{repo_id}: no bundle there (expected {FILES[0]} and {FILES[1]}); name the folder "
            f"that holds one, {HF}{repo_id}/FOLDER, or another repository"
        )
    return found, Path(folder).name

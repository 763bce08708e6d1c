"""What is common to everything that talks to the Hugging Face Hub: the client, retries, reasons."""

import errno
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar
from urllib.parse import unquote

from lora_ws.errors import NotAvailableError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

T = TypeVar("T")
HF = "hf://"
LOCAL_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)
BUSY = (429, 500, 502, 503, 504)
PAUSES = (1, 4)
REASONS = {
    "GatedRepoError": "is gated: accept its terms on its page and log in: `hf auth login`",
    "RepositoryNotFoundError": "does not exist, or is private: check its name, or log in: "
    "`hf auth login`",
    "RevisionNotFoundError": "has no revision `{revision}`: check it",
    "EntryNotFoundError": "lists a file that it does not hold: try again later",
    "HFValidationError": "is not a valid repository id: expected `owner/name`",
}


class HubPath(NamedTuple):
    """What an address of a repository names: all of it, a folder, or a file.

    Attributes:
        repo_id: ``owner/name``.
        path: inside it; empty for all of it.
        revision: branch, tag or commit; None for the default branch.
    """

    repo_id: str
    path: str = ""
    revision: str | None = None

    @classmethod
    def parse(cls, text: str, kind: Literal["models", "datasets"] = "models") -> "HubPath":
        """Read the addresses of fsspec, ``hf://owner/name@revision/path``.

        Args:
            text: the address; that of a data set starts with ``hf://datasets/``.
            kind: of repository.

        Raises:
            NotAvailableError: it names no repository of this kind.

        Example:
            >>> HubPath.parse("hf://owner/name@refs%2Fpr%2F1/folder/a.safetensors")
            HubPath(repo_id='owner/name', path='folder/a.safetensors', revision='refs/pr/1')
            >>> HubPath.parse("hf://datasets/owner/name", "datasets").repo_id
            'owner/name'
        """
        prefix = "" if kind == "models" else f"{kind}/"
        address = text.removeprefix(HF).removeprefix(f"{kind}/")
        match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([^/]+))?(?:/(.*))?", address)
        if not match or address.split("/")[0] in ("models", "datasets", "spaces", "buckets"):
            raise NotAvailableError(
                f"{text}: expected {HF}{prefix}owner/name of a {kind[:-1]}, or a path inside it"
            )
        return cls(match[1], (match[3] or "").strip("/"), unquote(match[2] or "") or None)


def client() -> "HfApi":
    """The Hub's client, for the endpoint that ``HF_ENDPOINT`` names now."""
    from huggingface_hub import HfApi

    # Given explicitly, because the library reads the variable only once, when it is imported.
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT"))


def is_offline() -> bool:
    """Whether ``HF_HUB_OFFLINE`` forbids the network."""
    from huggingface_hub import constants

    return constants.is_offline_mode()


def is_busy(error: Exception) -> bool:
    """Whether a server turned a request down that it may answer later."""
    from huggingface_hub.errors import HfHubHTTPError

    return isinstance(error, HfHubHTTPError) and error.response.status_code in BUSY


def is_passing(error: Exception) -> bool:
    """Whether it is worth asking again: a busy server, or a connection that broke."""
    return is_busy(error) or "TransportError" in {kind.__name__ for kind in type(error).__mro__}


def insist(call: Callable[[], T], passing: Callable[[Exception], bool] = is_busy) -> T:
    """Repeat a request as long as its failure may pass; the Hub client does so for files only."""
    for pause in PAUSES:
        try:
            return call()
        except Exception as error:
            if not passing(error):
                raise
            time.sleep(pause)
    return call()


def remember(snapshot: Path, revision: str) -> None:
    """Note in the Hub's cache what a revision stood for, as a download by its name would.

    Args:
        snapshot: folder of a commit in the cache.
        revision: the branch or tag that was asked for.
    """
    if revision != snapshot.name:
        ref = snapshot.parent.parent / "refs" / revision
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(snapshot.name, encoding="utf-8")


def no_answer(error: Exception, repo_id: str, revision: str | None) -> str:
    """Why the Hub could not be reached, where that is what the error means.

    Raises:
        NotAvailableError: the Hub's answer was a definite no, or its cache cannot be written.
        Exception: the error itself, where it has nothing to do with the Hub.
    """
    if isinstance(error, NotAvailableError):
        raise error
    # By name: the client changed its HTTP library between versions; the names of the base stayed.
    kinds = {kind.__name__ for kind in type(error).__mro__}
    # The client says "no such local entry" when it got no answer at all.
    refused = [] if "LocalEntryNotFoundError" in kinds else [k for k in REASONS if k in kinds]
    if refused:
        reason = REASONS[refused[0]].format(revision=revision or "main")
        raise NotAvailableError(f"{repo_id} {reason}") from error
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403) or "LocalTokenNotFoundError" in kinds:
        raise NotAvailableError(f"{repo_id} wants a login: `hf auth login`, or HF_TOKEN") from error
    if getattr(error, "errno", None) in LOCAL_TROUBLE:
        raise NotAvailableError(f"the Hub's cache cannot be written: {error}") from error
    if not isinstance(error, OSError) and not kinds & {"TransportError", "HfHubHTTPError"}:
        raise error
    return f"the Hub cannot be reached ({type(error).__name__})"


def push_folder(
    folder: Path,
    repo_id: str,
    message: str,
    *,
    private: bool | None = None,
    repo_type: Literal["model", "dataset"] = "model",
) -> str:
    """Upload a folder in one commit, and return that commit.

    Raises:
        NotAvailableError: the Hub cannot be reached, or wants a login.
    """
    api = client()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True, repo_type=repo_type)
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message=message, repo_type=repo_type
        )
    except Exception as error:
        why = no_answer(error, repo_id, None)
        raise NotAvailableError(f"nothing was uploaded to {repo_id}: {why}") from error
    return str(commit.oid)

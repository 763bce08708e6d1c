"""`load`: a name or a path becomes an `AdapterSet`: bundled, then local store, then Hub."""

import hashlib
import json
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from lora_ws.collection.adapter_set import AdapterSet
from lora_ws.collection.addressed import on_disk
from lora_ws.collection.beside import TABLES
from lora_ws.collection.bundled import ASSETS, packed_hash, unpack
from lora_ws.collection.card import DatasetCard, card_names, find_card
from lora_ws.collection.ingest import OnError, import_collection, import_source
from lora_ws.collection.labels import join_labels
from lora_ws.collection.published import published_rows
from lora_ws.collection.store import MANIFEST, QUARANTINE, partial_path
from lora_ws.config import cache_dir, spec_root
from lora_ws.errors import DataError, NotAvailableError, notice
from lora_ws.journal import locked

# What an import of adapter files looks at.
READ = (".safetensors", ".json", ".info", *TABLES)


def load(
    name_or_path: str | Path,
    *,
    subset: str | None = None,
    revision: str | None = None,
    rank: int | None = None,
) -> AdapterSet:
    """Open an adapter collection.

    Args:
        name_or_path: name of a card in ``datasets/``, ``hf://datasets/owner/name@revision`` on the
            Hub, the folder of a store, or a folder of adapter files: these are imported into the
            cache, projected to what most of them have in common, and again when the folder has
            changed, or this library. Either folder may be at an address of fsspec, such as
            ``s3://bucket/store``, and is copied into the cache then.
        subset: keep one subset of the collection, such as ``shared/class`` of lora-ws-mini.
        revision: Hub branch, tag or commit, instead of the card's.
        rank: bring all updates to this rank, see `AdapterSet.at_rank`; None leaves each at its own.

    Raises:
        NotAvailableError: it is not here and cannot be fetched; the message has the ways out.

    Example:
        >>> adapters = load("lora-ws-mini", subset="shared/class")
        >>> adapters.weights.shape
        (500, 7072)
    """
    path = on_disk(name_or_path)
    if (path / MANIFEST).is_file() or partial_path(path).is_dir():
        adapters = AdapterSet.open(path)
    elif str(name_or_path) not in card_names() and path.exists():
        adapters = _from_folder(path)
    else:
        adapters = _by_name(find_card(str(name_or_path)), revision)
    adapters = adapters if subset is None else adapters.subset(subset)
    return adapters if rank is None else adapters.at_rank(rank)


def store_path(card: DatasetCard, revision: str) -> Path:
    """Where the local store of a collection is, or will be."""
    if card.bundled:
        return cache_dir() / "stores" / card.name / packed_hash(ASSETS / card.name)
    ref = cache_dir() / "stores" / card.name / "refs" / revision.replace("/", "--")
    commit = ref.read_text(encoding="utf-8").strip() if ref.is_file() else revision
    return cache_dir() / "stores" / card.name / commit


def local_store(card: DatasetCard, revision: str | None) -> Path:
    """Where a user's own copy of a collection goes, and from now on is found under its name."""
    folder = cache_dir() / "stores" / card.name
    _point(folder, revision or card.revision, "local")
    return folder / "local"


def _point(folder: Path, revision: str, commit: str) -> None:
    ref = folder / "refs" / revision.replace("/", "--")
    ref.parent.mkdir(parents=True, exist_ok=True)
    ref.write_text(commit, encoding="utf-8")


def import_from_hub(
    card: DatasetCard, revision: str | None = None, on_error: OnError = "raise"
) -> AdapterSet:
    """Fetch a collection from the Hub at a revision and import it into the local store."""
    if card.kind == "images":
        raise DataError(
            f"`{card.name}` holds images, not adapters: read it with "
            f'datasets.load_dataset("{card.hub_id}")'
        )
    if not card.hub_id:
        raise DataError(f"`{card.name}` is not on the Hub, there is nothing to import")
    revision = revision or card.revision
    folder = cache_dir() / "stores" / card.name
    work = folder / f"unpacked-{revision.replace('/', '--')}"
    with published_rows(card, revision, work) as (source, commit):
        if not (folder / commit / MANIFEST).is_file():
            origin = {"hub_id": card.hub_id, "commit": commit}
            import_source(source, folder / commit, card, on_error=on_error, origin=origin)
    _point(folder, revision, commit)
    return AdapterSet.open(folder / commit)


def _from_folder(folder: Path) -> AdapterSet:
    """The store of a folder of adapter files as it is now; what does not fit is reported."""
    if not folder.is_dir() or not any(folder.rglob("*.safetensors")):
        raise NotAvailableError(
            f"{folder} is neither an adapter store nor a folder of adapter files; make a store "
            f"with `lora-ws data import {folder} --out STORE`"
        )
    folder = folder.resolve()
    beside = sorted(file for file in folder.rglob("*") if file.suffix in READ and file.is_file())
    state = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in beside]
    # Another version may read more of a file.
    made_of = json.dumps([str(folder), state, version("lora_ws")])
    key = hashlib.sha256(made_of.encode()).hexdigest()[:16]
    store = cache_dir() / "stores" / "folders" / f"{folder.name}-{key}" / folder.name
    if not (store / MANIFEST).is_file():
        store.parent.mkdir(parents=True, exist_ok=True)
        with locked(store.with_suffix(".import")):
            if not (store / MANIFEST).is_file():
                import_collection(folder, store, project=True, on_error="skip")
    adapters = AdapterSet.open(store)
    if lost := adapters.manifest["quarantined"]:
        first = json.loads((store / QUARANTINE).read_text(encoding="utf-8").splitlines()[0])
        notice(
            f"{folder}: {lost} of {lost + len(adapters)} files are left out, such as "
            f"{first['source']}: {first['reason']}; all stand in {store / QUARANTINE}"
        )
    return adapters


def _by_name(card: DatasetCard, revision: str | None) -> AdapterSet:
    path = store_path(card, revision or card.revision)
    if not (path / MANIFEST).is_file() and not card.bundled:
        import_from_hub(card, revision)
        path = store_path(card, revision or card.revision)
    if card.bundled and revision:
        raise DataError(f"`{card.name}` is bundled and has no revisions, got `{revision}`")
    if not (path / MANIFEST).is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        # Several processes may ask for the same bundled collection for the first time.
        with locked(path.with_suffix(".expand")):
            if not (path / MANIFEST).is_file():
                unpack(ASSETS / card.name, card).save(path)
    # The card of this version counts, not the one of the version that made the store.
    return join_labels(replace(AdapterSet.open(path), card=card), spec_root("datasets"))

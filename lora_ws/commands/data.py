"""`lora-ws data`: list, describe, import and check collections."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lora_ws.adapters import Layout
from lora_ws.audit.prompt import TEMPLATES, PromptReader
from lora_ws.collection import AdapterSet, DatasetCard, import_collection, load
from lora_ws.collection.addressed import is_away
from lora_ws.collection.card import card_names, find_card
from lora_ws.collection.load import import_from_hub, local_store, store_path
from lora_ws.collection.store import MANIFEST
from lora_ws.config import load_spec
from lora_ws.errors import ConfigError, DataError
from lora_ws.hub import HF


def list_collections() -> None:
    """List the known collections and where each is."""
    table = Table("name", "rows", "where", "what", box=None)
    for name in card_names():
        card = find_card(name)
        local = (store_path(card, card.revision) / MANIFEST).is_file()
        where = "bundled" if card.bundled else "in the cache" if local else "on the Hub"
        table.add_row(name, str(card.rows or "?"), where, card.title)
    Console().print(table)


def info(name: str, /) -> None:
    """Describe a collection: size, layout, classes, split, origin.

    Args:
        name: name of a card, or the folder of a store.
    """
    adapters = load(name)
    counts = _classes(adapters)
    shapes = Counter((x.in_features, x.out_features, x.rank) for x in adapters.layout.layers)
    table = Table(show_header=False, box=None)
    facts = {
        "name": adapters.card.name,
        "what": adapters.card.title,
        "rows": str(len(adapters)),
        "numbers each": f"{adapters.layout.size} in {len(adapters.layout.layers)} layers",
        "layers": ", ".join(f"{n} of {i}->{o} rank {r}" for (i, o, r), n in shapes.items()),
        "layout": adapters.layout.fingerprint,
        "classes": ", ".join(f"{name} {count}" for name, count in sorted(counts.items())),
        "split": _split(adapters),
        "columns": ", ".join(adapters.rows.column_names),
        "quarantined": str(adapters.manifest.get("quarantined", 0)),
        "origin": str(adapters.manifest.get("hub_id", adapters.manifest.get("origin", "files"))),
        "commit": str(adapters.manifest.get("commit", "")),
        "licence": adapters.card.licence,
    }
    if adapters.card.subset:
        subsets = Counter(adapters.column(adapters.card.subset).tolist())
        facts["subsets"] = ", ".join(f"{name} {count}" for name, count in subsets.items())
    for key, value in facts.items():
        if value:
            table.add_row(key, value)
    Console().print(table)


def import_(
    sources: list[str],
    /,
    *,
    out: Path | None = None,
    card: str | None = None,
    layout: str | None = None,
    project: str | None = None,
    min_energy: float = 0.0,
    label: str | None = None,
    revision: str | None = None,
    on_error: Literal["raise", "skip"] = "raise",
) -> None:
    """Import adapters into a store that `lora_ws.load` opens.

    Args:
        sources: a collection's name or hf://datasets/owner/name, fetched from the Hub; or parquet
            files, adapter files, folders, also at addresses such as s3://bucket/folder
        out: folder of the new store; needed for files
        card: description of the collection: name of a card in datasets/, or a YAML file of the same
            form
        layout: name of the required layout; default: that of the card or of the first row
        project: auto projects adapters of other ranks and modules to the most common layout; a name
            projects to that layout; null refuses them
        min_energy: minimal share of an update's squared norm that the projection keeps
        label: column of the class or of lists of labels, or several of 0 and 1 joined by commas;
            default: that of the card, of a table beside the files, else the sub-folder, else that
            of sidecars
        revision: Hub branch, tag or commit instead of the card's
        on_error: raise stops at the first invalid row; skip lists invalid rows in quarantine.jsonl
    """
    if len(sources) == 1 and not (is_away(sources[0]) or Path(sources[0]).exists()):
        if out and not sources[0].startswith(HF) and sources[0] not in card_names():
            raise ConfigError(f"{sources[0]}: no such file or folder")
        if out:
            raise ConfigError("--out: a collection from the Hub goes into the cache; leave it out")
        adapters = import_from_hub(find_card(sources[0]), revision, on_error)
    else:
        if out is None and card is None:
            raise ConfigError("--out: expected a folder for the new store, got none")
        described = _card(card) if card else None
        if described and label:
            described = replace(described, label=label)
        elif label:
            described = DatasetCard(name=Path(str(out)).name, label=label)
        if out is None and described and described.bundled:
            raise ConfigError(f"--card: `{card}` is bundled and stays as it is; give --out")
        if project and layout:
            raise ConfigError("--layout, --project: expected one of them, got both")
        named = layout or (project if project != "auto" else None)
        adapters = import_collection(
            sources,
            out or local_store(_card(str(card)), revision),
            card=described,
            layout=Layout.known(named) if named else None,
            project=project is not None,
            min_energy=min_energy,
            on_error=on_error,
        )
    console = Console()
    console.print(adapters)
    lost = adapters.manifest["quarantined"]
    if lost:
        console.print(f"{lost} entries were not imported: see quarantine.jsonl in the store")


def prompt_leak(
    name: str,
    /,
    *,
    label: str | None = None,
    base: str | None = None,
    templates: list[str] | None = None,
    device: str = "cpu",
    as_json: bool = False,
) -> None:
    """Measure how much the training prompts reveal of the labels, without any training.

    Args:
        name: name of a card, or the folder of a store.
        label: column whose values may occur in prompts; default: the card's label.
        base: base model: digit-sd, tiny-sd, a pipeline's folder, or its name on the Hub;
            default: the card's.
        templates: templates of training prompts, with {} for the class word; default: five common
            ones.
        device: torch device of the base model.
        as_json: print one JSON line per subset instead of a table.
    """
    # Here, as scipy's tests take a second to import.
    from lora_ws.audit.prompt_leak import prompt_leak as measure

    zoo = load(name)
    known = base or zoo.card.base_model
    if not known:
        raise ConfigError("--base: expected the adapters' base model, as the card names none")
    reader = PromptReader(known, tuple(templates or TEMPLATES), device=device)
    table = Table("subset", "adapters", "top-1", "95 %", "top-3", "chance", "p", box=None)
    for leak in measure(zoo, reader, label):
        if as_json:
            print(json.dumps(leak.to_dict()))  # noqa: T201
        shares = (f"{100 * value:.1f}" for value in (leak.low, leak.high))
        table.add_row(
            leak.subset or zoo.card.name,
            str(leak.adapters),
            f"{100 * leak.top1:.1f}",
            " to ".join(shares),
            f"{100 * leak.top3:.1f}",
            f"{100 * leak.chance:.1f}",
            f"{leak.p_value:.2g}",
        )
    if not as_json:
        Console().print(table)


def audit(
    name: str,
    /,
    *,
    subset: str | None = None,
    split: str | None = None,
    label: str | None = None,
    base: str | None = None,
    as_json: bool = False,
) -> None:
    """Look for leaks between training and test rows, and for what predicts labels without weights.

    Args:
        name: name of a card, or the folder of a store.
        subset: subset of the collection; default: the card's main one.
        split: column of parts or a rule by name, as in lora-ws train; default: the card's rule.
        label: column to predict; default: the card's label.
        base: base model of the adapters, a pipeline's folder or its name on the Hub, by which words
            of training prompts are read; default: that of the card where it is bundled.
        as_json: print one JSON line per finding instead of a table.
    """
    # Here, as scipy's tests take a second to import.
    from lora_ws.learn.leaks import find_leaks, find_prompt_words

    zoo = load(name)
    chosen = subset or zoo.card.main_subset
    zoo = zoo.subset(chosen) if chosen else zoo
    zoo = zoo.split_by(split) if split else zoo
    if label:
        zoo = replace(zoo, card=replace(zoo.card, label=label, classes=()))
    table = Table("what", "", "found", "to do", box=None)
    colours = {"leak": "red", "note": "yellow", "clean": "green", "not measured": "dim"}
    for one in [*find_leaks(zoo), find_prompt_words(zoo, base)]:
        if as_json:
            print(json.dumps(one.to_dict()))  # noqa: T201
        verdict = Text(one.verdict, style=colours[one.verdict])
        table.add_row(one.what, verdict, Text(one.found), Text(one.advice))
    if not as_json:
        Console().print(table)


def _classes(adapters: AdapterSet) -> Counter[str]:
    """How many rows each class has, or each of several labels."""
    named = all(name in adapters.rows.column_names for name in adapters.label_columns())
    if adapters.has_classes() or not named:
        return Counter(map(str, adapters.column(adapters.card.label).tolist() if named else []))
    flags, names = adapters.label_lists()
    return Counter(dict(zip(names, flags.sum(axis=0).astype(int).tolist(), strict=True)))


def _split(adapters: AdapterSet) -> str:
    try:
        split = adapters.split()
    except DataError as error:
        return f"none: {error}"
    return f"{len(split.train)} train, {len(split.val)} validation, {len(split.test)} test"


def _card(name: str) -> DatasetCard:
    return load_spec(DatasetCard, name) if name.endswith(".yaml") else find_card(name)

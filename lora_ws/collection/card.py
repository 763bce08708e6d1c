"""Dataset cards: what a collection is, where it is, and how it is split. Data in `datasets/`."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from lora_ws.config import load_spec, nearest, spec_files
from lora_ws.errors import NotAvailableError
from lora_ws.hub import HF, HubPath


@dataclass(frozen=True)
class SplitRule:
    """How rows become train, validation and test parts.

    Attributes:
        fractions: shares of train, validation and test; they sum to 1.
        seed: seed of the split; it belongs to the collection, not to an experiment.
        group: column whose equal values stay in one part, such as the image set of an adapter.
        column: column that holds the part of each row (train, val or test), where the collection
            records it: the rule of a collection with subsets, so that all of them agree.

    Example:
        >>> SplitRule(fractions=(0.8, 0.1, 0.1), group="image_set").seed
        42
    """

    fractions: tuple[float, float, float] = (0.7, 0.1, 0.2)
    seed: int = 42
    group: str | None = None
    column: str | None = None


@dataclass(frozen=True)
class LabelTable:
    """A table that says which labels the values of a column have.

    Attributes:
        column: column of the rows whose values the table lists.
        file: a CSV beside the card: the values in its first column, then a column of 0 and 1 for
            each label.
    """

    column: str
    file: str


@dataclass(frozen=True)
class SideTable:
    """A table of a repository that says more of each row of the weights.

    Attributes:
        files: glob patterns of its CSV, JSON-lines or parquet files.
        key: its columns that name the row together, joined by slashes.
        column: column of the rows with the same values; empty takes the path of their file.
        hub_id: the data set that holds it; empty for the repository of the weights.
        labels: its columns of 1 and 0 (or -1) become one column of this name: lists of those that
            apply. Empty leaves them as they are.
        pattern: regular expression whose groups, joined by slashes, are what counts of a key; empty
            for all of it.

    Example:
        >>> SideTable(files=("labels.csv",), key=("folder",), column="who").labels
        ''
    """

    files: tuple[str, ...]
    key: tuple[str, ...]
    column: str = ""
    hub_id: str = ""
    labels: str = ""
    pattern: str = ""


@dataclass(frozen=True)
class DatasetCard:
    """One adapter collection.

    Attributes:
        name: name that `lora_ws.load` takes.
        title: one line for people.
        kind: what its rows are.
        version: raised when results on it stop being comparable with earlier ones.
        hub_id: repository on the Hugging Face Hub; empty when there is none.
        revision: branch, tag or commit to read; the commit it stood for is recorded at import.
        hub_type: what kind of repository that is. Of a model repository with ``modules`` only these
            are fetched, by byte ranges.
        archive: zip files of the repository that hold the rows, as a glob pattern; empty where none
            does. ``files`` are then patterns of their members.
        files: which files of the repository hold the rows, as glob patterns.
        unsafe: why it is not opened, and what to do; empty for safe formats.
        bundled: whether a copy ships inside the package.
        schema: columns of the rows: one nested list per matrix, or one flat vector.
        weights_column: name of the vector column of the flat schema.
        layout: name of the expected layout; empty to take it from the first row.
        rank: the highest of its rows, which the layout gets; lower ones are padded with zeros, and
            a column ``rank`` says which. 0 for the layout's own.
        modules: modules to read, by path, ``*`` standing for anything; empty for all, where any
            other is an error.
        alpha_from: where the scale of an update is said; a number is the alpha of all files that
            say none.
        path_columns: regular expression for the path of a file; its named groups become columns.
        side_tables: tables that say more of each row.
        base_from: column that names each row's base model, where there are several.
        label: column of the class to predict.
        task: of `lora-ws train` that this column is for.
        classes: its values, in the order of their integer labels.
        label_from: columns of lists of labels that are made on loading, each from a table.
        rows: how many rows it holds, 0 where unknown.
        rows_note: what is known about that number.
        base_model: model the adapters were trained on.
        split: how it is split.
        group_columns: columns whose equal values tie adapters together, by what they share (leaf,
            photos, start): ``--split group:leaf`` keeps them in one part.
        subset: column that names the subsets; empty when there are none.
        subsets: their names; whatever takes one takes the first.
        main_subset: the one that `lora-ws train` takes; empty for the first.
        references: test accuracy of what is no reader of weights, by name and column of the split,
            such as that of a classifier of the photos.
        licence: terms, as far as known.
        citation: what to cite.
        source: where these facts come from.

    Example:
        >>> DatasetCard(name="mine", label="style", classes=("oil", "ink")).split.fractions
        (0.7, 0.1, 0.2)
    """

    name: str
    title: str = ""
    kind: Literal["adapters", "images"] = "adapters"
    version: int = 1
    hub_id: str = ""
    hub_type: Literal["dataset", "model"] = "dataset"
    revision: str = "main"
    archive: str = ""
    unsafe: str = ""
    files: tuple[str, ...] = ("**/*.parquet", "*.parquet")
    bundled: bool = False
    schema: Literal["matrix_columns", "flat_column"] = "matrix_columns"
    weights_column: str = "weights"
    layout: str = ""
    rank: int = 0
    modules: tuple[str, ...] = ()
    alpha_from: str = ""
    path_columns: str = ""
    side_tables: tuple[SideTable, ...] = ()
    base_from: str = ""
    label: str = "category_label"
    task: str = "classification"
    classes: tuple[str, ...] = ()
    label_from: dict[str, LabelTable] = field(default_factory=dict)
    rows: int = 0
    rows_note: str = ""
    base_model: str = ""
    split: SplitRule = field(default_factory=SplitRule)
    group_columns: dict[str, str] = field(default_factory=dict)
    subset: str = ""
    subsets: tuple[str, ...] = ()
    main_subset: str = ""
    references: dict[str, dict[str, float]] = field(default_factory=dict)
    licence: str = ""
    citation: str = ""
    source: str = ""


def stored_card(data: Mapping[str, Any]) -> DatasetCard:
    """The card written into a store; keys of other versions of this library are left out."""
    split = SplitRule(**_known(SplitRule, data.get("split", {})))
    tables = data.get("label_from", {}).items()
    label_from = {name: LabelTable(**_known(LabelTable, table)) for name, table in tables}
    known = _known(DatasetCard, data)
    beside = tuple(SideTable(**_known(SideTable, one)) for one in data.get("side_tables", ()))
    nested = {"split": split, "label_from": label_from, "side_tables": beside}
    return DatasetCard(**{**known, **nested})


def _known(kind: type, data: Mapping[str, Any]) -> dict[str, Any]:
    names = {f.name for f in fields(kind)}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in data.items() if k in names}


def card_names() -> list[str]:
    """Names of all cards in `datasets/`."""
    return list(spec_files("datasets"))


def find_card(name: str) -> DatasetCard:
    """Return the card called ``name``, or that of an address on the Hub.

    Args:
        name: of a card, or ``hf://datasets/owner/name@revision``, whose rows must be as
            `lora-ws zoo publish` writes them where no card is of this repository.

    Raises:
        NotAvailableError: there is none; the nearest name is given.

    Example:
        >>> find_card("hf://datasets/owner/loras@main").hub_id
        'owner/loras'
    """
    if name.startswith(HF):
        return _card_of_address(name)
    files = spec_files("datasets")
    if name not in files:
        raise NotAvailableError(
            f"`{name}` is neither a folder nor a known collection"
            f"{nearest(name, list(files), few=len(files))}"
        )
    return load_spec(DatasetCard, files[name])


def _card_of_address(address: str) -> DatasetCard:
    repo, path, revision = HubPath.parse(address, "datasets")
    if path:
        raise NotAvailableError(f"{address}: expected a whole repository, got the path {path}")
    known = (card for card in map(find_card, card_names()) if card.hub_id == repo)
    card = next(known, DatasetCard(name=repo, hub_id=repo))
    return replace(card, revision=revision or card.revision)

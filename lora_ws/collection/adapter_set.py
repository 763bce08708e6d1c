"""`AdapterSet`: a row-major float32 matrix, a layout that says what its columns are, and a table.

On disk it is a folder, the *store*: ``weights.npy`` (opened as a memory map), ``rows.parquet``,
``layout.json``, ``card.yaml`` and ``manifest.json``.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from lora_ws.adapters.layout import Layout
from lora_ws.adapters.projection import pad_rows, project_rows
from lora_ws.collection.card import DatasetCard, stored_card
from lora_ws.collection.columns import to_arrow, to_dataset, to_frame
from lora_ws.collection.splits import (
    Split,
    group_of,
    is_rule,
    make_split,
    split_by_group,
    split_by_name,
    tied,
)
from lora_ws.collection.store import (
    CARD,
    COUNTED,
    LAYOUT,
    MANIFEST,
    ROWS,
    WEIGHTS,
    StoreWriter,
    partial_path,
    row_hashes,
)
from lora_ws.collection.targets import (
    Reduce,
    columns_of,
    is_one_class,
    read_classes,
    read_column,
    read_lists,
    read_numbers,
)
from lora_ws.config import nearest
from lora_ws.errors import DataError, LayoutError, NotAvailableError
from lora_ws.memory import blocks, check_room

if TYPE_CHECKING:
    from datasets import Dataset
    from pandas import DataFrame


@dataclass(frozen=True, eq=False, repr=False)
class AdapterSet:
    """Adapters as rows of a matrix.

    Attributes:
        weights: float32 ``[adapters, layout.size]``, often a read-only memory map.
        layout: which columns are which matrix.
        rows: labels and metadata, one row per adapter.
        card: what the collection is and how it is split.
        manifest: where the rows came from.

    Example:
        >>> layout = Layout.known("tiny_sd_qv")
        >>> rows = pa.table({"category_label": ["cat", "dog"]})
        >>> adapters = AdapterSet(np.ones((2, layout.size), np.float32), layout, rows)
        >>> adapters.labels()[0].tolist(), adapters.where(category_label="dog").weights.shape
        ([0, 1], (1, 7072))
    """

    weights: np.ndarray
    layout: Layout
    rows: pa.Table
    card: DatasetCard = field(default_factory=lambda: DatasetCard(name="unnamed"))
    manifest: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.weights.ndim != 2 or self.weights.shape[1] != self.layout.size:
            raise LayoutError(
                f"expected weights of shape [adapters, {self.layout.size}] for this layout, "
                f"got {list(self.weights.shape)}"
            )
        if self.rows.num_rows != len(self.weights):
            raise DataError(
                f"expected one table row per adapter, got {self.rows.num_rows} rows "
                f"for {len(self.weights)} adapters"
            )

    def __len__(self) -> int:
        return len(self.weights)

    def __repr__(self) -> str:
        ranks = sorted({layer.rank for layer in self.layout.layers})
        return (
            f"AdapterSet({self.card.name}: {len(self)} adapters, {len(self.layout.layers)} layers, "
            f"rank {'/'.join(map(str, ranks))}, {self.layout.size} numbers each)"
        )

    @property
    def version(self) -> str:
        """Hash of the content, recorded by whatever was trained on it; empty for arrays."""
        return str(self.manifest.get("sha256", ""))

    @property
    def origin(self) -> dict[str, Any]:
        """Where the rows came from: the manifest without what a writer counts and hashes anew."""
        return {key: value for key, value in self.manifest.items() if key not in COUNTED}

    def select(self, index: Sequence[int] | np.ndarray | slice) -> "AdapterSet":
        """Keep the rows at ``index``; a contiguous range stays a view of the memory map.

        Raises:
            ConfigError: others are more than `lora_ws.memory` has room for, as they are copied.
        """
        if isinstance(index, slice):
            index = np.arange(len(self))[index]
        index = np.asarray(index)
        if index.dtype == bool:
            if len(index) != len(self):
                raise DataError(f"expected a mask of {len(self)} rows, got one of {len(index)}")
            index = np.flatnonzero(index)
        if index.size:
            # Negative numbers count from the end; numbers beyond it raise.
            index = np.arange(len(self))[index]
        if index.size and np.array_equal(index, np.arange(index[0], index[0] + index.size)):
            start, stop = int(index[0]), int(index[0]) + index.size
            rows = self.rows.slice(start, stop - start)
            return replace(self, weights=self.weights[start:stop], rows=rows)
        index = index.astype(np.int64)
        check_room(
            f"{self.card.name}: {len(index)} rows that do not follow each other",
            len(index) * self.layout.size * self.weights.itemsize,
            share=1,
            advice="a store in which they do",
        )
        return replace(self, weights=self.weights[index], rows=self.rows.take(pa.array(index)))

    def where(self, **equal: Any) -> "AdapterSet":
        """Keep the rows whose columns equal the given values."""
        keep = np.ones(len(self), bool)
        for name, value in equal.items():
            values = self.column(name)
            if value not in set(values.tolist()):
                some = ", ".join(map(str, list(dict.fromkeys(values.tolist()))[:12]))
                raise DataError(f"no row has {name} == {value!r}; its values: {some}")
            keep &= values == value
        return self.select(np.flatnonzero(keep))

    def subset(self, name: str) -> "AdapterSet":
        """Keep one of the subsets that the card's column names."""
        if not self.card.subset:
            raise DataError(f"subset: `{self.card.name}` has no subsets, got `{name}`")
        return self.where(**{self.card.subset: name})

    def column(self, name: str) -> np.ndarray:
        """Values of a table column."""
        return read_column(self.rows, self.card, name)

    def labels(self, column: str | None = None) -> tuple[np.ndarray, tuple[str, ...]]:
        """Integer labels and the class names they index.

        Args:
            column: a label column; the card's by default, with the card's order of classes.

        Raises:
            DataError: a row has no label or one that the card does not list.
        """
        return read_classes(self.rows, self.card, column or self.card.label)

    def targets(self, column: str | None = None, reduce: Reduce | None = None) -> np.ndarray:
        """A label column as numbers, float32.

        Args:
            column: the column; the card's label by default.
            reduce: what stands for a list of numbers, such as the losses of all epochs; None
                takes no lists.

        Raises:
            DataError: it has rows without a label, or holds no numbers.
        """
        return read_numbers(self.rows, self.card, column or self.card.label, reduce)

    def label_columns(self, label: str | None = None) -> tuple[str, ...]:
        """Names of the columns that a label is: one, or several separated by commas.

        Args:
            label: the card's by default.

        Example:
            >>> rows = pa.table({"cat": [0, 1], "dog": [1, 1]})
            >>> layout = Layout.known("tiny_sd_qv")
            >>> adapters = AdapterSet(np.ones((2, layout.size), np.float32), layout, rows)
            >>> adapters.label_columns("cat, dog"), adapters.label_columns("cat")
            (('cat', 'dog'), ('cat',))
        """
        return columns_of(self.rows, label or self.card.label)

    def has_classes(self, label: str | None = None) -> bool:
        """Tell whether a label is one class a row: one column, and not of lists.

        Args:
            label: the card's by default.
        """
        return is_one_class(self.rows, label or self.card.label)

    def label_lists(self, column: str | None = None) -> tuple[np.ndarray, tuple[str, ...]]:
        """Several labels a row, and their names.

        Args:
            column: a column of lists of text, or several of 0 and 1 (or false and true), a label
                each, separated by commas; the card's label by default.

        Returns:
            1 where a label applies, float32 ``[adapters, labels]``; the names: of lists sorted, of
            columns in their order.

        Raises:
            DataError: a row has no list, or a column holds something else.
        """
        return read_lists(self.rows, self.card, column or self.card.label)

    @property
    def ranks(self) -> np.ndarray:
        """Rank of each row's updates: the column ``rank``, else that of the layout."""
        own = max(layer.rank for layer in self.layout.layers)
        if "rank" not in self.rows.column_names:
            return np.full(len(self), own)
        return np.minimum(self.column("rank").astype(np.int64), own)

    def at_rank(self, rank: int) -> "AdapterSet":
        """The same updates at one rank: cut where theirs is higher, padded with zeros where lower.

        Args:
            rank: of the result.

        Raises:
            DataError: it is below 1.
        """
        if rank < 1:
            raise DataError(f"rank: expected at least 1, got {rank}")
        layout, own = self.layout.at_rank(rank), {layer.rank for layer in self.layout.layers}
        if own == {rank}:
            return self
        rows = np.asarray(self.weights)
        if max(own) < rank:
            rows = pad_rows(rows, self.layout, rank)
        else:
            rows = project_rows(rows, self.layout, layout)
        return replace(self, weights=rows, layout=layout)

    def _strata(self, column: str | None) -> np.ndarray:
        """What parts get equal shares of: classes; several labels a row, and none, have none."""
        for name in self.label_columns(column) if column else ():
            self.column(name)  # Says what there is.
        return self.labels(column)[0] if self.has_classes(column) else np.zeros(len(self), int)

    def split(self, column: str | None = None) -> Split:
        """Train, validation and test rows by the card's rule, stratified by the label."""
        rule = self.card.split
        if group := group_of(rule.column):
            named = self.card.group_columns.get(group, group)
            return split_by_group(self._strata(column), tied(self.column(named)), rule)
        groups = self.column(rule.group) if rule.group else None
        if rule.column and is_rule(rule.column):
            return split_by_name(rule.column, self._strata(column), groups)
        if rule.column:
            part = self.column(rule.column)
            return Split(*(np.flatnonzero(part == name) for name in Split._fields))
        return make_split(self._strata(column), groups, rule)

    def split_by(self, column: str) -> "AdapterSet":
        """Split the same rows by the parts that a column records, or by a rule's name."""
        recorded = () if is_rule(column) else map(str, self.column(column))
        unknown = sorted(set(recorded) - set(Split._fields))
        if unknown:
            raise DataError(
                f"split: column `{column}` holds `{unknown[0]}`, expected train, val and test"
            )
        rule = replace(self.card.split, column=column)
        return replace(self, card=replace(self.card, split=rule))

    def layer(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the factors of one layer: A ``[n, rank, in]`` and B ``[n, out, rank]``."""
        for layer, down, up in self.layout.pairs():
            if layer.name == name:
                return (
                    self.weights[:, down].reshape(len(self), *layer.down_shape),
                    self.weights[:, up].reshape(len(self), *layer.up_shape),
                )
        names = [layer.name for layer in self.layout.layers]
        raise LayoutError(f"no layer `{name}`{nearest(name, names)}")

    def to_arrow(self) -> pa.Table:
        """Write a table: the rows' columns, and one ``[rows, columns]`` list for each factor.

        `lora_ws.adapters_from` reads it back.
        """
        return to_arrow(self.weights, self.layout, self.rows)

    def to_frame(self) -> "DataFrame":
        """Write a pandas frame: the rows' columns, and one of float32 matrices for each factor.

        `lora_ws.adapters_from` reads it back.
        """
        return to_frame(self.weights, self.layout, self.rows)

    def to_dataset(self) -> "Dataset":
        """Write a ``datasets.Dataset`` with the columns of `to_arrow`.

        `lora_ws.adapters_from` reads it back, also after a filter, a shuffle or ``push_to_hub``.
        """
        return to_dataset(self.weights, self.layout, self.rows)

    @classmethod
    def open(cls, path: str | Path) -> "AdapterSet":
        """Open a store; the weights are mapped, not read.

        Raises:
            NotAvailableError: there is no finished store at ``path``.
        """
        path = Path(path)
        if not (path / MANIFEST).is_file():
            hint = " (an unfinished import is: run it again)" if partial_path(path).exists() else ""
            raise NotAvailableError(f"{path} is not an adapter store{hint}")
        try:
            weights = np.load(path / WEIGHTS, mmap_mode="r", allow_pickle=False)
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            layout = Layout.from_dict(json.loads((path / LAYOUT).read_text(encoding="utf-8")))
            rows = pq.read_table(path / ROWS)
            card = stored_card(yaml.safe_load((path / CARD).read_text(encoding="utf-8")))
            if len(weights) != manifest["rows"]:
                raise DataError(f"{manifest['rows']} rows expected, {WEIGHTS} holds {len(weights)}")
            return cls(weights, layout, rows, card, manifest)
        except _DAMAGE as error:
            raise DataError(f"{path}: the store is damaged ({error}); import it again") from error

    def save(self, path: str | Path) -> Path:
        """Write a store that `open` reads; refuses to overwrite one."""
        origin = self.origin or {"origin": "arrays"}
        # Nothing tells whose rows an unfinished store of arrays holds, so it is not continued.
        with StoreWriter(Path(path), self.layout, self.card, origin, resume=False) as writer:
            for part in blocks(len(self), 4 * self.layout.size):
                weights = np.asarray(self.weights[part])
                rows = self.rows.slice(part.start, len(weights))
                if "sha256" not in rows.column_names:
                    rows = rows.append_column("sha256", pa.array(row_hashes(weights), pa.string()))
                writer.append(weights, rows)
            writer.finish()
        return Path(path)


_DAMAGE = (
    OSError,
    EOFError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    yaml.YAMLError,
    pa.ArrowException,
)

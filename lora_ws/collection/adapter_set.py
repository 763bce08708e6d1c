"""`AdapterSet`: a row-major float32 matrix, a layout that says what its columns are, and a table.

On disk it is a folder, the *store*: ``weights.npy`` (opened as a memory map), ``rows.parquet``,
``layout.json``, ``card.yaml`` and ``manifest.json``.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

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
from lora_ws.config import nearest
from lora_ws.errors import DataError, LayoutError, NotAvailableError
from lora_ws.memory import blocks

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
        """Keep the rows at ``index``; a contiguous range stays a view of the memory map."""
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
        if name not in self.rows.column_names:
            why = f"`{self.card.name}` has no column `{name}`"
            if name == self.card.label:
                why += (
                    ", its label: put files into a folder per class, or labels into a table beside "
                    "them (docs/data_format.md), or name another column with --label"
                )
            known = self.rows.column_names
            raise DataError(f"{why}{nearest(name, known, few=len(known))}")
        return self.rows[name].to_numpy(zero_copy_only=False)

    def labels(self, column: str | None = None) -> tuple[np.ndarray, tuple[str, ...]]:
        """Integer labels and the class names they index.

        Args:
            column: a label column; the card's by default, with the card's order of classes.

        Raises:
            DataError: a row has no label or one that the card does not list.
        """
        name = column or self.card.label
        if len(several := self.label_columns(name)) > 1:
            raise DataError(
                f"label: expected one column, got {', '.join(several)}; several are for --task "
                "multilabel, or choose one with --label"
            )
        values = self._known(name)
        if pa.types.is_nested(self.rows[name].type):
            raise DataError(
                f"column `{name}` holds {self.rows[name].type}, expected one class each; lists of "
                "labels are for --task multilabel, or choose a column of text or numbers"
            )
        listed = self.card.classes if name == self.card.label else ()
        classes = listed or tuple(map(str, np.unique(values).tolist()))
        codes = {value: code for code, value in enumerate(classes)}
        unknown = sorted({str(v) for v in values.tolist()} - set(classes))
        if unknown:
            raise DataError(
                f"column `{name}` holds `{unknown[0]}`, which card `{self.card.name}` does not "
                f"list under classes ({', '.join(classes)})"
            )
        return np.array([codes[str(value)] for value in values.tolist()], np.int64), classes

    def targets(
        self, column: str | None = None, reduce: Literal["last", "mean"] | None = None
    ) -> np.ndarray:
        """A label column as numbers, float32.

        Args:
            column: the column; the card's label by default.
            reduce: what stands for a list of numbers, such as the losses of all epochs; None
                takes no lists.

        Raises:
            DataError: it has rows without a label, or holds no numbers.
        """
        name = column or self.card.label
        values = self._known(name)
        kind = self.rows[name].type
        if reduce and pa.types.is_list(kind) and not pa.types.is_string(kind.value_type):
            values = self._reduced(name, values, reduce)
        if values.dtype.kind not in "biuf" or not np.isfinite(values).all():
            raise DataError(
                f"column `{name}` of `{self.card.name}`: expected finite numbers, got "
                f"{kind}; choose a column of numbers, or use task=classification"
            )
        return values.astype(np.float32)

    def _reduced(self, name: str, lists: np.ndarray, reduce: str) -> np.ndarray:
        """The last number of each list, or the mean of all."""
        if empty := sum(len(one) == 0 for one in lists):
            raise DataError(
                f"column `{name}` of `{self.card.name}`: expected a number or more in each row's "
                f"list, got {empty} empty ones; filter them first"
            )
        return np.array([one[-1] if reduce == "last" else one.mean() for one in lists])

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
        name = label or self.card.label
        if name in self.rows.column_names:
            return (name,)
        return tuple(part.strip() for part in name.split(","))

    def has_classes(self, label: str | None = None) -> bool:
        """Tell whether a label is one class a row: one column, and not of lists.

        Args:
            label: the card's by default.
        """
        name, *more = self.label_columns(label)
        if more or name not in self.rows.column_names:
            return False
        return not pa.types.is_list(self.rows[name].type)

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
        name, *more = self.label_columns(column)
        if more:
            return self._flags((name, *more)), (name, *more)
        values, kind = self._known(name), self.rows[name].type
        if not (pa.types.is_list(kind) and pa.types.is_string(kind.value_type)):
            raise DataError(
                f"column `{name}` of `{self.card.name}`: expected lists of text, got {kind}; write "
                'lists such as ["cat", "red"], name several columns of 0 and 1 as --label cat,red, '
                "or use --task classification"
            )
        lists = [sorted(set(labels)) for labels in values]
        names = sorted(set(chain.from_iterable(lists)))
        places = {label: place for place, label in enumerate(names)}
        found = np.zeros((len(lists), len(names)), np.float32)
        for row, labels in zip(found, lists, strict=True):
            row[[places[label] for label in labels]] = 1
        return found, tuple(names)

    def _flags(self, columns: Sequence[str]) -> np.ndarray:
        """Columns of 0 and 1, ``[adapters, columns]``."""
        found = np.stack([self.targets(name) for name in columns], axis=1)
        if wrong := set(np.unique(found).tolist()) - {0.0, 1.0}:
            raise DataError(
                f"label: expected 0 and 1 in each of {', '.join(columns)}, got {min(wrong):g}; "
                "leave that column out"
            )
        return found

    def _known(self, name: str) -> np.ndarray:
        values = self.column(name)
        if self.rows[name].null_count:
            raise DataError(f"column `{name}` has rows without a label; filter them first")
        return values

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

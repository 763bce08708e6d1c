"""Find adapters that do the same or nearly: an index of update sketches that grows on disk."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from lora_ws.adapters import Adapter
from lora_ws.audit import index_store
from lora_ws.audit.index_store import Signature, numbers, strings, unit
from lora_ws.audit.neighbours import graph_search
from lora_ws.errors import ConfigError, DataError, LoraWsError
from lora_ws.functional.sketch import SIDE, sketch, update_norm
from lora_ws.functional.update_hash import update_hash
from lora_ws.functional.update_modules import Module, Modules

# Copies in bfloat16 of lora-ws-mini and of strangers' adapters have a cosine above 1 - 5e-6 and
# norms within 3e-4. The closest adapters of lora-ws-mini that are not copies (same images and
# seeds, another prompt) have one below 1 - 1.9e-5, so more than rounding parts them.
EQUAL = 1 - 1e-5
EQUAL_NORMS = 1e-3
# Of the 1000 such twins all but one are above it; no two adapters of other images reach 0.74.
NEAR = 0.8
# Between the hash of an update and what tells its file apart.
MARK = "+"
# Up to here every sketch is compared with, in a tenth of a second; beyond, a graph is walked.
EXACT_ROWS = 1_000_000
_BLOCK_ROWS, _BLOCK_QUERIES = 8192, 256
Adapters = Iterable[tuple[str, Modules]]


class Found(NamedTuple):
    """Best rows for each of q queries, best first: row numbers and cosines ``[q, top]``."""

    rows: Int[np.ndarray, "q top"]
    cosine: Float[np.ndarray, "q top"]


class Match(NamedTuple):
    """An adapter of the index, and the estimated cosine of its update with the one asked for."""

    name: str
    cosine: float
    norm: float
    hash: str


@dataclass(frozen=True, eq=False, repr=False)
class Index:
    """Unit sketches of adapters and their names, as they were when the index was opened.

    Attributes:
        folder: where it is.
        side: rows of the projections; sketches have ``side * side`` numbers.
        sketches: float32 ``[n, side * side]``, mapped; a row of zeros is an update of zero.
        rows: a table with ``name``, ``norm`` (of the update) and ``hash`` (`update_hash`).

    Example:
        >>> import tempfile
        >>> rng = np.random.default_rng(0)
        >>> def adapter():
        ...     return [("to_v", rng.standard_normal((1, 40)), rng.standard_normal((30, 1)), 1.0)]
        >>> ours = {name: adapter() for name in "abc"}
        >>> index = Index.build(tempfile.mkdtemp(), ours.items())
        >>> index.query(sketch(ours["b"]), top=1)[0].name
        'b'
    """

    folder: Path
    side: int
    sketches: np.ndarray
    rows: pa.Table

    def __len__(self) -> int:
        return len(self.sketches)

    def __repr__(self) -> str:
        return f"Index({self.folder}: {len(self)} adapters, {self.side}x{self.side} numbers each)"

    @classmethod
    def build(
        cls,
        folder: str | Path,
        adapters: Adapters = (),
        *,
        side: int = SIDE,
        batch: int = 256,
        on_error: Callable[[str, LoraWsError], None] | None = None,
    ) -> "Index":
        """Make an index, or go on with one that is there.

        Args:
            folder: absent, empty, or an index.
            adapters: as for `add`.
            side: of the sketches; that of an index that is there must be the same.
            batch: as for `add`.
            on_error: as for `add`.

        Raises:
            DataError: the folder holds something else, or an index of another kind.
        """
        folder = Path(folder)
        if side < 1:
            raise ConfigError(f"side: expected at least 1, got {side}; {SIDE} is a good start")
        if not (folder / index_store.HEAD).is_file():
            index_store.create(folder, side)
        index = cls.open(folder)
        if index.side != side:
            raise DataError(
                f"{folder}: expected sketches of side {side}, the index has {index.side}; pass "
                f"side={index.side}, or choose another folder"
            )
        return index.add(adapters, batch=batch, on_error=on_error)

    @classmethod
    def open(cls, folder: str | Path) -> "Index":
        """Open an index; the sketches are mapped, not read.

        Raises:
            NotAvailableError: there is no index in the folder.
            DataError: it is damaged, or of a kind that this version does not read.
        """
        return cls(Path(folder), *index_store.read(Path(folder)))

    def add(
        self,
        adapters: Adapters,
        *,
        batch: int = 256,
        on_error: Callable[[str, LoraWsError], None] | None = None,
    ) -> "Index":
        """Sketch adapters and add them; those whose names are there are passed over, unread.

        Args:
            adapters: name and modules, in batches that a kill cannot lose once they are written.
                Modules may be a generator, which is then only begun for a new name.
            batch: how many adapters are written at a time.
            on_error: called for adapters that cannot be read, which are left out; None raises.

        Returns:
            The index with the new rows.

        Raises:
            DataError: another process writes to it.
        """
        with index_store.writing(self.folder):
            known = set(Index.open(self.folder).rows["name"].to_pylist())
            names: list[str] = []
            found: list[Signature] = []
            for name, modules in adapters:
                if name in known:
                    continue
                try:
                    found.append(signature(modules, self.side))
                except LoraWsError as error:
                    if on_error is None:
                        raise
                    on_error(name, error)
                    continue
                known.add(name)
                names.append(name)
                if len(names) == batch:
                    index_store.append(self.folder, self.side, names, found)
                    names, found = [], []
            index_store.append(self.folder, self.side, names, found)
        return Index.open(self.folder)

    def append(self, names: Sequence[str], signatures: Sequence[Signature]) -> "Index":
        """Add rows whose signatures are known.

        Args:
            names: new ones, each once.
            signatures: one per name.

        Returns:
            The index with the new rows.

        Raises:
            DataError: a name is there, a sketch does not fit, or another process writes.
        """
        with index_store.writing(self.folder):
            known = set(Index.open(self.folder).rows["name"].to_pylist())
            if len(known | set(names)) < len(known) + len(names):
                raise DataError(f"{self.folder}: expected new names, each once; leave out others")
            index_store.append(self.folder, self.side, names, signatures)
        return Index.open(self.folder)

    def select(self, rows: Sequence[int], names: Sequence[str] | None = None) -> "Index":
        """Take some rows, as they are now; their sketches are read.

        Args:
            rows: which, in the order of the result; one may come twice.
            names: of the result's rows; None keeps theirs.

        Returns:
            An index in memory. Its folder, of these rows alone, holds a graph of neighbours once
            one is needed, and nothing else.
        """
        mark = hashlib.sha256(json.dumps(list(rows)).encode()).hexdigest()[:16]
        table = self.rows.take(numbers(np.asarray(rows, np.int64)))
        if names is not None:
            column = table.column_names.index("name")
            table = table.set_column(column, "name", strings(names))
        sketches = self.sketches[np.asarray(rows, np.int64)]
        return Index(self.folder / f"part-{mark}", self.side, sketches, table)

    def search(
        self,
        sketches: Float[np.ndarray, "q size"],
        top: int = 10,
        *,
        approximate: bool | None = None,
    ) -> Found:
        """Rows with the highest cosines.

        Args:
            sketches: of any norm; one of zeros has cosine 0 with everything.
            top: how many, at most as many as there are rows.
            approximate: walk a graph of neighbours, which may miss some, instead of comparing with
                every row; None does above `EXACT_ROWS`. The graph is kept in the folder. Its
                cosines are exact for the rows it finds.

        Raises:
            ConfigError: the sketches do not fit, or ``top`` is below 1.
            NotAvailableError: the library for the graph is not installed.
        """
        queries = np.asarray(sketches)
        if queries.ndim != 2 or queries.shape[1] != self.side**2 or top < 1:
            raise ConfigError(
                f"expected sketches [q, {self.side**2}] and top of at least 1, got "
                f"{list(queries.shape)} and {top}; sketch with side={self.side}"
            )
        units, top = unit(queries), min(top, len(self))
        if approximate is None:
            approximate = len(self) > EXACT_ROWS
        if approximate and top:
            rows = graph_search(self.folder, self.sketches, units, top)
            return _best(units, rows, self.sketches[rows])
        blocks = range(0, len(units), _BLOCK_QUERIES)
        found = [_exact(self.sketches, units[k : k + _BLOCK_QUERIES], top) for k in blocks]
        return Found(*map(np.concatenate, zip(*found, strict=True))) if found else _none(0, top)

    def query(self, sketch: Float[np.ndarray, " size"], top: int = 10) -> list[Match]:
        """Find the adapters most like one, best first; see `search`."""
        return self.matches(self.search(np.asarray(sketch)[None], top))[0]

    def matches(self, found: Found) -> list[list[Match]]:
        """Name what `search` found: a list per query."""
        return [
            [
                Match(row["name"], float(cosine), row["norm"], row["hash"])
                for row, cosine in zip(
                    self.rows.take(numbers(np.asarray(rows, np.int64))).to_pylist(),
                    cosines,
                    strict=True,
                )
            ]
            for rows, cosines in zip(*found, strict=True)
        ]


def adapter_modules(adapter: Adapter) -> Iterator[Module]:
    """List the modules of an adapter that was read from a file, as `sketch` takes them."""
    for name, module in adapter.modules.items():
        yield name, *module.factors, module.scale


def marked_hash(adapter: Adapter, update_hash: str) -> str:
    """Mark the hash of an update as that of a part, where its file holds more; see `Signature`.

    Args:
        adapter: as it was read.
        update_hash: of its modules.
    """
    if not adapter.partly_read:
        return update_hash
    return f"{update_hash}{MARK}{adapter.sha256 or adapter.source}"


def is_partial(marked_hash: str) -> bool:
    """Tell whether the hash of a `Signature` is of a part of its file."""
    return MARK in marked_hash


def signature(modules: Modules, side: int = SIDE) -> Signature:
    """Compute what the index keeps of an adapter.

    Args:
        modules: of one adapter, as for `sketch`.
        side: of the index.
    """
    modules = list(modules)
    return Signature(sketch(modules, side), update_norm(modules), update_hash(modules))


def same_update(
    cosine: np.ndarray | float,
    norm: np.ndarray | float,
    other: np.ndarray | float,
    equal: float = EQUAL,
) -> np.ndarray:
    """Test whether updates are equal but for rounding: direction and norm agree.

    Args:
        cosine: of their sketches.
        norm: of the one.
        other: of the other.
        equal: least cosine.

    Returns:
        Booleans; false where an update is zero.

    Example:
        >>> same_update(np.array([1.0, 1.0, 0.99]), 2.0, np.array([2.001, 4.0, 2.0])).tolist()
        [True, False, False]
    """
    larger, smaller = np.maximum(norm, other), np.minimum(norm, other)
    return (np.asarray(cosine) >= equal) & (smaller >= (1 - EQUAL_NORMS) * larger) & (smaller > 0)


def _exact(sketches: np.ndarray, units: np.ndarray, top: int) -> Found:
    """Compare with every row, a block at a time."""
    best = _none(len(units), 0)
    for start in range(0, len(sketches), _BLOCK_ROWS):
        cosine = units @ sketches[start : start + _BLOCK_ROWS].T
        rows = np.broadcast_to(np.arange(start, start + cosine.shape[1]), cosine.shape)
        if cosine.shape[1] > top:
            kept = np.argpartition(-cosine, top - 1, axis=1)[:, :top]
            cosine, rows = (np.take_along_axis(v, kept, 1) for v in (cosine, rows))
        joined = (np.concatenate(pair, axis=1) for pair in zip(best, (rows, cosine), strict=True))
        best = _sorted(*joined, top)
    return best


def _best(units: np.ndarray, rows: np.ndarray, sketches: np.ndarray) -> Found:
    return _sorted(rows, np.einsum("qd,qtd->qt", units, sketches), rows.shape[1])


def _sorted(rows: np.ndarray, cosine: np.ndarray, top: int) -> Found:
    """Sort by cosine, the highest first, the lower row first among equals."""
    order = np.lexsort((rows, -cosine), axis=1)[:, :top]
    return Found(np.take_along_axis(rows, order, 1), np.take_along_axis(cosine, order, 1))


def _none(queries: int, top: int) -> Found:
    return Found(np.empty((queries, top), np.int64), np.empty((queries, top), np.float32))

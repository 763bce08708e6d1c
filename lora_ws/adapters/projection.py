"""An adapter of any rank and modules, brought into a layout."""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from lora_ws.adapters.adapter import Adapter, Module, lay_out
from lora_ws.adapters.layout import LayerSpec, Layout
from lora_ws.errors import AdapterError, LayoutError, old_names
from lora_ws.functional.factors import Cut, cut_to_rank, product_energy
from lora_ws.functional.kronecker import KroneckerProduct, cut_kronecker

# A layer that is missing counts as no update; with more missing the verdict would be on little.
MAX_MISSING = 0.5
# A common layout has no higher rank, and the layers that this share of adapters has.
MAX_COMMON_RANK, COMMON = 16, 0.5
__getattr__ = old_names(__name__, {"project": f"{__name__}:project_adapter"})


@dataclass(frozen=True, eq=False)
class Projection:
    """A row of a layout, and what was done to get it.

    Attributes:
        layout: which column is which number.
        weights: float32 ``[layout.size]``.
        energy: share of the squared norm of the update, over the layout's layers, that is left.
        missing: layers of those that count that the adapter leaves alone; their update is 0.
        exact: whether the row holds the file's own numbers.
    """

    layout: Layout
    weights: Float[np.ndarray, " size"]
    energy: float
    missing: tuple[str, ...]
    exact: bool


def project_adapter(
    adapter: Adapter, layout: Layout, layers: Collection[str] | None = None
) -> Projection:
    """Bring an adapter into a layout: each update cut to the layer's rank, absent ones 0.

    Numbers stay as they are where rank and shape agree. Else factors become canonical
    (`cut_to_rank`), so two spellings of one update give one row.

    Args:
        adapter: any adapter of the layout's base model.
        layout: where to.
        layers: the layers that count; the others stay 0 and are not missed. None for all.

    Raises:
        AdapterError: a layer has another shape, or most layers are missing: another base.
    """
    wanted = [layer for layer in layout.layers if layers is None or layer.name in layers]
    found = {x.name: adapter.linear[x.name] for x in wanted if x.name in adapter.linear}
    missing = tuple(layer.name for layer in wanted if layer.name not in found)
    cuts: dict[str, Cut] = {}
    for layer in wanted:
        module = found.get(layer.name)
        if module is None:
            continue
        _check_shape(adapter, module, layer)
        if module.rank != layer.rank:
            cuts[layer.name] = _cut(module, layer.rank)
    if len(missing) > MAX_MISSING * len(wanted):
        raise AdapterError(
            f"{adapter.source}: {len(missing)} of {len(wanted)} layers that are read are "
            f"not adapted, such as `{missing[0]}`: it is of another base model, or adapts other "
            "modules",
            "foreign",
        )
    ready = {
        name: Module(*_place(found[name]), cut.down, cut.up, 1.0, "cut to the rank")
        for name, cut in cuts.items()
    }
    row = lay_out(found | ready, layout)
    # A sum of squares is not finite where a number is not, and takes less than a look at each.
    with np.errstate(over="ignore", invalid="ignore"):
        finite = np.isfinite(row.dot(row))
    if not finite and not np.isfinite(row).all():
        raise AdapterError(f"{adapter.source}: its scale takes values beyond float32", "not-finite")
    whole = [module for name, module in found.items() if name not in cuts]
    exact = not cuts and not missing
    return Projection(layout, row, _energy(list(cuts.values()), whole), missing, exact)


def project_rows(
    rows: Float[np.ndarray, "n params"], layout: Layout, wanted: Layout
) -> Float[np.ndarray, "n size"]:
    """Bring rows of one layout to the ranks of another, as `project_adapter` does with a file.

    Args:
        rows: of ``layout``.
        layout: theirs.
        wanted: the same layers at other ranks.

    Raises:
        LayoutError: it has other layers.

    Example:
        >>> one = Layout.known("tiny_sd_qv")
        >>> project_rows(np.ones((2, one.at_rank(4).size)), one.at_rank(4), one).shape
        (2, 7072)
    """
    if difference := wanted.difference(layout.at_rank(wanted.layers[0].rank)):
        raise LayoutError(f"expected the same layers at other ranks: {difference}")
    new = np.empty((len(rows), wanted.size), np.float32)
    for (layer, down, up), (own, new_down, new_up) in zip(
        layout.pairs(), wanted.pairs(), strict=True
    ):
        if layer.rank == own.rank:
            new[:, new_down], new[:, new_up] = rows[:, down], rows[:, up]
            continue
        for old, row in zip(rows, new, strict=True):
            cut = cut_to_rank(
                old[down].reshape(layer.down_shape), old[up].reshape(layer.up_shape), own.rank
            )
            row[new_down], row[new_up] = cut.down.ravel(), cut.up.ravel()
    return new


def pad_rows(
    rows: Float[np.ndarray, "n params"], layout: Layout, rank: int
) -> Float[np.ndarray, "n size"]:
    """Bring rows to a higher rank by zeros; their numbers stay as they are.

    Args:
        rows: of ``layout``.
        layout: theirs, of no higher rank.
        rank: of the result.

    Example:
        >>> one = Layout.known("tiny_sd_qv")
        >>> pad_rows(np.ones((2, one.size), np.float32), one, 2).sum(axis=1).tolist()
        [7072.0, 7072.0]
    """
    wanted = layout.at_rank(rank)
    new = np.zeros((len(rows), wanted.size), np.float32)
    for (layer, down, up), (own, new_down, new_up) in zip(
        layout.pairs(), wanted.pairs(), strict=True
    ):
        grown = np.zeros((len(rows), *own.down_shape), np.float32)
        grown[:, : layer.rank] = rows[:, down].reshape(-1, *layer.down_shape)
        new[:, new_down] = grown.reshape(len(rows), -1)
        grown = np.zeros((len(rows), *own.up_shape), np.float32)
        grown[:, :, : layer.rank] = rows[:, up].reshape(-1, *layer.up_shape)
        new[:, new_up] = grown.reshape(len(rows), -1)
    return new


def common_layout(found: Sequence[tuple[str, Layout]]) -> Layout:
    """Choose a layout that most adapters fit: the base that most have, the layers of at least half.

    Its rank is the highest of theirs, up to 16, so that lower ones lose nothing.

    Args:
        found: base model and layout of each adapter, at least one.

    Example:
        >>> one, two = (Layout.known("tiny_sd_qv").at_rank(rank) for rank in (1, 2))
        >>> common_layout([("tiny", one), ("tiny", two)]) == two
        True
    """
    if len({layout for _, layout in found}) == 1:
        return found[0][1]
    base = Counter(name for name, _ in found).most_common(1)[0][0]
    layouts = [layout for name, layout in found if name == base]
    rank = min(MAX_COMMON_RANK, max(x.rank for layout in layouts for x in layout.layers))
    counts = Counter(x for layout in layouts for x in layout.at_rank(rank).layers)
    shapes: dict[str, LayerSpec] = {}
    for layer, _ in counts.most_common():
        shapes.setdefault(layer.name, layer)
    kept = [layer for layer in shapes.values() if counts[layer] >= COMMON * len(layouts)]
    return Layout.from_layers(kept or layouts[0].at_rank(rank).layers)


def _place(module: Module) -> tuple[str, str, str]:
    return module.component, module.path, module.method


def _cut(module: Module, rank: int) -> Cut:
    down, up = module.factors
    if isinstance(down, KroneckerProduct) and isinstance(up, KroneckerProduct) and not up.rows:
        first = up.first * np.float64(module.scale)
        return cut_kronecker(down, KroneckerProduct(first, up.second), rank)
    return cut_to_rank(module.down, module.up * np.float64(module.scale), rank)


def _energy(cuts: list[Cut], whole: list[Module]) -> float:
    if not cuts:
        return 1.0
    untouched = sum(m.scale**2 * product_energy(m.down, m.up) for m in whole)
    before = untouched + sum(cut.whole for cut in cuts)
    return (untouched + sum(cut.kept for cut in cuts)) / before if before else 1.0


def _check_shape(adapter: Adapter, module: Module, layer: LayerSpec) -> None:
    shape = module.outputs, module.inputs
    if shape != (layer.out_features, layer.in_features):
        raise AdapterError(
            f"{adapter.source}: layer `{layer.name}` maps {shape[1]} to {shape[0]}, expected "
            f"{layer.in_features} to {layer.out_features}: it is of another base model",
            "foreign",
        )

"""Networks over canonical factors equal their formulas on updates that are formed."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import orthogonal_procrustes
from tolerances import EXACT
from torch import Tensor
from torch.nn import functional as F

from lora_ws.adapters import LayerSpec, Layout
from lora_ws.errors import ConfigError
from lora_ws.models import (
    W2T,
    InputSpec,
    Metanetwork,
    OAlignMLP,
    SignNet,
    SketchTransformer,
    SpectralMLP,
)
from lora_ws.models.o_align_mlp import Aligner
from lora_ws.models.sketch_transformer import UpdateSketches
from lora_ws.models.spectra import FLOOR

LAYERS = [("a", 6, 5), ("b", 4, 7), ("c", 6, 5)]


def layout(rank: int = 2, names: str = "abc") -> Layout:
    return Layout.from_layers(LayerSpec(*layer, rank) for layer in LAYERS if layer[0] in names)


def draw(shape: Layout, n: int = 4, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((n, shape.size)))


def build(spec: Metanetwork, shape: Layout) -> Any:
    torch.manual_seed(0)
    return spec.build(InputSpec.of(shape), 3).double().eval()


def dense(row: Tensor, shape: Layout) -> Iterator[np.ndarray]:
    for layer, down, up in shape.pairs():
        yield (row[up].view(layer.up_shape) @ row[down].view(layer.down_shape)).numpy()


def log_size(value: Any) -> np.ndarray:
    return np.log((value + FLOOR) / (1 + FLOOR))


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_spectral_mlp_reads_the_spectrum_of_dense_updates(rank: int) -> None:
    shape, read = layout(rank), []
    module = build(SpectralMLP(width=4), shape)
    module.norm.register_forward_pre_hook(lambda _, given: read.append(given[0]))
    rows = draw(shape)
    module(rows)
    expected = []
    for row in rows:
        found = []
        # Modules of one shape follow each other.
        for place in (0, 2, 1):
            values = np.linalg.svd(list(dense(row, shape))[place], compute_uv=False)[:rank]
            shares = values**2 / (values**2).sum()
            entropy = -(shares * np.log(shares)).sum()
            norm = log_size(np.linalg.norm(values))
            rest = [norm, shares[0], entropy] if rank > 1 else []
            found += [*log_size(values), *rest]
        expected.append(found)
    np.testing.assert_allclose(read[0].numpy(), expected, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("side", ["left", "both"])
@pytest.mark.parametrize("rank", [1, 3])
def test_sign_net_is_its_formula(rank: int, side: str) -> None:
    shape, read = layout(rank, "b"), []
    module = build(SignNet(side=side, hidden=5, features=3, width=4), shape)  # type: ignore[arg-type]
    module.pool.register_forward_pre_hook(lambda _, given: read.append(given[0]))
    rows = draw(shape)
    module(rows)
    maps = {name: value.detach().numpy()[0] for name, value in module.maps[0].named_parameters()}

    def phi(vector: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        inner = vector @ maps["directions"] + sizes @ maps["sizes"] + maps["bias"]
        return np.maximum(inner, 0) @ maps["last"]

    for row, got in zip(rows, read[0], strict=True):
        u, values, vh = np.linalg.svd(next(dense(row, shape)))
        expected = np.zeros(3)
        for k in range(rank):
            vector = np.concatenate([u[:, k], vh[k]]) if side == "both" else u[:, k]
            sizes = log_size(np.array([values[k], values[k] / values[0]]))
            share = values[k] ** 2 / (values**2).sum()
            expected += share * (phi(vector, sizes) + phi(-vector, sizes))
        np.testing.assert_allclose(got[0].detach().numpy(), expected, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_aligner_solves_procrustes_against_the_first_training_row(rank: int) -> None:
    shape = layout(rank, "b")
    rows, train = draw(shape, 6), np.array([4, 1, 2])
    aligner = Aligner(shape).fit(rows.numpy(), train).double()
    (layer, down, up), *_ = shape.pairs()
    scaled = rows.numpy().copy()
    for columns in (down, up):
        # The constants are kept in float32.
        scaled[:, columns] /= np.float32(np.sqrt((rows.numpy()[train][:, columns] ** 2).mean()))

    def stacked(row: np.ndarray) -> np.ndarray:
        return np.vstack([row[up].reshape(layer.up_shape), row[down].reshape(layer.down_shape).T])

    template = aligner.template.numpy()
    np.testing.assert_allclose(template, scaled[train[0]], rtol=4 * float(np.finfo(np.float32).eps))
    for row, mine in zip(scaled, aligner(rows).numpy(), strict=True):
        turned = stacked(row) @ orthogonal_procrustes(stacked(row), stacked(template))[0]
        wrote, read = np.split(turned, [layer.out_features])
        expected = np.concatenate([wrote.ravel(), read.T.ravel()])
        np.testing.assert_allclose(mine, expected, rtol=EXACT, atol=EXACT)


def test_o_align_does_not_depend_on_rotations_of_the_ranks() -> None:
    shape = layout(3, "b")
    module, rows = build(OAlignMLP(width=4), shape), draw(shape)
    module.normalizer.fit(rows.numpy(), np.arange(4)).double()
    turn = torch.linalg.qr(draw(layout(3, "b"))[0, :9].view(3, 3)).Q
    (layer, down, up), *_ = shape.pairs()
    turned = rows.clone()
    turned[:, up] = (rows[:, up].unflatten(1, layer.up_shape) @ turn).flatten(1)
    turned[:, down] = (turn.mT @ rows[:, down].unflatten(1, layer.down_shape)).flatten(1)
    torch.testing.assert_close(module(turned), module(rows), rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("rank", [1, 4])
def test_sketches_are_those_of_dense_updates(rank: int) -> None:
    shape = layout(rank, "b")
    sketches, rows = UpdateSketches(shape, 3).double(), draw(shape)
    got = sketches(rows).numpy()
    write, read = (value.numpy() for value in sketches.state_dict().values())
    for row, mine in zip(rows, got, strict=True):
        update = next(dense(row, shape))
        norm = np.linalg.norm(update)
        sketch = write.T @ update @ read / norm * np.sqrt(update.size)
        np.testing.assert_allclose(mine[0], [*sketch.ravel(), log_size(norm)], atol=EXACT)


@pytest.mark.parametrize("side", ["left", "both"])
def test_modules_that_are_missing_are_as_if_they_were_not_there(side: str) -> None:
    spec = SketchTransformer(side=side, probes=3, token=8, depth=2, heads=2, width=5)  # type: ignore[arg-type]
    whole, part = build(spec, layout()), build(spec, layout(names="ac"))
    own = whole.state_dict()
    per_module = {"pool.read_in.weight", "pool.read_in.bias", "normalizer.scale"}
    part.load_state_dict(
        {name: own[name][[0, 2]] if name in per_module else own[name] for name in part.state_dict()}
    )
    rows = draw(layout(names="ac"))
    columns = torch.cat([torch.arange(22), torch.arange(22, 44) + 22])
    missing = torch.zeros(4, layout().size, dtype=rows.dtype)
    missing[:, columns] = rows
    torch.testing.assert_close(whole(missing), part(rows), rtol=EXACT, atol=EXACT)


def test_modules_go_missing_in_training_alone() -> None:
    spec = SketchTransformer(probes=3, token=8, heads=2, dropout=0, module_dropout=0.5)
    module, rows = build(spec, layout()), draw(layout())
    assert torch.equal(module(rows), module(rows))
    module.train()
    assert not torch.equal(module(rows), module(rows))


def test_signs_are_random_in_training_alone() -> None:
    module, rows = build(W2T(width=8, heads=2, signs="random"), layout()), draw(layout())
    assert torch.equal(module(rows), module(rows))
    module.train()
    assert not torch.equal(module(rows), module(rows))


def test_even_tokens_need_no_canonical_sign() -> None:
    module, rows = build(W2T(width=8, heads=2, signs="even"), layout()), draw(layout())
    before = module(rows)
    for project in module.project:
        for weight in project.parameters():
            weight.data.neg_()
    torch.testing.assert_close(module(rows), before, rtol=EXACT, atol=EXACT)


def padded(rows: Tensor, shape: Layout) -> Tensor:
    """The same adapters with one more rank, of zeros."""
    parts = []
    for layer, down, up in shape.pairs():
        parts.append(F.pad(rows[:, down].unflatten(1, layer.down_shape), (0, 0, 0, 1)).flatten(1))
        parts.append(F.pad(rows[:, up].unflatten(1, layer.up_shape), (0, 1)).flatten(1))
    return torch.cat(parts, 1)


@torch.no_grad()
def test_published_form_hardly_sees_sizes_and_sees_padding() -> None:
    """What the mended form mends."""
    small = draw(layout(2), 8) / 100
    by_size, by_padding = {}, {}
    for published in (True, False):
        spec = W2T(width=8, heads=2, signs="canonical", published=published)
        module, wide = build(spec, layout(2)), build(spec, layout(3))
        # Its sizes count for nothing at the start of training.
        module.fuse.gain.fill_(1)
        wide.load_state_dict(module.state_dict())
        outputs = module(small)
        apart = (outputs - outputs.mean(0)).norm()
        by_size[published] = (module(2 * small) - outputs).norm() / apart
        by_padding[published] = (wide(padded(small, layout(2))) - outputs).norm() / apart
    assert 10 * by_size[True] < by_size[False]
    assert by_padding[False] < EXACT < 1e-3 < by_padding[True]


@pytest.mark.parametrize(
    ("spec", "rank", "text"),
    [
        (W2T(published=True, signs="canonical"), 1, "`published: false` W2T reads any rank"),
        (
            W2T(published=True),
            2,
            "signs: expected canonical with published, got even; use signs=canonical",
        ),
        (W2T(width=6), 2, "width a multiple of heads"),
        (W2T(signs="odd"), 2, "signs random, even or canonical"),  # type: ignore[arg-type]
        (W2T(side="right"), 2, "side left or both"),  # type: ignore[arg-type]
        (SpectralMLP(width=0), 1, "width of at least 1"),
        (OAlignMLP(width=0), 1, "width of at least 1"),
        (SignNet(side="right"), 1, "side left or both"),  # type: ignore[arg-type]
        (SignNet(pool="mean"), 1, "pool: expected concat or transformer"),  # type: ignore[arg-type]
        (SketchTransformer(token=6), 1, "token a multiple of heads"),
        (SketchTransformer(module_dropout=1), 1, "module_dropout from 0 to below 1"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused(spec: Metanetwork, rank: int, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        spec.build(InputSpec.of(layout(rank)), 3)


@pytest.mark.parametrize(
    ("spec", "rank", "millions"),
    [
        (SpectralMLP(), 1, 0.02),
        (SpectralMLP(), 4, 0.12),
        (OAlignMLP(), 1, 1.59),
        (OAlignMLP(), 4, 6.38),
        (SignNet(), 1, 1.77),
        (SignNet(), 8, 1.77),
        (SignNet(side="both"), 1, 3.36),
        (W2T(width=64), 1, 6.57),
        (W2T(), 1, 13.48),
        (W2T(published=True, signs="canonical"), 8, 13.48),
        (SketchTransformer(side="both", probes=8, token=64, depth=2), 1, 0.38),
        (SketchTransformer(), 1, 1.11),
    ],
    ids=str,
)
def test_parameters_on_stable_diffusion(spec: Metanetwork, rank: int, millions: float) -> None:
    with torch.device("meta"):
        module = spec.build(InputSpec.of(Layout.sd15_qv(rank)), 10)
    count = sum(weight.numel() for weight in module.parameters())
    assert round(count / 1e6, 2) == millions

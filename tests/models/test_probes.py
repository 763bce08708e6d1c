"""Networks over probes equal their formulas on updates that are formed, and have their sizes."""

import numpy as np
import pytest
import torch
from tolerances import EXACT

from lora_ws.adapters import LayerSpec, Layout
from lora_ws.errors import ConfigError
from lora_ws.functional.views import VIEWS
from lora_ws.models import GLNet, InputSpec, LeftGram, MetanetModule, Metanetwork, MVProbe, ProbeX
from lora_ws.models.factors import Factors
from lora_ws.models.probes import ModuleProbes

LAYOUT = Layout.from_layers(
    [
        LayerSpec("a", 6, 5, 1),
        LayerSpec("b", 4, 7, 2),
        LayerSpec("c", 6, 5, 1),
        LayerSpec("d", 6, 5, 3),
    ]
)
# Group and place within it of each module: by shape and rank.
PLACES = [(0, 0), (1, 0), (0, 1), (2, 0)]


def rows(n: int = 3) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((n, LAYOUT.size))


def factors(row: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    return [
        (row[up].reshape(layer.up_shape), row[down].reshape(layer.down_shape))
        for layer, down, up in LAYOUT.pairs()
    ]


def built(spec: Metanetwork) -> MetanetModule:
    torch.manual_seed(0)
    return spec.build(InputSpec.of(LAYOUT), 3).double().eval()


def mlp(module: MetanetModule, features: list[np.ndarray]) -> np.ndarray:
    """The head of a network on the features of all modules of one adapter."""
    x = torch.from_numpy(np.concatenate(features))[None]
    return module.output(torch.relu(module.norm(module.linear(x))))[0].detach().numpy()  # type: ignore[operator]


@pytest.mark.parametrize("share", ["none", "shape"])
def test_probes_see_the_dense_updates_in_the_order_of_modules(share: str) -> None:
    torch.manual_seed(0)
    reads = Factors(LAYOUT)
    net = ModuleProbes(reads, tuple(VIEWS), 3, share=share, standardize=True).double()  # type: ignore[arg-type]
    got = net(reads(torch.from_numpy(rows()))).detach().numpy()
    assert got.shape == (3, 4, net.features) == (3, 4, 36)
    for row, mine in zip(rows(), got, strict=True):
        for module, (up, down) in enumerate(factors(row)):
            update, wanted = up @ down, []
            seen = {"update": update, "transposed": update.T}
            seen |= {"left_gram": update @ update.T, "right_gram": update.T @ update}
            group, place = PLACES[module]
            for number, name in enumerate(VIEWS):
                view, *columns = net.columns[number]
                sides = [p[group].detach().numpy() for p in (net.up, net.down)]
                sides = [p[place] if share == "none" else p for p in sides]
                projection = sides[view.transposed][:, columns[0]]
                probes = sides[view.transposed == view.gram][:, columns[1]]
                made = seen[name] @ probes
                unit = (made - made.mean()) / made.std(ddof=1)
                wanted.append((projection.T @ unit).ravel())
            np.testing.assert_allclose(mine[module], np.concatenate(wanted), rtol=0, atol=EXACT)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_gl_net_is_the_one_of_its_equations(layers: int) -> None:
    net = built(GLNet(hidden=4, layers=layers, width=5, norm=False))
    got = net(torch.from_numpy(rows())).detach().numpy()
    for row, mine in zip(rows(), got, strict=True):
        features = []
        for module, (up, down) in enumerate(factors(row)):
            group, place = PLACES[module]
            maps = [p[place].detach().numpy().T for p in net.maps[group]]  # type: ignore[index]
            u, v = maps[0] @ up, maps[1] @ down.T
            for write, read in zip(maps[2::2], maps[3::2], strict=True):
                product = u @ v.T
                u = write @ (u * (product.sum(1) > 0)[:, None])
                v = read @ (v * (product.sum(0) > 0)[:, None])
            features.append((u @ v.T).ravel())
        np.testing.assert_allclose(mine, mlp(net, features), rtol=0, atol=EXACT)


def test_norm_of_gl_net_divides_the_product_and_tells_the_size() -> None:
    net = built(GLNet(hidden=4, layers=1, width=5))
    got = net(torch.from_numpy(rows())).detach().numpy()
    for row, mine in zip(rows(), got, strict=True):
        features = []
        for module, (up, down) in enumerate(factors(row)):
            group, place = PLACES[module]
            write, read = (p[place].detach().numpy().T for p in net.maps[group])  # type: ignore[index]
            product = write @ up @ down @ read.T
            size = np.log(1 + np.square(up @ down).sum())
            features.append(np.append(4 * product / np.linalg.norm(product), size))
        np.testing.assert_allclose(mine, mlp(net, features), rtol=0, atol=EXACT)


def test_left_gram_reads_the_gram_matrix_of_each_update() -> None:
    net = built(LeftGram(probes=3, width=5))
    got = net.embed(torch.from_numpy(rows())).detach().numpy()
    for row, mine in zip(rows(), got, strict=True):
        features = []
        for module, (up, down) in enumerate(factors(row)):
            group, place = PLACES[module]
            probes = net.probes[group][place].detach().numpy()  # type: ignore[index]
            square = np.square(up @ down).sum()
            gram = probes.T @ up @ down @ down.T @ up.T @ probes * len(up) / (square + 1e-8)
            features.append(np.append(gram[np.triu_indices(3)], np.log(1 + square)))
        wanted = net.pool(torch.from_numpy(np.stack(features))[None])[0]  # type: ignore[operator]
        np.testing.assert_allclose(mine, wanted.detach().numpy(), rtol=0, atol=EXACT)


ONE = ["mid_block*.attn2.to_v"]  # 1280 x 768


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "matrices", "millions"),
    [
        (GLNet(hidden=64, width=16), None, 10.6),
        (GLNet(hidden=64, width=128), None, 39.9),
        (GLNet(hidden=16, width=64), None, 2.64),
        (GLNet(), None, 1.32),
        (ProbeX(), None, 1.32),
        (MVProbe(views=("left_gram",)), None, 1.32),
        (MVProbe(), None, 5.29),
        (MVProbe(pool="transformer"), None, 4.34),
        (LeftGram(), None, 1.25),
        (ProbeX(probes=128, width=512), ONE, 8.66),
        (MVProbe(probes=128, width=512), ONE, 34.6),
    ],
    ids=str,
)
def test_parameters_are_those_of_the_literature_on_stable_diffusion(
    spec: Metanetwork, matrices: list[str] | None, millions: float
) -> None:
    """Counts of the published networks, to the digits given, but for sizes and normalisations."""
    for rank in (1, 4):
        layout = Layout.sd15_qv(rank).choose(matrices).layout
        with torch.device("meta"):
            net = spec.build(InputSpec.of(layout), 10)
        count = sum(p.numel() for p in net.parameters())
        assert count / 1e6 == pytest.approx(millions, rel=0.02)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (ProbeX(width=0), "width of at least 1"),
        (ProbeX(probes=0), "probes of at least 1"),
        (ProbeX(share="all"), "share of none or shape"),  # type: ignore[arg-type]
        (MVProbe(input_dropout=1.0), "from 0 to below 1"),
        (MVProbe(views=()), "each once"),
        (MVProbe(views=("update", "update")), "each once"),
        (MVProbe(views=("left",)), "expected views of update, transposed, left_gram"),  # type: ignore[arg-type]
        (MVProbe(pool="mean"), "expected concat or transformer"),  # type: ignore[arg-type]
        (GLNet(layers=0), "layers and width of at least 1"),
        (LeftGram(probes=0), "probes and width of at least 1"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused(spec: Metanetwork, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        spec.build(InputSpec.of(LAYOUT), 3)

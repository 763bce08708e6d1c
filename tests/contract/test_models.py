"""What every registered network promises, and toy networks that break each promise."""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from tolerances import EXACT
from torch import Tensor, nn

import lora_ws.models
from lora_ws.adapters import LayerSpec, Layout
from lora_ws.config import load_spec, to_plain
from lora_ws.learn.spec import ExperimentSpec
from lora_ws.models import (
    MLP,
    W2T,
    DeepSets,
    GLNet,
    InputSpec,
    LeftGram,
    MetanetModule,
    Metanetwork,
    ModuleTransformer,
    MVProbe,
    OAlignMLP,
    ProbeX,
    SignNet,
    SketchTransformer,
    SpectralMLP,
)
from lora_ws.models.base import Symmetry
from lora_ws.models.normalizers import Normalizer
from lora_ws.models.tokens import TokenModule

SMALL: list[Metanetwork] = [
    MLP(hidden=(8, 5)),
    DeepSets(width=8, depth=2, probes=4),
    ModuleTransformer(width=8, depth=2, heads=2, probes=4),
    ProbeX(probes=3, width=8),
    ProbeX(probes=3, width=8, share="shape"),
    MVProbe(probes=2, width=8),
    MVProbe(probes=2, width=8, sizes=False, standardize=False, pool="transformer"),
    MVProbe(probes=2, width=8, sizes=False, views=("left_gram", "right_gram"), share="shape"),
    GLNet(hidden=3, width=8),
    GLNet(hidden=4, width=8, layers=3, norm=False),
    LeftGram(probes=3, width=8),
    SpectralMLP(width=8),
    OAlignMLP(width=8),
    SignNet(hidden=4, features=3, width=8),
    SignNet(side="both", hidden=4, features=3, width=8),
    W2T(width=8, depth=1, heads=2, signs="random"),
    W2T(side="left", width=8, depth=1, heads=2),
    SketchTransformer(probes=3, width=8, token=8, depth=1, heads=2),
    SketchTransformer(side="both", probes=3, width=8, token=8, depth=1, heads=2),
]
NETWORKS = pytest.mark.parametrize("spec", SMALL, ids=lambda spec: type(spec).__name__)
OUTPUTS = 3
SYMMETRIES: tuple[Symmetry, ...] = ("gl", "sign", "scale", "negation")
# What is said to change the outputs must move them more than rounding by this much.
SEEN = 1e4 * EXACT


def layout(rank: int = 2, other: int | None = None) -> Layout:
    """Four modules of three shapes, the last of another rank."""
    widths = [("a", 6, 5), ("b", 4, 7), ("c", 6, 5)]
    layers = [LayerSpec(name, inputs, out, rank) for name, inputs, out in widths]
    return Layout.from_layers([*layers, LayerSpec("d", 6, 5, other or rank + 1)])


def draw(shape: Layout, n: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(n, shape.size, generator=torch.Generator().manual_seed(seed)).double()


def make(spec: Metanetwork, shape: Layout, seed: int = 0) -> MetanetModule:
    """A network in float64 that evaluates, its normalizer fitted on rows of its own."""
    torch.manual_seed(seed)
    reads = InputSpec.of(shape) if spec.reads == "factors" else InputSpec(shape.size)
    module = spec.build(reads, OUTPUTS)
    module.normalizer.fit(draw(shape, 9, seed=1).numpy(), np.arange(9))
    return module.double().eval()


def factors(rows: Tensor, shape: Layout) -> list[tuple[Tensor, Tensor]]:
    """A and B of each module, ``[adapters, rank, in]`` and ``[adapters, out, rank]``."""
    return [
        (rows[:, down].unflatten(1, layer.down_shape), rows[:, up].unflatten(1, layer.up_shape))
        for layer, down, up in shape.pairs()
    ]


def flat(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    return torch.cat([matrix.flatten(1) for pair in pairs for matrix in pair], 1)


def transformed(rows: Tensor, shape: Layout, how: Symmetry, condition: float = 10.0) -> Tensor:
    """The same adapters, their factors or sizes changed; G has a condition number above rank 1."""
    torch.manual_seed(3)
    moved = []
    for a, b in factors(rows, shape):
        rank = a.shape[1]
        ends = 0.0, math.log10(condition)
        sizes = torch.logspace(*ends, rank).double() if rank > 1 else torch.tensor([3.0]).double()
        left, right = (torch.linalg.qr(torch.randn(rank, rank).double()).Q for _ in range(2))
        signs = torch.ones(rank).double()
        signs[::2] = -1
        mixings = {"gl": left * sizes @ right, "sign": signs.diag()}
        mixing = mixings.get(how, torch.eye(rank).double())
        size = {"scale": 2.5, "negation": -1.0}.get(how, 1.0)
        moved.append((torch.linalg.solve(mixing, a), size * b @ mixing))
    return flat(moved)


def same(first: Tensor, second: Tensor) -> None:
    torch.testing.assert_close(first, second, rtol=EXACT, atol=EXACT)


# The promises: each takes a spec and fails where it is broken.


def check_finite(spec: Metanetwork) -> None:
    shape = layout()
    for dtype in (torch.float32, torch.float64):
        module = make(spec, shape).to(dtype).train()
        zero = draw(shape).to(dtype)
        for _, down, up in list(shape.pairs())[1:]:
            zero[1, down], zero[1, up] = 0, 0
        zero[2] = 0
        zero.requires_grad_()
        outputs = module(zero)
        assert outputs.shape == (len(zero), OUTPUTS)
        assert outputs.dtype == dtype
        outputs.square().sum().backward()
        found = [outputs, zero.grad, *(weight.grad for weight in module.parameters())]
        assert all(value is not None and value.isfinite().all() for value in found)


def check_every_weight_learns(spec: Metanetwork) -> None:
    module = make(spec, layout())
    module(draw(layout(), 32)).square().sum().backward()
    assert all(w.grad is not None and w.grad.abs().max() > 0 for w in module.parameters())


def check_rows_alone(spec: Metanetwork) -> None:
    rows, module = draw(layout()), make(spec, layout())
    order = torch.tensor([4, 0, 2])
    same(module(rows)[order], module(rows[order]))
    same(module(rows)[:1], module(rows[:1]))


def check_symmetries(spec: Metanetwork, rank: int = 2) -> None:
    shape = layout(rank)
    rows, module = draw(shape), make(spec, shape)
    assert "sign" in spec.symmetries or "gl" not in spec.symmetries
    outputs = module(rows)
    for how in SYMMETRIES:
        other = module(transformed(rows, shape, how))
        if how in spec.symmetries:
            same(outputs, other)
        else:
            assert (outputs - other).abs().amax(1).min() > SEEN, f"{how} holds, but is not declared"


def check_state(spec: Metanetwork) -> None:
    shape, rows = layout(), draw(layout())
    module = make(spec, shape)
    fresh = make(spec, shape, seed=5)
    assert (fresh(rows) - module(rows)).abs().max() > SEEN
    state = {name: value.numpy().copy() for name, value in module.state_dict().items()}
    fresh.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()})
    assert torch.equal(fresh(rows), module(rows))


def check_plain(spec: Metanetwork) -> None:
    """Constructors only store: the spec is its class path and arguments."""
    names = inspect.signature(type(spec)).parameters
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in names.values())
    again = type(spec)(**spec.get_params())
    assert again.get_params() == spec.get_params() == vars(spec)
    assert vars(clone(spec)) == spec.get_params()
    plain = to_plain(spec)
    assert set(plain) == {"class_path", "init_args"}
    assert set(plain["init_args"]) == set(names)


def check_seed(spec: Metanetwork) -> None:
    rows = draw(layout())
    first, again, other = (make(spec, layout(), seed)(rows) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert (first - other).abs().max() > SEEN


def check_two_steps(spec: Metanetwork) -> None:
    rows, module = draw(layout()), make(spec, layout())
    embedding = module.embed(rows)
    assert embedding.ndim == 2
    assert len(embedding) == len(rows)
    assert torch.equal(module.head(embedding), module(rows))


def check_tokens(spec: Metanetwork) -> None:
    """Tokens are the same before and after a step of training, which makes them once."""
    rows, module = draw(layout()), make(spec, layout())
    if not isinstance(module, TokenModule):
        return
    before = module.tokenize(rows)
    assert not before.requires_grad
    assert torch.equal(module.head(module.embed_tokens(before)), module(rows))
    for parameter in module.parameters():
        parameter.data.add_(1)
    assert torch.equal(module.train().tokenize(rows), before)


def check_normalizer(spec: Metanetwork) -> None:
    """Rows that are not for training change no constant; rows that are change one."""
    shape, rows = layout(), draw(layout(), 12).numpy()
    train = np.arange(0, 12, 2)

    def constants(values: np.ndarray) -> list[Tensor]:
        fitted = make(spec, shape).normalizer.fit(values, train)
        return [value.clone() for value in fitted.state_dict().values()]

    hidden, told = rows.copy(), rows.copy()
    hidden[1::2] *= 100
    told[::2] *= 100
    before = constants(rows)
    assert all(torch.equal(a, b) for a, b in zip(before, constants(hidden), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(before, constants(told), strict=True))


def check_stack(spec: Metanetwork) -> None:
    shape, rows = layout(), draw(layout())
    modules = [make(spec, shape, seed) for seed in range(3)]
    many = spec.stack(modules).eval()
    own = torch.stack([draw(shape, seed=k) for k in range(3)])
    separate = torch.stack([m(x) for m, x in zip(modules, own, strict=True)])
    same(many(own), separate)
    same(many(rows), torch.stack([module(rows) for module in modules]))
    many(rows).square().sum().backward()
    many.keep(torch.tensor([2, 0]))
    assert len(many) == 2
    same(many(rows), torch.stack([modules[2](rows), modules[0](rows)]))
    alone = many.unstack(1).eval()
    assert torch.equal(alone(rows), modules[0](rows))
    assert all(weight.requires_grad for weight in alone.parameters())


CHECKS: list[Callable[[Metanetwork], None]] = [
    check_finite,
    check_every_weight_learns,
    check_rows_alone,
    check_symmetries,
    check_state,
    check_plain,
    check_seed,
    check_two_steps,
    check_tokens,
    check_normalizer,
    check_stack,
]


@NETWORKS
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__[6:])
def test_network(check: Callable[[Metanetwork], None], spec: Metanetwork) -> None:
    check(spec)


@NETWORKS
@pytest.mark.parametrize("rank", [1, 8])
def test_symmetries_at_every_rank(spec: Metanetwork, rank: int) -> None:
    check_symmetries(spec, rank)


@NETWORKS
@pytest.mark.parametrize("condition", [1.0, 100.0])
def test_splits_of_any_condition(spec: Metanetwork, condition: float) -> None:
    """An orthogonal change of basis between the factors, and one that is far from it."""
    shape = layout(4)
    rows, module = draw(shape), make(spec, shape)
    outputs, other = module(rows), module(transformed(rows, shape, "gl", condition))
    if "gl" in spec.symmetries:
        same(outputs, other)
    elif condition > 1:
        assert (outputs - other).abs().amax(1).min() > SEEN


@NETWORKS
def test_padded_rank(spec: Metanetwork) -> None:
    """An adapter of rank 2 in a layout of rank 4: padded with zeros, or split in another way."""
    thin, wide = layout(2, 2), layout(4, 4)
    pairs = factors(draw(thin), thin)
    padded = [(nn.functional.pad(a, (0, 0, 0, 2)), nn.functional.pad(b, (0, 2))) for a, b in pairs]
    split = torch.tensor([[1.0, 0.0, 2.0, 1.0], [0.0, 1.0, -1.0, 1.0]]).double()
    spread = [(torch.linalg.pinv(split) @ a, b @ split) for a, b in pairs]
    module = make(spec, wide)
    outputs = module(flat(padded))
    assert outputs.isfinite().all()
    if "gl" in spec.symmetries:
        same(outputs, module(flat(spread)))
    else:
        assert (outputs - module(flat(spread))).abs().max() > SEEN


@NETWORKS
@pytest.mark.parametrize("rank", [1, 4, 8])
def test_refactored_in_float32(spec: Metanetwork, rank: int) -> None:
    """The same updates split by a singular value decomposition, in the numbers of a file."""
    shape = layout(rank)
    rows = draw(shape)
    split = []
    for a, b in factors(rows, shape):
        u, sizes, v = torch.linalg.svd(b @ a, full_matrices=False)
        keep = min(a.shape[1], sizes.shape[1])
        a, b = torch.zeros_like(a), torch.zeros_like(b)
        a[:, :keep], b[..., :keep] = v[:, :keep], (u * sizes[:, None])[..., :keep]
        split.append((a, b))
    module = make(spec, shape).float()
    outputs, other = module(rows.float()), module(flat(split).float())
    apart = (outputs - other).norm() / outputs.norm()
    assert apart < 1e-4 if "gl" in spec.symmetries else apart > 1e-2


@NETWORKS
def test_through_yaml(spec: Metanetwork, tmp_path: Any) -> None:
    recipe = tmp_path / "recipe.yaml"
    plain = to_plain(ExperimentSpec(model=spec))
    recipe.write_text(f"model: {plain['model']}\n", encoding="utf-8")
    built = load_spec(ExperimentSpec, recipe).model
    assert type(built) is type(spec)
    assert to_plain(built) == plain["model"]
    rows = draw(layout())
    assert torch.equal(make(built, layout())(rows), make(spec, layout())(rows))  # type: ignore[arg-type]


def test_every_registered_network_is_here() -> None:
    registered = [getattr(lora_ws.models, name) for name in lora_ws.models.__all__]
    kinds = {k for k in registered if isinstance(k, type) and issubclass(k, Metanetwork)}
    assert {type(spec) for spec in SMALL} == kinds - {Metanetwork}


# Networks that break one promise each.


class Toy(Metanetwork):
    """Linear in the flat factors, and right."""

    reads = "factors"

    def build(self, inputs: InputSpec, outputs: int) -> MetanetModule:
        return ToyModule(inputs, outputs)


class ToyModule(MetanetModule):
    def __init__(self, inputs: InputSpec, outputs: int) -> None:
        super().__init__(inputs)
        self.linear = nn.Linear(inputs.width, outputs)

    def embed(self, rows: Tensor) -> Tensor:
        return self.normalizer(rows)

    def head(self, embedding: Tensor) -> Tensor:
        return self.linear(embedding)


class NormalisedModule(ToyModule):
    def embed(self, rows: Tensor) -> Tensor:
        return rows / rows.norm(dim=1, keepdim=True)


class UnusedWeightModule(ToyModule):
    def __init__(self, inputs: InputSpec, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.unused = nn.Parameter(torch.ones(1))

    def head(self, embedding: Tensor) -> Tensor:
        return self.linear(embedding) + 0 * self.unused


class BatchCentredModule(ToyModule):
    def embed(self, rows: Tensor) -> Tensor:
        return rows - rows.mean(0)


class ForgetfulModule(ToyModule):
    probe: Tensor

    def __init__(self, inputs: InputSpec, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.register_buffer("probe", torch.randn(inputs.width), persistent=False)

    def embed(self, rows: Tensor) -> Tensor:
        return rows * self.probe


class UnseededModule(ToyModule):
    def __init__(self, inputs: InputSpec, outputs: int) -> None:
        super().__init__(inputs, outputs)
        fresh = np.random.default_rng().standard_normal(self.linear.weight.shape)
        self.linear.weight.data = torch.from_numpy(fresh)


class OwnForwardModule(ToyModule):
    def forward(self, rows: Tensor) -> Tensor:  # type: ignore[override]
        return self.linear(rows) + 1


class Peeking(Normalizer):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(1))

    def fit(self, rows: np.ndarray, train: np.ndarray) -> "Peeking":
        self.scale = torch.tensor([np.abs(rows).mean()])
        return self

    def forward(self, rows: Tensor) -> Tensor:
        return rows / self.scale


class LearnedTokensModule(TokenModule):
    def __init__(self, inputs: InputSpec, outputs: int) -> None:
        super().__init__(inputs)
        self.linear = nn.Linear(inputs.width, outputs)

    def tokenize(self, rows: Tensor) -> Tensor:
        return self.linear(self.normalizer(rows))[:, None]

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        return tokens[:, 0]

    def head(self, embedding: Tensor) -> Tensor:
        return embedding


class PeekingModule(ToyModule):
    def __init__(self, inputs: InputSpec, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.normalizer = Peeking()


@dataclass
class Broken:
    """A toy of this module, and the promise that it breaks."""

    check: Callable[[Metanetwork], None]
    module: Callable[[InputSpec, int], MetanetModule] = ToyModule
    symmetries: frozenset[Symmetry] = frozenset()
    methods: dict[str, Any] = field(default_factory=dict)

    def spec(self) -> Metanetwork:
        body = {
            "symmetries": self.symmetries,
            "build": lambda _, inputs, outputs: self.module(inputs, outputs),
            **self.methods,
        }
        return type("BrokenToy", (Toy,), body)()


def stores_another(self: Any, *, width: int = 8) -> None:
    self.width = width + 1


def stack_the_first(self: Metanetwork, modules: list[MetanetModule]) -> Any:
    return Metanetwork.stack(self, [modules[0]] * len(modules))


BROKEN = {
    "no number where the update is 0": Broken(check_finite, NormalisedModule),
    "a weight that does nothing": Broken(check_every_weight_learns, UnusedWeightModule),
    "rows that see each other": Broken(check_rows_alone, BatchCentredModule),
    "gl and sign declared": Broken(check_symmetries, symmetries=frozenset({"gl", "sign"})),
    "sign declared": Broken(check_symmetries, symmetries=frozenset({"sign"})),
    "scale declared": Broken(check_symmetries, symmetries=frozenset({"scale"})),
    "negation declared": Broken(check_symmetries, symmetries=frozenset({"negation"})),
    "state that is not kept": Broken(check_state, ForgetfulModule),
    "a constructor that computes": Broken(check_plain, methods={"__init__": stores_another}),
    "a seed of its own": Broken(check_seed, UnseededModule),
    "a forward of its own": Broken(check_two_steps, OwnForwardModule),
    "tokens that training changes": Broken(check_tokens, LearnedTokensModule),
    "a look at rows of the test": Broken(check_normalizer, PeekingModule),
    "a stack of one network": Broken(check_stack, methods={"stack": stack_the_first}),
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__[6:])
def test_toy_keeps_every_promise(check: Callable[[Metanetwork], None]) -> None:
    check(Toy())


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_broken_promise_is_found(broken: Broken) -> None:
    with pytest.raises(AssertionError):
        broken.check(broken.spec())


def test_symmetry_that_is_not_declared_is_found() -> None:
    class Modest(Metanetwork):
        reads = "factors"

        def build(self, inputs: InputSpec, outputs: int) -> MetanetModule:
            return DeepSets(width=8, probes=4).build(inputs, outputs)

    with pytest.raises(AssertionError, match="gl holds, but is not declared"):
        check_symmetries(Modest())


def test_every_check_has_a_network_that_fails_it() -> None:
    assert {broken.check for broken in BROKEN.values()} == set(CHECKS)

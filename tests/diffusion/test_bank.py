"""AdapterBank against peft inside a small U-Net, and against merged weights, sample by sample."""

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.numpy import save_file
from shapes import unchecked
from tolerances import EXACT, of_images, rounding, slope
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from lora_ws.adapters import LayerSpec, Layout, read_adapter
from lora_ws.diffusion import AdapterStack, compose
from lora_ws.diffusion.bank import AdapterBank
from lora_ws.diffusion.generation import GenerationSpec
from lora_ws.diffusion.pipeline import generate, load_pipeline
from lora_ws.errors import AdapterError, ConfigError, LayoutError

TARGETS = ("to_q", "to_v")


def make_unet(**changes) -> UNet2DConditionModel:
    """A small U-Net in float64, where bounds can be tight on any machine."""
    torch.manual_seed(0)
    sizes = {
        "sample_size": 8,
        "block_out_channels": (32, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": 24,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**(sizes | changes)).requires_grad_(False).eval().double()


@pytest.fixture(scope="module")
def _unet() -> UNet2DConditionModel:
    return make_unet()


@pytest.fixture
def unet(_unet: UNet2DConditionModel) -> UNet2DConditionModel:
    return copy.deepcopy(_unet)


def layout_of(model: nn.Module, rank: int = 1, endings: Sequence[str] = TARGETS) -> Layout:
    found = [(k, m) for k, m in model.named_modules() if k.rpartition(".")[2] in endings]
    return Layout.from_layers(
        LayerSpec(k, m.in_features, m.out_features, rank)  # type: ignore[arg-type]
        for k, m in found
    )


def random_row(layout: Layout, seed: int, size: float = 0.3) -> Tensor:
    return size * torch.randn(layout.size, generator=torch.Generator().manual_seed(seed))


def random_bank(
    model: nn.Module, ranks: Sequence[int], trainable: Sequence[int] = (), dtype=torch.float64
) -> AdapterBank:
    layouts = [layout_of(model, rank) for rank in ranks]
    rows = [random_row(layout, seed) for seed, layout in enumerate(layouts)]
    return AdapterBank(layouts, rows, trainable, dtype)


def inputs(batch: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn(batch, 4, 8, 8, generator=g).to(dtype),
        "timestep": torch.randint(0, 1000, (batch,), generator=g),
        "encoder_hidden_states": torch.randn(batch, 5, 24, generator=g).to(dtype),
    }


def with_peft(
    model: UNet2DConditionModel, bank: AdapterBank, dtype: torch.dtype = torch.float64
) -> UNet2DConditionModel:
    """A copy in which peft holds the same adapters, ``a0``, ``a1`` and so on."""
    model = copy.deepcopy(model)
    for n, layout in enumerate(bank.layouts):
        add_to_peft(model, f"a{n}", layout, bank.row(n).to(dtype))
    return model


def add_to_peft(model, name: str, layout: Layout, row: Tensor, alpha: float | None = None):
    rank = layout.layers[0].rank
    model.add_adapter(
        LoraConfig(r=rank, lora_alpha=alpha or rank, target_modules=list(TARGETS)), name
    )
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.lora_A[name].to(row.dtype)
            module.lora_B[name].to(row.dtype)
    with torch.no_grad():
        for layer, down, up in layout.pairs():
            module = model.get_submodule(layer.name)
            module.lora_A[name].weight.copy_(row[down].view(layer.down_shape))
            module.lora_B[name].weight.copy_(row[up].view(layer.up_shape))


def peft_row(model: nn.Module, name: str, layout: Layout) -> Tensor:
    parts = []
    for layer in layout.layers:
        module = model.get_submodule(layer.name)
        parts += [module.lora_A[name].weight.flatten(), module.lora_B[name].weight.flatten()]  # type: ignore[index]
    return torch.cat(parts).detach()


def peft_output(model, weights: Sequence[float], **call) -> Tensor:
    model.set_adapters([f"a{n}" for n in range(len(weights))], list(weights))
    return model(**call).sample


def gap(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max())


# Outputs


@pytest.mark.parametrize("ranks", [pytest.param((1, 1, 1), marks=pytest.mark.slow), (4, 1, 2)])
def test_each_sample_equals_peft_with_its_adapter_active(unet, ranks):
    bank = random_bank(unet, ranks)
    call = inputs(6)
    which = [0, 0, 2, 1, 2, 0]
    with torch.no_grad():
        base = unet(**call).sample
        with bank.attach(unet, torch.eye(3)[which]):
            ours = unet(**call).sample
        oracle = with_peft(unet, bank)
        for b, n in enumerate(which):
            theirs = peft_output(oracle, [float(n == m) for m in range(3)], **call)[b]
            assert gap(ours[b], theirs) < EXACT
            assert gap(ours[b], base[b]) > 1e-2


def test_mixtures_equal_peft_with_weighted_adapters(unet):
    bank = random_bank(unet, (2, 1, 3))
    call = inputs(4)
    scales = [[0.8, 0.8, 0.8], [1.0, 0.0, -0.5], [0.0, 0.0, 0.0], [0.3, 2.0, 0.0]]
    with torch.no_grad():
        with bank.attach(unet, torch.tensor(scales, dtype=torch.float64)):
            ours = unet(**call).sample
        oracle = with_peft(unet, bank)
        for b, weights in enumerate(scales):
            assert gap(ours[b], peft_output(oracle, weights, **call)[b]) < EXACT


def test_guidance_doubles_the_rows(unet):
    bank = random_bank(unet, (1, 2))
    call = inputs(6)
    scales = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    with torch.no_grad():
        with bank.attach(unet, scales):
            doubled = unet(**call).sample
        with bank.attach(unet, torch.cat([scales, scales])):
            assert torch.equal(doubled, unet(**call).sample)
        with bank.attach(unet, scales):
            halves = [
                unet(**{k: v[at] for k, v in call.items()}).sample for at in (slice(3), slice(3, 6))
            ]
    assert gap(doubled, torch.cat(halves)) < EXACT


def test_one_row_serves_every_sample(unet):
    bank = random_bank(unet, (1, 2))
    call = inputs(3)
    with torch.no_grad(), bank.attach(unet, [0.5, 0.25]):
        one = unet(**call).sample
    with torch.no_grad(), bank.attach(unet, [[0.5, 0.25]] * 3):
        assert gap(one, unet(**call).sample) < EXACT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_untrained_adapters_change_no_bit(unet, dtype):
    """Of what any adapted module returns in the same pass: passes may differ in their rounding."""
    unet.to(dtype)
    call = inputs(4, dtype=dtype)
    bank = AdapterBank.fresh(layout_of(unet, 2), 3)
    outputs: dict[nn.Module, list[Tensor]] = {module: [] for module in bank.modules_of(unet)}

    def note(module: nn.Module, _: object, output: Tensor) -> None:
        outputs[module].append(output)

    for scales in (torch.eye(3)[[0, 1, 2, 0]], torch.rand(4, 3), torch.zeros(3)):
        with ExitStack() as held, torch.no_grad():
            for module in outputs:  # before the bank's own hook, and after it
                held.callback(module.register_forward_hook(note).remove)
            held.enter_context(bank.attach(unet, scales))
            for module in outputs:
                held.callback(module.register_forward_hook(note).remove)
            unet(**call)
        for seen in outputs.values():
            base, adapted = seen
            assert base.dtype == adapted.dtype == dtype
            assert torch.equal(adapted, base)
            seen.clear()


@pytest.mark.parametrize(
    "factors", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)]
)
def test_a_bfloat16_model_is_as_near_to_the_truth_as_with_peft(unet, factors):
    low = copy.deepcopy(unet).to(torch.bfloat16)
    unet.load_state_dict(low.state_dict())  # the truth: the same numbers, nothing rounded
    bank, exact = (random_bank(unet, (2, 2), dtype=dtype) for dtype in (factors, torch.float64))
    exact.load_state_dict(bank.state_dict())
    call = inputs(4, dtype=torch.bfloat16)
    wide = {k: v.double() if v.is_floating_point() else v for k, v in call.items()}
    scales = torch.eye(2).repeat(2, 1)
    with torch.no_grad():
        with bank.attach(low, scales), exact.attach(unet, scales):
            ours, truth = low(**call).sample, unet(**wide).sample
        assert ours.dtype == torch.bfloat16
        oracle = with_peft(low, bank, factors)
        theirs = torch.stack([peft_output(oracle, scales[b].tolist(), **call)[b] for b in range(4)])

        def error(found: Tensor) -> float:
            return float((found.double() - truth).norm())

        # Two draws of one rounding: their norms differ by the root of the numbers, 3 percent.
        assert error(ours) < 1.3 * error(theirs)
        assert error(low(**call).sample) > 5 * error(ours)


# Outputs of any nested module, against weights merged sample by sample


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleList(nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(2))
        self.head = nn.Linear(5, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.body:
            x = x + block(x)
        return self.head(input=x)


def merged(model: nn.Module, bank: AdapterBank, scales: Tensor) -> nn.Module:
    model = copy.deepcopy(model)
    with torch.no_grad():
        for n, layout in enumerate(bank.layouts):
            for layer, down, up in layout.pairs():
                row = bank.row(n)
                update = row[up].view(layer.up_shape) @ row[down].view(layer.down_shape)
                model.get_submodule(layer.name).weight += scales[n] * update  # type: ignore[operator]
    return model


NESTED = (("body.0.0", 5, 5), ("body.1.0", 5, 5), ("head", 5, 3))


@st.composite
def cases(draw):
    """Adapters of any ranks on some of the modules, and scales with any pattern of zeros."""
    layouts = [
        Layout.from_layers(
            LayerSpec(*shape, draw(st.integers(1, 3)))
            for shape in draw(st.lists(st.sampled_from(NESTED), min_size=1, unique=True))
        )
        for _ in range(draw(st.integers(1, 5)))
    ]
    value = st.sampled_from([0.0, 0.0, 0.0, 1.0, 0.8, -1.5])
    row = st.lists(value, min_size=len(layouts), max_size=len(layouts))
    scales = draw(st.lists(row, min_size=1, max_size=4))
    trainable = draw(st.lists(st.sampled_from(range(len(layouts))), unique=True))
    shape = (len(scales) * draw(st.integers(1, 3)), *draw(st.sampled_from([(), (2,), (2, 3)])))
    return layouts, torch.tensor(scales), trainable, shape


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(cases())
def test_equals_merged_weights_sample_by_sample(case):
    layouts, scales, trainable, shape = case
    torch.manual_seed(0)
    model, x = Nested().double(), torch.randn(*shape, 5).double()
    rows = [random_row(layout, seed) for seed, layout in enumerate(layouts)]
    bank = AdapterBank(layouts, rows, trainable, torch.float64)
    scales = scales.double()
    with bank.attach(model, scales):
        ours = model(x)
    for b in range(len(x)):
        theirs = merged(model, bank, scales[b % len(scales)])(x[b])
        torch.testing.assert_close(ours[b], theirs, atol=EXACT, rtol=EXACT)
    for n, row in enumerate(rows):
        assert torch.equal(bank.row(n), row.double())


def test_a_broken_adapter_spoils_only_its_own_samples():
    model, layout = Nested(), layout_of(Nested(), endings=("head",))
    rows = torch.ones(4, layout.size)
    rows[2] = float("nan")
    bank = AdapterBank.from_rows(rows, layout)
    with bank.attach(model, torch.eye(4)):
        assert model(torch.ones(4, 5)).isnan().all(1).tolist() == [False, False, True, False]


# Training


def noise_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean square of each sample, so that adapters share nothing."""
    return (prediction - target).square().flatten(1).mean(1)


# In float64: Adam divides by the size of the gradient, so in float32 the rounding of a gradient
# near zero becomes a step.
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [(1, 1, 1), (2, 1, 3)])
def test_training_together_equals_peft_one_by_one(unet, ranks):
    steps, each, max_norm, lr, dtype = 30, 2, 0.02, 1e-3, torch.float64
    inits = [AdapterBank.fresh(layout_of(unet, r), 1, seed=n) for n, r in enumerate(ranks)]
    layouts = [b.layout for b in inits]
    bank = AdapterBank(layouts, [b.row(0) for b in inits], range(3), dtype)
    start = [bank.row(n) for n in range(3)]
    batches = [[inputs(each, 100 * n + k, dtype) for n in range(3)] for k in range(steps)]
    noises = torch.randn(steps, 3 * each, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    noises = noises.to(dtype)

    optimizer, norms = torch.optim.AdamW(bank.parameters(), lr), []
    with bank.attach(unet, torch.eye(3).repeat_interleave(each, 0)):
        for batch, noise in zip(batches, noises, strict=True):
            call = {key: torch.cat([b[key] for b in batch]) for key in batch[0]}
            loss = noise_loss(unet(**call).sample, noise).sum() / each
            optimizer.zero_grad()
            loss.backward()
            norms.append(bank.clip_grad_norm(max_norm))
            optimizer.step()

    for n in range(3):
        oracle = copy.deepcopy(unet)
        add_to_peft(oracle, "a", bank.layouts[n], start[n])
        parameters = [p for p in oracle.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr)
        for k in range(steps):
            noise = noises[k, n * each : (n + 1) * each]
            loss = noise_loss(oracle(**batches[k][n]).sample, noise).mean()
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
            assert norm == pytest.approx(float(norms[k][n]), rel=EXACT)
            optimizer.step()
        assert gap(bank.row(n), peft_row(oracle, "a", bank.layouts[n])) < EXACT
        assert gap(bank.row(n), start[n]) > 20 * lr
    assert (torch.stack(norms) > max_norm).any(), "clipping should have had something to do"
    for layer, down, up in bank.layout.pairs():
        rows, rank = bank.rows()[1], ranks[1]
        assert not rows[down].view(layer.down_shape)[rank:].any()
        assert not rows[up].view(layer.up_shape)[:, rank:].any()


def test_only_chosen_adapters_learn(unet):
    bank = random_bank(unet, (1, 2, 1, 1), trainable=[3, 1])
    before = [bank.row(n) for n in range(4)]
    optimizer = torch.optim.AdamW(bank.parameters(), 1e-2, weight_decay=0.5)
    with bank.attach(unet, torch.ones(4)):
        unet(**inputs(2)).sample.square().mean().backward()
    norms = bank.clip_grad_norm(1.0)
    optimizer.step()
    assert (norms > 0).tolist() == [False, True, False, True]
    assert [torch.equal(bank.row(n), before[n]) for n in range(4)] == [True, False, True, False]
    assert all(p.grad is None for p in unet.parameters())


def test_frozen_bank_gives_gradients_to_the_input_only(unet):
    bank = random_bank(unet, (1, 1))
    call = inputs(2)
    call["sample"].requires_grad_()
    with bank.attach(unet, torch.eye(2)):
        unet(**call).sample.sum().backward()
    assert call["sample"].grad is not None
    assert all(p.grad is None and (not p.requires_grad) for p in bank.parameters())
    assert bank.clip_grad_norm(1.0).tolist() == [0, 0]


def test_scales_get_gradients_even_where_they_are_zero():
    torch.manual_seed(0)
    model = Nested().double()
    layout = Layout.from_layers(LayerSpec(*shape, 2) for shape in NESTED[1:])
    bank = AdapterBank.from_rows(torch.randn(3, layout.size), layout, dtype=torch.float64)
    x, scales = torch.randn(2, 4, 5).double(), torch.tensor([[1.0, 0, 0], [0, 0.5, 0]]).double()
    scales.requires_grad_()
    with bank.attach(model, scales):
        for _ in range(2):  # two passes sum up
            model(x).square().sum().backward()
    for b in range(2):
        for n in range(3):

            def value(step: float, b: int = b, n: int = n) -> float:
                moved = scales.detach()[b].clone()
                moved[n] += step
                return merged(model, bank, moved)(x[b]).square().sum().item()

            expected, off = slope(value, 1e-4)
            found = float(scales.grad[b, n])  # type: ignore[index]
            assert found == pytest.approx(2 * expected, rel=0, abs=2 * off)


def test_gradient_checkpointing_inside_the_block(unet):
    call, grads = inputs(2), []
    for checkpointing in (False, True):
        bank = random_bank(unet, (1, 1), trainable=[0, 1])
        unet.train()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        with bank.attach(unet, torch.eye(2)):
            unet(**call).sample.square().mean().backward()
        grads.append(torch.cat([p.grad.flatten() for p in bank.parameters() if p.grad is not None]))
    assert gap(*grads) < EXACT


def test_passes_without_gradients_leave_training_alone(unet):
    bank = random_bank(unet, (1, 1), trainable=[0, 1])
    with bank.attach(unet, torch.eye(2)):
        with torch.inference_mode():
            unet(**inputs(2))
        unet(**inputs(2)).sample.sum().backward()
    assert all((bank.clip_grad_norm(1.0) > 0).tolist())


# The block


def test_scales_change_between_calls(unet):
    bank = random_bank(unet, (1, 2))
    call = inputs(2)
    with torch.no_grad(), bank.attach(unet, [1, 0]) as mixture:
        first = unet(**call).sample
        mixture.set([0, 1])
        second = unet(**call).sample
        mixture.set(torch.eye(2))
        both = unet(**call).sample
    assert gap(both[0], first[0]) < EXACT
    assert gap(both[1], second[1]) < EXACT
    assert gap(first, second) > 1e-2


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("batch", [2, 3])
def test_exceptions_restore_the_model(unet, batch):
    call = inputs(2)
    before = unet(**call).sample
    bank = random_bank(unet, (1, 2))

    def fail() -> None:
        with bank.attach(unet, torch.eye(2)):
            assert gap(unet(**call).sample, before) > 1e-2
            unet(**inputs(batch))  # a batch of 3 raises inside the model
            raise KeyError

    with pytest.raises((KeyError, ConfigError)):
        fail()
    assert hooks(unet) == 0
    assert torch.equal(unet(**call).sample, before)


def test_the_bank_moves_and_the_scales_need_not(unet):
    bank, call = random_bank(unet, (1, 2), trainable=[1]).to("meta"), inputs(4)
    for scales in (torch.eye(2), torch.ones(2)):
        with bank.attach(unet.to("meta"), scales):
            sample = unet(**{key: value.to("meta") for key, value in call.items()}).sample
        assert (sample.device.type, sample.shape) == ("meta", (4, 4, 8, 8))


def test_two_banks_add_up(unet):
    bank = random_bank(unet, (1, 2))
    halves = [AdapterBank([bank.layouts[n]], [bank.row(n)], dtype=torch.float64) for n in range(2)]
    call = inputs(2)
    with torch.no_grad():
        with bank.attach(unet, torch.ones(2)):
            together = unet(**call).sample
        with halves[0].attach(unet, [1]), halves[1].attach(unet, [1]):
            assert gap(unet(**call).sample, together) < EXACT


# In and out


def test_rows_of_a_collection_round_trip(make_zoo):
    zoo = make_zoo(n=5)
    bank = AdapterBank.from_rows(zoo.weights, zoo.layout, trainable=[1, 3])
    assert bank.layout == zoo.layout
    np.testing.assert_array_equal(bank.rows().numpy(), zoo.weights)
    np.testing.assert_array_equal(bank.row(3).numpy(), zoo.weights[3])
    again = AdapterBank.from_rows(bank.rows(), bank.layout)
    assert torch.equal(again.rows(), bank.rows())


def test_unequal_ranks_are_padded_with_zeros():
    model = Nested()
    bank = random_bank_of_head(model, (1, 3))
    assert bank.layout.layers[0].rank == 3
    wide = AdapterBank.from_rows(bank.rows(), bank.layout)
    x = torch.randn(2, 5)
    with bank.attach(model, torch.eye(2)):
        ours = model(x)
    with wide.attach(model, torch.eye(2)):
        assert torch.equal(model(x), ours)


def random_bank_of_head(model: nn.Module, ranks: Sequence[int]) -> AdapterBank:
    layouts = [layout_of(model, rank, ("head",)) for rank in ranks]
    return AdapterBank(layouts, [random_row(x, n) for n, x in enumerate(layouts)])


def test_fresh_factors():
    layout = Layout.known("tiny_sd_qv")
    own, shared = AdapterBank.fresh(layout, 3, seed=5), AdapterBank.fresh(layout, 3, "shared", 5)
    later = AdapterBank.fresh(layout, 1, seed=7)
    assert torch.equal(own.rows()[2], later.rows()[0]), "an adapter's draw is its own"
    assert torch.equal(shared.rows()[0], shared.rows()[2])
    assert torch.equal(shared.rows()[0], own.rows()[0])
    assert not torch.equal(own.rows()[0], own.rows()[1])
    assert own.trainable == (0, 1, 2)


@pytest.mark.parametrize("rank", [1, 4])
def test_fresh_factors_are_distributed_as_those_of_peft(rank):
    model = nn.Sequential(nn.Linear(4000, 8))
    layout = layout_of(model, rank, ("0",))
    row = AdapterBank.fresh(layout, 1).rows()[0]
    config = LoraConfig(r=rank, target_modules=["0"], init_lora_weights="gaussian")
    theirs = get_peft_model(model, config).base_model.model[0].lora_A["default"].weight
    ((_, down, up),) = layout.pairs()
    # The spread of n normal numbers is known to 1 / sqrt(2 n) of itself: five times that.
    rel = 5 / (2 * row[down].numel()) ** 0.5
    assert float(row[down].std()) == pytest.approx(float(theirs.detach().std()), rel=2**0.5 * rel)
    assert float(row[down].std()) == pytest.approx(1 / rank, rel=rel)
    assert not row[up].any()


def write(path: Path, layout: Layout, row: Tensor, alpha: float, **more: np.ndarray) -> Path:
    tensors = dict(more)
    for layer, down, up in layout.pairs():
        stem = f"unet.{layer.name}.lora"
        tensors[f"{stem}.down.weight"] = row[down].view(layer.down_shape).numpy()
        tensors[f"{stem}.up.weight"] = row[up].view(layer.up_shape).numpy()
        tensors[f"unet.{layer.name}.alpha"] = np.float32([alpha])
    save_file(tensors, path)
    return path


def test_adapter_files_act_with_the_scale_they_ask_for(unet, tmp_path):
    call, oracle, adapters = inputs(2), copy.deepcopy(unet), []
    # Powers of two, which the bank folds into float32 factors without rounding.
    for n, (rank, alpha) in enumerate([(2, 1.0), (1, 4.0)]):
        layout = layout_of(unet, rank)
        row = random_row(layout, n)
        adapters.append(read_adapter(write(tmp_path / f"{n}.safetensors", layout, row, alpha)))
        add_to_peft(oracle, f"a{n}", layout, row.double(), alpha)
    bank = AdapterBank.from_adapters(adapters, dtype=torch.float64)
    with torch.no_grad(), bank.attach(unet, torch.eye(2)):
        ours = unet(**call).sample
        for n in range(2):
            theirs = peft_output(oracle, [float(n == m) for m in range(2)], **call)[n]
            assert gap(ours[n], theirs) < EXACT


def test_adapters_of_a_text_encoder_are_refused_or_left_out(unet, tmp_path):
    layout = layout_of(unet)
    stem = "text_encoder.layers.0.self_attn.q_proj.lora"
    other = {f"{stem}.down.weight": np.ones((1, 4)), f"{stem}.up.weight": np.ones((4, 1))}
    file = write(tmp_path / "a.safetensors", layout, random_row(layout, 0), 1.0, **other)
    with pytest.raises(AdapterError, match=r"a\.safetensors: `text_encoder.*ignore_other=True"):
        AdapterBank.from_adapters([read_adapter(file)])
    bank = AdapterBank.from_adapters([read_adapter(file)], ignore_other=True)
    assert gap(bank.rows()[0], random_row(layout, 0)) == 0


# Refusals


def head(width: int = 5, name: str = "head") -> AdapterBank:
    return AdapterBank.fresh(Layout.from_layers([LayerSpec(name, width, 3)]), 2)


@pytest.mark.parametrize(
    ("bank", "says"),
    [
        (head(name="haed"), "Nested has no module `haed`, did you mean `head`"),
        (head(name="body.0.1"), "`body.0.1` is a Tanh; only nn.Linear"),
        (head(width=6), "`head` maps 5 to 3 in this model, but 6 to 3 in the adapters"),
    ],
)
def test_modules_that_do_not_fit(bank, says):
    model = Nested()
    with pytest.raises(LayoutError, match=says), bank.attach(model, torch.eye(2)):
        pass
    assert hooks(model) == 0


def test_modules_that_are_read_but_not_called(unet):
    attention = nn.MultiheadAttention(4, 2)
    bank = AdapterBank.fresh(Layout.from_layers([LayerSpec("out_proj", 4, 4)]), 1)
    with pytest.raises(LayoutError, match="without calling it"), bank.attach(attention, [1]):
        pass
    bank = random_bank(unet, (1,))
    unet.fuse_qkv_projections()
    with pytest.raises(LayoutError, match="unfuse_qkv_projections"), bank.attach(unet, [1]):
        pass
    unet.unfuse_qkv_projections()
    with bank.attach(unet, [1]):
        pass


@pytest.mark.parametrize(
    ("scales", "says"),
    [
        (torch.eye(3), r"expected scales of shape \[rows, 2\] or \[2\].*got \[3, 3\]"),
        (torch.zeros(0, 2), "got \\[0, 2\\]"),
        ([1.0, float("nan")], "finite scales"),
    ],
)
def test_scales_that_do_not_fit(scales, says):
    with pytest.raises(ConfigError, match=says), head().attach(Nested(), scales):
        pass


def test_batches_that_do_not_fit():
    model = Nested()
    with head().attach(model, torch.eye(2)):
        with pytest.raises(ConfigError, match="a batch of 3, expected a multiple of the 2 rows"):
            model(torch.ones(3, 5))
        with pytest.raises(ConfigError, match="called on shape"):
            model.head(torch.ones(5))


def test_batch_folded_into_another_dimension():
    class Folding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x.flatten(0, 1))

    model, x = Folding(), torch.ones(2, 4, 5)
    with head().attach(model, torch.eye(2)) as mixture:
        with pytest.raises(ConfigError, match=r"in a batch of 2: .* give one row"):
            model(x)
        mixture.set([1, 0])
        assert model(x).shape == (8, 3)


def test_building_blocks_that_do_not_fit():
    layout = Layout.from_layers([LayerSpec("head", 5, 3)])
    row = torch.zeros(layout.size)
    with pytest.raises(ConfigError, match="at least one adapter"):
        AdapterBank([], [])
    with pytest.raises(ConfigError, match="expected 2 rows"):
        AdapterBank([layout] * 2, [row])
    with pytest.raises(LayoutError, match="adapter 1: expected 8 numbers"):
        AdapterBank([layout] * 2, [row, row[1:]])
    with pytest.raises(ConfigError, match="trainable: expected numbers from 0 to 0, got 1"):
        AdapterBank([layout], [row], [1])
    with pytest.raises(ConfigError, match="init `shared` or `per_adapter`"):
        unchecked(AdapterBank.fresh)(layout, 1, "same")
    other = Layout.from_layers([LayerSpec("head", 5, 4)])
    with pytest.raises(LayoutError, match="not of one base"):
        AdapterBank([layout, other], [row, torch.zeros(9)])


@pytest.mark.slow
@pytest.mark.parametrize("trainable", [(), (0,)])
def test_factors_go_where_their_module_is(trainable: tuple[int, ...], unet) -> None:
    """On a stand-in for a GPU, which refuses operations on tensors of two devices."""
    bank = random_bank(unet, (1, 2), trainable, torch.float32)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with bank.attach(unet, torch.eye(2)), mode:
        there = {"device": "lazy", "dtype": torch.float16}
        weights = {name: torch.empty(p.shape, **there) for name, p in unet.named_parameters()}
        given = {name: torch.empty(x.shape, **there) for name, x in inputs(4).items()}
        said = functional_call(unet, weights, kwargs=given).sample
    assert (said.device.type, said.dtype) == ("lazy", torch.float16)
    assert {(p.device.type, p.dtype) for p in bank.parameters()} == {("cpu", torch.float32)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_adapters_act_in_half_precision_as_weights_that_they_are_added_to(dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 64), nn.Linear(64, 32)).double()
    layout = Layout.from_layers([LayerSpec("0", 48, 64, 4), LayerSpec("1", 64, 32, 2)])
    bank = AdapterBank([layout], [random_row(layout, 0)])
    x = torch.randn(8, 48, dtype=torch.float64)
    with torch.no_grad(), bank.attach(model, [1.0]):
        exact = model(x)
        half = model.to(dtype)(x.to(dtype))
    assert half.dtype == dtype
    size = float(exact.abs().max())
    # Weights, factors and inputs are rounded too, once each.
    atol = rounding(48 + 4 + 64 + 2, size=size, steps=3, dtype=dtype)
    assert torch.allclose(half.double(), exact, atol=atol, rtol=0)
    assert not torch.allclose(half.double(), model.double()(x), atol=atol, rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_draws_what_the_cpu_draws() -> None:
    pipelines = [load_pipeline("digit-sd", device) for device in ("cpu", "cuda")]
    generation = GenerationSpec("a photo of three", num_inference_steps=4, seed=3)
    layout = layout_of(pipelines[0].unet, 2)
    stack = AdapterStack(("a",), AdapterBank([layout], [random_row(layout, 0)]), (1.0,))
    drawn = []
    for pipeline in pipelines:
        with compose(pipeline, stack):
            drawn.append(generate(pipeline, generation, images=2))
    assert pipelines[1].unet.device.type == "cuda"
    atol = of_images(pipelines[0], 4, generation.guidance_scale)
    assert torch.allclose(*drawn, atol=atol, rtol=0)

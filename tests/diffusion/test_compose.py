"""Composition against diffusers, loops written by hand, and the paper's formulas."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.spatial.distance import cosine as scipy_cosine
from shapes import unchecked
from tolerances import of_images, rounding, terms_of
from torch import Tensor

import lora_ws.diffusion
from lora_ws.adapters import Adapter, LayerSpec, Layout, read_adapter
from lora_ws.diffusion import compose
from lora_ws.diffusion.bank import AdapterBank
from lora_ws.diffusion.generation import GenerationSpec
from lora_ws.diffusion.methods import (
    BatchedSets,
    Composite,
    Merge,
    Method,
    Regions,
    Schedule,
    Switch,
)
from lora_ws.diffusion.pipeline import adapter_layout, generate, initial_noise, load_pipeline
from lora_ws.diffusion.prompts import encode_prompts, token_ids
from lora_ws.diffusion.stack import AdapterStack
from lora_ws.diffusion.text_encoders import prompt_weights
from lora_ws.errors import AdapterError, ConfigError, DeprecatedName, LayoutError, Notice

PROMPTS = ["a photo of three", "a photo of seven"]
SCALES = (0.8, 1.0, 0.5)
GUIDANCE, STEPS = 3.0, 6
# Convolutions that the adapters adapt too, and the sizes of their kernels.
KERNELS = {
    "down_blocks.0.attentions.0.proj_in": 1,
    "down_blocks.0.downsamplers.0.conv": 3,
    "mid_block.resnets.0.conv1": 3,
}
METHODS = (Merge(), Merge(normalised=True), Switch(), Composite())


@pytest.fixture(scope="module")
def _pipeline() -> Any:
    return load_pipeline("digit-sd")


@pytest.fixture
def pipeline(_pipeline: Any) -> Iterator[Any]:
    """Left as it was found, by every test."""
    before = copy.deepcopy(_pipeline.unet.state_dict())
    yield _pipeline
    unet = _pipeline.unet
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in unet.modules())
    assert all(torch.equal(before[name], value) for name, value in unet.state_dict().items())


def write(folder: Path, layout: Layout, seed: int, size: float = 0.3) -> Path:
    """An adapter as diffusers writes it, of random numbers."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in layout.layers:
        for role, shape in (("A", layer.down_shape), ("B", layer.up_shape)):
            values = size * torch.randn(shape, generator=generator)
            if layer.name in KERNELS:
                kernel = KERNELS[layer.name] if role == "A" else 1
                values = values.view(len(values), -1, kernel, kernel)
            tensors[f"unet.{layer.name}.lora_{role}.weight"] = values
    file = folder / f"adapter{seed}.safetensors"
    save_file(tensors, file)
    return file


@pytest.fixture
def files(_pipeline: Any, tmp_path: Path) -> list[Path]:
    """Three adapters of ranks 1, 2 and 3, the last of fewer modules."""
    unet, layouts = _pipeline.unet, []
    for k, rank in enumerate((1, 2, 3)):
        few = adapter_layout(unet, rank, ("to_q", "to_v")[: 1 + (k < 2)])
        convolutions = [
            LayerSpec(name, weight[0].numel(), len(weight), rank)
            for name in list(KERNELS)[: 3 - (k == 2)]
            for weight in [unet.get_submodule(name).weight]
        ]
        layouts.append(Layout.from_layers([*few.layers, *convolutions]))
    return [write(tmp_path, layout, k) for k, layout in enumerate(layouts)]


@pytest.fixture
def adapters(files: list[Path]) -> list[Adapter]:
    return [read_adapter(file) for file in files]


def asked(prompts: Sequence[str], **how: Any) -> GenerationSpec:
    settings = {"guidance_scale": GUIDANCE, "num_inference_steps": STEPS, "seed": 3}
    return GenerationSpec(tuple(prompts), **{**settings, **how})


def images(pipeline: Any, guidance: float = GUIDANCE, steps: int = STEPS) -> Tensor:
    return generate(pipeline, asked(PROMPTS, guidance_scale=guidance, num_inference_steps=steps))


def composed(
    pipeline: Any, adapters: Any, method: Method, scales: Any = None, **how: Any
) -> Tensor:
    with compose(pipeline, adapters, method, scales):
        return images(pipeline, **how)


def close(pipeline: Any, one: Tensor, other: Tensor) -> None:
    """Images are the same but for rounding."""
    atol = of_images(pipeline, STEPS, GUIDANCE)
    assert torch.allclose(one, other, atol=atol, rtol=0), (one - other).abs().max()


def merged_weights(unet: Any, adapters: list[Adapter], scales: Any) -> Any:
    """A copy of the U-Net with updates added to its weights."""
    made = copy.deepcopy(unet)
    for adapter, scale in zip(adapters, scales, strict=True):
        for name, module in adapter.modules.items():
            factors = module.up.astype(float), module.down.astype(float)
            update = torch.from_numpy(scale * module.scale * factors[0] @ factors[1])
            weight = made.get_submodule(name).weight
            weight.data += update.view(weight.shape)
    return made


@pytest.mark.parametrize("adapters_of", range(1, 6))
@pytest.mark.parametrize("tau", range(1, 8))
def test_turns_of_switch_are_those_of_the_formula(adapters_of: int, tau: int) -> None:
    k = adapters_of
    formula = [int(((t - 1) % (k * tau)) / tau) for t in range(1, 61)]
    assert [Switch(tau).turn(step, k) for step in range(60)] == formula
    released = [Switch(tau, compat=True).turn(step, k) for step in range(60)]
    assert released[: tau + 1] == [0] * (tau + 1)
    assert released[1:] == formula[:-1]


def test_weighted_turns_have_their_shares() -> None:
    turns = [Switch(tau=5, weights=(3, 1, 1)).turn(step, 3) for step in range(30)]
    assert [turns.count(k) for k in range(3)] == [18, 6, 6]
    assert turns[:15] == turns[15:]


def test_turns_follow_the_steps_of_the_pipeline(pipeline: Any, adapters: list[Adapter]) -> None:
    seen = []
    with compose(pipeline, adapters, Switch(tau=2), SCALES):
        name = adapters[0].layout.layers[0].name

        def note(module: Any, args: Any, output: Tensor) -> None:
            update = output - torch.nn.functional.linear(args[0], module.weight, module.bias)
            alone = [
                scale * args[0] @ torch.from_numpy(a.modules[name].up @ a.modules[name].down).T
                for a, scale in zip(adapters, SCALES, strict=True)
            ]
            seen.append(min(range(3), key=lambda k: float((update - alone[k]).abs().max())))

        with pipeline.unet.get_submodule(name).register_forward_hook(note):
            images(pipeline, steps=9)
    assert seen == [0, 0, 1, 1, 2, 2, 0, 0, 1]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_one_adapter_is_that_adapter(
    method: Method, pipeline: Any, adapters: list[Adapter]
) -> None:
    expected = composed(pipeline, adapters[:1], Merge(), [0.7])
    assert torch.equal(composed(pipeline, adapters[:1], method, [0.7]), expected)
    assert (expected - images(pipeline)).abs().max() > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_untrained_adapters_change_nothing(method: Method, pipeline: Any) -> None:
    bank = AdapterBank.fresh(adapter_layout(pipeline.unet, 2), 2)
    stack = AdapterStack(("a", "b"), bank, (1.0, 1.0))
    close(pipeline, composed(pipeline, stack, method), images(pipeline))


def test_merge_is_merged_weights_and_what_diffusers_does(
    pipeline: Any, adapters: list[Adapter], files: list[Path]
) -> None:
    ours = composed(pipeline, adapters, Merge(), SCALES)
    own = pipeline.unet
    pipeline.unet = merged_weights(own, adapters, SCALES)
    merged = images(pipeline)
    pipeline.unet = copy.deepcopy(own)
    for k, file in enumerate(files):
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=f"a{k}")
    pipeline.set_adapters(["a0", "a1", "a2"], list(SCALES))
    theirs = images(pipeline)
    pipeline.unet = own
    close(pipeline, ours, merged)
    close(pipeline, ours, theirs)


# The adapters of each prediction that a step's one is the mean of, and how much it counts.
MEANS: dict[Method, list[tuple[float, dict[int, float]]]] = {
    Merge(): [(1, {0: 1, 1: 1, 2: 1})],
    Merge(normalised=True): [(1, {0: 1 / 3, 1: 1 / 3, 2: 1 / 3})],
    Switch(): [(1, {0: 1})],
    Composite(): [(1 / 3, {0: 1}), (1 / 3, {1: 1}), (1 / 3, {2: 1})],
    Composite((2.0, 1.0, 1.0)): [(1 / 2, {0: 1}), (1 / 4, {1: 1}), (1 / 4, {2: 1})],
    Schedule(((0, 0.5), (0.5, 1), (0, 1))): [(1, {0: 1, 2: 1})],
}


@pytest.mark.parametrize("method", MEANS, ids=str)
def test_in_float64_a_prediction_is_that_of_merged_weights(
    method: Method, pipeline: Any, adapters: list[Adapter]
) -> None:
    """Only scales and weights are float32, so that a scale off by a hundredth shows clearly."""
    wide = SimpleNamespace(unet=copy.deepcopy(pipeline.unet).double(), scheduler=pipeline.scheduler)
    bank = AdapterBank.from_adapters(adapters, dtype=torch.float64)
    stack = replace(AdapterStack.of(adapters, SCALES), bank=bank)
    text = encode_prompts(pipeline, PROMPTS).double()
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).double()

    def mean(error: float = 0.0) -> Tensor:
        total = torch.zeros_like(x)
        for weight, shares in MEANS[method]:
            scales = [SCALES[k] * (shares.get(k, 0) + error * (k == 0)) for k in range(3)]
            total += weight * merged_weights(wide.unet, adapters, scales)(x, 500, text).sample
        return total

    with torch.no_grad():
        with compose(wide, stack, method):
            found = wide.unet(x, 500, text).sample
        expected, wrong = mean(), mean(0.01)
    atol = rounding(1, size=float(expected.abs().max()))
    assert torch.allclose(found, expected, atol=atol, rtol=0)
    assert (wrong - expected).abs().max() > 100 * atol


def ddim(pipeline: Any, unets: list[Any], weights: list[float], guidance: float) -> Tensor:
    """A loop by hand: guidance in every model, then the mean (section 3 of the paper)."""
    from lora_ws.diffusion.pipeline import decode_latents

    scheduler = pipeline.scheduler
    scheduler.set_timesteps(6)
    text, empty = encode_prompts(pipeline, PROMPTS), encode_prompts(pipeline, ["", ""])
    latents = initial_noise(pipeline, [3, 4]) * scheduler.init_noise_sigma
    with torch.no_grad():
        for time in scheduler.timesteps:
            noise = torch.zeros_like(latents)
            for unet, weight in zip(unets, weights, strict=True):
                plain = unet(latents, time, empty).sample
                asked = unet(latents, time, text).sample
                noise += weight * (plain + guidance * (asked - plain))
            latents = scheduler.step(noise, time, latents).prev_sample
    return decode_latents(pipeline, latents)


@pytest.mark.slow
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("weights", [None, (2.0, 1.0, 1.0)])
def test_composite_is_the_mean_of_guided_predictions(
    guidance: float, weights: Any, pipeline: Any, adapters: list[Adapter]
) -> None:
    pairs = zip(adapters, SCALES, strict=True)
    unets = [merged_weights(pipeline.unet, [adapter], [scale]) for adapter, scale in pairs]
    shares = [weight / sum(weights or (1, 1, 1)) for weight in weights or (1, 1, 1)]
    expected = ddim(pipeline, unets, shares, guidance)
    close(
        pipeline,
        composed(pipeline, adapters, Composite(weights), SCALES, guidance=guidance),
        expected,
    )


@pytest.mark.slow
def test_composite_of_equal_ones_is_one_and_order_is_nothing_to_it(
    pipeline: Any, adapters: list[Adapter]
) -> None:
    one = composed(pipeline, adapters[1:2], Merge())
    with pytest.warns(Notice, match="it counts twice"):
        thrice = composed(pipeline, [adapters[1]] * 3, Composite())
    close(pipeline, thrice, one)
    forth = composed(pipeline, adapters, Composite(), SCALES)
    back = composed(pipeline, adapters[::-1], Composite(), SCALES[::-1])
    close(pipeline, forth, back)
    switched = composed(pipeline, adapters, Switch(1), SCALES)
    assert (
        switched - composed(pipeline, adapters[::-1], Switch(1), SCALES[::-1])
    ).abs().max() > 0.01


@pytest.mark.slow
def test_long_turns_are_the_first_adapter_alone(pipeline: Any, adapters: list[Adapter]) -> None:
    alone = composed(pipeline, adapters[:1], Merge(), SCALES[:1])
    close(pipeline, composed(pipeline, adapters, Switch(tau=6), SCALES), alone)


def test_regions_are_their_owners(pipeline: Any, adapters: list[Adapter]) -> None:
    masks = torch.zeros(3, 8, 8)
    masks[0, :, :4], masks[1, :4, 4:], masks[2, 6:, 4:] = 1, 1, 1
    unet, text = pipeline.unet, encode_prompts(pipeline, PROMPTS)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        with compose(pipeline, adapters, Regions(masks), SCALES):
            whole = unet(x, 500, text).sample
            (as_tuple,) = unet(x, 500, text, return_dict=False)
        base = unet(x, 500, text).sample
        expected = base * (1 - masks.sum(0))
        for mask, adapter, scale in zip(masks, adapters, SCALES, strict=True):
            expected += mask * merged_weights(unet, [adapter], [scale])(x, 500, text).sample
    atol = rounding(terms_of(unet), size=float(expected.abs().max()))
    assert torch.allclose(whole, expected, atol=atol, rtol=0)
    assert torch.allclose(as_tuple, expected, atol=atol, rtol=0)


@pytest.mark.slow
def test_schedules_turn_adapters_on_and_off(pipeline: Any, adapters: list[Adapter]) -> None:
    whole = Schedule(((0, 1), (0, 1), (0, 1)))
    close(
        pipeline,
        composed(pipeline, adapters, whole, SCALES),
        composed(pipeline, adapters, Merge(), SCALES),
    )
    turns = Schedule(((0, 0.5), (0.5, 1)))
    close(
        pipeline,
        composed(pipeline, adapters[:2], turns, SCALES[:2]),
        composed(pipeline, adapters[:2], Switch(tau=3), SCALES[:2]),
    )


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_second_call_is_the_first_again(
    method: Method, pipeline: Any, adapters: list[Adapter]
) -> None:
    with compose(pipeline, adapters, method, SCALES):
        assert torch.equal(images(pipeline), images(pipeline))


@pytest.mark.slow
def test_the_released_composite_forgets_at_the_second_call(
    pipeline: Any, adapters: list[Adapter]
) -> None:
    with compose(pipeline, adapters, Composite(compat=True), SCALES):
        first, second = images(pipeline), images(pipeline)
    close(pipeline, first, composed(pipeline, adapters, Composite(), SCALES))
    close(pipeline, second, composed(pipeline, adapters[2:], Merge(), SCALES[2:]))


def test_a_failure_leaves_the_pipeline_as_it_was(pipeline: Any, adapters: list[Adapter]) -> None:
    before = images(pipeline)

    def fail(*_: object, **__: object) -> dict:
        raise RuntimeError("in a step")

    block = compose(pipeline, adapters, Composite(), SCALES)
    with pytest.raises(RuntimeError, match="in a step"), block:
        pipeline(PROMPTS, num_inference_steps=4, callback_on_step_end=fail)
    assert torch.equal(images(pipeline), before)


WRONG: dict[str, tuple[Any, str]] = {
    "scales": (lambda p, a: compose(p, a, Merge(), [1.0]), "scales: expected 3"),
    "not finite": (lambda p, a: compose(p, a, Merge(), [1, 2, float("nan")]), "scales: .* got nan"),
    "none": (lambda p, a: compose(p, []), "at least one"),
    "tau": (lambda p, a: compose(p, a, Switch(tau=0)), "tau: expected at least 1"),
    "weights": (lambda p, a: compose(p, a, Composite((1.0, 2.0))), "weights: expected 3"),
    "masks": (lambda p, a: compose(p, a, Regions(torch.ones(2, 8, 8))), "masks: expected"),
    "windows": (lambda p, a: compose(p, a, Schedule(((0, 1),))), "windows: expected 3"),
    "a mode of text": (
        lambda p, a: contextmanager(unchecked(compose))(p, a, text="frist"),
        "did you mean `first`",
    ),
    "window": (lambda p, a: compose(p, a, Schedule(((0, 1), (1, 0), (0, 1)))), "start < stop"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_does_not_fit_is_named(wrong: str, pipeline: Any, adapters: list[Adapter]) -> None:
    call, text = WRONG[wrong]
    with pytest.raises(ConfigError, match=text), call(pipeline, adapters):
        raise AssertionError("it began")


def test_adapters_of_another_base_are_refused(pipeline: Any, tmp_path: Path) -> None:
    (first, *_) = adapter_layout(pipeline.unet).layers
    foreign = Layout.from_layers([LayerSpec(first.name, 768, 320, 1)])
    file = write(tmp_path, foreign, 0)
    with pytest.raises(LayoutError, match="is this their base"), compose(pipeline, [file]):
        raise AssertionError("it began")


TEXT = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"


@pytest.fixture
def spoken(files: list[Path], tmp_path: Path) -> list[Path]:
    """Two adapters, of the text encoder too."""
    made = []
    for k, file in enumerate(files[:2]):
        generator = torch.Generator().manual_seed(100 + k)
        down, up = (torch.randn(shape, generator=generator) for shape in ((2, 48), (48, 2)))
        more = {f"{TEXT}.lora_A.weight": down, f"{TEXT}.lora_B.weight": up}
        made.append(tmp_path / f"spoken{k}.safetensors")
        save_file({**load_file(file), **more}, made[-1])
    return made


def text_encoder(pipeline: Any, file: Path, scale: float, onto: Any = None) -> Any:
    """A copy of the text encoder with an adapter's update added to its weights."""
    made, tensors = copy.deepcopy(onto or pipeline.text_encoder), load_file(file)
    update = tensors[f"{TEXT}.lora_B.weight"] @ tensors[f"{TEXT}.lora_A.weight"]
    made.encoder.layers[0].self_attn.q_proj.weight.data += scale * update
    return made


@pytest.mark.slow
def test_text_encoders_adapters_are_added_taken_from_the_first_or_left_out(
    pipeline: Any, spoken: list[Path], files: list[Path]
) -> None:
    own, scales = pipeline.text_encoder, SCALES[:2]
    first = text_encoder(pipeline, spoken[0], scales[0])
    encoders = {
        "merged": text_encoder(pipeline, spoken[1], scales[1], first),
        "first": first,
        "none": own,
    }
    drawn = {}
    for mode, encoder in encoders.items():
        with compose(pipeline, spoken, Composite(), scales, text=mode):  # type: ignore[arg-type]
            drawn[mode] = images(pipeline)
        pipeline.text_encoder = encoder
        try:
            close(pipeline, drawn[mode], composed(pipeline, files[:2], Composite(), scales))
        finally:
            pipeline.text_encoder = own
    assert (drawn["merged"] - drawn["first"]).abs().max() > 0.01
    assert (drawn["first"] - drawn["none"]).abs().max() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("method", [Composite(), Switch(tau=6)], ids=["composite", "switch"])
@pytest.mark.parametrize("by_hand", [False, True], ids=["pipeline", "denoise"])
def test_each_prediction_sees_its_own_adapters_text(
    method: Method, by_hand: bool, pipeline: Any, spoken: list[Path]
) -> None:
    scales, own = SCALES[:2], pipeline.text_encoder
    with compose(pipeline, spoken, method, scales, text="per_adapter"):
        if by_hand:
            from lora_ws.diffusion.pipeline import decode_latents, denoise, initial_noise

            *_, last = denoise(pipeline, initial_noise(pipeline, [3, 4]), asked(PROMPTS))
            drawn = decode_latents(pipeline, last)
        else:
            drawn = images(pipeline)
    texts = []
    for file, scale in zip(spoken, scales, strict=True):
        pipeline.text_encoder = text_encoder(pipeline, file, scale)
        pipeline.text_encoder, encoder = own, pipeline.text_encoder
        texts.append(encoder)
    unets = [
        merged_weights(pipeline.unet, [_unet_part(file)], [scale])
        for file, scale in zip(spoken, scales, strict=True)
    ]
    weights = [1.0, 0.0] if isinstance(method, Switch) else [0.5, 0.5]
    expected = ddim_with_texts(pipeline, unets, texts, weights)
    close(pipeline, drawn, expected)


def _unet_part(file: Path) -> Adapter:
    read = read_adapter(file)
    own = {name: m for name, m in read.modules.items() if m.component == "unet"}
    return replace(read, modules=own)


def ddim_with_texts(
    pipeline: Any, unets: list[Any], encoders: list[Any], weights: list[float]
) -> Tensor:
    """`ddim` where every model has embeddings of its own."""
    from lora_ws.diffusion.pipeline import decode_latents
    from lora_ws.diffusion.prompts import token_ids

    scheduler, noise = pipeline.scheduler, initial_noise(pipeline, [3, 4])
    scheduler.set_timesteps(6)
    latents = noise * scheduler.init_noise_sigma
    with torch.no_grad():
        said = [
            [encoder(input_ids=token_ids(pipeline, texts))[0] for texts in (PROMPTS, ["", ""])]
            for encoder in encoders
        ]
        for time in scheduler.timesteps:
            total = torch.zeros_like(latents)
            for unet, (text, empty), weight in zip(unets, said, weights, strict=True):
                plain = unet(latents, time, empty).sample
                total += weight * (plain + 3.0 * (unet(latents, time, text).sample - plain))
            latents = scheduler.step(total, time, latents).prev_sample
    return decode_latents(pipeline, latents)


def test_texts_of_each_adapter_need_a_method_that_runs_each_alone(
    pipeline: Any, spoken: list[Path]
) -> None:
    block = compose(pipeline, spoken, Merge(), text="per_adapter")
    with pytest.raises(ConfigError, match="Switch or Composite, got Merge"), block:
        raise AssertionError("it began")
    with (
        compose(pipeline, spoken, Composite(), text="per_adapter"),
        pytest.raises(ConfigError, match="embedded inside the block"),
    ):
        pipeline(prompt_embeds=torch.randn(1, 10, 48), guidance_scale=1.0, num_inference_steps=2)


def test_what_cannot_be_applied_is_not_left_out_in_silence(
    pipeline: Any, files: list[Path], tmp_path: Path
) -> None:
    name = "unet.down_blocks.0.resnets.0.conv1"
    more = {
        f"{name}.lora_A.weight": torch.ones(1, 32, 3),
        f"{name}.lora_B.weight": torch.ones(32, 1, 1),
    }
    file = tmp_path / "both.safetensors"
    save_file({**load_file(files[0]), **more}, file)
    with (
        pytest.raises(AdapterError, match=r"conv1.*1-D convolution.*ignore_other=True"),
        compose(pipeline, [file]),
    ):
        raise AssertionError("it began")
    stack = AdapterStack.of([file], ignore_other=True)
    close(pipeline, composed(pipeline, stack, Merge()), composed(pipeline, files[:1], Merge()))


@pytest.mark.slow
@pytest.mark.parametrize("method", [Merge(), Switch(tau=2), Composite()], ids=str)
def test_sets_together_are_each_set_by_itself(
    method: Method, pipeline: Any, adapters: list[Adapter]
) -> None:
    sets = ((0, 1), (2, 0), (1, 2))
    with compose(pipeline, adapters, BatchedSets(method, sets), SCALES):
        seeds = [3, 3, 3, 4, 4, 4]
        drawn = generate(pipeline, asked(PROMPTS[:1]), seeds=seeds)
    for n, places in enumerate(sets):
        chosen, scales = [adapters[k] for k in places], [SCALES[k] for k in places]
        with compose(pipeline, chosen, method, scales):
            alone = generate(pipeline, asked(PROMPTS[:1]), images=2)
        close(pipeline, drawn[n::3], alone)


def test_prompts_weigh_adapters(pipeline: Any) -> None:
    prompt, triggers = "a photo of three", ("three", "photo")
    encoder, ids = pipeline.text_encoder, lambda text: token_ids(pipeline, [text])
    pooled = [
        encoder(input_ids=ids(text)).pooler_output[0]
        for text in (prompt, "a photo of", "a of three", *triggers)
    ]
    cosine = [1 - float(scipy_cosine(pooled[0], other)) for other in pooled[1:]]
    absence = [1 - value for value in cosine[:2]]
    expected = [value / sum(absence) for value in absence]
    bound = rounding(terms_of(encoder))  # of a cosine
    found = prompt_weights(pipeline, prompt, triggers, "absence")
    assert found == pytest.approx(expected, abs=bound / sum(absence))
    presence = [value / sum(cosine[2:]) for value in cosine[2:]]
    found = prompt_weights(pipeline, prompt, triggers, "presence")
    assert found == pytest.approx(presence, abs=bound / sum(cosine[2:]))
    with pytest.raises(ConfigError, match="phrases of the prompt, got `seven`"):
        prompt_weights(pipeline, prompt, ["seven"], "absence")


def test_an_old_name_is_the_new_one_with_a_notice() -> None:
    with pytest.warns(DeprecatedName, match="Stack` is deprecated.*AdapterStack"):
        assert lora_ws.diffusion.Stack is AdapterStack

"""Inversion against diffusers and by drawing again, late ablation against true, and agreement."""

import copy
import warnings
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddim_inverse import DDIMInverseScheduler
from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteScheduler
from diffusers.schedulers.scheduling_lcm import LCMScheduler
from diffusers.schedulers.scheduling_pndm import PNDMScheduler
from tolerances import of_images, rounding
from torch import Tensor

from lora_ws.attribution.ablation import ablate
from lora_ws.attribution.agreement import agreement, late_start_curve
from lora_ws.attribution.inversion import invert, pseudo_ablate
from lora_ws.attribution.trajectory import trajectory
from lora_ws.diffusion.bank import AdapterBank
from lora_ws.diffusion.generation import GenerationSpec
from lora_ws.diffusion.pipeline import (
    PipelineSize,
    adapter_layout,
    build_pipeline,
    denoise,
    load_pipeline,
)
from lora_ws.diffusion.prompts import encode_prompts
from lora_ws.diffusion.schedulers import timesteps_of
from lora_ws.diffusion.stack import AdapterStack
from lora_ws.errors import ConfigError
from lora_ws.threads import threads

SIZE = PipelineSize(16, (8, 8), (16, 16), 1, 2, 2, 16, 1, norm_groups=8)
GENERATION = GenerationSpec("a photo of three", seed=5, num_inference_steps=3, guidance_scale=2)


@pytest.fixture(scope="module")
def _pipeline() -> Any:
    return load_pipeline("digit-sd")


@pytest.fixture
def pipeline(_pipeline: Any) -> Iterator[Any]:
    """Left as it was found, by every test; on one thread, where rows of a batch are alike."""
    before, scheduler = copy.deepcopy(_pipeline.unet.state_dict()), _pipeline.scheduler
    settings = dict(scheduler.config)
    with threads(1):
        yield _pipeline
    unet = _pipeline.unet
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in unet.modules())
    assert not any(w.requires_grad for w in unet.parameters())
    assert all(torch.equal(before[name], value) for name, value in unet.state_dict().items())
    assert _pipeline.scheduler is scheduler
    assert dict(scheduler.config) == settings


def make_stack(pipeline: Any, size: float = 0.1) -> AdapterStack:
    """Three adapters of random numbers; the last one is untrained and does nothing."""
    layout = adapter_layout(pipeline.unet, 2)
    rows = size * torch.randn(3, layout.size, generator=torch.Generator().manual_seed(0))
    for _, _, up in layout.pairs():
        rows[2, up] = 0
    return AdapterStack(
        ("ink", "dots", "nothing"),
        AdapterBank.from_rows(rows, layout, dtype=pipeline.unet.dtype),
        (0.8, 0.5, 1.0),
    )


def drawn(pipeline: Any, stack: AdapterStack, generation: GenerationSpec, noise: Tensor) -> Tensor:
    """The latents that a generation ends with."""
    with stack.bank.attach(pipeline.unet, torch.tensor(stack.scales)):
        return list(denoise(pipeline, noise, generation))[-1]


def off(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.slow
def test_there_and_back_is_within_a_hundredth(pipeline: Any) -> None:
    stack, generation = make_stack(pipeline), replace(GENERATION, num_inference_steps=10)
    last = trajectory(pipeline, stack, generation)[-1]
    errors = []
    for iterations in (0, 10):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            back = invert(
                pipeline, stack, generation, last, guidance_scale=2, fixed_point_iters=iterations
            )
        assert torch.equal(back[-1], last)
        errors.append(off(drawn(pipeline, stack, generation, back[0]), last))
    assert errors[1] < 0.01 < 0.1 < errors[0]


def untrained(kind: str = "epsilon") -> Any:
    """A pipeline in float64."""
    pipeline = build_pipeline(SIZE, ["three"])
    for part in (pipeline.unet, pipeline.text_encoder):
        part.double()
    config: Any = pipeline.scheduler.config
    pipeline.scheduler = DDIMScheduler.from_config(config, prediction_type=kind)
    return pipeline


ANY = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).double()


def test_without_iterations_it_is_the_inversion_of_diffusers() -> None:
    pipeline = untrained()
    stack, generation = (
        make_stack(pipeline, 0.3),
        GenerationSpec("three", num_inference_steps=6, guidance_scale=1),
    )
    found = invert(pipeline, stack, generation, ANY, guidance_scale=1, fixed_point_iters=0)
    inverse: Any = DDIMInverseScheduler.from_config(pipeline.scheduler.config)
    inverse.set_timesteps(6)
    expected, text = [ANY], encode_prompts(pipeline, ["three"]).expand(2, -1, -1)
    with torch.no_grad(), stack.bank.attach(pipeline.unet, torch.tensor(stack.scales)):
        for time in inverse.timesteps:
            said = pipeline.unet(expected[-1], time, encoder_hidden_states=text).sample
            expected.append(inverse.step(said, time, expected[-1]).prev_sample)
    # Schedulers keep their coefficients in float32; a step multiplies and adds twice.
    atol = rounding(4, size=float(found.abs().max()), steps=6)
    assert torch.allclose(found, torch.stack(expected[::-1]), rtol=0, atol=atol)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_every_step_back_is_undone_by_a_step_of_the_scheduler(kind: str) -> None:
    pipeline = untrained(kind)
    stack, generation = (
        make_stack(pipeline, 0.3),
        GenerationSpec("three", num_inference_steps=3, guidance_scale=1),
    )
    found = invert(pipeline, stack, generation, ANY, guidance_scale=1, fixed_point_iters=30)
    text = encode_prompts(pipeline, ["three"]).expand(2, -1, -1)
    with torch.no_grad(), stack.bank.attach(pipeline.unet, torch.tensor(stack.scales)):
        for k, time in enumerate(pipeline.scheduler.timesteps):
            said = pipeline.unet(found[k], time, encoder_hidden_states=text).sample
            step = pipeline.scheduler.step(said, time, found[k]).prev_sample
            # Iterations stop at 1e-5 of the latents, which a step makes up to ten times larger.
            assert off(step, found[k + 1]) < 1e-4


def test_other_guidance_is_warned_of(pipeline: Any) -> None:
    stack, generation = make_stack(pipeline), replace(GENERATION, num_inference_steps=1)
    last = torch.zeros(1, 4, 8, 8)
    with pytest.warns(UserWarning, match="guided by 2 and its inversion by 1"):
        invert(pipeline, stack, generation, last, guidance_scale=1, fixed_point_iters=0)


@pytest.mark.slow
def test_from_the_first_of_cached_latents_it_is_the_true_ablation(pipeline: Any) -> None:
    stack = make_stack(pipeline)
    cached = trajectory(pipeline, stack, GENERATION)
    true, found = (
        ablate(pipeline, stack, GENERATION),
        pseudo_ablate(pipeline, stack, GENERATION, cached, start=0),
    )
    assert found.names == true.names
    for name in ("full", "base", "leave_one_out"):
        assert torch.equal(getattr(found, name), getattr(true, name))
    late = pseudo_ablate(pipeline, stack, GENERATION, cached, start=2)
    expected = ablate(pipeline, stack, GENERATION, start=2)
    bound = of_images(pipeline, GENERATION.num_inference_steps, GENERATION.guidance_scale)
    assert torch.allclose(late.leave_one_out, expected.leave_one_out, atol=bound, rtol=0)
    assert float(late.effects[0]) < float(true.effects[0])


@pytest.mark.slow
@pytest.mark.parametrize("start", [0, 2])
def test_an_adapter_of_zeros_changes_nothing(pipeline: Any, start: int) -> None:
    stack = make_stack(pipeline, 0.3)
    cached = trajectory(pipeline, stack, GENERATION)
    bound = of_images(pipeline, GENERATION.num_inference_steps - start, GENERATION.guidance_scale)
    inverted = invert(
        pipeline, stack, GENERATION, cached[-1], guidance_scale=2, fixed_point_iters=1
    )
    for latents in (cached, inverted):
        maps = pseudo_ablate(pipeline, stack, GENERATION, latents, start=start).maps
        assert maps[2].max() < bound
        assert (maps[:2].amax(dim=(1, 2)) > 4 * bound).all()


def attribution(maps: np.ndarray, shares: list[float]) -> Any:
    return SimpleNamespace(maps=torch.tensor(maps), shares=torch.tensor(shares))


def test_agreement_is_of_tops_maps_and_shares() -> None:
    rng = np.random.default_rng(0)
    one, two = rng.random((2, 2, 3, 4, 4))
    one[1, 2] = 0
    ours = [attribution(one[0], [0.6, 0.3, 0.1]), attribution(one[1], [0.2, 0.8, 0.0])]
    true = [attribution(two[0], [0.5, 0.2, 0.3]), attribution(two[1], [0.5, 0.4, 0.1])]
    found = agreement(ours, true)
    pairs = [(p, k) for p in range(2) for k in range(3) if (p, k) != (1, 2)]
    maps = [np.corrcoef(one[p, k].ravel(), two[p, k].ravel())[0, 1] for p, k in pairs]
    shares = [
        np.corrcoef(a.shares.numpy(), b.shares.numpy())[0, 1]
        for a, b in zip(ours, true, strict=True)
    ]
    assert found.top1 == 0.5
    assert found.map_correlation == pytest.approx(np.mean(maps))
    assert found.share_correlation == pytest.approx(np.mean(shares))
    assert found.pictures == 2
    assert found.majority == 1
    assert agreement(ours[::-1], [true[0], ours[1]]).majority == 0.5
    more = agreement([*ours, ours[0]], [*true, ours[1]])
    assert more.majority == pytest.approx(2 / 3)
    without: Any = SimpleNamespace(maps=None, shares=torch.tensor([0.5, 0.2, 0.3]))
    blind = agreement([without], true[:1])
    assert (blind.top1, blind.share_correlation) == (1, pytest.approx(1))
    assert np.isnan(blind.map_correlation)


@pytest.mark.slow
def test_the_later_the_start_the_cheaper_and_the_further_from_true(pipeline: Any) -> None:
    stack = make_stack(pipeline, 0.2)
    generations = [
        GenerationSpec(f"a photo of {word}", num_inference_steps=8, guidance_scale=1)
        for word in ("three", "seven")
    ]
    curve = late_start_curve(pipeline, stack, generations, (0, 0.25, 0.75), batch=5)
    assert [row.start for row in curve] == [0, 0.25, 0.75]
    # Of five images, four are saved.
    assert [row.cost for row in curve] == pytest.approx([1, 0.8, 0.4])
    assert curve[0].agreement[:3] == pytest.approx((1, 1, 1))
    correlations = [row.agreement.map_correlation for row in curve]
    assert all(np.diff(correlations) < 0.02)
    assert correlations[-1] < 0.9


LATENTS = torch.zeros(1, 4, 8, 8)
WRONG: dict[str, tuple[Any, str]] = {
    "iterations": (
        lambda p, s: invert(p, s, GENERATION, LATENTS, guidance_scale=2, fixed_point_iters=-1),
        "0 or more",
    ),
    "prompt": (
        lambda p, s: invert(p, s, GenerationSpec("a cow"), LATENTS, guidance_scale=3),
        "no `cow`",
    ),
    "latents": (
        lambda p, s: pseudo_ablate(p, s, GENERATION, LATENTS.expand(3, 1, -1, -1, -1), start=0),
        "before each of 3 steps",
    ),
    "start": (
        lambda p, s: pseudo_ablate(p, s, GENERATION, LATENTS.expand(4, 1, -1, -1, -1), start=3),
        "from 0 to 2",
    ),
    "generations": (lambda p, s: late_start_curve(p, s, []), "generations: expected"),
    "starts": (lambda p, s: late_start_curve(p, s, [GENERATION], [1.0]), "starts: expected"),
    "pictures": (lambda p, s: agreement([], []), "the same images"),
    "adapters": (
        lambda p, s: agreement(
            [attribution(np.zeros((1, 2, 2)), [1.0])], [attribution(np.zeros((2, 2, 2)), [1.0, 0])]
        ),
        "the same adapters",
    ),
    "pixels": (
        lambda p, s: agreement(
            [attribution(np.zeros((1, 2, 2)), [1.0])], [attribution(np.zeros((1, 3, 2)), [1.0])]
        ),
        "the same pixels",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_bad_input_is_named(wrong: str, pipeline: Any) -> None:
    call, text = WRONG[wrong]
    with pytest.raises(ConfigError, match=text):
        call(pipeline, make_stack(pipeline))


SCHEDULERS: dict[str, tuple[type, dict[str, Any], str]] = {
    "another": (PNDMScheduler, {}, "DDIMScheduler.from_config"),
    "clips": (DDIMScheduler, {"clip_sample": True}, "clip_sample=False"),
    "kind": (DDIMScheduler, {"prediction_type": "sample"}, "epsilon or v_prediction"),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_that_cannot_be_inverted_are_refused(name: str, pipeline: Any) -> None:
    kind, options, text = SCHEDULERS[name]
    scheduler: Any = kind
    other = SimpleNamespace(
        scheduler=scheduler.from_config(pipeline.scheduler.config, **options),
        unet=pipeline.unet,
        tokenizer=pipeline.tokenizer,
    )
    with pytest.raises(ConfigError, match=text):
        invert(other, make_stack(pipeline), GENERATION, LATENTS, guidance_scale=2)


@pytest.mark.parametrize("kind", [HeunDiscreteScheduler, LCMScheduler, PNDMScheduler])
def test_latents_alone_do_not_say_how_others_go_on(kind: Any, pipeline: Any) -> None:
    before = pipeline.scheduler
    pipeline.scheduler = kind.from_config(before.config)
    try:
        generation = replace(GENERATION, num_inference_steps=4)
        steps = len(timesteps_of(pipeline.scheduler, 4))
        latents = LATENTS.expand(steps + 1, 1, -1, -1, -1)
        text = f"{kind.__name__} remembers steps or draws noise"
        with pytest.raises(ConfigError, match=text):
            pseudo_ablate(pipeline, make_stack(pipeline), generation, latents, start=1)
    finally:
        pipeline.scheduler = before

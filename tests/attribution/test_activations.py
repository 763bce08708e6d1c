"""Changes of blocks against numpy on configurations run one by one, and where they must be zero."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tolerances import of_images, rounding, terms_of
from torch import Tensor

from lora_ws.attribution.activations import (
    block_names,
    block_sensitivity,
    cache_safe_blocks,
    relative_variance,
)
from lora_ws.attribution.trajectory import record, trajectory
from lora_ws.diffusion.bank import AdapterBank
from lora_ws.diffusion.generation import GenerationSpec
from lora_ws.diffusion.pipeline import (
    PipelineSize,
    adapter_layout,
    build_pipeline,
    decode_latents,
    generate,
    initial_noise,
    load_pipeline,
)
from lora_ws.diffusion.prompts import encode_prompts
from lora_ws.diffusion.stack import AdapterStack
from lora_ws.errors import ConfigError
from lora_ws.report.grid import markdown
from lora_ws.threads import threads

SIZE = PipelineSize(16, (8, 8), (16, 16), 1, 2, 2, 16, 1, norm_groups=8)
BLOCKS = ("conv_in", "down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1")
GENERATIONS = [
    GenerationSpec(
        "a photo of cat",
        negative_prompt="dog",
        guidance_scale=2.0,
        num_inference_steps=2,
        seed=seed,
    )
    for seed in (0, 1)
]
FIRST, LAST = "down_blocks.0.", "up_blocks.1."


@pytest.fixture(scope="module")
def _pipeline() -> Any:
    pipeline = build_pipeline(SIZE, ["cat", "dog"])
    pipeline.unet.requires_grad_(False).eval()
    return pipeline


@pytest.fixture
def pipeline(_pipeline: Any) -> Iterator[Any]:
    """Without hooks after every test."""
    with threads(1):
        yield _pipeline
    modules = list(_pipeline.unet.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)


def bound_of(pipeline: Any) -> float:
    """Relative, of what a block returns after two steps under guidance of 2."""
    return rounding(terms_of(pipeline.unet), steps=2 * 3)


def make_stack(pipeline: Any, *only: str, size: float = 0.5) -> AdapterStack:
    """An adapter of random numbers for each start of module names, "" for all modules."""
    layout = adapter_layout(pipeline.unet, 2)
    generator = torch.Generator().manual_seed(3)
    rows = size * torch.randn(len(only), layout.size, generator=generator)
    for row, start in zip(rows, only, strict=True):
        for layer, _, up in layout.pairs():
            row[up] *= layer.name.startswith(start)
    names = tuple(f"adapter {k}" for k in range(len(only)))
    return AdapterStack(names, AdapterBank.from_rows(rows, layout), (1.0,) * len(only))


def by_hand(pipeline: Any, latents: Tensor, time: Tensor) -> dict[str, np.ndarray]:
    """Outputs of the blocks at one latent, without the prompt and with it."""
    seen: dict[str, np.ndarray] = {}
    handles = []
    for name in BLOCKS:

        def keep(_: Any, __: Any, output: Any, name: str = name) -> None:
            first = output[0] if isinstance(output, tuple) else output
            seen[name] = first.double().numpy().ravel()

        handles.append(pipeline.unet.get_submodule(name).register_forward_hook(keep))
    text = encode_prompts(pipeline, ["dog", "a photo of cat"])
    with torch.no_grad():
        pipeline.unet(torch.cat([latents, latents]), time, encoder_hidden_states=text)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.slow
def test_measures_are_those_of_configurations_one_by_one(pipeline: Any) -> None:
    stack = make_stack(pipeline, "", FIRST)
    rows = torch.tensor([[1.0, 1.0], [0.7, 0.0], [0.0, -0.5]])
    found = block_sensitivity(pipeline, stack, GENERATIONS, rows)
    variance, change = [], []
    for generation in GENERATIONS:
        with stack.bank.attach(pipeline.unet, torch.ones(2)):
            run: list[Tensor] = [initial_noise(pipeline, [generation.seed])]
            pipeline(
                generation.prompt,
                negative_prompt=generation.negative_prompt,
                latents=run[0],
                num_inference_steps=2,
                guidance_scale=2.0,
                output_type="latent",
                callback_on_step_end=lambda _, __, ___, kept, run=run: (
                    run.append(kept["latents"].clone()) or kept
                ),
            )
        for latents, time in zip(run, pipeline.scheduler.timesteps, strict=False):
            outputs = []
            for row in (torch.zeros(2), *rows):
                with stack.bank.attach(pipeline.unet, row):
                    outputs.append(by_hand(pipeline, latents, time))
            arrays = [np.stack([output[name] for output in outputs]) for name in BLOCKS]
            variance.append([a[1:].var(0).sum() / (a[1:].mean(0) ** 2).sum() for a in arrays])
            norms = [np.linalg.norm(a[1:] - a[0], axis=1) / np.linalg.norm(a[0]) for a in arrays]
            change.append(np.stack(norms, axis=1))
    assert found.blocks == BLOCKS
    assert len(variance) == 4
    bound = 2 * bound_of(pipeline)  # of a difference of two outputs, relative to either
    mean, change = np.mean(variance, axis=0), np.array(change)
    np.testing.assert_allclose(found.variance, mean, atol=2 * bound * mean.max() ** 0.5)
    np.testing.assert_allclose(found.change, change.mean(axis=0), atol=bound)
    np.testing.assert_allclose(found.worst, change.max(axis=(0, 1)), atol=bound)


def test_a_trajectory_has_the_size_of_the_picture(pipeline: Any) -> None:
    wide = replace(GENERATIONS[0], width=24, height=16, num_inference_steps=1)
    stack = make_stack(pipeline, "")
    last = trajectory(pipeline, stack, wide)[-1]
    assert last.shape == (1, SIZE.latent_channels, 8, 12)
    with stack.attach(pipeline, torch.tensor(stack.scales)):
        drawn = generate(pipeline, wide)
    torch.testing.assert_close(
        decode_latents(pipeline, last), drawn, atol=of_images(pipeline, 1, 2.0), rtol=0
    )


def test_along_their_own_trajectories_pictures_are_those_of_the_pipeline(pipeline: Any) -> None:
    stack, generation = make_stack(pipeline, "", FIRST), GENERATIONS[0]
    rows = torch.tensor([[0.0, 0.0], [1.0, 0.5]])
    latents = record(
        pipeline, stack, generation, rows, ["mid_block"], lambda moment: moment.latents
    )
    whole = trajectory(pipeline, stack, generation, rows)
    assert torch.equal(torch.stack(latents), whole[:-1])
    for row, last in zip(rows, whole[-1], strict=True):
        with stack.bank.attach(pipeline.unet, row):
            expected = pipeline(
                generation.prompt,
                negative_prompt=generation.negative_prompt,
                latents=initial_noise(pipeline, [generation.seed]),
                num_inference_steps=2,
                guidance_scale=2.0,
                output_type="latent",
            ).images[0]
        atol = bound_of(pipeline) * float(expected.abs().max())
        assert torch.allclose(last, expected, rtol=0, atol=atol)


@pytest.mark.slow
@pytest.mark.parametrize("forced", [True, False])
def test_identical_configurations_differ_by_nothing(pipeline: Any, forced: bool) -> None:
    stack = make_stack(pipeline, "")
    found = block_sensitivity(pipeline, stack, GENERATIONS, torch.full((3, 1), 0.8), forced=forced)
    bound = bound_of(pipeline)
    assert (found.variance < bound**2).all()
    assert (found.change[:, 1:] > bound).all()
    none = block_sensitivity(pipeline, stack, GENERATIONS, torch.zeros(2, 1), forced=forced)
    assert (none.worst < bound).all()


def test_an_adapter_of_the_last_block_leaves_all_earlier_ones_alone(pipeline: Any) -> None:
    stack = make_stack(pipeline, LAST)
    forced, bound = (
        block_sensitivity(pipeline, stack, GENERATIONS, [[0.0], [1.0]]),
        bound_of(pipeline),
    )
    assert (forced.variance[:-1] < bound**2).all()
    assert (forced.worst[:-1] < bound).all()
    assert forced.variance[-1] > 1e-6
    assert cache_safe_blocks(forced, bound).safe == BLOCKS[:-1]
    # Its latents drift, and every block with them, though no adapter touches these.
    free = block_sensitivity(pipeline, stack, GENERATIONS, [[0.0], [1.0]], forced=False)
    assert (free.variance > bound**2).all()
    with pytest.raises(ConfigError, match="measure with forced=True"):
        cache_safe_blocks(free)


def test_an_adapter_of_the_first_block_changes_all_later_ones(pipeline: Any) -> None:
    found = block_sensitivity(pipeline, make_stack(pipeline, FIRST), GENERATIONS, [[0.0], [1.0]])
    bound = bound_of(pipeline)
    assert found.variance[0] < bound**2
    assert (found.variance[1:] > bound**2).all()
    report = cache_safe_blocks(found, bound)
    assert report.safe == ("conv_in",)
    table = markdown(report.grid()).splitlines()
    assert [line.split(" | ")[1] for line in table[2:8]] == ["yes", *["no"] * 5]


def test_a_block_behind_one_that_changes_is_not_safe(pipeline: Any) -> None:
    found = block_sensitivity(pipeline, make_stack(pipeline, FIRST), GENERATIONS[:1], [[1.0]])
    worst = float(found.worst[1])
    found.worst[2:] = 0
    report = cache_safe_blocks(found, worst / 2)
    assert report.safe == ("conv_in",)
    assert "no, an earlier block changes" in markdown(report.grid())
    assert cache_safe_blocks(found, worst).safe == BLOCKS


@pytest.mark.slow
def test_the_bundled_base_has_the_same_blocks_and_is_left_as_found() -> None:
    pipeline = load_pipeline("digit-sd")
    assert block_names(pipeline.unet) == BLOCKS
    generation = GenerationSpec("three", num_inference_steps=2, guidance_scale=1)
    before = generate(pipeline, generation)
    found = block_sensitivity(pipeline, make_stack(pipeline, ""), [generation], [[0.8], [0.0]])
    assert (found.variance[1:] > bound_of(pipeline) ** 2).all()
    assert torch.equal(generate(pipeline, generation), before)


def test_nothing_to_nothing_is_no_change() -> None:
    assert float(relative_variance(torch.zeros(3, 4))) == 0


WRONG: dict[str, tuple[Any, str]] = {
    "generations": (lambda p, s: block_sensitivity(p, s, [], [[1.0]]), "generations: expected"),
    "rows": (lambda p, s: block_sensitivity(p, s, GENERATIONS, [[1.0, 2.0]]), "rows of 1 scales"),
    "scales": (lambda p, s: trajectory(p, s, GENERATIONS[0], [[1.0, 2.0]]), "rows of 1 numbers"),
    "model": (lambda p, s: block_names(p.vae), "has no conv_in"),
    "module": (
        lambda p, s: record(p, s, GENERATIONS[0], [[1.0]], ["midblock"], id),
        "did you mean `mid_block`",
    ),
    "prompt": (
        lambda p, s: block_sensitivity(p, s, [GenerationSpec("a photo of cow")], [[1.0]]),
        "no `cow`",
    ),
    "tolerance": (
        lambda p, s: cache_safe_blocks(block_sensitivity(p, s, GENERATIONS[:1], [[1.0]]), -1),
        "tolerance: expected",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_bad_input_is_named(wrong: str, pipeline: Any) -> None:
    call, text = WRONG[wrong]
    with pytest.raises(ConfigError, match=text):
        call(pipeline, make_stack(pipeline, ""))

"""Pipelines of every family against diffusers itself and against its own adapters."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from PIL import Image
from tiny_pipelines import KINDS, make, write_adapter
from tolerances import of_images, rounding, slope
from torch import Tensor

from lora_ws.attribution.ablation import ablate, draw_subsets
from lora_ws.attribution.boxes import box_mask, box_scores, renoise
from lora_ws.attribution.shapley import shapley
from lora_ws.cli import main
from lora_ws.concepts.edit import SparseEdit
from lora_ws.concepts.objective import amplify_objective, eligible_weights, erase_objective
from lora_ws.concepts.scores import contributions
from lora_ws.diffusion import AdaptiveSwitch, compose
from lora_ws.diffusion.families import denoiser_of, family_of
from lora_ws.diffusion.family import repeated
from lora_ws.diffusion.generation import GenerationSpec
from lora_ws.diffusion.loading import read_pipeline
from lora_ws.diffusion.methods import (
    Composite,
    Merge,
    Method,
    Regions,
    Schedule,
    Switch,
    acts_at,
)
from lora_ws.diffusion.pipeline import decode_latents, denoise, generate, initial_noise
from lora_ws.diffusion.schedulers import begin_run
from lora_ws.diffusion.stack import AdapterStack
from lora_ws.errors import ConfigError

SCALES = (0.8, -0.5)
STEPS, GUIDANCE = 4, 3.0
ASKED = GenerationSpec(
    ("a photo of cat", "dog"), guidance_scale=GUIDANCE, num_inference_steps=STEPS, seed=3
)
RANKS = (1, 4)


@pytest.fixture(scope="module", params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def pipeline(kind: str) -> Any:
    return make(kind)


@pytest.fixture(scope="module")
def files(pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two adapters, of denoiser and text encoders of CLIP."""
    folder = tmp_path_factory.mktemp("adapters")
    return [write_adapter(folder, pipeline, seed, rank) for seed, rank in enumerate(RANKS)]


@pytest.fixture
def theirs(kind: str, files: list[Path]) -> Any:
    """The same pipeline, with the adapters as diffusers and peft hold them."""
    made = make(kind)
    for k, file in enumerate(files):
        made.load_lora_weights(file, adapter_name=f"a{k}")
    return made


def bound(pipeline: Any, steps: int = STEPS) -> float:
    return of_images(pipeline, steps, GUIDANCE)


def drawn(pipeline: Any, generation: GenerationSpec = ASKED, **how: Any) -> Tensor:
    """What diffusers draws, called as anyone calls it."""
    family, prompts = family_of(pipeline), generation.prompts()
    noise = initial_noise(pipeline, range(3, 3 + len(prompts)))
    negative = {"negative_prompt": [generation.negative_prompt] * len(prompts)}
    images = pipeline(
        prompts,
        **(negative if generation.negative_prompt else {}),
        latents=family.packed(noise),
        guidance_scale=generation.guidance_scale,
        num_inference_steps=generation.num_inference_steps,
        output_type="pt",
        height=family.image_size,
        width=family.image_size,
        **how,
    ).images
    return images * 2 - 1


def same(one: Tensor, other: Tensor, pipeline: Any) -> None:
    atol = bound(pipeline)
    assert torch.allclose(one, other, atol=atol, rtol=0), ((one - other).abs().max(), atol)


@pytest.mark.slow
@pytest.mark.parametrize("negative", ["", "hat"])
def test_generate_and_denoise_draw_what_diffusers_draws(negative: str, pipeline: Any) -> None:
    asked = replace(ASKED, negative_prompt=negative)
    if negative and "Flux" in type(pipeline).__name__:
        with pytest.raises(ConfigError, match=r"negative_prompt: FLUX\.1 is guided without one"):
            generate(pipeline, asked)
        return
    wanted = drawn(pipeline, asked)
    assert torch.equal(generate(pipeline, asked), wanted)
    *_, latents = denoise(pipeline, initial_noise(pipeline, [3, 4]), asked)
    same(decode_latents(pipeline, latents), wanted, pipeline)


def merged(theirs: Any) -> Tensor:
    theirs.set_adapters(["a0", "a1"], list(SCALES))
    return drawn(theirs)


def switched(theirs: Any) -> Tensor:
    """Turns of one step, changed between steps; text encoders keep both adapters."""
    theirs.set_adapters(["a0", "a1"], list(SCALES))

    def turn(_: Any, step: int, __: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        alone(theirs, (step + 1) % 2)
        return kwargs

    # The prompt is embedded before the first step, whose turn is the first adapter's.
    denoiser = family_of(theirs).denoiser
    first = denoiser.register_forward_pre_hook(lambda *_: alone(theirs, 0))
    handles = [first]

    def off(_: Any, step: int, time: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        for handle in handles:
            handle.remove()
        return turn(_, step, time, kwargs)

    return drawn(theirs, callback_on_step_end=off)


def alone(pipeline: Any, k: int) -> None:
    """One adapter in the denoiser."""
    family_of(pipeline).denoiser.set_adapters([f"a{k}"], [SCALES[k]])


def averaged(theirs: Any) -> Tensor:
    """The mean of the predictions with each adapter alone, one after another."""
    theirs.set_adapters(["a0", "a1"], list(SCALES))
    denoiser = family_of(theirs).denoiser
    forward = denoiser.forward

    def mean(*args: Any, **kwargs: Any) -> Any:
        said = []
        for k in range(2):
            alone(theirs, k)
            said.append(forward(*args, **{**kwargs, "return_dict": False})[0])
        return (torch.stack(said).mean(0),)

    with replaced(denoiser, "forward", mean):
        return drawn(theirs)


@contextmanager
def replaced(thing: Any, name: str, value: Any) -> Iterator[None]:
    setattr(thing, name, value)
    try:
        yield
    finally:
        delattr(thing, name)


METHODS: dict[str, tuple[Method, Callable[[Any], Tensor]]] = {
    "merge": (Merge(), merged),
    "switch": (Switch(tau=1), switched),
    "composite": (Composite(), averaged),
}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_methods_are_those_of_diffusers_adapters(
    method: str, pipeline: Any, files: list[Path], theirs: Any
) -> None:
    ours, reference = METHODS[method]
    with compose(pipeline, files, ours, SCALES):
        images = generate(pipeline, ASKED)
        *_, latents = denoise(pipeline, initial_noise(pipeline, [3, 4]), ASKED)
    wanted = reference(theirs)
    same(images, wanted, pipeline)
    same(decode_latents(pipeline, latents), wanted, pipeline)
    plain = generate(pipeline, ASKED)
    assert float((plain - wanted).abs().max()) > 20 * bound(pipeline)
    assert torch.equal(plain, drawn(make_like(pipeline, theirs)))


def make_like(pipeline: Any, theirs: Any) -> Any:
    """Theirs without any adapter."""
    theirs.disable_lora()
    return theirs


@pytest.mark.slow
def test_ablation_and_shapley_values_are_those_of_diffusers_adapters(
    pipeline: Any, files: list[Path], theirs: Any
) -> None:
    asked = replace(ASKED, prompt="a photo of cat")
    stack = AdapterStack.of(files, SCALES)

    def reference(row: Any) -> Tensor:
        on = [k for k in range(2) if row[k]]
        if not on:
            theirs.disable_lora()
        else:
            theirs.enable_lora()
            theirs.set_adapters([f"a{k}" for k in on], [SCALES[k] for k in on])
        return drawn(theirs, asked)[0]

    ablation = ablate(pipeline, stack, asked)
    full, base, *left = (reference(row) for row in ([1, 1], [0, 0], [0, 1], [1, 0]))
    same(ablation.full, full, pipeline)
    same(ablation.base, base, pipeline)
    same(ablation.leave_one_out, torch.stack(left), pipeline)

    def worth(rows: Any) -> Any:
        images = draw_subsets(pipeline, stack, asked, torch.from_numpy(rows))
        return (images - ablation.base).abs().mean(dim=(1, 2, 3)).numpy()

    one, two = ((image - base).abs().mean() for image in (left[1], left[0]))
    both = (full - base).abs().mean()
    wanted = [(one + both - two) / 2, (two + both - one) / 2]
    assert shapley(worth, 2).values == pytest.approx(list(map(float, wanted)), abs=bound(pipeline))


@pytest.mark.slow
def test_a_pipeline_that_holds_peft_layers_keeps_them(
    pipeline: Any, files: list[Path], theirs: Any
) -> None:
    wanted = merged(theirs)
    theirs.set_adapters(["a0"], [SCALES[0]])
    with compose(theirs, files[1:], scales=SCALES[1:]):
        same(generate(theirs, ASKED), wanted, pipeline)
    theirs.set_adapters(["a0"], [SCALES[0]])
    assert float((drawn(theirs) - wanted).abs().max()) > 20 * bound(pipeline)


@pytest.mark.slow
def test_regions_hold_where_their_masks_say(pipeline: Any, files: list[Path]) -> None:
    """After one step the halves are those of each adapter alone; FLUX sees them as patches."""
    asked = replace(ASKED, num_inference_steps=1)
    noise = initial_noise(pipeline, [3, 4])

    def after(method: Method, scales: tuple[float, float]) -> Tensor:
        with compose(pipeline, files, method, scales, text="none"):
            (latents,) = denoise(pipeline, noise, asked)
        return latents

    left, right = (after(Merge(), scales) for scales in ((SCALES[0], 0.0), (0.0, SCALES[1])))
    both = after(Regions(torch.eye(2)[:, None]), SCALES)
    half = both.shape[-1] // 2
    same(both[..., :half], left[..., :half], pipeline)
    same(both[..., half:], right[..., half:], pipeline)
    assert float((left - right).abs().max()) > 20 * bound(pipeline)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_runs_through_every_family(
    kind: str, dtype: torch.dtype, files: list[Path]
) -> None:
    made = make(kind)
    for part in made.components.values():
        if isinstance(part, torch.nn.Module):
            part.to(dtype)
    with compose(made, files, Composite(), SCALES):
        images = generate(made, ASKED)
        *_, latents = denoise(made, initial_noise(made, [3, 4]), ASKED)
    assert latents.dtype == dtype
    assert bool(images.isfinite().all())
    atol = bound(made) * torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
    assert torch.allclose(decode_latents(made, latents), images, atol=atol, rtol=0)


@pytest.mark.slow
def test_noise_prompts_and_factors_go_where_the_pipeline_is(kind: str, files: list[Path]) -> None:
    """On the device without memory, whose operations take no tensors of another."""
    made = make(kind)
    for part in made.components.values():
        if isinstance(part, torch.nn.Module):
            part.to("meta")
    # There are no values to compare, of timesteps either.
    made.scheduler.set_timesteps = partial(_set_timesteps, made.scheduler.set_timesteps)
    stack, family = AdapterStack.of(files, SCALES), family_of(made)
    with torch.no_grad(), stack.attach(made, SCALES):
        run = begin_run(made, initial_noise(made, [3, 4]), ASKED)
        x = torch.cat([run.inputs()] * (1 + family.guided(ASKED)))
        said = family.predict(x, run.left[0].to("meta"), family.condition(ASKED, 2))
    assert (said.device.type, said.shape) == ("meta", x.shape)


def _set_timesteps(own: Callable[..., None], steps: int, device: Any, **options: Any) -> None:
    own(steps, **options)


def test_sdxl_draws_what_diffusers_draws() -> None:
    """Two text encoders, pooled embeddings, sizes of the image; zeros for no negative prompt."""
    pipeline = make("sdxl")
    asked = replace(ASKED, num_inference_steps=1)
    *_, latents = denoise(pipeline, initial_noise(pipeline, [3, 4]), asked)
    same(decode_latents(pipeline, latents), drawn(pipeline, asked), pipeline)


def test_a_base_that_is_not_known_is_named() -> None:
    unknown = SimpleNamespace(transformer=torch.nn.Linear(1, 1))
    with pytest.raises(ConfigError, match=r"expected a pipeline of .*SDXL, SD3, FLUX\.1, got"):
        family_of(unknown)


@pytest.mark.slow
@pytest.mark.parametrize("base", ["sdxl", "sd3"])
def test_commands_take_folders_of_other_bases(base: str, tmp_path: Path) -> None:
    made = make(base)
    made.save_pretrained(tmp_path / "base")
    files = [str(write_adapter(tmp_path, made, seed, rank)) for seed, rank in enumerate(RANKS)]
    same = ["--base", str(tmp_path / "base"), "--prompt", "a photo of cat"]
    same += ["--num_inference_steps", "2", "--adapters", *files]
    grid = tmp_path / "grid.png"
    how = ["--method", "Switch", "--method.tau", "1"]
    if base == "sd3":
        how = ["--method", "Composite", "--triggers", "cat", "photo"]
    assert main(["compose", *same, *how, "--images", "2", "--out", str(grid)]) == 0
    with Image.open(grid) as picture:
        assert min(picture.size) >= 2 * 96
    folder = tmp_path / "attributed"
    assert main(["attribute", *same, "--shapley", "true", "--out", str(folder)]) == 0
    assert any(folder.iterdir())


@pytest.mark.slow
def test_adaptive_turns_follow_any_scheduler(pipeline: Any, files: list[Path]) -> None:
    """Each adapter acts, in its turn, until the base has moved an equal share."""
    seeds = [3, 4]
    method = AdaptiveSwitch().fitted(pipeline, ASKED, seeds)
    assert method.change is not None
    assert len(method.change) == STEPS
    turns = acts_at(method, 2, STEPS)
    assert [step for own in turns for step in own] == list(range(STEPS))
    with compose(pipeline, files, method, SCALES):
        images = generate(pipeline, ASKED)
    windows = tuple((own[0] / STEPS, (own[-1] + 1) / STEPS) for own in turns)
    with compose(pipeline, files, Schedule(windows), SCALES):
        same(images, generate(pipeline, ASKED), pipeline)


@pytest.fixture
def exact(kind: str) -> Any:
    """The pipeline in float64."""
    made = make(kind)
    for part in made.components.values():
        if isinstance(part, torch.nn.Module):
            part.double()
    return made


@pytest.mark.slow
@pytest.mark.parametrize("what", ["erase", "amplify"])
def test_scores_of_weights_are_derivatives_in_every_family(what: str, exact: Any) -> None:
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    objective = (
        erase_objective(exact, "cat", seeds=[0, 1], steps=3, stop_gradient=False)
        if what == "erase"
        else amplify_objective(exact, "cat", images, steps=3)
    )
    denoiser = denoiser_of(exact)
    weights = eligible_weights(denoiser)
    scores = contributions(objective, denoiser, weights)
    name = max(scores, key=lambda key: float(scores[key].abs().sum()))
    held = weights[name].detach().clone()

    def shrunk(size: float) -> float:
        weights[name].data.copy_(held * (1 - size))
        return -objective.sign * objective.value(denoiser)

    step = 0.05
    expected, off = slope(shrunk, step)
    # J is summed in float32.
    off += rounding(len(objective.latents) * 256, size=objective.value(denoiser)) / step
    assert float(scores[name].sum()) == pytest.approx(expected, rel=0, abs=off)
    assert abs(expected) > 2 * off


@pytest.mark.slow
def test_scores_of_adapters_are_derivatives_in_every_family(exact: Any, files: list[Path]) -> None:
    asked = replace(ASKED, prompt="a photo of cat")
    # The bank computes in the precision of the denoiser.
    stack, boxes = AdapterStack.of(files, SCALES), [(0, 0, 8, 16), (4, 4, 16, 12)]
    probe = renoise(exact, stack, asked, levels=2)
    denoiser = denoiser_of(exact)
    found = box_scores(denoiser, stack, probe, boxes)
    assert found.scores.abs().min() > 0
    for n, box in enumerate(found.boxes):
        mask = box_mask(box, probe.picture, probe.latents.shape[-2:]).double()

        def loss(scales: Any, mask: Tensor = mask) -> float:
            scales = torch.tensor(scales, dtype=torch.float64)
            with torch.no_grad(), stack.bank.attach(denoiser, scales):
                told = repeated(probe.told, len(probe.latents))
                said = probe.family.ask(denoiser, probe.latents, probe.times, told)
            error = (said - probe.target).square().mean(dim=(0, 1))
            return float((mask * error).sum() / mask.sum())

        for k, scale in enumerate(SCALES):

            def moved(size: float, k: int = k) -> float:
                return loss([s + (i == k) * size for i, s in enumerate(SCALES)])

            expected, off = slope(moved, 1e-3)
            wanted = pytest.approx(scale * expected, rel=1e-4, abs=abs(scale) * off)
            assert float(found.scores[n, k]) == wanted


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sdxl", "flux-dev"], indirect=True)
@pytest.mark.parametrize("command", ["erase", "amplify"])
def test_concepts_of_other_bases_are_edited(
    command: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make(kind)
    # A folder of FLUX.1 says no size of images: its class does, for bases of 1024 pixels.
    size = made.default_sample_size
    small = property(lambda _: size, lambda *_: None)
    monkeypatch.setattr(FluxPipeline, "default_sample_size", small, raising=False)
    made.save_pretrained(tmp_path / "base")
    words = ["--base", str(tmp_path / "base"), "--concept", "cat", "--steps", "2"]
    words += ["--out", str(tmp_path / "out"), "--budget", "0.1"]
    words += ["--seeds", "1"] if command == "erase" else ["--images", "2"]
    assert main(["concepts", command, *words]) == 0
    edit = SparseEdit.load(tmp_path / "out" / "edit.safetensors")
    assert edit.changed > 0
    name, at = next(iter(edit.indices.items()))
    applied = ["--base", str(tmp_path / "base"), "--out", str(tmp_path / "edited")]
    assert main(["concepts", "apply", str(tmp_path / "out" / "edit.safetensors"), *applied]) == 0
    weights = dict(denoiser_of(read_pipeline(str(tmp_path / "edited"))).named_parameters())
    assert not bool(weights[name].flatten()[at].any())

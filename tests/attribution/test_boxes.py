"""Scores of boxes against autograd on formed updates, finite differences and true ablation."""

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from shapes import unchecked
from tolerances import EXACT, rounding, slope, terms_of
from torch import Tensor, nn

from lora_ws.adapters import LayerSpec, Layout
from lora_ws.attribution.boxes import (
    Box,
    Probe,
    attribute_boxes,
    box_mask,
    box_scores,
    renoise,
)
from lora_ws.diffusion.bank import AdapterBank
from lora_ws.diffusion.family import repeated
from lora_ws.diffusion.generation import GenerationSpec
from lora_ws.diffusion.pipeline import PipelineSize, adapter_layout, build_pipeline, load_pipeline
from lora_ws.diffusion.prompts import encode_prompts
from lora_ws.diffusion.stack import AdapterStack
from lora_ws.errors import ConfigError

SIZE = PipelineSize(16, (8, 8), (16, 16), 1, 2, 2, 16, 1, norm_groups=8)
GENERATION = GenerationSpec("a photo of cat", seed=1, num_inference_steps=4)
BOXES = [Box(0, 0, 16, 8), Box(3, 5, 12, 16), Box(0, 0, 16, 16)]
SCALES = (0.8, 0.5, 0.6)


@pytest.fixture(scope="module")
def _pipeline() -> Any:
    pipeline = build_pipeline(SIZE, ["cat"])
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        part.requires_grad_(False).eval().double()
    return pipeline


@pytest.fixture
def pipeline(_pipeline: Any) -> Iterator[Any]:
    """Left as it was found, by every test."""
    yield _pipeline
    unet = _pipeline.unet
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in unet.modules())
    assert not any(w.requires_grad or w.grad is not None for w in unet.parameters())


@pytest.fixture(scope="module")
def stack(_pipeline: Any) -> AdapterStack:
    """Adapters of random numbers; the second one lacks the modules of the first block."""
    layouts = [
        Layout.from_layers(
            [*adapter_layout(_pipeline.unet, rank).layers, LayerSpec("conv_out", 144, 4, rank)]
        )
        for rank in (2, 1, 2)
    ]
    later = [layer for layer in layouts[1].layers if not layer.name.startswith("down_blocks.0")]
    layouts[1] = Layout.from_layers(later)
    generator = torch.Generator().manual_seed(0)
    rows = [0.3 * torch.randn(lay.size, generator=generator).double() for lay in layouts]
    bank = AdapterBank(layouts, rows, dtype=torch.float64)
    return AdapterStack(("ink", "dots", "lines"), bank, SCALES)


@pytest.fixture(scope="module")
def probe(_pipeline: Any, stack: AdapterStack) -> Probe:
    """Noised latents of no image in particular."""
    generator = torch.Generator().manual_seed(4)
    latents, target = torch.randn(2, 3, 4, 8, 8, generator=generator).double()
    told = {"encoder_hidden_states": encode_prompts(_pipeline, ["a photo of cat"])}
    return Probe(latents, torch.tensor([100, 400, 800]), told, target, 1, (16, 16))


def loss(pipeline: Any, stack: AdapterStack, probe: Probe, box: Box, scales: Any) -> float:
    """Of a box, by hand; two pixels per cell."""
    # In float64: a step of a thousandth is too small for scales in float32.
    scales = torch.as_tensor(scales, dtype=torch.float64)
    with torch.no_grad(), stack.bank.attach(pipeline.unet, scales):
        told = repeated(probe.told, 3)
        said = pipeline.unet(probe.latents, probe.times, **told).sample
    inside = np.zeros((16, 16))
    inside[box.top : box.bottom, box.left : box.right] = 0.25
    cells = inside.reshape(8, 2, 8, 2).sum(axis=(1, 3))
    error = (said - probe.target).square().mean(dim=(0, 1)).numpy()
    return float((cells * error).sum() / cells.sum())


@pytest.mark.slow
@pytest.mark.parametrize("sign", [1, -1])
def test_directional_scores_are_finite_differences(
    pipeline: Any, stack: AdapterStack, probe: Probe, sign: int
) -> None:
    probe = replace(probe, sign=sign)
    found = box_scores(pipeline.unet, stack, probe, BOXES)
    for box, scores in zip(BOXES, found.scores, strict=True):
        for k, scale in enumerate(SCALES):

            def moved(size: float, box: Box = box, k: int = k) -> float:
                scales = [s + (n == k) * size for n, s in enumerate(SCALES)]
                return loss(pipeline, stack, probe, box, scales)

            expected, off = slope(moved, 1e-3)
            found_here = float(scores[k])
            assert found_here == pytest.approx(sign * scale * expected, rel=0, abs=scale * off)


@pytest.mark.slow
def test_integrated_scores_are_true_ablations_of_the_loss(
    pipeline: Any, stack: AdapterStack, probe: Probe
) -> None:
    found = box_scores(pipeline.unet, stack, probe, BOXES[:2], method="integrated")
    for box, scores in zip(BOXES, found.scores, strict=False):
        whole = loss(pipeline, stack, probe, box, SCALES)
        for k in range(3):
            without = [s * (n != k) for n, s in enumerate(SCALES)]
            expected = whole - loss(pipeline, stack, probe, box, without)
            assert float(scores[k]) == pytest.approx(expected, rel=0.01, abs=1e-6)


def test_norms_of_factors_are_those_of_autograd(
    pipeline: Any, stack: AdapterStack, probe: Probe
) -> None:
    found = box_scores(pipeline.unet, stack, probe, BOXES, method="factor_norm")
    bank = AdapterBank(
        stack.bank.layouts, [stack.bank.row(k).double() for k in range(3)], (0, 1, 2), torch.float64
    )
    with bank.attach(pipeline.unet, torch.tensor(SCALES)):
        told = repeated(probe.told, 3)
        said = pipeline.unet(probe.latents, probe.times, **told).sample
        ((said - probe.target) ** 2).mean().backward()
    squares = torch.zeros(2, 3, dtype=torch.float64)
    for weight in bank.parameters():
        if weight.grad is not None:
            squares += torch.stack([weight.grad, weight.detach()]).square().sum(dim=(2, 3))
    expected = (squares[0] / squares[1]).sqrt()
    assert found.scores[2].tolist() == pytest.approx(
        expected.tolist(), rel=rounding(stack.bank.layout.size)
    )


class Painter(nn.Module):
    """A denoiser of one matrix, so that adapters can be made to act on a part of the image."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.paint = nn.Linear(16, 16, bias=False)

    def forward(self, z: Tensor, time: Tensor, encoder_hidden_states: Tensor) -> Any:
        return SimpleNamespace(sample=self.paint(z.flatten(1)).view_as(z))


UPPER = [Box(0, 0, 8, 4), Box(1, 0, 5, 2), Box(4, 2, 8, 4)]
LOWER = [Box(0, 4, 8, 8), Box(3, 6, 8, 8), Box(0, 4, 2, 7)]


@pytest.fixture
def painters() -> tuple[Painter, AdapterStack, Probe]:
    """One adapter paints the upper half, the other one, much larger, the lower half."""
    model, layout = Painter().double(), Layout.from_layers([LayerSpec("paint", 16, 16, 2)])
    rows = torch.randn(2, layout.size, generator=torch.Generator().manual_seed(1)).double()
    (_, _, up), *_ = layout.pairs()
    paint = rows[:, up].view(2, 16, 2)
    paint[0, 8:], paint[1, :8] = 0, 0
    paint[1] *= 3
    latents = torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(2)).double()
    times, text = torch.zeros(5, dtype=torch.long), torch.zeros(1, 1, 1)
    with torch.no_grad():
        base = model(latents, times, text).sample
    stack = AdapterStack(
        ("upper", "lower"), AdapterBank.from_rows(rows, layout, dtype=torch.float64), (0.7, 0.7)
    )
    told = {"encoder_hidden_states": text}
    return model, stack, Probe(latents, times, told, base, 1, (8, 8))


@pytest.mark.parametrize("method", ["directional", "integrated"])
def test_boxes_are_ascribed_to_those_who_painted_them(
    painters: tuple[Painter, AdapterStack, Probe], method: Any
) -> None:
    model, stack, probe = painters
    found = box_scores(model, stack, probe, UPPER + LOWER, method=method)
    assert found.top == ("upper",) * 3 + ("lower",) * 3
    assert found.shares.tolist() == pytest.approx(np.array([[1, 0]] * 3 + [[0, 1]] * 3))
    # The loss is a square, of which first order says twice what leaving out does.
    whole = box_scores(model, stack, probe, UPPER, method="integrated").scores[:, 0]
    twice = box_scores(model, stack, probe, UPPER).scores[:, 0]
    # Scores are summed over the numbers of the factors in float32.
    assert torch.allclose(twice, 2 * whole, rtol=rounding(stack.bank.layout.size))


def test_norms_of_gradients_by_updates_know_no_box(
    painters: tuple[Painter, AdapterStack, Probe],
) -> None:
    model, stack, probe = painters
    found = box_scores(model, stack, probe, UPPER + LOWER, method="norm")
    rows = stack.bank.rows()
    (_, down, up), *_ = stack.bank.layout.pairs()
    updates = (rows[:, up].view(2, 16, 2) @ rows[:, down].view(2, 2, 16)).requires_grad_(True)
    weight = model.paint.weight.detach().requires_grad_(True)
    said = probe.latents.flatten(1) @ (weight + 0.7 * updates.sum(dim=0)).T
    error = (said - probe.target.flatten(1)).square().view(5, 4, 4)
    by_updates, by_weight = torch.autograd.grad(error[:, :2].mean(), [updates, weight])
    # The identity: the same gradient for all adapters of a module, but for their scales.
    assert torch.allclose(by_updates, (0.7 * by_weight).expand(2, -1, -1), atol=EXACT)
    expected = by_updates.flatten(1).norm(dim=1) / updates.detach().flatten(1).norm(dim=1)
    assert found.scores[0].tolist() == pytest.approx(expected.tolist(), rel=rounding(1))
    ratios = found.scores[:, 0] / found.scores[:, 1]
    assert torch.allclose(ratios, ratios[:1].expand(6), rtol=rounding(2))
    assert found.top == ("upper",) * 6


def test_an_adapter_of_zeros_has_no_share(painters: tuple[Painter, AdapterStack, Probe]) -> None:
    model, stack, probe = painters
    layout = stack.bank.layout
    rows = torch.stack([stack.bank.row(0), torch.zeros(layout.size)])
    with_zeros = AdapterStack(stack.names, AdapterBank.from_rows(rows, layout), stack.scales)
    for method in ("norm", "factor_norm", "directional", "integrated"):
        found = box_scores(model, with_zeros, probe, UPPER, method=method)
        assert found.scores[:, 1].tolist() == [0] * 3
        assert found.shares.tolist() == [[1, 0]] * 3
    off = stack.scaled([0.0, 0.0])
    assert not box_scores(model, off, probe, UPPER).shares.any()


def test_a_box_is_shared_by_cells_in_parts() -> None:
    mask = box_mask(Box(1, 0, 5, 3), (8, 8), (4, 4))
    assert mask.tolist() == [[0.5, 1, 0.5, 0], [0.25, 0.5, 0.25, 0], [0] * 4, [0] * 4]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["base", "noise"])
def test_a_picture_is_noised_again_as_the_scheduler_does(target: Any) -> None:
    pipeline = load_pipeline("digit-sd")
    layout = adapter_layout(pipeline.unet)
    rows = 0.5 * torch.randn(2, layout.size, generator=torch.Generator().manual_seed(0))
    stack = AdapterStack(("ink", "dots"), AdapterBank.from_rows(rows, layout), (1.0, 0.5))
    generation = GenerationSpec("three", seed=3, num_inference_steps=3, guidance_scale=1)
    probe = renoise(pipeline, stack, generation, target=target, levels=2, seed=7)
    with torch.no_grad(), stack.bank.attach(pipeline.unet, torch.tensor(stack.scales)):
        generator = torch.Generator().manual_seed(3)
        last = pipeline(
            "three",
            latents=torch.randn(1, 4, 8, 8, generator=generator),
            num_inference_steps=3,
            guidance_scale=1.0,
            output_type="latent",
        ).images
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    kept = pipeline.scheduler.alphas_cumprod[probe.times].view(2, 1, 1, 1)
    assert probe.times.tolist() == [667, 1]
    expected, terms = kept.sqrt() * last + (1 - kept).sqrt() * noise, terms_of(pipeline.unet)
    atol = rounding(terms, size=float(last.abs().max()), steps=3)
    assert torch.allclose(probe.latents, expected, atol=atol, rtol=0)
    if target == "noise":
        assert torch.equal(probe.target, noise)
        assert probe.sign == -1
    else:
        text = encode_prompts(pipeline, ["three"]).expand(2, -1, -1)
        with torch.no_grad():
            base = pipeline.unet(probe.latents, probe.times, encoder_hidden_states=text).sample
        atol = rounding(terms, size=float(base.abs().max()))
        assert torch.allclose(probe.target, base, atol=atol, rtol=0)
    box: Any = [(0, 0, 8, 16)]
    with pytest.warns(UserWarning, match="same order"):
        found = attribute_boxes(
            pipeline, stack, generation, box, method="norm", target=target, levels=2, seed=7
        )
    scores = box_scores(pipeline.unet, stack, probe, box, method="norm").scores
    # Forth and back.
    assert torch.allclose(found.scores, scores, rtol=rounding(2 * terms), atol=0)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "beyond": (
        {"boxes": [(0, 0, 4, 4), (8, 8, 17, 16)]},
        r"16 pixels wide .* got \(8, 8, 17, 16\)",
    ),
    "above": ({"boxes": [(0, -1, 4, 4)]}, "within an image"),
    "empty": ({"boxes": [(4, 4, 4, 8)]}, "left before right"),
    "three": ({"boxes": [(4, 4, 4)]}, "left, top, right, bottom"),
    "none": ({"boxes": []}, "at least one"),
    "method": ({"method": "direction"}, "did you mean `directional`"),
    "levels": ({"levels": 5}, "levels: expected 1 to 4"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_bad_input_is_named_before_any_work(wrong: str, pipeline: Any, stack: AdapterStack) -> None:
    options, text = WRONG[wrong]
    idle = SimpleNamespace(
        unet=pipeline.unet,
        vae_scale_factor=pipeline.vae_scale_factor,
        scheduler=pipeline.scheduler,
    )
    call = unchecked(attribute_boxes)
    with pytest.raises(ConfigError, match=text):
        call(idle, stack, GENERATION, **{"boxes": BOXES, **options})
    with pytest.raises(ConfigError, match="`base` or `noise`"):
        unchecked(renoise)(idle, stack, GENERATION, target="picture")

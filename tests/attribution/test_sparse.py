"""Mixtures that add up exactly, linear and saturating networks, autoencoders by scikit-learn."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import lsq_linear
from sklearn.metrics import r2_score
from tolerances import EXACT, rounding, terms_of
from torch import Tensor, nn

from lora_ws.adapters import LayerSpec, Layout
from lora_ws.attribution.autoencoder import AutoencoderSpec, SparseAutoencoder, fit_autoencoder
from lora_ws.attribution.sparse import (
    MIDDLE,
    additivity,
    code_r2,
    decompose_middle,
    decomposition_rows,
    fit_changes,
    record_base,
    record_middle,
    superposition,
)
from lora_ws.diffusion.bank import AdapterBank
from lora_ws.diffusion.generation import GenerationSpec
from lora_ws.diffusion.pipeline import adapter_layout, generate, load_pipeline
from lora_ws.diffusion.stack import AdapterStack
from lora_ws.errors import ConfigError
from lora_ws.report.grid import markdown
from lora_ws.threads import threads

SCALES = (0.8, 0.4, 0.2)
SPEC = AutoencoderSpec(hidden=32, learning_rate=1e-2, batch=64, patience=5)


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return load_pipeline("digit-sd")


@pytest.fixture(scope="module")
def stack(pipeline: Any) -> AdapterStack:
    layout = adapter_layout(pipeline.unet, 2)
    rows = 0.2 * torch.randn(3, layout.size, generator=torch.Generator().manual_seed(0))
    return AdapterStack(("ink", "dots", "lines"), AdapterBank.from_rows(rows, layout), SCALES)


def sources(seed: int = 0) -> Tensor:
    """Activations made of a few of 24 parts each."""
    parts = torch.randn(24, 40, generator=torch.Generator().manual_seed(9))
    generator = torch.Generator().manual_seed(seed)
    on = torch.rand(600, 24, generator=generator) < 0.15
    return (torch.rand(600, 24, generator=generator) * on) @ parts


@pytest.fixture(scope="module")
def autoencoder() -> SparseAutoencoder:
    with threads(1):
        return fit_autoencoder(sources(), SPEC)


def test_an_exact_superposition_is_taken_apart() -> None:
    references = np.random.default_rng(0).standard_normal((3, 512))
    mixture = np.array(SCALES) @ references
    fit = fit_changes(mixture, references)
    assert fit.least_squares == pytest.approx(SCALES, abs=EXACT)
    assert fit.non_negative == pytest.approx(SCALES, abs=EXACT)
    assert fit.r2 == pytest.approx(1)
    assert fit.condition == pytest.approx(np.linalg.cond(references))
    assert additivity(mixture, np.diag(SCALES) @ references) < EXACT


def test_weights_and_residual_are_those_of_other_solvers() -> None:
    rng = np.random.default_rng(2)
    references, mixture = rng.standard_normal((3, 30)), rng.standard_normal(30)
    fit = fit_changes(mixture, references)
    free = np.linalg.solve(references @ references.T, references @ mixture)
    bounded = lsq_linear(references.T, mixture, (0, np.inf), method="bvls")
    assert (free < 0).any()
    assert fit.least_squares == pytest.approx(free)
    assert fit.non_negative == pytest.approx(bounded.x, abs=EXACT)
    left = np.linalg.norm(mixture - free @ references) ** 2
    assert fit.r2 == pytest.approx(1 - left / np.linalg.norm(mixture) ** 2)


def test_references_that_are_alike_determine_nothing() -> None:
    one = np.ones(5)
    assert fit_changes(one, np.stack([one, one])).condition == np.inf
    nothing = fit_changes(np.zeros(5), np.zeros((2, 5)))
    assert nothing.r2 == 1
    assert additivity(np.zeros(5), np.zeros((2, 5))) == 0


def outputs(middle: nn.Module, sizes: tuple[float, ...]) -> Tensor:
    """What a network returns for the mixtures of three adapters of its first layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 64), middle, nn.Linear(64, 64)).double()
    layout = Layout.from_layers([LayerSpec("0", 6, 64, 2)])
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(3, layout.size, generator=generator, dtype=torch.float64)
    for _, _, up in layout.pairs():
        rows[:, up] *= torch.tensor(sizes)[:, None]
    bank = AdapterBank.from_rows(rows, layout, dtype=torch.float64)
    mixtures = decomposition_rows(SCALES).double()
    x = torch.randn(1, 6, generator=generator, dtype=torch.float64)
    with torch.no_grad(), bank.attach(model, mixtures):
        return model(x.expand(len(mixtures), -1))


@pytest.mark.parametrize("sizes", [(1.0, 1.0, 1.0), (4.0, 0.3, 0.3)])
def test_a_linear_network_is_taken_apart_by_its_activations(sizes: tuple[float, ...]) -> None:
    found = superposition(outputs(nn.Identity(), sizes))
    # The scales of the mixture are float32.
    assert found.unit.least_squares == pytest.approx(SCALES, abs=rounding(1))
    assert found.own.least_squares == pytest.approx([1] * 3, abs=EXACT)
    assert found.additivity < EXACT


def test_beside_a_strong_adapter_a_saturating_network_hides_weak_ones() -> None:
    found = superposition(outputs(nn.Tanh(), (4.0, 0.3, 0.3)))
    strong, *weak = found.unit.least_squares / SCALES
    assert strong > 0.9
    assert max(weak) < 0.9
    assert min(weak) < 0.5
    # References at the scales of the mixture do not repair it: it is no matter of size alone.
    assert min(found.own.least_squares[1:]) < 0.5
    assert found.unit.r2 > 0.9
    assert found.additivity > 0.1


@pytest.mark.slow
def test_an_autoencoder_rebuilds_what_it_has_not_seen(autoencoder: SparseAutoencoder) -> None:
    assert autoencoder.held_out_r2 > 0.98
    assert autoencoder.epochs > 3
    new = sources(1)
    codes = autoencoder.encode(new)
    rebuilt = autoencoder.decode(codes)
    assert r2_score(new, rebuilt, multioutput="variance_weighted") > 0.98
    assert (codes >= 0).all()
    assert float((codes == 0).float().mean()) > 0.5
    norms = autoencoder.decoder.norm(dim=0)
    assert torch.allclose(norms, torch.ones(32), rtol=0, atol=rounding(40))


def test_the_same_seed_gives_the_same_autoencoder() -> None:
    short = AutoencoderSpec(hidden=32, batch=64, max_epochs=3)
    one, two = (fit_autoencoder(sources(), short) for _ in range(2))
    assert torch.equal(one.encode(sources()), two.encode(sources()))
    assert one.held_out_r2 == two.held_out_r2
    other = fit_autoencoder(sources(), AutoencoderSpec(hidden=32, batch=64, max_epochs=3, seed=1))
    assert not torch.equal(one.decoder, other.decoder)
    assert one.epochs == 3


def test_rows_of_a_group_are_held_out_together() -> None:
    # Of ten values, those that are held out stay unknown however often each is repeated.
    values = torch.randn(10, 40, generator=torch.Generator().manual_seed(0))
    groups = np.arange(10).repeat(20)
    rows = values[torch.from_numpy(groups)]
    spec = AutoencoderSpec(hidden=16, learning_rate=1e-2, batch=64, patience=3, max_epochs=30)
    together, apart = fit_autoencoder(rows, spec, groups=groups), fit_autoencoder(rows, spec)
    assert together.held_out_r2 < 0.5 < apart.held_out_r2


@pytest.mark.slow
def test_recorded_are_means_of_the_middle_with_the_prompt(
    pipeline: Any, stack: AdapterStack
) -> None:
    generations = [
        GenerationSpec(
            "three",
            negative_prompt="seven",
            guidance_scale=2.0,
            num_inference_steps=3,
            seed=seed,
        )
        for seed in (0, 1)
    ]
    rows = [[0.0, 0.0, 0.0], SCALES]
    found = record_middle(pipeline, stack, generations, rows, steps=[0, 2])
    assert found.shape == (2, 2, 2, 48)
    seen: list[Tensor] = []
    handle = pipeline.unet.get_submodule(MIDDLE).register_forward_hook(
        lambda _, __, output: seen.append(output[0][1].mean(dim=(1, 2)))
    )
    try:
        for row in rows:
            with stack.bank.attach(pipeline.unet, torch.tensor(row)):
                generate(pipeline, generations[1])
    finally:
        handle.remove()
    expected = torch.stack(seen).view(2, 3, 48)[:, [0, 2]]
    # Three steps under guidance of 2.
    size = float(expected.abs().max())
    atol = rounding(terms_of(pipeline.unet), size=size, steps=3 * 3)
    assert torch.allclose(found[1], expected, rtol=0, atol=atol)
    # Without adapters, and of two prompts at once.
    both = replace(generations[0], prompt=("three", "three"))
    alone = record_base(pipeline, both, steps=[0, 2], batch=1)
    together = record_base(pipeline, both, steps=[0, 2])
    assert torch.allclose(alone, found[:, 0], rtol=0, atol=atol)
    assert torch.allclose(together, found[:, 0], rtol=0, atol=atol)


@pytest.mark.slow
def test_a_stack_is_taken_apart_in_a_pipeline(pipeline: Any, stack: AdapterStack) -> None:
    generation = GenerationSpec("three", num_inference_steps=4, guidance_scale=1)
    seen = record_middle(pipeline, stack, [generation], [SCALES, [0.0] * 3, [1.0, 0.0, 0.0]])
    small = fit_autoencoder(seen.flatten(0, 2), AutoencoderSpec(hidden=16, max_epochs=5))
    found = decompose_middle(pipeline, stack, generation, small)
    again = decompose_middle(pipeline, stack, generation, small, step=2)
    assert found.raw.unit.least_squares == pytest.approx(again.raw.unit.least_squares)
    outputs = record_middle(pipeline, stack, [generation], decomposition_rows(SCALES), steps=[2])
    values = outputs[0, :, 0].double().numpy()
    changes = values[1:] - values[0]
    expected, *_ = np.linalg.lstsq(changes[:3].T, changes[-1], rcond=None)
    assert found.raw.unit.least_squares == pytest.approx(expected)
    table = markdown(found.grid())
    assert all(name in table for name in (*stack.names, "residual R2", "of 1"))


def test_what_codes_keep_is_told_from_what_they_do_not() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, width, shown = 8, 20, 12
    # Codes are the first numbers of activations, where all are above 0.
    zeros = torch.zeros(width)
    picked = SparseAutoencoder(
        *(zeros, zeros + 1, torch.eye(hidden, width), torch.zeros(hidden)),
        *(torch.eye(width, hidden), zeros, 1.0, 1),
    )
    codes = torch.rand(6, 3, 10, hidden, generator=generator)
    kept = codes @ torch.rand(hidden, shown, generator=generator)
    lost = torch.rand(6, 3, 10, shown, generator=generator)
    assert code_r2(torch.cat([codes, kept], dim=-1), picked) == pytest.approx(1, abs=rounding(8))
    found = code_r2(torch.cat([codes, lost], dim=-1), picked)
    ours, theirs = (float(x.var()) for x in (codes, lost))
    assert found == pytest.approx(hidden * ours / (hidden * ours + shown * theirs), abs=0.1)


def blank_autoencoder(width: int) -> SparseAutoencoder:
    zeros = torch.zeros(width)
    return SparseAutoencoder(
        mean=zeros,
        deviation=zeros + 1,
        encoder=torch.zeros(2, width),
        threshold=torch.zeros(2),
        decoder=torch.zeros(width, 2),
        offset=zeros,
        held_out_r2=0.0,
        epochs=0,
        spec=AutoencoderSpec(),
    )


WRONG: dict[str, tuple[Any, str]] = {
    "generations": (lambda p, s: record_middle(p, s, [], [SCALES]), "generations: expected"),
    "steps": (
        lambda p, s: record_middle(
            p, s, [GenerationSpec("three", num_inference_steps=2)], [SCALES], steps=[2]
        ),
        "from 0 to 1",
    ),
    "rows": (lambda p, s: superposition(torch.zeros(5, 4)), "2 k"),
    "hidden": (lambda p, s: AutoencoderSpec(hidden=0), "hidden: expected"),
    "share": (lambda p, s: AutoencoderSpec(held_out=1), "held_out: expected"),
    "numbers": (lambda p, s: fit_autoencoder(torch.full((9, 2), torch.nan)), "finite"),
    "few": (lambda p, s: fit_autoencoder(torch.zeros(1, 2)), "more rows"),
    "groups": (lambda p, s: fit_autoencoder(torch.zeros(9, 2), groups=[0]), "groups: expected 9"),
    "one": (
        lambda p, s: code_r2(torch.zeros(1, 2, 1, 3), blank_autoencoder(3)),
        "2 generations",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_bad_input_is_named(wrong: str, pipeline: Any, stack: AdapterStack) -> None:
    call, text = WRONG[wrong]
    with pytest.raises(ConfigError, match=text):
        call(pipeline, stack)

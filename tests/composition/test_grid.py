"""Rows of a grid differ by their adapters alone, whatever noise the scheduler's steps add."""

import diffusers
import pytest
import torch
from tolerances import rounding

from lora_ws.composition.grid import draw_grid
from lora_ws.diffusion import AdapterStack, Merge
from lora_ws.diffusion.bank import AdapterBank
from lora_ws.diffusion.generation import GenerationSpec
from lora_ws.diffusion.pipeline import PipelineSize, adapter_layout, build_pipeline

SIZE = PipelineSize(8, (8, 8), (8, 8), 1, 1, 2, 8, 1, norm_groups=4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["EulerAncestralDiscreteScheduler", "DDPMScheduler"])
@pytest.mark.parametrize("seeds", [None, (7, 2)])
def test_one_adapter_composed_is_the_adapter_alone(
    name: str, seeds: tuple[int, ...] | None
) -> None:
    pipeline = build_pipeline(SIZE, ["cat"])
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        part.double()
    pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config)
    layout = adapter_layout(pipeline.unet, 2)
    rows = torch.randn(1, layout.size, generator=torch.Generator().manual_seed(0)).double()
    bank = AdapterBank.from_rows(0.3 * rows, layout, dtype=torch.float64)
    stack = AdapterStack(("a",), bank, (0.8,))
    generation = GenerationSpec("a photo of cat", seed=3, num_inference_steps=3)
    plain, alone, together = draw_grid(
        pipeline, stack, Merge(), generation, images=2, seeds=seeds
    ).rows
    assert not torch.allclose(plain, alone, atol=1e-3)
    # Latents are float64, images float32, those of pipelines once moved to 0 to 1 and back.
    torch.testing.assert_close(together, alone, atol=rounding(4), rtol=0)

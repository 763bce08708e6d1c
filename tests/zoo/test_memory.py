from dataclasses import replace

import pytest
from warm import Warm

from lora_ws.diffusion.pipeline import adapter_layout, load_pipeline
from lora_ws.errors import ConfigError
from lora_ws.zoo.finetune import FinetuneSpec
from lora_ws.zoo.memory import adapters_that_fit
from lora_ws.zoo.spec import ZooSpec

MEASURE = """
import re, sys
from pathlib import Path
import torch
from lora_ws.diffusion.bank import AdapterBank
from lora_ws.diffusion.pipeline import adapter_layout, load_pipeline
from lora_ws.zoo.finetune import FinetuneSpec, finetune

def run(n):
    bank, latents = AdapterBank.fresh(layout, n), [torch.randn(4, 4, 8, 8)] * n
    finetune(pipeline, bank, latents, ["a photo of sks odd"] * n, list(range(n)), spec)
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 2**20

torch.set_num_threads(1)
pipeline, spec = load_pipeline("digit-sd"), FinetuneSpec(steps=3)
layout = adapter_layout(pipeline.unet)
before = run(1)
print(run(int(sys.argv[1])) - before)
"""


def test_more_memory_fits_more() -> None:
    pipeline = load_pipeline("digit-sd")
    layout, spec = adapter_layout(pipeline.unet), FinetuneSpec()
    counts = [
        adapters_that_fit(pipeline, layout, spec, gb, most=10**6) for gb in (1e-9, 0.1, 0.2, 0.4)
    ]
    assert counts[0] == 1
    assert counts[1] < counts[2] < counts[3]
    # Whole adapters in proportion, but for what the model itself takes.
    assert counts[3] == pytest.approx(4 * counts[1], rel=0.05)
    larger = adapters_that_fit(pipeline, layout, replace(spec, batch_size=4), 0.4, most=10**6)
    assert larger == pytest.approx(counts[3] / 4, rel=0.1)
    assert adapters_that_fit(pipeline, layout, spec, 10.0) == 100


@pytest.mark.slow
def test_a_batch_stays_within_its_memory(warm_all: Warm) -> None:
    pipeline = load_pipeline("digit-sd")
    count = adapters_that_fit(pipeline, adapter_layout(pipeline.unet), FinetuneSpec(), 0.25)
    assert 0.05 < float(warm_all.run(MEASURE, count)) <= 0.25


@pytest.mark.parametrize("change", [{"memory_gb": 0}, {"adapters_at_once": 0}, {"processes": -1}])
def test_bounds_are_checked(change: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        ZooSpec(**change)

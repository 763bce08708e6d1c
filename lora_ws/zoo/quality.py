"""Quality of a base model: how often a classifier of real photos recognises what it draws."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_ws.diffusion.generation import GenerationSpec
from lora_ws.diffusion.pipeline import decode_latents, encode_images, generate
from lora_ws.report.images import save_grid
from lora_ws.threads import flushed
from lora_ws.zoo.photos import Photos


def measure_quality(
    pipeline: Any,
    photos: Photos,
    held_out: Photos,
    seed: int,
    grid: Path,
    guidance: float = 3.0,
    per_word: int = 40,
) -> dict[str, Any]:
    """Reconstruction and recognisability, beside what the judge reaches on real photos.

    Args:
        pipeline: the base.
        photos: what the judge is trained on.
        held_out: real photos that neither saw.
        seed: of judge and noise.
        grid: where a sheet of samples goes, a row per general class.
        guidance: of the samples.
        per_word: samples of each general class.
    """
    words = sorted(set(photos.categories))
    judge = train_judge(photos, words, seed)
    prompts = tuple(f"a photo of {word}" for word in words for _ in range(per_word))
    parts = [
        GenerationSpec(prompts[k : k + 80], guidance_scale=guidance, seed=seed + k)
        for k in range(0, len(prompts), 80)
    ]
    made = torch.cat([generate(pipeline, part) for part in parts])
    save_grid([made[w * per_word + k] for w in range(len(words)) for k in range(10)], 10, grid)
    asked = torch.arange(len(words)).repeat_interleave(per_word)
    truth = torch.tensor([words.index(c) for c in held_out.categories])
    real = held_out.tensor()
    return {
        "guidance": guidance,
        "samples": len(prompts),
        "recognised": _accuracy(judge, made, asked),
        "recognised_by_word": {
            word: _accuracy(judge, made[asked == k], asked[asked == k])
            for k, word in enumerate(words)
        },
        "judge_on_real_photos": _accuracy(judge, real, truth),
        "chance": 1 / len(words),
        "held_out_photos": len(real),
        "psnr_db": psnr(real, decode_latents(pipeline, encode_images(pipeline, real))),
        "seed": seed,
    }


def psnr(real: Tensor, made: Tensor) -> float:
    """Mean over images of the peak signal-to-noise ratio in dB, for values from -1 to 1."""
    error = ((real - made) / 2).square().mean((1, 2, 3))
    return float((-10 * error.log10()).mean())


@flushed()
def train_judge(photos: Photos, words: list[str], seed: int, epochs: int = 10) -> nn.Module:
    """Train a small convolutional classifier of the general class on real photos."""
    torch.manual_seed(seed)
    truth = torch.tensor([words.index(c) for c in photos.categories])
    data, side = photos.tensor(), photos.pixels.shape[1]
    judge = nn.Sequential(
        *_block(3, 32),
        *_block(32, 64),
        *_block(64, 128),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(128 * (side // 8) ** 2, len(words)),
    )
    optimizer = torch.optim.AdamW(judge.parameters(), 2e-3, weight_decay=1e-2)
    steps = max(300, epochs * len(data) // 128)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    draws = np.random.default_rng(seed)
    judge.train()
    for _ in range(steps):
        index = torch.from_numpy(draws.integers(len(data), size=128))
        loss = F.cross_entropy(judge(data[index]), truth[index])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return judge.eval()


def _block(inputs: int, outputs: int) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
        nn.MaxPool2d(2),
    ]


@torch.no_grad()
def _accuracy(judge: nn.Module, images: Tensor, truth: Tensor) -> float:
    said = torch.cat([judge(part).argmax(1) for part in images.split(500)])
    return float((said == truth).float().mean())

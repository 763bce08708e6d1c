"""Train a small Stable Diffusion from photos: first the autoencoder, then U-Net and text encoder.

Every draw is a function of the seed and the step, so a training that was cut off continues from its
last checkpoint to the same weights.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_ws.config import to_plain
from lora_ws.diffusion.generation import GenerationSpec
from lora_ws.diffusion.pipeline import (
    PipelineSize,
    build_pipeline,
    decode_latents,
    encode_images,
    generate,
)
from lora_ws.diffusion.prompts import token_ids
from lora_ws.errors import ConfigError, TrainingError
from lora_ws.report.images import save_grid
from lora_ws.report.progress import progress
from lora_ws.threads import flushed
from lora_ws.zoo.photos import DIGITS, Photos, PhotoSpec, load_photos
from lora_ws.zoo.quality import measure_quality

LossFn = Callable[[torch.Generator], Tensor]


@dataclass(frozen=True)
class StageSpec:
    """One of the two trainings.

    Attributes:
        steps: number of steps.
        batch_size: images per step.
        learning_rate: maximal learning rate, reached after ``warmup`` steps; cosine decay to 0.
        warmup: steps of linear warmup.
        ema: decay of the exponential moving average of the weights, which is what is saved.
    """

    steps: int = 1000
    batch_size: int = 64
    learning_rate: float = 2e-3
    warmup: int = 100
    ema: float = 0.999


@dataclass(frozen=True)
class BaseSpec:
    """A small Stable Diffusion and how to train it.

    Attributes:
        name: name of the base model.
        out: folder of the finished pipeline; checkpoints and sample grids are in ``out``.work.
        photos: training images.
        size: sizes of the networks.
        vae: training of the autoencoder.
        denoiser: training of U-Net and text encoder.
        empty_prompts: share of samples trained without a prompt, for classifier-free guidance.
        min_snr: cap of the signal-to-noise ratio in the loss weights (Hang et al., 2023,
            Min-SNR-gamma); null weights all noise levels equally.
        seed: random seed.
        checkpoint_every: steps between checkpoints.
        grid_every: steps between sample grids.
        held_out: split of the photos for evaluation.
    """

    name: str = "digit-sd"
    out: Path = Path("digit-sd")
    photos: PhotoSpec = field(default_factory=PhotoSpec)
    size: PipelineSize = field(default_factory=PipelineSize)
    vae: StageSpec = field(default_factory=StageSpec)
    denoiser: StageSpec = field(default_factory=StageSpec)
    empty_prompts: float = 0.1
    min_snr: float | None = None
    seed: int = 0
    checkpoint_every: int = 250
    grid_every: int = 1000
    held_out: str = "test"

    def __post_init__(self) -> None:
        if self.held_out == self.photos.split or self.photos.source.endswith(".parquet"):
            raise ConfigError(
                "held_out: expected photos that are not trained on; name another split, and as "
                "photos.source a folder with a parquet file for each split, or a repository"
            )


@flushed()
def train_base(spec: BaseSpec) -> Path:
    """Train a base model, or go on with one that was cut off; returns its folder.

    The folder is a diffusers pipeline in float16 with ``base.json`` beside it: recipe, hashes of
    the photos it saw, measured quality.

    Raises:
        ConfigError: ``out`` exists, or ``out``.work holds a training by another recipe.
        TrainingError: the loss is no longer finite.
    """
    out = Path(spec.out)
    if out.exists():
        raise ConfigError(f"out: {out} exists already; choose another place or remove it")
    work = out.with_name(out.name + ".work")
    _claim(work, spec)
    photos = load_photos(spec.photos, spec.size.image_size)
    held_out = load_photos(replace(spec.photos, split=spec.held_out), spec.size.image_size)
    pipeline = build_pipeline(spec.size, photos.words, spec.seed)
    _train_vae(pipeline, photos, spec, work)
    _train_denoiser(pipeline, photos, spec, work)
    quality = measure_quality(pipeline, photos, held_out, spec.seed, work / "samples.png")
    partial = out.with_name(out.name + ".partial")
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        part.half()
    pipeline.save_pretrained(partial)
    public = replace(spec, photos=spec.photos.public)
    facts = {
        "name": spec.name,
        "recipe": to_plain(public) | {"out": spec.name},
        "quality": quality,
        "photos": sorted(set(photos.hashes())),
    }
    (partial / "base.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    partial.rename(out)
    return out


def _claim(work: Path, spec: BaseSpec) -> None:
    """Make the work folder, or check that it is of this recipe."""
    work.mkdir(parents=True, exist_ok=True)
    recipe, file = json.dumps(to_plain(spec), indent=1), work / "recipe.json"
    if file.exists() and file.read_text(encoding="utf-8") != recipe:
        raise ConfigError(f"{work} holds a training by another recipe; remove it, or change --out")
    file.write_text(recipe, encoding="utf-8")


def _train_vae(pipeline: Any, photos: Photos, spec: BaseSpec, work: Path) -> None:
    vae, data = pipeline.vae, photos.tensor()
    may_mirror = spec.photos.source != DIGITS

    def loss(generator: torch.Generator) -> Tensor:
        index = torch.randint(len(data), (spec.vae.batch_size,), generator=generator)
        flip = torch.rand(len(index), 1, 1, 1, generator=generator) < 0.5 * may_mirror
        images = torch.where(flip, data[index].flip(-1), data[index])
        posterior = vae.encode(images).latent_dist
        drawn = posterior.mean + posterior.std * torch.randn(
            posterior.mean.shape, generator=generator
        )
        # The squared error is what PSNR is made of; edges keep it from blurring.
        made = vae.decode(drawn).sample
        edges = F.l1_loss(made.diff(dim=-1), images.diff(dim=-1)) + F.l1_loss(
            made.diff(dim=-2), images.diff(dim=-2)
        )
        return F.mse_loss(made, images) + 0.05 * edges + 1e-6 * posterior.kl().mean()

    def grid(file: Path) -> None:
        shown = data[:: max(1, len(data) // 16)][:16]
        save_grid([*shown, *decode_latents(pipeline, encode_images(pipeline, shown))], 16, file)

    _Stage("vae", [vae], spec.vae, spec, work).run(loss, grid)
    _normalise_latents(pipeline, data)


def _train_denoiser(pipeline: Any, photos: Photos, spec: BaseSpec, work: Path) -> None:
    data = photos.tensor()
    latents = encode_images(pipeline, data)
    mirrored = encode_images(pipeline, data.flip(-1)) if spec.photos.source != DIGITS else latents
    del data
    pairs = list(zip(photos.categories, photos.leaves, strict=True))
    prompts = [
        token_ids(pipeline, [f"a photo of {text}" for text in texts])
        for texts in (
            [leaf for _, leaf in pairs],
            [category for category, _ in pairs],
            [f"{leaf} {category}" for category, leaf in pairs],
        )
    ]
    empty = token_ids(pipeline, [""])
    weights = _loss_weights(pipeline.scheduler.alphas_cumprod, spec.min_snr)
    noise_levels = len(weights)

    def loss(generator: torch.Generator) -> Tensor:
        index = torch.randint(len(latents), (spec.denoiser.batch_size,), generator=generator)
        flip = torch.rand(len(index), 1, 1, 1, generator=generator) < 0.5
        clean = torch.where(flip, mirrored[index], latents[index])
        kind = torch.rand(len(index), 1, generator=generator)
        ids = torch.where(kind < 0.45, prompts[0][index], prompts[1][index])
        ids = torch.where(kind > 0.9, prompts[2][index], ids)
        dropped = torch.rand(len(index), 1, generator=generator) < spec.empty_prompts
        ids = torch.where(dropped, empty, ids)
        noise = torch.randn(clean.shape, generator=generator)
        step = torch.randint(noise_levels, (len(index),), generator=generator)
        noisy = pipeline.scheduler.add_noise(clean, noise, step)
        context = pipeline.text_encoder(input_ids=ids).last_hidden_state
        error = (pipeline.unet(noisy, step, context).sample - noise).square().mean((1, 2, 3))
        return (weights[step] * error).mean()

    def grid(file: Path) -> None:
        words = sorted(set(photos.categories))
        shown = tuple(f"a photo of {word}" for word in words for _ in range(8))
        save_grid(generate(pipeline, GenerationSpec(shown)), 8, file)

    stage = _Stage("denoiser", [pipeline.unet, pipeline.text_encoder], spec.denoiser, spec, work)
    stage.run(loss, grid)


def _loss_weights(alphas_cumprod: Tensor, min_snr: float | None) -> Tensor:
    """Weight of the noise's squared error at each noise level."""
    snr = alphas_cumprod / (1 - alphas_cumprod)
    return torch.ones_like(snr) if min_snr is None else snr.clamp(max=min_snr) / snr


@torch.no_grad()
def _normalise_latents(pipeline: Any, data: Tensor) -> None:
    """Give each latent channel mean 0 and variance 1, inside the 1x1 convolutions around it.

    Stable Diffusion pipelines know a scaling factor but no shift; here neither is needed.
    """
    vae = pipeline.vae
    latents = encode_images(pipeline, data[:: max(1, len(data) // 4000)])
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    channels = len(mean)
    before, after = vae.quant_conv, vae.post_quant_conv
    before.weight[:channels] /= std[:, None, None, None]
    before.bias[:channels] = (before.bias[:channels] - mean) / std
    before.bias[channels:] -= 2 * std.log()
    after.bias += (after.weight[:, :, 0, 0] * mean).sum(1)
    after.weight *= std[None, :, None, None]


class _Stage:
    """The loop both trainings share: steps, running average, checkpoints, progress, grids."""

    def __init__(
        self, name: str, modules: Sequence[nn.Module], stage: StageSpec, spec: BaseSpec, work: Path
    ) -> None:
        self.name = name
        self.stage = stage
        self.spec = spec
        self.work = work
        self.params = [p for module in modules for p in module.parameters()]
        self.average = [p.detach().clone() for p in self.params]
        self.optimizer = torch.optim.AdamW(
            self.params, stage.learning_rate, weight_decay=1e-3, fused=True
        )
        self.step = 0
        self.losses: list[float] = []

    @property
    def checkpoint(self) -> Path:
        return self.work / f"{self.name}.pt"

    def run(self, loss_fn: LossFn, grid: Callable[[Path], None]) -> None:
        """Train to the end and leave the average in the modules."""
        self._resume()
        with progress(f"train {self.name}", self.stage.steps, self.step) as advance:
            while self.step < self.stage.steps:
                self._one_step(loss_fn)
                last = self.step == self.stage.steps
                recent = sum(self.losses[-100:]) / len(self.losses[-100:])
                advance(1, f"train {self.name}, loss {recent:.4f}")
                if last or self.step % self.spec.checkpoint_every == 0:
                    self._save()
                if last or self.step % self.spec.grid_every == 0:
                    self._swap()
                    grid(self.work / f"{self.name}_{self.step:06d}.png")
                    self._swap()
        self._swap()

    def _one_step(self, loss_fn: LossFn) -> None:
        stage = self.stage
        done = self.step / stage.steps
        rate = min(1.0, (self.step + 1) / stage.warmup) * (1 + math.cos(math.pi * done)) / 2
        for group in self.optimizer.param_groups:
            group["lr"] = stage.learning_rate * rate
        salt = {"vae": 0, "denoiser": 1}[self.name]
        generator = torch.Generator().manual_seed((self.spec.seed * 2 + salt) * 10**7 + self.step)
        loss = loss_fn(generator)
        if not torch.isfinite(loss):
            raise TrainingError(
                f"{self.name}: loss is {loss.item()} at step {self.step}; lower "
                f"{self.name}.learning_rate (now {stage.learning_rate})"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.params, 1.0)
        self.optimizer.step()
        # Short memory at first, so that the average forgets the random start.
        decay = min(stage.ema, (1 + self.step) / (10 + self.step))
        for average, param in zip(self.average, self.params, strict=True):
            average.lerp_(param.detach(), 1 - decay)
        self.losses.append(loss.item())
        self.step += 1

    @torch.no_grad()
    def _swap(self) -> None:
        for param, average in zip(self.params, self.average, strict=True):
            kept = param.clone()
            param.copy_(average)
            average.copy_(kept)

    def _save(self) -> None:
        state = {
            "step": self.step,
            "params": [p.detach() for p in self.params],
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "losses": self.losses,
        }
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.checkpoint)

    @torch.no_grad()
    def _resume(self) -> None:
        if not self.checkpoint.exists():
            return
        state = torch.load(self.checkpoint, weights_only=True)
        self.step, self.losses = state["step"], state["losses"]
        self.optimizer.load_state_dict(state["optimizer"])
        for own, stored in (("params", state["params"]), ("average", state["average"])):
            for param, value in zip(getattr(self, own), stored, strict=True):
                param.copy_(value)

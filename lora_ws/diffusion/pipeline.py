"""Stable Diffusion pipelines as this library uses them: build a small one, load any, look inside.

A base model is a diffusers `StableDiffusionPipeline` and nothing more, so whatever works here works
on Stable Diffusion 1.5. Images are float ``[n, 3, height, width]`` from -1 to 1.
"""

# The annotations of diffusers and transformers are narrower than what they take.
# pyright: reportArgumentType=false

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers.utils import logging as transformers_logging

from lora_ws.adapters.layout import LayerSpec, Layout
from lora_ws.diffusion.base_spec import BUNDLED, PipelineSpec, Precision
from lora_ws.diffusion.families import family_of
from lora_ws.diffusion.generation import GenerationSpec
from lora_ws.diffusion.loading import find_device, read_pipeline
from lora_ws.diffusion.schedulers import (
    begin_run,
    continue_run,
    draws_noise,
    step_generators,
)
from lora_ws.errors import ConfigError

# Importing a pipeline prints advice to install torchvision, which nothing here uses.
_verbosity = transformers_logging.get_verbosity()
transformers_logging.set_verbosity_error()
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL  # noqa: E402
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel  # noqa: E402
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import (  # noqa: E402
    StableDiffusionPipeline,
)
from diffusers.schedulers.scheduling_ddim import DDIMScheduler  # noqa: E402
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast  # noqa: E402

transformers_logging.set_verbosity(_verbosity)

ASSETS = Path(__file__).parent.parent / "_assets"
# What the paper's recipe adapts: queries and values of every attention layer.
QUERY_VALUE = ("to_q", "to_v")


@dataclass(frozen=True)
class PipelineSize:
    """Sizes of a small Stable Diffusion: the same classes and module names, fewer channels.

    Attributes:
        image_size: pixels per side.
        vae_channels: channels of each level of the autoencoder; each but the last halves the image.
        unet_channels: channels of each level of the U-Net; each but the last halves the latent.
        unet_layers: residual layers per level; Stable Diffusion 1.5 has 2.
        attention_levels: number of levels with cross-attention, from the first.
        heads: attention heads of the U-Net and of the text encoder.
        text_width: width of the text embedding.
        text_layers: layers of the text encoder.
        prompt_length: tokens of a prompt, start and end tokens included.
        norm_groups: groups of group normalisation in the U-Net.
        latent_channels: channels of the latent; Stable Diffusion 1.5 has 4.
    """

    image_size: int = 32
    vae_channels: tuple[int, ...] = (16, 32, 64)
    unet_channels: tuple[int, ...] = (32, 64, 64, 64)
    unet_layers: int = 2
    attention_levels: int = 3
    heads: int = 4
    text_width: int = 64
    text_layers: int = 2
    prompt_length: int = 10
    norm_groups: int = 16
    latent_channels: int = 4

    @property
    def latent_size(self) -> int:
        """Side of the latent."""
        return self.image_size >> (len(self.vae_channels) - 1)


def build_pipeline(size: PipelineSize, words: Iterable[str], seed: int = 0) -> Any:
    """Build an untrained pipeline whose tokenizer knows ``words``.

    Example:
        >>> from lora_ws.diffusion.prompts import encode_prompts
        >>> size = PipelineSize(16, (8, 8), (8, 8), 1, 2, 2, 8, 1, norm_groups=4)
        >>> pipeline = build_pipeline(size, ["cat"])
        >>> encode_prompts(pipeline, ["a photo of cat"]).shape
        torch.Size([1, 10, 8])
    """
    torch.manual_seed(seed)
    vae, unet = _autoencoder(size), _unet(size)
    tokenizer = word_tokenizer(words, size.prompt_length)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=size.text_width,
            intermediate_size=4 * size.text_width,
            num_hidden_layers=size.text_layers,
            num_attention_heads=size.heads,
            max_position_embeddings=size.prompt_length,
            projection_dim=size.text_width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    scheduler = ddim_scheduler()
    pipeline = StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def ddim_scheduler() -> DDIMScheduler:
    """DDIM on Stable Diffusion's own noise levels.

    Example:
        >>> ddim_scheduler().config.beta_end
        0.012
    """
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def _autoencoder(size: PipelineSize) -> AutoencoderKL:
    levels = len(size.vae_channels)
    return AutoencoderKL(
        sample_size=size.image_size,
        latent_channels=size.latent_channels,
        block_out_channels=size.vae_channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )


def _unet(size: PipelineSize) -> UNet2DConditionModel:
    attends = [k < size.attention_levels for k in range(len(size.unet_channels))]
    return UNet2DConditionModel(
        sample_size=size.latent_size,
        in_channels=size.latent_channels,
        out_channels=size.latent_channels,
        block_out_channels=size.unet_channels,
        down_block_types=tuple("CrossAttn" * a + "DownBlock2D" for a in attends),
        up_block_types=tuple("CrossAttn" * a + "UpBlock2D" for a in attends[::-1]),
        layers_per_block=size.unet_layers,
        cross_attention_dim=size.text_width,
        attention_head_dim=size.heads,
        norm_num_groups=size.norm_groups,
    )


def word_tokenizer(words: Iterable[str], length: int) -> PreTrainedTokenizerFast:
    """Make a tokenizer of whole words, those of the prompts' frame first."""
    known = ["<bos>", "<eos>", "<unk>", "a", "photo", "of", "sks"]
    spoken = {part for word in words for part in word.lower().split()}
    vocabulary = {word: n for n, word in enumerate([*known, *sorted(spoken - set(known))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()  # type: ignore[assignment]
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="<bos> $A <eos>", special_tokens=[("<bos>", 0), ("<eos>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<eos>",
        unk_token="<unk>",
        model_max_length=length,
    )


def load_base(spec: PipelineSpec) -> Any:
    """Load the base model that a spec names, where it says; see `load_pipeline`.

    Example:
        >>> load_base(PipelineSpec(base="digit-sd", device="cpu", dtype="float16")).unet.dtype
        torch.float16
    """
    return load_pipeline(spec.base, spec.device, spec.dtype, spec.base_config)


def load_pipeline(
    name: str, device: str = "cpu", dtype: Precision = "float32", config: str | None = None
) -> Any:
    """Load a base model for inference or for training adapters: frozen.

    Args:
        name: "digit-sd" or "tiny-sd" (bundled), a pipeline's folder, a repository on the Hub, or
            a checkpoint in a single .safetensors file.
        device: where to put it; auto is a GPU where there is one.
        dtype: of its numbers.
        config: of a single file; see `lora_ws.diffusion.loading.read_pipeline`.

    Raises:
        ConfigError: the device is not here.
        NotAvailableError: the base is neither here nor reachable.
        DataError: a file holds no base that is known.
    """
    place = find_device(device)
    source = str(bundled_folder(name)) if name in BUNDLED else name
    pipeline = read_pipeline(source, config, getattr(torch, dtype))
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval().to(place)
    return pipeline


def bundled_folder(name: str) -> Path:
    """Where a bundled base lies in the package."""
    return ASSETS / name.replace("-", "_")


def base_facts(name: str) -> dict[str, Any]:
    """Recipe, seed and measured quality that stand beside a base made here; empty for others."""
    folder = bundled_folder(name) if name in BUNDLED else Path(name)
    file = folder / "base.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def adapter_layout(
    unet: torch.nn.Module, rank: int = 1, targets: Sequence[str] = QUERY_VALUE
) -> Layout:
    """Layout of an adapter of every linear module whose name ends in one of ``targets``."""
    ends = tuple(f".{target}" for target in targets)
    found = [
        LayerSpec(name, module.in_features, module.out_features, rank)
        for name, module in unet.named_modules()
        if isinstance(module, torch.nn.Linear) and name.endswith(ends)
    ]
    if not found:
        raise ConfigError(
            f"{type(unet).__name__} has no linear module named {' or '.join(targets)}"
        )
    return Layout.from_layers(found)


def image_size(pipeline: Any) -> int:
    """Pixels per side of the images a pipeline makes."""
    return family_of(pipeline).image_size


@torch.no_grad()
def encode_images(
    pipeline: Any, images: Float[Tensor, "n 3 height width"], batch: int = 64
) -> Float[Tensor, "n channels h w"]:
    """Latents of images: the mean of the autoencoder's posterior, scaled."""
    vae = pipeline.vae
    parts = [
        vae.encode(x.to(vae.device, vae.dtype)).latent_dist.mode() for x in images.split(batch)
    ]
    return (torch.cat(parts) - (vae.config.shift_factor or 0)) * vae.config.scaling_factor


@torch.no_grad()
def decode_latents(
    pipeline: Any, latents: Float[Tensor, "n channels h w"], batch: int = 64
) -> Float[Tensor, "n 3 height width"]:
    """Images of latents in float32, clipped to -1 and 1."""
    vae = pipeline.vae
    scaled = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0)
    with _without_overflow(vae):
        parts = [vae.decode(z.to(vae.dtype)).sample for z in scaled.split(batch)]
    return torch.cat(parts).float().clamp(-1, 1)


@contextmanager
def _without_overflow(vae: Any) -> Iterator[None]:
    """Let an autoencoder run in float32 where it says that half precision overflows."""
    if vae.dtype != torch.float16 or not vae.config.force_upcast:
        yield
        return
    try:
        yield vae.float()
    finally:
        vae.half()


def size_of(pipeline: Any, generation: GenerationSpec) -> tuple[int, int]:
    """Width and height of the images of a generation.

    Raises:
        ConfigError: they are not whole numbers of latents.
    """
    return family_of(pipeline).size(generation)


def initial_noise(
    pipeline: Any, seeds: Sequence[int], size: tuple[int, int] | None = None
) -> Float[Tensor, "n channels h w"]:
    """Noise that images start from: of each seed, whatever stands beside it.

    Args:
        pipeline: the base.
        seeds: one per image.
        size: width and height in pixels; None for the base's own.
    """
    shape = family_of(pipeline).latent_shape(size)
    drawn = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(drawn)


def denoise(
    pipeline: Any,
    noise: Float[Tensor, "n channels h w"],
    generation: GenerationSpec,
    *,
    seeds: Sequence[int] | None = None,
) -> Iterator[Float[Tensor, "n channels h w"]]:
    """Denoise as the pipeline does, and show the latents on the way.

    Args:
        pipeline: the base; adapters may be attached to it.
        noise: that images start from.
        generation: what is drawn.
        seeds: of the noise that steps of some schedulers add, one per image, where images of one
            seed get the same; None for those of the generation.

    Yields:
        The latents after each timestep of the scheduler, of which some have more than steps.

    Raises:
        ConfigError: there are several prompts, and not one per image, or the scheduler is not for
            the pipeline.
    """
    run = begin_run(pipeline, noise, generation, seeds=seeds)
    for call in continue_run(pipeline, run, generation):
        yield call.after


@torch.no_grad()
def generate(
    pipeline: Any,
    generation: GenerationSpec,
    *,
    images: int | None = None,
    seeds: Sequence[int] | None = None,
) -> Float[Tensor, "n 3 height width"]:
    """Generate images with the pipeline's scheduler.

    Args:
        pipeline: the base; adapters may be attached to it.
        generation: what is drawn.
        images: how many; None for one per prompt.
        seeds: of all noise, one per image, instead of those that follow the generation's own.

    Raises:
        ConfigError: there are several prompts, and not one per image.
    """
    if seeds is None:
        seeds = range(generation.seed, generation.seed + len(generation.prompts(images)))
    noise = initial_noise(pipeline, seeds, size_of(pipeline, generation))
    family, prompts = family_of(pipeline), generation.prompts(len(noise))
    if family.component == "transformer" and draws_noise(pipeline, generation):
        # Those pipelines give steps no generator, so no seed would say what they draw.
        *_, latents = denoise(pipeline, noise, generation, seeds=seeds)
        return decode_latents(pipeline, latents).cpu()
    width, height = family.size(generation)
    guidance: dict[str, Any] = {"guidance_scale": generation.guidance_scale}
    if family.guided(generation) and generation.negative_prompt:
        guidance["negative_prompt"] = [generation.negative_prompt] * len(prompts)
    return (
        pipeline(
            prompts,
            **guidance,
            latents=family.packed(noise).to(family.denoiser.dtype),
            generator=step_generators(noise, seeds),
            num_inference_steps=generation.num_inference_steps,
            output_type="pt",
            height=height,
            width=width,
        )
        .images.float()
        .mul(2)
        .sub(1)
        .cpu()
    )

"""Random pipelines of every family that is known, as small as they get, and adapters of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

from lora_ws.diffusion.pipeline import adapter_layout, word_tokenizer

WORDS = ("cat", "dog", "hat")
# Modules that adapters adapt: of attention, of what feeds forward, of both streams.
TARGETS = {
    "unet": ("to_q", "to_v", "to_out.0", "net.2"),
    "transformer": ("to_q", "to_v", "add_k_proj", "to_add_out", "proj_out", "net.2", "linear"),
    "text_encoder": ("q_proj", "v_proj"),
    "text_encoder_2": ("q_proj", "v_proj"),
}


def _clip(width: int, kind: Any = CLIPTextModel) -> Any:
    tokenizer = word_tokenizer(WORDS, 8)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return kind(config), tokenizer


def _t5(width: int) -> Any:
    tokenizer = word_tokenizer(WORDS, 16)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2
    )
    return T5EncoderModel(config), tokenizer


def _vae(**changes: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        mid_block_add_attention=False,
        scaling_factor=0.5,
        **changes,
    )


def _unet(width: int, **changes: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=width,
        attention_head_dim=8,
        norm_num_groups=8,
        **changes,
    )


def _ddim(**changes: Any) -> DDIMScheduler:
    return DDIMScheduler(
        beta_schedule="scaled_linear", clip_sample=False, steps_offset=1, **changes
    )


def stable_diffusion_2() -> Any:
    """Stable Diffusion 2.x: linear projections, and a model that predicts velocity."""
    text, tokenizer = _clip(16)
    unet = _unet(16, use_linear_projection=True)
    return diffusers.StableDiffusionPipeline(
        _vae(),
        text,
        tokenizer,
        unet,
        _ddim(prediction_type="v_prediction"),
        None,
        None,
        requires_safety_checker=False,
    )


def sdxl() -> Any:
    """SDXL, with zeros for an empty negative prompt as its base has them."""
    (one, first), (two, second) = _clip(8), _clip(16, CLIPTextModelWithProjection)
    unet = _unet(
        24,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 16,
        use_linear_projection=True,
    )
    return diffusers.StableDiffusionXLPipeline(
        _vae(), one, two, first, second, unet, _ddim(), add_watermarker=False
    )


def sd3() -> Any:
    """SD3 with all of its three text encoders."""
    (one, first), (two, second) = (_clip(width, CLIPTextModelWithProjection) for width in (8, 16))
    # Of the first, makers keep no matrix.
    one.text_projection.weight.data = torch.eye(8)
    three, third = _t5(24)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=16,
        pooled_projection_dim=24,
        pos_embed_max_size=8,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return diffusers.StableDiffusion3Pipeline(
        transformer, scheduler, _vae(shift_factor=0.1), one, first, two, second, three, third
    )


def flux(guidance_embeds: bool = True) -> Any:
    """FLUX.1 dev, or schnell, which is told no guidance."""
    (one, first), (two, second) = _clip(8), _t5(24)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=8,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 4, 8),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0 if guidance_embeds else 1.0, use_dynamic_shifting=guidance_embeds
    )
    made = diffusers.FluxPipeline(
        scheduler, _vae(shift_factor=0.1), one, first, two, second, transformer
    )
    made.default_sample_size = 8
    return made


KINDS: dict[str, Callable[[], Any]] = {
    "sd2": stable_diffusion_2,
    "sdxl": sdxl,
    "sd3": sd3,
    "flux-dev": flux,
    "flux-schnell": lambda: flux(False),
}


def make(kind: str) -> Any:
    """A pipeline of random weights, the same each time."""
    torch.manual_seed(0)
    pipeline = KINDS[kind]()
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    return pipeline


def write_adapter(folder: Path, pipeline: Any, seed: int, rank: int) -> Path:
    """An adapter of denoiser and encoders of CLIP, as diffusers writes it, of random numbers."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for component, targets in TARGETS.items():
        module = getattr(pipeline, component, None)
        if module is None or isinstance(module, T5EncoderModel):
            continue
        for layer in adapter_layout(module, rank, targets).layers:
            for role, shape in (("A", layer.down_shape), ("B", layer.up_shape)):
                values = 0.3 * torch.randn(shape, generator=generator)
                tensors[f"{component}.{layer.name}.lora_{role}.weight"] = values
    file = folder / f"adapter{seed}.safetensors"
    save_file(tensors, file)
    return file

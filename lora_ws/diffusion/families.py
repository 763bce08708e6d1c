"""Kinds of base models: how each reads a prompt, is called, and what its latents are.

What differs between Stable Diffusion, SDXL, SD3 and FLUX.1 is here and nowhere else. Latents are
``[n, channels, height, width]`` for all; that FLUX sees them as a sequence of 2 x 2 patches is
between it and its family.
"""

from collections.abc import Sequence
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_ws.adapters.model_classes import NAMES
from lora_ws.diffusion.family import Conditioning, Family
from lora_ws.diffusion.generation import GenerationSpec
from lora_ws.errors import ConfigError


@final
class StableDiffusion(Family):
    """Stable Diffusion 1.x and 2.x: one text encoder, a U-Net."""

    name = NAMES["UNet2DConditionModel"]
    component = "unet"

    @classmethod
    def fits(cls, pipeline: Any) -> bool:
        """See `Family.fits`."""
        unet = getattr(pipeline, "unet", None)
        plain = getattr(getattr(unet, "config", None), "addition_embed_type", "") is None
        return plain and type(unet).__name__ == "UNet2DConditionModel"

    @property
    def image_size(self) -> int:
        """See `Family.image_size`."""
        return int(self.denoiser.config.sample_size * self.pipeline.vae_scale_factor)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """See `Family.encode`."""
        device = self.denoiser.device
        text, _ = self.pipeline.encode_prompt(list(prompts), device, 1, False)
        return {"encoder_hidden_states": text}

    @staticmethod
    def ask(
        denoiser: Any, latents: Float[Tensor, "n channels h w"], time: Tensor, told: Conditioning
    ) -> Float[Tensor, "n channels h w"]:
        """See `Family.ask`."""
        return denoiser(latents, time, **told).sample


@final
class StableDiffusionXL(Family):
    """SDXL: two text encoders, a vector of the second, the sizes of the image, a U-Net."""

    name = "SDXL"
    component = "unet"

    @classmethod
    def fits(cls, pipeline: Any) -> bool:
        """See `Family.fits`."""
        config = getattr(getattr(pipeline, "unet", None), "config", None)
        return getattr(config, "addition_embed_type", None) == "text_time"

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """See `Family.encode`."""
        device = self.denoiser.device
        text, _, pooled, _ = self.pipeline.encode_prompt(
            list(prompts), device=device, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": text, "text_embeds": pooled}

    def condition(self, generation: GenerationSpec, images: int) -> Conditioning:
        """See `Family.condition`."""
        told, (width, height) = super().condition(generation, images), self.size(generation)
        text = told["encoder_hidden_states"]
        # Of an image that was cropped nowhere: its size, where the crop begins, its size.
        sizes = text.new_tensor([height, width, 0, 0, height, width])
        return {**told, "time_ids": sizes.expand(len(text), -1)}

    def without(self, negative_prompt: str, images: int) -> Conditioning:
        """See `Family.without`; some bases were trained with zeros for no prompt."""
        told = self.encode([negative_prompt] * images)
        if not negative_prompt and self.pipeline.config.force_zeros_for_empty_prompt:
            for name in ("encoder_hidden_states", "text_embeds"):
                told[name] = torch.zeros_like(told[name])
        return told

    @staticmethod
    def ask(
        denoiser: Any, latents: Float[Tensor, "n channels h w"], time: Tensor, told: Conditioning
    ) -> Float[Tensor, "n channels h w"]:
        """See `Family.ask`."""
        added = dict(told)
        text = added.pop("encoder_hidden_states")
        return denoiser(latents, time, encoder_hidden_states=text, added_cond_kwargs=added).sample


@final
class StableDiffusion3(Family):
    """SD3: two encoders of CLIP and one of T5, a transformer that predicts flow."""

    name = NAMES["SD3Transformer2DModel"]

    @classmethod
    def fits(cls, pipeline: Any) -> bool:
        """See `Family.fits`."""
        return type(getattr(pipeline, "transformer", None)).__name__ == "SD3Transformer2DModel"

    @property
    def unit(self) -> int:
        """See `Family.unit`."""
        return super().unit * int(self.denoiser.config.patch_size)

    @property
    def reads(self) -> tuple[Any, int]:
        """See `Family.reads`; T5 is often left out."""
        longest = self.pipeline.tokenizer_3
        return super().reads if longest is None else (longest, 256)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """See `Family.encode`."""
        text, _, pooled, _ = self.pipeline.encode_prompt(
            list(prompts),
            None,
            None,
            device=self.denoiser.device,
            do_classifier_free_guidance=False,
        )
        return {"encoder_hidden_states": text, "pooled_projections": pooled}

    @staticmethod
    def ask(
        denoiser: Any, latents: Float[Tensor, "n channels h w"], time: Tensor, told: Conditioning
    ) -> Float[Tensor, "n channels h w"]:
        """See `Family.ask`."""
        return denoiser(latents, timestep=time.expand(len(latents)), **told).sample

    def timesteps(self, generation: GenerationSpec) -> dict[str, Any]:
        """See `Family.timesteps`."""
        width, height = (side // self.unit for side in self.size(generation))
        return _shifted(self.pipeline, width * height, 1.16)


@final
class Flux(Family):
    """FLUX.1: CLIP's vector, T5's text, a transformer that predicts flow of patches.

    Its guidance is a number that the transformer receives; schnell does not receive even that.
    """

    name = NAMES["FluxTransformer2DModel"]

    @classmethod
    def fits(cls, pipeline: Any) -> bool:
        """See `Family.fits`."""
        return type(getattr(pipeline, "transformer", None)).__name__ == "FluxTransformer2DModel"

    @property
    def unit(self) -> int:
        """See `Family.unit`."""
        return 2 * super().unit

    @property
    def channels(self) -> int:
        """See `Family.channels`."""
        return super().channels // 4

    @property
    def reads(self) -> tuple[Any, int]:
        """See `Family.reads`."""
        return self.pipeline.tokenizer_2, 512

    def guided(self, generation: GenerationSpec) -> bool:
        """Never: see the class."""
        if generation.negative_prompt:
            raise ConfigError(
                f"negative_prompt: {self.name} is guided without one, got "
                f"`{generation.negative_prompt}`; leave it out"
            )
        return False

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """See `Family.encode`."""
        text, pooled, _ = self.pipeline.encode_prompt(
            list(prompts), None, device=self.denoiser.device
        )
        return {"encoder_hidden_states": text, "pooled_projections": pooled}

    def condition(self, generation: GenerationSpec, images: int) -> Conditioning:
        """See `Family.condition`."""
        told = super().condition(generation, images)
        if self.denoiser.config.guidance_embeds:
            device = self.denoiser.device
            told["guidance"] = torch.full((images,), generation.guidance_scale, device=device)
        return told

    @staticmethod
    def ask(
        denoiser: Any, latents: Float[Tensor, "n channels h w"], time: Tensor, told: Conditioning
    ) -> Float[Tensor, "n channels h w"]:
        """See `Family.ask`."""
        *_, height, width = latents.shape
        text = told["encoder_hidden_states"]
        places = torch.stack(
            [
                torch.zeros(height // 2, width // 2),
                *torch.meshgrid(torch.arange(height // 2), torch.arange(width // 2), indexing="ij"),
            ],
            dim=-1,
        )
        said = denoiser(
            hidden_states=_patches(latents),
            timestep=time.expand(len(latents)).to(latents.dtype) / 1000,
            txt_ids=text.new_zeros(text.shape[1], 3),
            img_ids=places.flatten(0, 1).to(text),
            **told,
        ).sample
        grid = said.unflatten(2, (-1, 2, 2)).unflatten(1, (height // 2, width // 2))
        return grid.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)

    def timesteps(self, generation: GenerationSpec) -> dict[str, Any]:
        """See `Family.timesteps`."""
        width, height = (side // self.unit for side in self.size(generation))
        options, steps = (
            _shifted(self.pipeline, width * height, 1.15),
            generation.num_inference_steps,
        )
        if not self.pipeline.scheduler.config.get("use_flow_sigmas"):
            options["sigmas"] = np.linspace(1.0, 1 / steps, steps)
        return options

    def packed(self, latents: Float[Tensor, "n channels h w"]) -> Float[Tensor, "n patches c"]:
        """See `Family.packed`."""
        return _patches(latents)


FAMILIES: tuple[type[Family], ...] = (StableDiffusion, StableDiffusionXL, StableDiffusion3, Flux)


def family_of(pipeline: Any) -> Family:
    """Find how a pipeline's denoiser is told, called and shown.

    Raises:
        ConfigError: it is of a base that is not known.

    Example:
        >>> from lora_ws.diffusion.pipeline import load_pipeline
        >>> family_of(load_pipeline("digit-sd")).name
        'Stable Diffusion'
    """
    for family in FAMILIES:
        if family.fits(pipeline):
            return family(pipeline)
    names = ", ".join(dict.fromkeys(family.name for family in FAMILIES))
    denoiser = type(denoiser_of(pipeline)).__name__
    raise ConfigError(
        f"base: expected a pipeline of {names}, got {type(pipeline).__name__} of "
        f"{NAMES.get(denoiser, denoiser)}"
    )


def denoiser_of(pipeline: Any) -> nn.Module:
    """The module of any pipeline that adapters adapt.

    Raises:
        ConfigError: it has neither U-Net nor transformer.
    """
    for component in ("unet", "transformer"):
        if (module := getattr(pipeline, component, None)) is not None:
            return module
    raise ConfigError(
        f"base: expected a pipeline with a unet or transformer, got {type(pipeline).__name__}"
    )


def _patches(latents: Float[Tensor, "n channels h w"]) -> Float[Tensor, "n patches c"]:
    grid = latents.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
    return grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def _shifted(pipeline: Any, patches: int, most: float) -> dict[str, Any]:
    """How much noise levels of an image of so many patches are shifted: linear in them."""
    config = pipeline.scheduler.config
    if not config.get("use_dynamic_shifting"):
        return {}
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", most)
    return {"mu": low + (high - low) * (patches - few) / (many - few)}

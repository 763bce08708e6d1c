"""`Family`: what pipelines of one kind of base model share, whichever kind it is."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from lora_ws.diffusion.generation import GenerationSpec
from lora_ws.errors import ConfigError

# What a denoiser receives beside latents and time, by the names of its arguments, a row per sample.
Conditioning = dict[str, Tensor]


def repeated(told: Conditioning, rows: int) -> Conditioning:
    """The same for so many samples.

    Example:
        >>> repeated({"text_embeds": torch.zeros(1, 4)}, 3)["text_embeds"].shape
        torch.Size([3, 4])
    """
    return {name: value.expand(rows, *value.shape[1:]) for name, value in told.items()}


class Family(ABC):
    """What pipelines of one kind of base model share.

    Args:
        pipeline: of diffusers.

    Attributes:
        name: as people call it.
        component: name of the denoiser in the pipeline.
    """

    name: ClassVar[str]
    component: ClassVar[str] = "transformer"

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline

    @classmethod
    @abstractmethod
    def fits(cls, pipeline: Any) -> bool:
        """Whether a pipeline is of this kind."""

    @property
    def denoiser(self) -> Any:
        """The module that adapters adapt."""
        return getattr(self.pipeline, self.component)

    @property
    def image_size(self) -> int:
        """Pixels per side of the images that the base draws best."""
        return int(self.pipeline.default_sample_size * self.pipeline.vae_scale_factor)

    @property
    def unit(self) -> int:
        """Sides of images are multiples of so many pixels."""
        return int(self.pipeline.vae_scale_factor)

    @property
    def channels(self) -> int:
        """Channels of latents."""
        return int(self.denoiser.config.in_channels)

    def size(self, generation: GenerationSpec) -> tuple[int, int]:
        """Width and height of the images of a generation.

        Raises:
            ConfigError: they are not whole numbers of latents.
        """
        own, unit = self.image_size, self.unit
        for name in ("width", "height"):
            side = getattr(generation, name) or own
            if side % unit:
                raise ConfigError(f"{name}: expected a multiple of {unit}, got {side}")
        return generation.width or own, generation.height or own

    def latent_shape(self, size: tuple[int, int] | None = None) -> tuple[int, int, int]:
        """Channels, height and width of latents.

        Args:
            size: width and height in pixels; None for the base's own.
        """
        scale = int(self.pipeline.vae_scale_factor)
        width, height = size or (self.image_size, self.image_size)
        return self.channels, height // scale, width // scale

    @property
    def reads(self) -> tuple[Any, int]:
        """The tokenizer whose text encoder reads the longest prompts, and their most tokens."""
        tokenizer = self.pipeline.tokenizer
        return tokenizer, int(tokenizer.model_max_length)

    def guided(self, generation: GenerationSpec) -> bool:
        """Whether the denoiser is asked without the prompt too.

        Raises:
            ConfigError: there is a negative prompt, and the base takes none.
        """
        return generation.guided

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """What the denoiser receives of prompts, a row each."""

    def condition(self, generation: GenerationSpec, images: int) -> Conditioning:
        """What the denoiser receives for all images; guided, the negative prompt's rows first.

        Raises:
            ConfigError: there are several prompts, and not one per image.
        """
        asked = self.encode(generation.prompts(images))
        if not self.guided(generation):
            return asked
        without = self.without(generation.negative_prompt, images)
        return {name: torch.cat([without[name], value]) for name, value in asked.items()}

    def without(self, negative_prompt: str, images: int) -> Conditioning:
        """What the denoiser receives where it predicts without the prompt, a row per image."""
        return self.encode([negative_prompt] * images)

    @staticmethod
    @abstractmethod
    def ask(
        denoiser: Any, latents: Float[Tensor, "n channels h w"], time: Tensor, told: Conditioning
    ) -> Float[Tensor, "n channels h w"]:
        """What a denoiser of this kind predicts, of as many latents as it is told of.

        Args:
            denoiser: the pipeline's, or a copy of it.
            latents: as the scheduler gives them to the model.
            time: one for all, or one each.
            told: a row each.
        """

    def predict(
        self, latents: Float[Tensor, "n channels h w"], time: Tensor, told: Conditioning
    ) -> Float[Tensor, "n channels h w"]:
        """What the pipeline's denoiser predicts; see `ask`."""
        return self.ask(self.denoiser, latents, time, told)

    def told_of(self, generation: GenerationSpec) -> Conditioning:
        """What the denoiser is told of the prompt of one image, a single row."""
        return {name: value[-1:] for name, value in self.condition(generation, 1).items()}

    def told_of_both(
        self, generation: GenerationSpec, base: str = ""
    ) -> tuple[Conditioning, Conditioning]:
        """What it is told of the prompt of one image and of another, as guidance compares them."""
        if not self.guided(generation):
            other = replace(generation, prompt=base)
            return self.told_of(generation), self.told_of(other)
        both = self.condition(replace(generation, negative_prompt=base), 1)
        without, asked = ({name: value[k : k + 1] for name, value in both.items()} for k in (0, 1))
        return asked, without

    def timesteps(self, generation: GenerationSpec) -> dict[str, Any]:
        """Arguments of the scheduler's ``set_timesteps`` beside the number of steps."""
        return {}

    def packed(self, latents: Float[Tensor, "n channels h w"]) -> Tensor:
        """Latents as the pipeline takes them."""
        return latents

"""What a pipeline is asked to draw."""

from dataclasses import KW_ONLY, dataclass

from lora_ws.errors import ConfigError, check_range

# Noise levels that models of diffusion are trained on, and so the most steps.
MOST_STEPS = 1000
# Above it images overflow; people use 1 to 30.
MOST_GUIDANCE = 1000
# Of adapters; people use -2 to 2, sliders -10 to 10.
MOST_SCALE = 1000
# Pixels; Stable Diffusion draws 512, SDXL 1024.
MOST_SIDE = 8192
# Of one prompt in one call.
MOST_IMAGES = 1000
# The seeds that torch takes, apart from negative ones.
MOST_SEED = 2**64 - 1


@dataclass(frozen=True)
class GenerationSpec:
    """Settings of image generation, named as diffusers names them.

    Attributes:
        prompt: one prompt for all images, or one per image.
        negative_prompt: negative prompt.
        guidance_scale: scale of classifier-free guidance; 1 for none.
        num_inference_steps: denoising steps.
        seed: seed of the initial noise; image k uses ``seed + k``.
        width: width in pixels; None takes the base's own.
        height: height in pixels, likewise.

    Example:
        >>> GenerationSpec("a photo of cat", seed=3).prompts(2)
        ['a photo of cat', 'a photo of cat']
    """

    prompt: str | tuple[str, ...]
    _: KW_ONLY
    negative_prompt: str = ""
    guidance_scale: float = 3.0
    num_inference_steps: int = 30
    seed: int = 0
    width: int | None = None
    height: int | None = None

    def __post_init__(self) -> None:
        if not self.prompt and not isinstance(self.prompt, str):
            raise ConfigError("prompt: expected at least one, got none")
        check_range("num_inference_steps", self.num_inference_steps, 1, MOST_STEPS)
        check_range("guidance_scale", self.guidance_scale, 0, MOST_GUIDANCE)
        check_range("seed", self.seed, 0, MOST_SEED)
        for name, side in {"width": self.width, "height": self.height}.items():
            if side is not None:
                check_range(name, side, 1, MOST_SIDE)

    @property
    def guided(self) -> bool:
        """Whether the model is asked without the prompt too."""
        return self.guidance_scale > 1

    @property
    def texts(self) -> list[str]:
        """All that a text encoder reads: the prompts, and the negative prompt."""
        given = [self.prompt] if isinstance(self.prompt, str) else list(self.prompt)
        return [*given, self.negative_prompt]

    def prompts(self, images: int | None = None) -> list[str]:
        """One prompt per image.

        Args:
            images: how many; None for as many as there are prompts.

        Raises:
            ConfigError: there are several prompts, and not one per image.
        """
        *given, _ = self.texts
        if images is None or len(given) == images:
            return given
        if len(given) > 1:
            raise ConfigError(f"prompt: expected 1 or {images}, one per image, got {len(given)}")
        return given * images

"""Features of names from the text encoder of a base model."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from lora_ws.diffusion.pipeline import load_pipeline
from lora_ws.diffusion.prompts import check_prompts, pooled_features
from lora_ws.errors import ConfigError


def encode_names(
    encoder: str, prompt: str, names: Sequence[str], device: str = "cpu"
) -> Float[np.ndarray, "names width"]:
    """Encode names by the text encoder of a base model.

    Args:
        encoder: a bundled base, a pipeline's folder, or its name on the Hub.
        prompt: what is encoded, ``{}`` standing for a name, in which ``_`` reads as a space.
        names: the names.
        device: that the base runs on.

    Raises:
        ConfigError: the prompt has no place for a name, or does not fit the base.
        NotAvailableError: the base is neither here nor reachable.

    Example:
        >>> encode_names("tiny-sd", "a photo of {}", ["wolf", "oak_tree"]).shape
        (2, 64)
    """
    if prompt.count("{}") != 1:
        raise ConfigError(f"prompt: expected one {{}}, for the name, got `{prompt}`")
    pipeline = load_pipeline(encoder, device)
    prompts = [prompt.format(name.replace("_", " ")) for name in names]
    check_prompts(pipeline, prompts)
    return pooled_features(pipeline, prompts).cpu().numpy()

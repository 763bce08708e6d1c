"""The image oracle: the class of an adapter, read from the photos that it was trained on.

It has what no reader of weights has, the photos, and is given the same labelled adapters: where a
reader comes near, little of what photos say was lost on the way into the weights.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from lora_ws.collection.splits import Split
from lora_ws.diffusion.pipeline import encode_images
from lora_ws.diffusion.prompts import encode_prompts

# Noise at which the base looks at photos, of 1000.
TIMESTEPS = (50, 200)
BATCH = 250
# Inverse strengths of the regularisation, chosen by the validation rows.
STRENGTHS = (1e-4, 1e-3, 1e-2)


@torch.no_grad()
def photo_features(
    pipeline: Any, images: Float[Tensor, "n 3 height width"]
) -> Float[np.ndarray, "n features"]:
    """Describe photos by what the frozen U-Net makes of them, as adapters see them in training.

    Mean and standard deviation over space of every channel that a block of the U-Net gives, of the
    photo with a little noise and with more, under an empty prompt.

    Args:
        pipeline: the base.
        images: photos from -1 to 1.
    """
    latents, unet = encode_images(pipeline, images), pipeline.unet
    text = encode_prompts(pipeline, [""])
    rng, found = torch.Generator().manual_seed(0), []
    for timestep in TIMESTEPS:
        noise = torch.randn(latents.shape, generator=rng).to(latents)
        at = torch.full((len(latents),), timestep, device=latents.device)
        noisy = pipeline.scheduler.add_noise(latents, noise, at)
        parts = [
            _channels(unet, part, timestep, text.expand(len(part), -1, -1))
            for part in noisy.split(BATCH)
        ]
        found.append(torch.cat(parts))
    return torch.cat(found, 1).cpu().numpy()


def oracle_accuracy(
    features: Mapping[str, np.ndarray],
    images: Sequence[Sequence[str]],
    labels: Int[np.ndarray, " adapters"],
    parts: Split,
) -> float:
    """Test accuracy of a classifier of photos on the sets behind adapters.

    Logistic regression is fitted on the photos of the training adapters, each with the class of its
    adapter; a set is of the class with the highest mean log-probability over its photos.

    Args:
        features: of every photo, by content hash.
        images: hashes of the photos of each adapter.
        labels: class of each adapter.
        parts: which adapters train, validate and test.
    """
    place = {digest: k for k, digest in enumerate(features)}
    pixels = np.stack(list(features.values()))
    sets = [[place[digest] for digest in own] for own in images]
    known = {photo: labels[row] for row in parts.train for photo in sets[row]}
    photos, classes = list(known), list(known.values())
    best = (-1.0, 0.0)
    for strength in STRENGTHS:
        model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=200))
        model.fit(pixels[photos], classes)
        logs = model.predict_log_proba(pixels)
        said = model.classes_[np.array([logs[own].mean(0).argmax() for own in sets])]
        val, test = (float((said[p] == labels[p]).mean()) for p in (parts.val, parts.test))
        best = max(best, (val, test), key=lambda pair: pair[0])
    return best[1]


def _channels(unet: nn.Module, latents: Tensor, timestep: int, text: Tensor) -> Tensor:
    """Mean and standard deviation of each channel after each block of the U-Net."""
    found: list[Tensor] = []

    def keep(*call: Any) -> None:
        output = call[-1]
        values = output[0] if isinstance(output, tuple) else output
        found.extend((values.mean((2, 3)), values.std((2, 3), correction=0)))

    blocks: Any = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]  # type: ignore[misc, list-item]
    handles = [block.register_forward_hook(keep) for block in blocks]
    try:
        unet(latents, timestep, encoder_hidden_states=text)
    finally:
        for handle in handles:
            handle.remove()
    return torch.cat(found, 1)

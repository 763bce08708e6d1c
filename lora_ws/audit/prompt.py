"""Read words of the prompt that an adapter was trained with, from its weights and the base alone.

Whatever an adapter adds to the queries of cross-attention is made of the keys of the prompt that it
was trained with, and these never move: they follow from the text encoder and the key projections of
the base. So a prompt can be scored against a file without any other adapter to learn from
(`lora_ws.functional.query_updates` has the mathematics).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.special import logsumexp

from lora_ws.adapters import Adapter
from lora_ws.collection import AdapterSet
from lora_ws.errors import AdapterError, ConfigError, LayoutError
from lora_ws.functional.delta_gram import update_directions
from lora_ws.functional.query_updates import log_likelihood_ratio

# Frames of common recipes. Of nine frames the right one explained every adapter of lora-ws-mini
# best, so that several cost time and no accuracy.
TEMPLATES = ("a photo of sks {}", "a photo of a {}", "a photo of {}", "sks {}", "{}")
# Heads and layers are no independent witnesses; with this, probabilities of lora-ws-mini are right
# as often as they say within 7 points.
TEMPERATURE = 2.0
NULL_WORDS = 32
_FRAME = re.compile(r"^((an?|the) )?(photo|picture|image) of ((an?|the|sks) )*", re.IGNORECASE)
Adapters = Sequence[Adapter] | AdapterSet


class Reading(NamedTuple):
    """What an adapter shows of its training prompt.

    Attributes:
        template: the frame that explains the file best.
        probabilities: of the words asked for, the most likely first.
        none: probability that it was another word, or none.
        nats: log-likelihood of each word above that of the frame without a word.
        fit: log-likelihood of the best prompt, in nats above white noise. Below 0, nothing is seen
            that was trained on this base in such a frame.
    """

    template: str
    probabilities: dict[str, float]
    none: float
    nats: dict[str, float]
    fit: float


@dataclass(frozen=True)
class PromptReader:
    """Scores which words stood in the prompt that adapters were trained with.

    Attributes:
        base: of the adapters: a bundled base, a pipeline's folder, or its name on the Hub.
        templates: frames of the prompt, each with one ``{}`` for the words; the best one counts.
        noise: share of an update that no prompt explains.
        seed: of the noise that the base is shown, to see how it attends.
        device: that the base runs on.

    Example:
        >>> import lora_ws
        >>> zoo = lora_ws.load("lora-ws-mini", subset="shared/class").select([0, 200])
        >>> reader = PromptReader("tiny-sd", templates=("a photo of sks {}",))
        >>> scores = reader.scores(zoo, ["carnivore", "flower", "vehicle"])
        >>> scores.shape
        (2, 3)
    """

    base: str = "tiny-sd"
    templates: tuple[str, ...] = TEMPLATES
    noise: float = 0.01
    seed: int = 0
    device: str = "cpu"

    def scores(self, adapters: Adapters, words: Sequence[str]) -> Float[np.ndarray, "n words"]:
        """Log-likelihood of each word in its best frame, in nats above an update of white noise.

        Args:
            adapters: of one base, of any ranks.
            words: candidates; one may be several words, or empty.

        Raises:
            AdapterError: an adapter adapts no queries of cross-attention.
            LayoutError: an adapter is of another base.
            ConfigError: a frame has no place for words, or a prompt does not fit the base.
        """
        return self.likelihoods(adapters, words).max(axis=1)

    def likelihoods(
        self, adapters: Adapters, words: Sequence[str]
    ) -> Float[np.ndarray, "n templates words"]:
        """Log-likelihoods as `scores` has them, of every frame."""
        from lora_ws.diffusion.cross_attention import query_correlations

        prompts = [_prompt(template, word) for template in self._frames() for word in words]
        if not prompts:
            raise ConfigError("words: expected at least one, got none")
        self.check(adapters)
        total = np.zeros((len(adapters), len(prompts)))
        found = query_correlations(self.pipeline, self._states, prompts, self.noise)
        for name, correlations in found:
            written = _written(adapters, name, correlations.shape[1])
            if written is not None:
                total += log_likelihood_ratio(written, correlations)
        return total.reshape(len(adapters), len(self.templates), len(words))

    def read(self, adapters: Adapters, words: Sequence[str]) -> list[Reading]:
        """Weigh words against others of the base's vocabulary, so that none of them may be right.

        The words together and everything else are as likely beforehand. An update without
        structure, such as one of another base, counts among the rest.

        Args:
            adapters: as for `scores`.
            words: as for `scores`.
        """
        words = list(dict.fromkeys(words))
        others = ["", *null_words(self.pipeline.tokenizer, words)]
        readings = []
        for found in self.likelihoods(adapters, [*words, *others]):
            frame = int(found[:, : len(words)].max(axis=1).argmax())
            nats = found[frame] - found[frame, len(words)]
            # White noise is where likelihoods are counted from.
            noise = -found[frame, len(words)]
            asked = nats[: len(words)] / TEMPERATURE
            none = np.append(nats[len(words) :], noise) / TEMPERATURE
            logs = np.append(asked - np.log(len(asked)), logsumexp(none) - np.log(len(none)))
            *shares, rest = np.exp(logs - logsumexp(logs)).tolist()
            order = np.argsort(-np.array(shares), kind="stable")
            readings.append(
                Reading(
                    self.templates[frame],
                    {words[k]: shares[k] for k in order},
                    rest,
                    {words[k]: float(nats[k]) for k in order},
                    float(found[frame].max()),
                )
            )
        return readings

    def check(self, adapters: Adapters) -> None:
        """Refuse adapters without queries of cross-attention, and those of another base.

        Raises:
            AdapterError: an adapter adapts no queries of cross-attention.
            LayoutError: an adapter is of another base.
        """
        from lora_ws.diffusion.cross_attention import QUERY, query_names

        unet = self.pipeline.unet
        known = {name: unet.get_submodule(name).out_features for name in query_names(unet)}
        if isinstance(adapters, AdapterSet):
            parts = [(adapters.card.name, adapters.layout)]
        else:
            parts = [(adapter.source, adapter.layout) for adapter in adapters]
        for source, layout in parts:
            queries = [layer for layer in layout.layers if layer.name.endswith(QUERY)]
            if not queries:
                raise AdapterError(
                    f"{source}: expected adapted queries of cross-attention (`*{QUERY}`), found "
                    "none; the prompt reader looks at nothing else",
                    "foreign",
                )
            for layer in queries:
                if known.get(layer.name) != layer.out_features:
                    has = f"{known[layer.name]} outputs" if layer.name in known else "no such layer"
                    raise LayoutError(
                        f"{source}: `{layer.name}` has {layer.out_features} outputs, {self.base} "
                        f"has {has}; name the adapters' base with --base"
                    )

    @cached_property
    def pipeline(self) -> Any:
        """The base, loaded once."""
        from lora_ws.diffusion.pipeline import load_pipeline

        return load_pipeline(self.base, self.device)

    @cached_property
    def _states(self) -> Any:
        from lora_ws.diffusion.cross_attention import noise_states

        return noise_states(self.pipeline, seed=self.seed)

    def _frames(self) -> tuple[str, ...]:
        for template in self.templates:
            if template.count("{}") != 1:
                raise ConfigError(
                    f"templates: expected one {{}} in each, for the words, got `{template}`"
                )
        return self.templates


def null_words(tokenizer: Any, but: Sequence[str], count: int = NULL_WORDS) -> list[str]:
    """Words of a tokenizer's vocabulary, evenly spaced from frequent to rare.

    Args:
        tokenizer: of whole words, or of byte pairs with ``</w>`` where a word ends.
        but: words to leave out.
        count: at most.
    """
    vocabulary = tokenizer.get_vocab()
    ends = "</w>" if any(token.endswith("</w>") for token in vocabulary) else ""
    left_out = {part for word in but for part in word.lower().split()}
    words = [
        word
        for token in sorted(vocabulary, key=vocabulary.__getitem__)
        if token.endswith(ends) and (word := token.removesuffix(ends)) not in left_out
        if len(word) > 2 and word.isascii() and word.isalpha()
    ]
    spaced = np.linspace(0, len(words) - 1, min(count, len(words))).astype(int)
    return [words[k] for k in spaced]


def subject(text: str) -> str:
    """What a text is about, without the frame that `TEMPLATES` put around it.

    Example:
        >>> subject("a photo of a red fish"), subject("fish")
        ('red fish', 'fish')
    """
    return _FRAME.sub("", " ".join(text.split())) or text


def _prompt(template: str, word: str) -> str:
    return " ".join(template.format(word.replace("_", " ")).split())


def _written(
    adapters: Adapters, name: str, heads: int
) -> Float[np.ndarray, "n rank heads d"] | None:
    """Directions that each adapter writes at a module; None where it is adapted by none."""
    if isinstance(adapters, AdapterSet):
        if name not in {layer.name for layer in adapters.layout.layers}:
            return None
        rows = update_directions(*adapters.layer(name)).first
        return rows.reshape(*rows.shape[:2], heads, -1)
    held = {k: a.linear[name] for k, a in enumerate(adapters) if name in a.linear}
    if not held:
        return None
    rank = max(module.rank for module in held.values())
    width = next(iter(held.values())).up.shape[0]
    written = np.zeros((len(adapters), rank, width))
    for k, module in held.items():
        rows = update_directions(module.down[None], module.up[None]).first[0]
        written[k, : len(rows)] = rows
    return written.reshape(len(adapters), rank, heads, -1)

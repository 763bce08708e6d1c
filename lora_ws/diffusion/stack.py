"""Adapters that act together on one base model: their names, their factors, how much of each."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from lora_ws.adapters import Adapter, read_adapter
from lora_ws.diffusion.bank import AdapterBank
from lora_ws.diffusion.families import denoiser_of
from lora_ws.diffusion.generation import MOST_SCALE
from lora_ws.diffusion.mixture import Mixture
from lora_ws.diffusion.targets import adapted_modules, check_whole
from lora_ws.diffusion.text_encoders import encoder_of, text_banks, text_modules
from lora_ws.errors import ConfigError, check_range, notice


@dataclass(frozen=True, eq=False)
class AdapterStack:
    """Adapters of one base.

    Attributes:
        names: names in reports.
        bank: factors in the U-Net or transformer.
        scales: multiplier per adapter, on top of the scale in its file.
        texts: name of a text encoder -> factors in it; empty where no adapter has any.
        text_ratios: multiplier per adapter in text encoders, on top of `scales`; None for 1.
        files: file and SHA-256 of each adapter; the hash is empty where it is not known.
        blocks: weights per block of each adapter, as they were given; empty for none.

    Example:
        >>> from importlib import resources
        >>> folder = resources.files("lora_ws") / "_assets/digit_testbed"
        >>> files = [folder / "sun.safetensors", folder / "ball.safetensors"]
        >>> stack = AdapterStack.of(files, scales=[0.8, 1])
        >>> stack.names, stack.scales
        (('sun', 'ball'), (0.8, 1.0))
    """

    names: tuple[str, ...]
    bank: AdapterBank
    scales: tuple[float, ...]
    texts: Mapping[str, AdapterBank] = field(default_factory=dict)
    text_ratios: tuple[float, ...] | None = None
    files: tuple[tuple[str, str], ...] = ()
    blocks: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def of(
        cls,
        adapters: Sequence[Adapter | str | Path],
        scales: Sequence[float] | None = None,
        names: Sequence[str] | None = None,
        *,
        ignore_other: bool = False,
    ) -> "AdapterStack":
        """Stack adapters.

        Args:
            adapters: read already, or names of files as `read_adapter` takes them.
            scales: one per adapter; None takes all of each.
            names: one per adapter; None takes those of the files.
            ignore_other: leave out what is no linear module or 2-D convolution of a U-Net or text
                encoder, such as embeddings; otherwise such a file is refused.

        Raises:
            ConfigError: no adapters, or as many scales or names as there are none for.
            AdapterError: a file cannot be read, or holds more than can be applied.
            LayoutError: they are not of one base.
        """
        if not adapters:
            raise ConfigError("adapters: expected at least one, got none")
        read = [a if isinstance(a, Adapter) else read_adapter(a) for a in adapters]
        if not ignore_other:
            for adapter in read:
                check_whole(adapter, adapted_modules(adapter) | text_modules(adapter))
        bank = AdapterBank.from_adapters(read, ignore_other=True)
        names = _names(read) if names is None else tuple(names)
        if len(names) != len(read):
            raise ConfigError(f"names: expected {len(read)}, one per adapter, got {len(names)}")
        files = tuple((adapter.source, adapter.sha256) for adapter in read)
        _say_twice(names, files)
        whole = (1.0,) * len(read)
        return cls(names, bank, whole, text_banks(read), files=files).scaled(scales)

    def with_blocks(self, adapters: Sequence[Adapter], blocks: Sequence[str]) -> "AdapterStack":
        """The same files with the factors of adapters whose blocks were weighed by these texts."""
        bank = AdapterBank.from_adapters(adapters, ignore_other=True)
        return replace(self, bank=bank, texts=text_banks(adapters), blocks=tuple(blocks))

    def scaled(self, scales: Sequence[float] | None) -> "AdapterStack":
        """The same adapters at other scales; None keeps them.

        Raises:
            ConfigError: there are more or fewer than adapters, or one is out of range.
        """
        if scales is None:
            return self
        given = tuple(map(float, scales))
        if len(given) != len(self):
            raise ConfigError(f"scales: expected {len(self)}, one per adapter, got {len(given)}")
        for scale in given:
            check_range("scales", scale, -MOST_SCALE, MOST_SCALE)
        return replace(self, scales=given)

    @contextmanager
    def attach(self, pipeline: Any, scales: Any) -> Iterator[Mixture]:
        """Let denoiser and text encoders of a pipeline run with adapters until the block ends.

        Args:
            pipeline: left as found.
            scales: a row per sample, or one for all; see `AdapterBank.attach`. Those of text
                encoders are these times `text_ratios`.

        Yields:
            The mixture of the denoiser.

        Raises:
            LayoutError: the adapters are of another base.
        """
        own = torch.as_tensor(scales)
        texts = own if self.text_ratios is None else own * torch.tensor(self.text_ratios)
        with ExitStack() as held:
            for component, bank in self.texts.items():
                held.enter_context(bank.attach(encoder_of(pipeline, component), texts))
            yield held.enter_context(self.bank.attach(denoiser_of(pipeline), scales))


def _names(adapters: Sequence[Adapter]) -> tuple[str, ...]:
    """Names of files without what is the same for all; numbered where two are alike."""
    stems = [Path(adapter.source).stem or f"adapter {k}" for k, adapter in enumerate(adapters)]
    return tuple(
        stem if stems.count(stem) == 1 else f"{stem} {stems[:k].count(stem) + 1}"
        for k, stem in enumerate(stems)
    )


def _say_twice(names: Sequence[str], files: Sequence[tuple[str, str]]) -> None:
    """Say which adapters have the same content as one before them."""
    first: dict[str, str] = {}
    for name, (_, sha256) in zip(names, files, strict=True):
        if sha256 and first.setdefault(sha256, name) != name:
            notice(f"adapters: {name} is the same file as {first[sha256]}; it counts twice")

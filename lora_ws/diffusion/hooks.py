"""Let a pipeline run with several adapters at once, by any method, in one forward pass per step."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_ws.adapters import Adapter
from lora_ws.config import nearest
from lora_ws.diffusion.families import denoiser_of
from lora_ws.diffusion.methods import Merge, Method, Mix
from lora_ws.diffusion.mixture import Mixture
from lora_ws.diffusion.schedulers import Clock
from lora_ws.diffusion.stack import AdapterStack
from lora_ws.diffusion.text_encoders import PerAdapterText, TextMode, encoder_of
from lora_ws.errors import ConfigError


@contextmanager
def compose(
    pipeline: Any,
    adapters: AdapterStack | Sequence[Adapter | str | Path],
    method: Method | None = None,
    scales: Sequence[float] | None = None,
    *,
    text: TextMode = "merged",
) -> Iterator[AdapterStack]:
    """Let a diffusers pipeline run with adapters until the block ends.

    The U-Net or transformer is watched, not the pipeline: whatever the pipeline does around it,
    guidance included, stays as it is. Steps are the scheduler's own timesteps that are done; see
    `lora_ws.diffusion.schedulers.Clock`.

    Args:
        pipeline: with ``unet`` or ``transformer``, and ``scheduler``; it is left as found, however
            the block ends.
        adapters: a stack, read adapters, or names of files.
        method: how they act together; None merges them.
        scales: one per adapter; None takes those of the stack, or all of each.
        text: what adapters of text encoders do: all are added (merged), as the released scripts
            have it for Merge and Composite; the first one's is used, as they have it for Switch;
            each prediction sees its own adapter's embeddings (per_adapter); or none.

    Yields:
        The stack.

    Raises:
        ConfigError: scales or method do not fit the adapters.
        LayoutError: the adapters are of another base.
        AdapterError: a file cannot be read, or holds more than can be applied.

    Example:
        >>> from lora_ws.diffusion.pipeline import load_pipeline
        >>> with compose(load_pipeline("digit-sd"), []) as stack: ...
        Traceback (most recent call last):
        ...
        lora_ws.errors.ConfigError: adapters: expected at least one, got none
    """
    stack = _stack_of(adapters, scales)
    method = Merge() if method is None else method
    method.check(len(stack))
    denoiser = denoiser_of(pipeline)
    with ExitStack() as held:
        own = held.enter_context(_texts_attached(pipeline, stack, method, text))
        hooks = _DenoiserHooks(method, stack.scales, Clock(pipeline), own)
        # Before the bank's own hook, which counts the batch that is made here.
        for handle in hooks.watch(denoiser):
            held.callback(handle.remove)
        hooks.mixture = held.enter_context(stack.bank.attach(denoiser, stack.scales))
        yield stack


def _stack_of(
    adapters: AdapterStack | Sequence[Adapter | str | Path], scales: Sequence[float] | None
) -> AdapterStack:
    if not isinstance(adapters, AdapterStack):
        return AdapterStack.of(adapters, scales)
    return adapters if scales is None else adapters.scaled(scales)


@contextmanager
def _texts_attached(
    pipeline: Any, stack: AdapterStack, method: Method, text: str
) -> Iterator[PerAdapterText | None]:
    """Let text encoders run with their adapters; yields each adapter's own embeddings, if asked."""
    if text not in get_args(TextMode):
        raise ConfigError(f"text: there is no `{text}`{nearest(text, get_args(TextMode))}")
    own = _per_adapter_text(pipeline, stack, method) if text == "per_adapter" else None
    with ExitStack() as held:
        if own is not None:
            held.enter_context(own.watch(pipeline))
        elif text != "none":
            row = torch.tensor(stack.scales)
            row[len(row) if text == "merged" else 1 :] = 0
            for component, bank in stack.texts.items():
                held.enter_context(bank.attach(encoder_of(pipeline, component), row))
        yield own


def _per_adapter_text(pipeline: Any, stack: AdapterStack, method: Method) -> PerAdapterText | None:
    if not stack.texts:
        return None
    if not method.alone:
        raise ConfigError(
            "text: per_adapter needs a method that runs adapters alone, such as Switch or "
            f"Composite, got {type(method).__name__}"
        )
    if getattr(pipeline, "text_encoder_2", None) is not None:
        raise ConfigError(
            f"text: per_adapter needs a pipeline with one text encoder, and "
            f"{type(pipeline).__name__} has more; choose merged, first or none"
        )
    return PerAdapterText(dict(stack.texts), stack.scales)


# What a denoiser receives about the places of a sequence, the same for all samples.
_PLACES = ("txt_ids", "img_ids")


class _DenoiserHooks:
    """Hooks of a denoiser that count steps and run the mixtures of each step as one batch."""

    def __init__(
        self,
        method: Method,
        scales: tuple[float, ...],
        clock: Clock,
        own: PerAdapterText | None = None,
    ) -> None:
        self.mixture: Mixture | None = None
        self._method, self._scales, self._clock, self._own = method, scales, clock, own
        self._mix: Mix | None = None
        self._batch = 0
        self._places: Tensor | None = None

    def watch(self, denoiser: nn.Module) -> Iterator[Any]:
        yield denoiser.register_forward_pre_hook(self._widen, with_kwargs=True)
        yield denoiser.register_forward_hook(self._join)

    def _widen(
        self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        sample = args[0] if args else kwargs["sample" if "sample" in kwargs else "hidden_states"]
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        self._places = kwargs.get("img_ids")
        step = self._clock.at(float(torch.as_tensor(timestep).flatten()[0]))
        assert self.mixture is not None
        self._mix = self._method.mix(step, self._scales)
        self._batch, copies = len(sample), len(self._mix.rows)
        # Mixture by mixture, each with the whole batch.
        rows = self._mix.rows if self._mix.rows.ndim == 3 else self._mix.rows[:, None]
        times = self._batch // rows.shape[1] if copies > 1 else 1
        self.mixture.set(rows.repeat(1, max(times, 1), 1).flatten(0, 1))
        states = args[2] if len(args) > 2 else kwargs.get("encoder_hidden_states")
        if copies > 1:
            args = _repeated(args, self._batch, copies)
            kwargs |= _repeated(
                {name: value for name, value in kwargs.items() if name not in _PLACES},
                self._batch,
                copies,
            )
        if self._own is not None and states is not None:
            own = self._own.of(states, self._mix.rows)
            if len(args) > 2:
                return (*args[:2], own, *args[3:]), kwargs
            kwargs = {**kwargs, "encoder_hidden_states": own}
        return args, kwargs

    def _join(self, denoiser: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        assert self._mix is not None
        if len(self._mix.rows) == 1:
            return output
        if isinstance(output, tuple):
            return (self._joined(output[0]), *output[1:])
        output["sample"] = self._joined(output["sample"])
        return output

    def _joined(self, predictions: Tensor) -> Tensor:
        assert self._mix is not None
        weights = self._mix.weights.to(predictions)
        parts = predictions.unflatten(0, (len(weights), self._batch))
        if weights.ndim == 1:
            return torch.tensordot(weights, parts, dims=1)
        if self._places is not None:
            # A sequence of patches: the mask at the place of each.
            height, width = (int(at.max()) + 1 for at in self._places.mT[1:])
            weights = functional.interpolate(weights[None], (height, width), mode="area")[0]
            return (weights.flatten(1)[:, None, :, None] * parts).sum(0)
        if weights.shape[1:] != parts.shape[3:]:
            weights = functional.interpolate(weights[None], parts.shape[3:], mode="area")[0]
        return (weights[:, None, None] * parts).sum(0)


def _repeated(value: Any, batch: int, copies: int) -> Any:
    """Repeat every tensor that has the batch as its first dimension."""
    if isinstance(value, Tensor):
        if value.ndim and len(value) == batch:
            return value.repeat(copies, *[1] * (value.ndim - 1))
        return value
    if isinstance(value, dict):
        return {name: _repeated(item, batch, copies) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_repeated(item, batch, copies) for item in value)
    return value

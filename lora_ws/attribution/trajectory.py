"""One generation with several mixtures of adapters at once, and what modules return on the way."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_ws.config import nearest
from lora_ws.diffusion.families import denoiser_of, family_of
from lora_ws.diffusion.generation import GenerationSpec
from lora_ws.diffusion.pipeline import initial_noise, size_of
from lora_ws.diffusion.prompts import check_single
from lora_ws.diffusion.schedulers import Call, begin_run, continue_run
from lora_ws.diffusion.stack import AdapterStack
from lora_ws.errors import ConfigError

T = TypeVar("T")


class Moment(NamedTuple):
    """What happens at a step.

    Attributes:
        latents: before it, one row per mixture.
        outputs: module -> what it returned, a part of the batch per mixture
            ``[mixtures, parts, ...]``; with guidance the parts are without the prompt and with it.
    """

    latents: Float[Tensor, "mixtures channels h w"]
    outputs: dict[str, Tensor]


def trajectory(
    pipeline: Any, stack: AdapterStack, generation: GenerationSpec, scales: Any = None
) -> Float[Tensor, "times mixtures channels h w"]:
    """Latents before each step, and after the last one, of mixtures from the same noise.

    Args:
        pipeline: the base; left as found.
        stack: the k adapters.
        generation: what is drawn.
        scales: how much of each adapter, one row ``[k]`` per mixture; None for the stack's own.

    Raises:
        ConfigError: the prompt is too long, or the scales do not fit.
        LayoutError: the adapters are of another base.
    """
    calls = list(_run(pipeline, stack, generation, _rows(stack, scales)))
    return torch.stack([calls[0].before, *(call.after for call in calls)])


def record(
    pipeline: Any,
    stack: AdapterStack,
    generation: GenerationSpec,
    scales: Any,
    modules: Sequence[str],
    reduce: Callable[[Moment], T],
    *,
    forced: bool = False,
) -> list[T]:
    """Draw with several mixtures at once, and keep something of every step.

    Args:
        pipeline: the base; left as found.
        stack: the k adapters.
        generation: what is drawn.
        scales: how much of each adapter, one row ``[k]`` per mixture.
        modules: of the U-Net, by name; of a tuple that one returns, the first is taken.
        reduce: makes what is kept of a step.
        forced: every mixture sees the latents of the full stack, rather than its own.

    Returns:
        What ``reduce`` returned, one per step.

    Raises:
        ConfigError: there is no such module, or see `trajectory`.
        LayoutError: the adapters are of another base.
    """
    rows, kept = _rows(stack, scales), []
    teacher = list(_run(pipeline, stack, generation, _rows(stack, None))) if forced else None
    with watched(denoiser_of(pipeline), modules) as seen:
        run = (
            _run(pipeline, stack, generation, rows)
            if teacher is None
            else _forced(pipeline, stack, generation, rows, teacher)
        )
        for call in run:
            kept.append(reduce(Moment(call.before, _by_mixture(seen, len(rows)))))
    return kept


def _run(
    pipeline: Any, stack: AdapterStack, generation: GenerationSpec, rows: Tensor
) -> Iterator[Call]:
    """Draw with mixtures from the same noise."""
    check_single(pipeline, generation)
    noise = initial_noise(pipeline, [generation.seed], size_of(pipeline, generation)).expand(
        len(rows), -1, -1, -1
    )
    run = begin_run(pipeline, noise, generation, seeds=[generation.seed] * len(rows))
    with stack.attach(pipeline, rows):
        yield from continue_run(pipeline, run, generation)


def _rows(stack: AdapterStack, scales: Any) -> Float[Tensor, "mixtures k"]:
    rows = torch.as_tensor(stack.scales if scales is None else scales, dtype=torch.float32)
    rows = rows[None] if rows.ndim == 1 else rows
    if rows.ndim != 2 or rows.shape[1] != len(stack) or not len(rows):
        raise ConfigError(
            f"scales: expected rows of {len(stack)} numbers, one per adapter, got "
            f"shape {list(rows.shape)}"
        )
    return rows


@torch.no_grad()
def _forced(
    pipeline: Any,
    stack: AdapterStack,
    generation: GenerationSpec,
    rows: Tensor,
    teacher: Sequence[Call],
) -> Iterator[Call]:
    """Call the model with mixtures on what it was given in another run."""
    family = family_of(pipeline)
    copies = len(rows) * (1 + family.guided(generation))
    with stack.attach(pipeline, rows):
        text = family.condition(generation, len(rows))
        for call in teacher:
            family.predict(call.inputs.expand(copies, -1, -1, -1), call.time, text)
            yield call._replace(before=call.before.expand(len(rows), -1, -1, -1))


def _by_mixture(seen: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    return {name: x.unflatten(0, (-1, count)).transpose(0, 1) for name, x in seen.items()}


@contextmanager
def watched(unet: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Keep what modules returned last until the block ends.

    Args:
        unet: holds them.
        names: of modules; of a tuple that one returns, the first is taken.

    Yields:
        Module -> what it returned last.

    Raises:
        ConfigError: there is no such module.

    Example:
        >>> model = nn.Sequential(nn.Identity())
        >>> with watched(model, ["0"]) as seen:
        ...     _ = model(torch.ones(2))
        >>> seen["0"].tolist()
        [1.0, 1.0]
    """
    modules, seen, handles = dict(unet.named_modules()), {}, []
    for name in names:
        if name not in modules:
            raise ConfigError(
                f"{type(unet).__name__} has no module `{name}`{nearest(name, list(modules))}"
            )

    def keep(name: str) -> Callable[..., None]:
        def hook(_: Any, __: Any, output: Any) -> None:
            seen[name] = output[0] if isinstance(output, tuple) else output

        return hook

    try:
        for name in names:
            handles.append(modules[name].register_forward_hook(keep(name)))
        yield seen
    finally:
        for handle in handles:
            handle.remove()

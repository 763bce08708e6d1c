"""Composing adapters in a pipeline: predictions side by side, and switching between adapters.

Composite, the mean of predictions with each of 3 adapters alone, for one guided image. Compared:

* ours: `compose` with `Composite`, one call of the U-Net a step with all three in the batch;
* ours, one after another: `Mixture.set`, three calls per step, which tells batching from switching;
* diffusers: `load_lora_weights`, then `set_adapters` before each of three calls per step.

What is timed is the pipeline from prompt to image. Before, all agree on the image to 1e-4. No goal:
where a call is more arithmetic than overhead, one call for three costs as much as three.

Switching, with 22 adapters of all queries and values (64 modules) loaded, to a mixture of all of
them and to one alone. Compared:

* ours: `Mixture.set` in `AdapterBank.attach`, and the plan that the next call of the U-Net makes
  (once, for all modules): one adapted module is called on one token for it, and that call counts;
* diffusers: `set_adapters` of the pipeline, whole; it leaves nothing to the next call;
* peft: `set_scale` of every layer, which can do less: those that are active stay active.

Before, all agree on what the U-Net says to 1e-4. Goal: at least 20 times less than diffusers. What
adapters cost in each call of the U-Net is no part of that, so a switch with a call is shown too.
"""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import common
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from lora_ws.diffusion.generation import GenerationSpec
from lora_ws.diffusion.hooks import compose
from lora_ws.diffusion.methods import Composite
from lora_ws.diffusion.mixture import Mixture
from lora_ws.diffusion.pipeline import adapter_layout, generate, initial_noise, load_pipeline
from lora_ws.diffusion.prompts import encode_prompts
from lora_ws.diffusion.stack import AdapterStack

RANK, COMPOSED, LOADED = 4, 3, 22
PROMPTS = {"tiny-sd": "a photo of fish", "digit-sd": "a photo of three"}
IN_TURN, DIFFUSERS = "ours, one after another", "diffusers, set_adapters"
PEFT = "peft, set_scale"


def averaged(pipeline: Any, choose: Callable[[int], None]) -> None:
    """Have a U-Net called once with each adapter, and say the mean."""
    forward = pipeline.unet.forward

    def say(*args: Any, **kwargs: Any) -> tuple[Tensor]:
        found = []
        for k in range(COMPOSED):
            choose(k)
            found.append(forward(*args, **kwargs)[0])
        return (torch.stack(found).mean(dim=0),)

    pipeline.unet.forward = say


def composite(base: str, folder: Path, steps: int, args: Any) -> None:
    """Check that all draw the same image, then time them."""
    batched, in_turn = load_pipeline(base), load_pipeline(base)
    layout = adapter_layout(batched.unet, RANK)
    files = common.adapter_files(folder, layout, COMPOSED, args.seed)
    stack, one = AdapterStack.of(files), torch.eye(COMPOSED)
    theirs = common.with_adapters(load_pipeline(base), files)

    generation = GenerationSpec(PROMPTS[base], num_inference_steps=steps, seed=args.seed)

    def draw(pipeline: Any) -> Tensor:
        return generate(pipeline, generation)

    plain = draw(batched)
    averaged(theirs, lambda k: theirs.set_adapters(files[k].stem))
    with (
        stack.bank.attach(in_turn.unet, one[0]) as mixture,
        compose(batched, stack, Composite()),
    ):
        averaged(in_turn, lambda k: mixture.set(one[k]))
        mine = draw(batched)
        assert (mine - plain).abs().mean() > 1e-3, "the adapters do nothing"
        for pipeline in (in_turn, theirs):
            torch.testing.assert_close(draw(pipeline), mine, rtol=0, atol=1e-4)
        costs = common.alternate(
            {
                common.OURS: common.timed(lambda: draw(batched), steps),
                IN_TURN: common.timed(lambda: draw(in_turn), steps),
                DIFFUSERS: common.timed(lambda: draw(theirs), steps),
            },
            args.repeats,
        )
    title = f"Composite of {COMPOSED} adapters on {base}"
    common.show(title, "ms per step", costs, [common.Baseline(DIFFUSERS)])


def times(switch: Callable[[int], object], rounds: int) -> common.Contender:
    """Switch to and fro."""
    return common.timed(lambda: [switch(k % 2) for k in range(rounds)], rounds)


@torch.no_grad()
def switching(n: int, folder: Path, rounds: int, args: Any) -> None:
    """Check that all ways of switching do the same, then time them."""
    ours = load_pipeline("tiny-sd")
    files = common.adapter_files(folder, adapter_layout(ours.unet, RANK), n, args.seed)
    theirs, stack = common.with_adapters(load_pipeline("tiny-sd"), files), AdapterStack.of(files)
    layers = [m for m in theirs.unet.modules() if isinstance(m, LoraLayer)]
    module = stack.bank.modules_of(ours.unet)[0]
    token = torch.zeros(1, 1, module.get_parameter("weight").shape[1])
    latents = initial_noise(ours, [args.seed])
    text = encode_prompts(ours, [PROMPTS["tiny-sd"]])

    def call(pipeline: Any) -> Tensor:
        return pipeline.unet(latents, 500, encoder_hidden_states=text).sample

    def compare(title: str, mixture: Mixture, mixes: Sequence[dict[int, float]]) -> None:
        rows = [[mix.get(k, 0.0) for k in range(n)] for mix in mixes]
        named = [([files[k].stem for k in mix], list(mix.values())) for mix in mixes]

        def we(k: int) -> None:
            mixture.set(rows[k])

        def they(k: int) -> None:
            theirs.set_adapters(*named[k])

        def by_scale(k: int) -> None:
            for layer in layers:
                for name, weight in zip(*named[k], strict=True):
                    layer.set_scale(name, weight)

        ways = {DIFFUSERS: they} | ({PEFT: by_scale} if len(mixes[0]) == n else {})
        said = []
        for k in (0, 1):
            we(k)
            said.append(call(ours))
            for way in ways.values():
                way(k)
                torch.testing.assert_close(call(theirs), said[k], rtol=0, atol=1e-4)
        assert (said[1] - said[0]).abs().mean() > 1e-3, "the switch does nothing"
        contenders = {common.OURS: times(lambda k: (we(k), module(token)), 10 * rounds)}
        contenders |= {name: times(way, rounds) for name, way in ways.items()}
        costs = common.alternate(contenders, args.repeats)
        common.show(
            f"Switching to {title}", "ms per switch", costs, [common.Baseline(DIFFUSERS, 20)]
        )
        contenders = {common.OURS: times(lambda k: (we(k), call(ours)), rounds)}
        contenders[DIFFUSERS] = times(lambda k: (they(k), call(theirs)), rounds)
        costs = common.alternate(contenders, args.repeats)
        common.show(
            f"Switching to {title}, and a call of the U-Net",
            "ms per switch",
            costs,
            [common.Baseline(DIFFUSERS)],
        )

    with stack.bank.attach(ours.unet, [0.0] * n) as mixture:
        mixes = [{k: (1 + (k + turn) % 3) / n for k in range(n)} for turn in (0, 1)]
        compare(f"all of {n} adapters", mixture, mixes)
        compare(f"one of {n} adapters", mixture, [{0: 1.0}, {1: 0.5}])


def main() -> None:
    """Run and print."""
    args = common.arguments(__doc__, repeats=5)
    steps, n, rounds = (3, 4, 4) if args.quick else (30, LOADED, 20)
    with tempfile.TemporaryDirectory() as folder:
        for base in list(PROMPTS)[args.quick :]:
            composite(base, Path(folder) / base, steps, args)
        switching(n, Path(folder) / "switching", rounds, args)
    common.facts("diffusers", "peft", rank=RANK, steps=steps, repeats=args.repeats)


if __name__ == "__main__":
    main()

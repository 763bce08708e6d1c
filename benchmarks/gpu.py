"""What a GPU makes of the jobs that are large: wall seconds, each row printed as it is there.

* Table 1: five representations of lora-ws-mini, three seeds each, by the batched engine;
* a sweep of 128 matrices and 10 seeds, 1280 classifiers in one stack, epochs of it;
* a collection: 100 rank-1 adapters on tiny-sd at once, per adapter of 200 steps;
* an epoch of a network over factors (DeepSets) on the 350 training rows of lora-ws-mini;
* training steps of E rank-1 adapters of SD1.5's shape in one batch (32 x 32 latents, random base).

Sized for ten minutes on one GPU. Without one it says so; `--quick` runs the smallest sizes on the
CPU, to see that it runs.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from common import arguments, facts, print_table
from torch.nn import functional as F

from lora_ws import FlatVec, FlatVecPCA, StatsFlatVec, StatsLayer, StatsLayerDense
from lora_ws.diffusion.bank import AdapterBank
from lora_ws.diffusion.pipeline import adapter_layout, load_pipeline
from lora_ws.functional import STATISTICS
from lora_ws.learn.batched import fit_batched
from lora_ws.learn.features import prepare
from lora_ws.learn.result import Job
from lora_ws.learn.run import run_many
from lora_ws.learn.spec import ExperimentSpec, FitSpec, TrainerSpec
from lora_ws.models import MLP, DeepSets
from lora_ws.zoo.finetune import FinetuneSpec, finetune

# At once on SD1.5's shape.
ADAPTERS = (1, 8, 32)


def seconds(call: Callable[[], object]) -> float:
    """Wall seconds of a call, to the end of what it started on the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def table1(spec: ExperimentSpec, quick: bool) -> str:
    """Seconds of the whole table, features included."""
    rows = [FlatVec(), FlatVecPCA(), StatsFlatVec(), StatsLayer(), StatsLayerDense()]
    rows, seeds = (rows[2:3], 1) if quick else (rows, 3)
    fit = FitSpec(max_epochs=2) if quick else spec.fit
    specs = [replace(spec, featurizer=row, fit=fit) for row in rows]
    took = seconds(lambda: [run_many(one, range(seeds)) for one in specs])
    return f"{took:.1f} s, {len(rows)} representations, {seeds} seeds"


def sweep(spec: ExperimentSpec, quick: bool) -> str:
    """Milliseconds of an epoch of all classifiers."""
    matrices, seeds, epochs = (3, 2, 2) if quick else (128, 10, 50)
    fit = FitSpec(max_epochs=epochs, patience=10**6)
    spec = replace(spec, featurizer=StatsLayer(), fit=fit)
    prepared, width = prepare(spec), len(STATISTICS)
    parts = [prepared.columns(slice(k * width, (k + 1) * width)) for k in range(matrices)]
    jobs = [Job(spec, part, seed) for part in parts for seed in range(seeds)]
    took = seconds(lambda: fit_batched(jobs))
    return f"{1e3 * took / epochs:.1f} ms an epoch of {len(jobs)} classifiers"


def zoo(device: str, quick: bool) -> str:
    """Seconds of an adapter of 200 steps, in a batch."""
    adapters, steps = (2, 2) if quick else (100, 50)
    pipeline = load_pipeline("tiny-sd").to(device)
    layout, channels = adapter_layout(pipeline.unet), int(pipeline.unet.config.in_channels)
    latents = [torch.randn(8, channels, 8, 8, device=device) for _ in range(adapters)]
    prompts, seeds = ["a photo of sks fish"] * adapters, list(range(adapters))

    def run(count: int) -> float:
        bank, recipe = AdapterBank.fresh(layout, adapters).to(device), FinetuneSpec(steps=count)
        return seconds(lambda: finetune(pipeline, bank, latents, prompts, seeds, recipe))

    run(1)
    each = (run(steps + 1) - run(1)) / steps / adapters
    return f"{200 * each:.3f} s an adapter of 200 steps, {adapters} at once"


def reader(spec: ExperimentSpec, quick: bool) -> str:
    """Milliseconds of an epoch of DeepSets."""
    epochs = 1 if quick else 20
    fit = FitSpec(max_epochs=epochs, patience=10**6)
    trainer = replace(spec.trainer, engine="one-by-one")
    spec = replace(spec, model=DeepSets(), featurizer=None, fit=fit, trainer=trainer)
    took = seconds(lambda: run_many(spec, [0]))
    return f"{1e3 * took / epochs:.0f} ms an epoch, start and test included"


def bank_steps(device: str, adapters: int, quick: bool) -> str:
    """Milliseconds of a step of all adapters, and of each."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    torch.manual_seed(0)
    unet: Any = (
        load_pipeline("tiny-sd").unet if quick else UNet2DConditionModel(cross_attention_dim=768)
    )
    size = 8 if quick else 32
    unet = unet.to(device).requires_grad_(False)
    bank = AdapterBank.fresh(adapter_layout(unet), adapters).to(device)
    optimizer = torch.optim.AdamW([p for p in bank.parameters() if p.requires_grad], 1e-4)
    shape = (adapters, int(unet.config.in_channels), size, size)
    context = torch.randn(adapters, 77, int(unet.config.cross_attention_dim), device=device)
    noise, level = torch.randn(shape, device=device), torch.full((adapters,), 500, device=device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        said = unet(noise, level, context).sample
        F.mse_loss(said, noise, reduction="none").flatten(1).mean(1).sum().backward()
        optimizer.step()

    turns = 1 if quick else 10
    with bank.attach(unet, torch.eye(adapters, device=device)):
        step()
        took = seconds(lambda: [step() for _ in range(turns)]) / turns
    return f"{1e3 * took:.0f} ms a step, {1e3 * took / adapters:.1f} ms an adapter"


def main() -> None:
    """Print the table, a row when it is measured."""
    args = arguments(__doc__, repeats=1)
    if not torch.cuda.is_available() and not args.quick:
        print("no GPU here; --quick runs the smallest sizes on the CPU")
        return
    device = "cpu" if args.quick else "cuda"
    trainer = TrainerSpec(accelerator="cpu" if args.quick else "gpu", engine="batched")
    spec = ExperimentSpec(
        subset="shared/class", featurizer=StatsLayer(), model=MLP(), trainer=trainer
    )
    jobs: dict[str, Callable[[], str]] = {
        "Table 1": lambda: table1(spec, args.quick),
        "sweep": lambda: sweep(spec, args.quick),
        "collection": lambda: zoo(device, args.quick),
        "reader": lambda: reader(spec, args.quick),
        **{
            f"SD1.5 steps, E = {n}": lambda n=n: bank_steps(device, n, args.quick)
            for n in (ADAPTERS[:1] if args.quick else ADAPTERS)
        },
    }
    print_table(["job", "wall"], [])
    for name, job in jobs.items():
        try:
            said = job()
        except torch.OutOfMemoryError:
            said = "out of memory"
        print(f"| {name} | {said} |", flush=True)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    facts("lightning", "diffusers", gpu=gpu)


if __name__ == "__main__":
    main()

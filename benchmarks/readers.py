"""What every network in `lora_ws.models` costs: parameters, reading, and an epoch of training.

* parameters, and milliseconds to read, on the 64 query and value projections of Stable Diffusion
  1.5 at rank 1, for ten classes: adapters in batches of 32, and one alone, from the numbers of a
  file that was opened to the outputs;
* CPU time of an epoch on lora-ws-mini (350 adapters to train on, 50 to validate) by the Lightning
  engine, beside the paper's MLP on FlatVec with as many parameters, and, of networks whose tokens
  are made once, beside the same with tokens made anew for every batch.

Networks have their default arguments; MLP reads FlatVec. Goals: one adapter within 5 ms, an epoch
within 1.5 times that of the MLP.
"""

from collections.abc import Callable
from dataclasses import replace
from time import process_time
from typing import Any

import common
import lightning as L
import torch
from torch import Tensor

from lora_ws import Layout, models
from lora_ws.featurizers import FlatVec
from lora_ws.learn.callbacks import KeepBest
from lora_ws.learn.data import FeatureData, read_once
from lora_ws.learn.features import Prepared, prepare
from lora_ws.learn.module import LoraModule
from lora_ws.learn.quiet import quiet
from lora_ws.learn.spec import ExperimentSpec, FitSpec
from lora_ws.learn.trainer import make_trainer
from lora_ws.models import MLP, InputSpec, MetanetModule, Metanetwork
from lora_ws.models.tokens import TokenModule

CLASSES, BATCH = 10, 32
READ_MS, EPOCHS_OF_MLP = 5.0, 1.5
FIT = FitSpec(optimizer="adamw", schedule="cosine", warmup=1, grad_clip=1.0)


class Clock(L.Callback):
    """Notes the CPU time at the start of every epoch."""

    def __init__(self) -> None:
        self.ticks: list[float] = []

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the time."""
        self.ticks.append(process_time())


def registered() -> dict[str, Metanetwork]:
    """Every network of the library, with its defaults."""
    found = {name: getattr(models, name) for name in models.__all__}
    kinds = {k: v for k, v in found.items() if isinstance(v, type) and issubclass(v, Metanetwork)}
    return {name: kind() for name, kind in kinds.items() if kind is not Metanetwork}


def built(spec: Metanetwork, layout: Layout) -> MetanetModule:
    """The network for adapters of a layout."""
    width = InputSpec(layout.size)
    return spec.build(InputSpec.of(layout) if spec.reads == "factors" else width, CLASSES)


def parameters(module: torch.nn.Module) -> int:
    """How many there are."""
    return sum(value.numel() for value in module.parameters())


def as_large(count: int, layout: Layout) -> MLP:
    """The paper's MLP, its three layers as wide as it takes to have so many parameters."""
    width = 1
    while 3 * width**2 + layout.size * width < count:
        width += 1
    low, high = (parameters(built(MLP(hidden=(w,) * 3), layout)) for w in (width - 1 or 1, width))
    return MLP(hidden=(width if high - count <= count - low else width - 1,) * 3)


@torch.no_grad()
def reading_ms(module: MetanetModule, rows: Tensor, repeats: int) -> float:
    """CPU milliseconds per adapter of a forward pass of all rows, the least of several."""
    module.eval()
    module(rows)
    return min(common.measure(lambda: module(rows), len(rows)).cpu for _ in range(repeats)) * 1e3


def epoch_ms(
    model: Metanetwork, prepared: Prepared, epochs: int, read: Callable[..., Any] = read_once
) -> float:
    """CPU milliseconds of an epoch, the median of some behind the first.

    Args:
        model: what trains.
        prepared: on what.
        epochs: how many.
        read: what is made of all rows before the first.
    """
    spec = ExperimentSpec(model=model, fit=replace(FIT, max_epochs=epochs, patience=epochs))
    clock = Clock()
    network = prepared.network(model)
    rows = read(network, prepared.features)
    data = FeatureData(rows, prepared.labels, prepared.split, BATCH, seed=0)
    with quiet():
        module = LoraModule(network, prepared.task, spec.fit)
        trainer = make_trainer(spec, KeepBest(restore=False), None)
        trainer.callbacks.append(clock)  # type: ignore[attr-defined]
        trainer.fit(module, datamodule=data)
    found = sorted(b - a for a, b in zip(clock.ticks[1:], clock.ticks[2:], strict=False))
    return 1e3 * found[len(found) // 2]


def main() -> None:
    """Measure, and print a row per network."""
    args = common.arguments(__doc__, repeats=5, only="")
    large, epochs = Layout.sd15_qv(), 4 if args.quick else 8
    rows = torch.from_numpy(common.synthetic(BATCH, args.seed)[0])
    flat = prepare(ExperimentSpec(dataset="lora-ws-mini", model=MLP(), featurizer=FlatVec()))
    table = []
    for name, spec in registered().items():
        if args.only not in name:
            continue
        torch.manual_seed(args.seed)
        module = built(spec, large)
        many, one = (reading_ms(module, part, args.repeats) for part in (rows, rows[:1]))
        data = flat
        if spec.reads == "factors":
            data = prepare(ExperimentSpec(dataset="lora-ws-mini", model=spec))
        small = parameters(data.network(spec))
        rival = as_large(small, data.adapters.layout)
        own, other = epoch_ms(spec, data, epochs), epoch_ms(rival, flat, epochs)
        gain = ""
        if isinstance(module, TokenModule):
            gain = f"{own / epoch_ms(spec, data, epochs, lambda _, rows: rows):.2f}"
        table.append(
            [
                f"`{name}`",
                f"{parameters(module) / 1e6:.2f} M",
                f"{many:.1f}",
                f"{one:.1f}" + ("" if one <= READ_MS else " (missed)"),
                f"{small / 1e6:.2f} M",
                f"{own:.0f}",
                f"{own / other:.1f}" + ("" if own <= EPOCHS_OF_MLP * other else " (missed)"),
                gain,
            ]
        )
    common.print_table(
        [
            "network",
            "parameters, SD 1.5",
            "ms per adapter",
            "ms, one alone",
            "parameters, mini",
            "CPU ms of an epoch on mini",
            "times an equally large MLP",
            "times tokens of every epoch",
        ],
        table,
    )
    common.facts()


if __name__ == "__main__":
    main()

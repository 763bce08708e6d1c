"""One epoch of the small classifier (3 x 512) in batches of 32.

Compared, for 200 and 896 features of 700 adapters and 200 of 350 (those of lora-ws-mini), each with
validation on a seventh of the rows every epoch:

* ours: `LoraModule` and `FeatureData` under the Lightning trainer that `lora_ws.run` makes;
* ours by autograd: the same where a callback looks into the step;
* ours without Lightning: a plain loop of the same steps (`FlatMLP`, fused Adam); the difference is
  what Lightning costs;
* published way: the authors' loop (see `published.py`): a `DataLoader` that collates single rows,
  Adam by default options, loss and accuracy read out and logged at every step;
* published way, without its log of every step;
* floor: the products of matrices of an epoch, and Adam's pass over one vector of weights, with
  nothing around them.

Each contender trains once a turn; the first epochs are left out, so that set-up does not count.
Goals: at least 1.8 times faster than the published way without its log; 35 ms with the rows of
lora-ws-mini; at most twice the floor.
"""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter, process_time

import common
import lightning as L
import numpy as np
import published
import torch
from torch import Tensor
from torch.nn import functional as F

from lora_ws.collection import Split
from lora_ws.learn.callbacks import KeepBest
from lora_ws.learn.data import FeatureData
from lora_ws.learn.flat import FlatMLP
from lora_ws.learn.module import LoraModule
from lora_ws.learn.optim import make_optimizer
from lora_ws.learn.quiet import quiet
from lora_ws.learn.spec import ExperimentSpec, FitSpec, TrainerSpec
from lora_ws.learn.tasks import Classification
from lora_ws.learn.trainer import flattens, make_trainer
from lora_ws.models import MLP, InputSpec
from lora_ws.threads import flushed, threads

CLASSES, BATCH, LR = 10, 32, 1e-3
# Rows to train on, of which lora-ws-mini has fewest, and features.
MINI, MOST_MS = 350, 35
SIZES = ((MINI, 200), (700, 200), (700, 896))
Schedule = torch.optim.lr_scheduler.ReduceLROnPlateau


class Problem:
    """Features and labels, standardised or nearly so, and which rows train and validate.

    Args:
        n_train: rows to train on.
        n_val: rows to validate on.
        width: number of features.
        seed: of values and labels.
    """

    def __init__(self, n_train: int, n_val: int, width: int, seed: int) -> None:
        random = np.random.default_rng(seed)
        rows = n_train + n_val
        self.labels = random.integers(0, CLASSES, rows)
        means = 0.1 * random.standard_normal((CLASSES, width), dtype=np.float32)
        self.features = random.standard_normal((rows, width), dtype=np.float32)
        self.features += means[self.labels]
        self.train, self.val = np.split(np.arange(rows), [n_train])
        self.width = width

    def part(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Features and labels of some rows, as a view of the memory."""
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        return torch.from_numpy(self.features[part]), torch.from_numpy(self.labels[part])


class Clock(KeepBest):
    """Notes the time at the start of every epoch, and keeps the best weights, as every run does."""

    def __init__(self) -> None:
        super().__init__()
        self.ticks: list[tuple[float, float]] = []

    def tick(self) -> None:
        """Note the time."""
        self.ticks.append((process_time(), perf_counter()))

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the time."""
        self.tick()

    def cost(self, skip: int, units: int = 1) -> common.Cost:
        """Mean cost of an epoch behind the first few, divided by the units of work in it."""
        (cpu, wall), (cpu_end, wall_end) = self.ticks[skip], self.ticks[-1]
        units *= len(self.ticks) - 1 - skip
        return common.Cost((cpu_end - cpu) / units, (wall_end - wall) / units)


Train = Callable[[Problem, int, Clock], None]


def lightning(problem: Problem, epochs: int, clock: Clock, flat: bool = True) -> None:
    """The library's trainer, with a patience that nothing exhausts."""
    fit = FitSpec(max_epochs=epochs, patience=10**6, batch_size=BATCH, lr=LR)
    spec = ExperimentSpec(fit=fit, trainer=TrainerSpec(accelerator="cpu"))
    task = Classification().fit(problem.labels, tuple(map(str, range(CLASSES))))
    with quiet(), threads(1):
        network = MLP().build(InputSpec(problem.width), CLASSES)
        split = Split(problem.train, problem.val, problem.val)
        features = torch.from_numpy(problem.features)
        data = FeatureData(features, problem.labels, split, BATCH, seed=0)
        trainer = make_trainer(spec, clock, None)
        module = LoraModule(network, task, fit, flat=flat and flattens(network, trainer))
        trainer.fit(module, datamodule=data)


def by_autograd(problem: Problem, epochs: int, clock: Clock) -> None:
    """The library's trainer, its gradients made by autograd."""
    lightning(problem, epochs, clock, flat=False)


@flushed()
def plain(problem: Problem, epochs: int, clock: Clock) -> None:
    """The same steps without Lightning."""
    model = MLP().build(InputSpec(problem.width), CLASSES)
    flat = FlatMLP(model)
    optimizer = make_optimizer([flat.weights], FitSpec(lr=LR))
    schedule, best = Schedule(optimizer, factor=0.5, patience=5), float("inf")
    features, labels = problem.part(problem.train)
    val_features, val_labels = problem.part(problem.val)
    for _ in range(epochs):
        clock.tick()
        total = torch.zeros(())
        for rows in torch.randperm(len(labels)).split(BATCH):
            loss_of = partial(F.cross_entropy, target=labels[rows])
            total += flat.backward(features.index_select(0, rows), loss_of) * len(rows)
            optimizer.step()
        with torch.no_grad():
            logits = model(val_features)
            val_loss = float(F.cross_entropy(logits, val_labels))
            float((logits.argmax(1) == val_labels).float().mean())
        schedule.step(val_loss)
        if val_loss < best:
            best = val_loss
            [value.clone() for value in model.state_dict().values()]


def as_published(problem: Problem, epochs: int, clock: Clock, log: bool = False) -> None:
    """The authors' loop."""
    rows = published.Problem(*problem.part(problem.train), *problem.part(problem.val))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "debug.txt" if log else None
        published.train(rows, CLASSES, epochs, file, patience=10**6, tick=clock.tick)


@flushed()
def floor(problem: Problem, epochs: int, clock: Clock) -> None:
    """Products and Adam alone, on gradients that stay; vectors are columns, which is faster."""
    model = MLP().build(InputSpec(problem.width), CLASSES)
    flat = FlatMLP(model)
    assert flat.weights.grad is not None
    optimizer = make_optimizer([torch.nn.Parameter(flat.weights.detach())], FitSpec(lr=LR))
    (vector,) = optimizer.param_groups[0]["params"]
    vector.grad = flat.weights.grad.normal_()
    weights = [value.detach() for value in model.parameters() if value.ndim == 2]
    features, _ = problem.part(problem.train)
    val_rows = len(problem.val)
    seen = [torch.randn(weight.shape[1], BATCH) for weight in weights]
    errors = [torch.randn(weight.shape[0], BATCH) for weight in weights]
    for _ in range(epochs):
        clock.tick()
        for start in range(0, len(features), BATCH):
            size = len(features[start : start + BATCH])
            for k, weight in enumerate(weights):
                torch.mm(weight, seen[k][:, :size])
                torch.mm(errors[k][:, :size], seen[k][:, :size].T)
                if k:
                    torch.mm(weight.T, errors[k][:, :size])
            optimizer.step()
        for weight in weights:
            torch.mm(weight, weight.new_ones(weight.shape[1], val_rows))


LOGGED, UNLOGGED = "published way", "published way, without its log"
CONTENDERS: dict[str, Train] = {
    common.OURS: lightning,
    LOGGED: partial(as_published, log=True),
    UNLOGGED: as_published,
    "ours by autograd": by_autograd,
    "ours without Lightning": plain,
    "floor": floor,
}


def epoch(train: Train, problem: Problem, epochs: int, skip: int, units: int = 1) -> common.Cost:
    """Train; the cost of an epoch, divided by the units of work in it."""
    clock = Clock()
    torch.manual_seed(0)
    train(problem, epochs + skip + 1, clock)
    return clock.cost(skip, units)


def main() -> None:
    """Run and print."""
    args = common.arguments(__doc__, repeats=7)
    epochs, skip = (2, 1) if args.quick else (20, 4)
    for n, width in SIZES[:1] if args.quick else SIZES:
        problem = Problem(n, n // 7, width, args.seed)
        contenders = {
            name: lambda train=train, problem=problem: epoch(train, problem, epochs, skip)
            for name, train in CONTENDERS.items()
        }
        costs = common.alternate(contenders, args.repeats)
        share = np.median(common.ratios(costs, "floor"))
        least = float(np.median([cost.cpu for cost in costs["floor"]]))
        remark = f"half of the floor {'reached' if share >= 0.5 else '**missed**'}"
        if n == MINI:
            took = 1e3 * float(np.median([cost.cpu for cost in costs[common.OURS]]))
            verdict = "reached" if took <= MOST_MS else "**missed**"
            remark = f"goal {MOST_MS} ms {verdict}, {remark}"
        common.show(
            f"Epoch of the 3 x 512 classifier, {width} features" + ", 350 rows" * (n == MINI),
            "ms",
            costs,
            [common.Baseline(LOGGED), common.Baseline(UNLOGGED, 1.8)],
            floor=least,
            remark=remark,
        )
        share = np.median(common.ratios(costs, common.OURS, "ours without Lightning"))
        print(f"Lightning adds {100 * (share - 1):.0f} % to the plain loop")
    common.facts("lightning", n=SIZES, epochs=epochs, repeats=args.repeats)


if __name__ == "__main__":
    main()

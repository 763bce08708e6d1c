"""`fit_batched`: seeds, layers or whole tables of networks, trained together.

Networks that have shape, numbers of rows and the fit in common train as one stack; a call may mix
several kinds. In exact arithmetic a model comes out as it does alone; in float32 the stopping epoch
can hang on last bits, so what is equal are the distributions over seeds, not single runs.
"""

import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lora_ws.collection import Split
from lora_ws.config import to_plain
from lora_ws.errors import ConfigError
from lora_ws.learn.data import held
from lora_ws.learn.engine import device_of
from lora_ws.learn.metrics import Measured
from lora_ws.learn.result import Fitted, Job, make_record
from lora_ws.learn.spec import ExperimentSpec, identity
from lora_ws.learn.stacked import StackData, StackedTrainer
from lora_ws.memory import held_bytes
from lora_ws.models import MetanetModule, Metanetwork
from lora_ws.threads import threads

# Weights, gradients (twice), two averages of Adam, its scratch, and the best weights.
COPIES = 7
CPU_MEMORY_GB = 4.0


def fit_batched(
    jobs: Sequence[Job],
    *,
    memory_gb: float | None = None,
    checkpoint: Path | None = None,
    every: int = 100,
) -> list[Fitted]:
    """Train one network per job, restore their best epochs, and measure them on test rows once.

    Args:
        jobs: of one or several experiments; features and rows may differ among them.
        memory_gb: GiB that weights, gradients, Adam's averages and best weights of a stack may
            take; more jobs train in several stacks. None takes half of what is free on a CUDA
            device, and 4 GiB on the CPU.
        checkpoint: folder that keeps the state of each stack, so that an equal call goes on where
            this one was cut off, to the same result; the caller removes it.
        every: epochs after which the state is kept.

    Returns:
        The results in the order of the jobs. ``seconds`` is a model's share of its stack's time.

    Raises:
        TrainingError: the validation loss of a job, which is named, was not finite from the start.

    Example:
        >>> from lora_ws.featurizers import StatsFlatVec
        >>> from lora_ws.learn.features import prepare
        >>> from lora_ws.learn.result import Job
        >>> from lora_ws.learn.spec import FitSpec
        >>> spec = ExperimentSpec(featurizer=StatsFlatVec(), fit=FitSpec(max_epochs=1))
        >>> data = prepare(spec)
        >>> [fitted.record.seed for fitted in fit_batched([Job(spec, data, k) for k in (0, 1)])]
        [0, 1]
    """
    if every < 1 or (memory_gb is not None and memory_gb <= 0):
        raise ConfigError(
            f"fit_batched: expected memory_gb and every above 0, got {memory_gb} and {every}"
        )
    results: dict[int, Fitted] = {}
    for numbers in _stacks(jobs, memory_gb):
        same = [jobs[number] for number in numbers]
        with threads(same[0].spec.trainer.threads):
            results |= zip(numbers, _fit_stack(same, checkpoint, every), strict=True)
    return [results[number] for number in range(len(jobs))]


def _stacks(jobs: Sequence[Job], memory_gb: float | None) -> Iterator[list[int]]:
    """Numbers of jobs that can train as one stack, as many as fit in memory."""
    kinds: dict[str, list[int]] = {}
    for number, job in enumerate(jobs):
        kinds.setdefault(_kind(job), []).append(number)
    for numbers in kinds.values():
        most = models_that_fit(jobs[numbers[0]], memory_gb)
        for start in range(0, len(numbers), most):
            yield numbers[start : start + most]


def _kind(job: Job) -> str:
    """What jobs of one stack have in common."""
    spec, prepared, _ = job
    rows = [len(part) for part in prepared.split]
    # Rows of several experiments lie in one tensor, which those that stay on disk are too many for.
    alone = id(prepared) if prepared.features.nbytes > held_bytes() else 0
    model = to_plain(spec.model)
    return repr((model, prepared.inputs, prepared.task.state, rows, alone, spec.fit, spec.trainer))


def models_that_fit(job: Job, memory_gb: float | None = None) -> int:
    """How many models like a job's train at once in so many GiB; at least one."""
    device = device_of(job.spec.trainer)
    if memory_gb is None:
        free = torch.cuda.mem_get_info(device)[0] / 2**31 if device.type == "cuda" else None
        memory_gb = CPU_MEMORY_GB if free is None else free
    with torch.device("meta"):
        task = job.prepared.task
        model = task.network(_model(job.spec)).build(job.prepared.inputs, task.outputs)
    weights = sum(value.numel() for value in model.parameters())
    return max(1, int(memory_gb * 2**30) // (4 * COPIES * weights))


def _fit_stack(jobs: Sequence[Job], checkpoint: Path | None, every: int) -> list[Fitted]:
    start = time.perf_counter()
    device = device_of(jobs[0].spec.trainer)
    data = _data(jobs, device)
    spec, task = jobs[0].spec, jobs[0].prepared.task
    network = task.network(_model(spec))
    models = network.stack([_initial(job) for job in jobs]).to(device, data.dtype)
    names = [f"{job.spec.name}, seed {job.seed}" for job in jobs]
    stack = StackedTrainer(models, data, [job.seed for job in jobs], task, spec.fit, names)
    file = None
    if checkpoint is not None:
        checkpoint.mkdir(parents=True, exist_ok=True)
        file = checkpoint / f"{_fingerprint(jobs, device)}.pt"
    stack.train(file, every)
    measured = list(_measure(stack, jobs))
    seconds = (time.perf_counter() - start) / len(jobs)
    fitted, engine = [], f"batched-{device.type}"
    for number, (job, history) in enumerate(zip(jobs, stack.histories, strict=True)):
        val, test = measured[number]
        record = make_record(job, history, val, test, engine=engine, seconds=seconds)
        network = stack.models.unstack(number).cpu().eval()
        fitted.append(Fitted(job, record, network, history, test))
    return fitted


def _initial(job: Job) -> MetanetModule:
    """A network as its seed alone starts it."""
    with torch.random.fork_rng():
        torch.manual_seed(job.seed)
        return job.prepared.network(_model(job.spec))


def _model(spec: ExperimentSpec) -> Metanetwork:
    assert isinstance(spec.model, Metanetwork)  # the spec refuses others for this engine
    return spec.model


def _data(jobs: Sequence[Job], device: torch.device) -> StackData:
    """The rows of all experiments of the jobs, one below the other, on the device."""
    experiments = list({id(job.prepared): job.prepared for job in jobs}.values())
    places = {id(prepared): place for place, prepared in enumerate(experiments)}
    starts = np.cumsum([0, *(len(prepared.labels) for prepared in experiments)])[:-1]
    features = experiments[0].features
    if features.nbytes <= held_bytes():
        parts = [held(one.features) for one in experiments]
        features = (torch.cat(parts) if len(parts) > 1 else parts[0]).to(device)

    def moved(arrays: Iterable[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.stack(list(arrays))).to(device)

    splits = [(p.split, start) for p, start in zip(experiments, starts, strict=True)]
    return StackData(
        features=features,
        labels=torch.from_numpy(np.concatenate([p.labels for p in experiments])).to(device),
        parts={
            name: moved(getattr(split, name) + start for split, start in splits)
            for name in Split._fields
        },
        owner=torch.tensor([places[id(job.prepared)] for job in jobs], device=device),
    )


def _measure(stack: StackedTrainer, jobs: Sequence[Job]) -> Iterator[tuple[Measured, Measured]]:
    """Metrics of each model's best epoch on the validation and test rows."""

    @cache
    def predictions(part: str) -> Tensor:
        return stack.predictions(part).cpu()

    def parts(number: int, part: str) -> tuple[Tensor, Tensor]:
        prepared = jobs[number].prepared
        truth = torch.from_numpy(prepared.labels[getattr(prepared.split, part)])
        return predictions(part)[number], truth

    for number, job in enumerate(jobs):
        measure = partial(job.prepared.task.measure, partial(parts, number))
        yield measure("val"), measure("test")


def _fingerprint(jobs: Sequence[Job], device: torch.device) -> str:
    """What decides the result of a stack, in a few letters."""
    whole = hashlib.sha256(device.type.encode())
    for spec, prepared, seed in jobs:
        whole.update(json.dumps([identity(spec), seed], sort_keys=True).encode())
        constants = [value.numpy() for value in prepared.normalizer.state_dict().values()]
        for array in (*constants, prepared.labels, *prepared.split):
            whole.update(np.ascontiguousarray(array).tobytes())
    return whole.hexdigest()[:16]

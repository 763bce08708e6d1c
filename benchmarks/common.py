"""What the benchmarks share: synthetic adapters, timing in alternation, peak memory, results.

Times are CPU seconds of the process, all its threads together, because they suffer less than wall
seconds from whatever else the machine does. Contenders take turns, and a ratio is taken between
neighbours in time. Everything runs on one thread of torch and of the BLAS behind numpy.
"""

import argparse
import logging
import math
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

from lora_ws.system import choose_numpy_kernels

choose_numpy_kernels()

import numpy as np
import torch
from results import Result, add, here, number, processor

from lora_ws import Layout
from lora_ws.adapters.adapter import Adapter, Module
from lora_ws.adapters.writer import write_adapter
from lora_ws.diffusion.bank import AdapterBank

torch.set_num_threads(1)

MIB = 1 << 20
OURS = "lora_ws"
# The flags of this process, which `show` needs to put results on record.
RUN = argparse.Namespace(quick=False, record=None)


class Cost(NamedTuple):
    """What one run took: seconds of CPU and on the wall, and anonymous memory on top in MiB."""

    cpu: float
    wall: float
    peak_mib: float = math.nan


class Baseline(NamedTuple):
    """A contender that a result is told against, and how many times our cost is the goal."""

    contender: str
    goal: float | None = None


Contender = Callable[[], Cost]
Costs = Mapping[str, Sequence[Cost]]


def arguments(doc: str | None, repeats: int, **more: int | str) -> argparse.Namespace:
    """Read the flags that every benchmark has, and more of its own with their defaults."""
    parser = flags(doc)
    parser.add_argument("--repeats", type=int, default=0, help=f"turns to take ({repeats})")
    parser.add_argument("--seed", type=int, default=0, help="of the synthetic data")
    for name, default in more.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"({default})")
    args = parser.parse_args(namespace=RUN)
    args.repeats = args.repeats or (1 if args.quick else repeats)
    return args


def flags(doc: str | None) -> argparse.ArgumentParser:
    """A parser of what really every benchmark takes."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--record", type=Path, help="file that results are added to")
    return parser


def synthetic(n: int, seed: int, classes: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Rank-1 adapters of Stable Diffusion 1.5: class means, a low-rank part and noise.

    Args:
        n: how many.
        seed: of labels, noise and all else.
        classes: how many.

    Returns:
        Weights ``[n, 99648]`` float32, entries of A near 1 and of B near 1e-3; labels ``[n]``.
    """
    random = np.random.default_rng(seed)
    layout = Layout.sd15_qv()
    labels = random.permutation(np.arange(n) % classes)
    means = 0.3 * random.standard_normal((classes, layout.size), dtype=np.float32)
    directions = random.standard_normal((30, layout.size), dtype=np.float32)
    strengths = 0.5 * 0.9 ** np.arange(30, dtype=np.float32)
    weights = random.standard_normal((n, layout.size), dtype=np.float32)
    weights += (random.standard_normal((n, 30), dtype=np.float32) * strengths) @ directions
    weights += means[labels]
    for _, _, up in layout.pairs():
        weights[:, up] *= np.float32(1e-3)
    return weights, labels


def adapter_files(folder: Path, layout: Layout, n: int, seed: int, size: float = 0.1) -> list[Path]:
    """Files as diffusers writes them, so that peers load what we read.

    Args:
        folder: where they go, a folder each.
        layout: what each adapts, of a U-Net.
        n: how many.
        seed: of the factors.
        size: standard deviation of B; A is as before training.
    """
    random = np.random.default_rng(seed)
    files = []
    for k, row in enumerate(AdapterBank.fresh(layout, n, seed=seed).rows().numpy()):
        modules = {}
        for layer, down, _ in layout.pairs():
            name, a = layer.name, row[down].reshape(layer.down_shape)
            b = size * random.standard_normal(layer.up_shape, dtype=np.float32)
            modules[name] = Module("unet", name, "lora", a, b, 1.0, "none")
        adapter = Adapter(modules, f"adapter{k}", sha256="")
        files.append(write_adapter(adapter, folder / adapter.source, "diffusers"))
    return files


def with_adapters(pipeline: Any, files: Sequence[Path]) -> Any:
    """Have diffusers load adapters into a pipeline, named as their files, without its warnings."""
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")
        for file in files:
            pipeline.load_lora_weights(str(file), adapter_name=file.stem)
    return pipeline


def measure(call: Callable[[], Any], units: int = 1) -> Cost:
    """Time a call, divided by the units of work it does."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return Cost((time.process_time() - cpu) / units, (time.perf_counter() - wall) / units)


def timed(call: Callable[[], Any], units: int = 1) -> Contender:
    """A contender that is timed in this process."""
    return lambda: measure(call, units)


def in_process(arguments: Sequence[str], folder: Path) -> Cost:
    """Time a Python process from its start to its end, with the processes that it starts.

    Args:
        arguments: of the interpreter.
        folder: where the process gets an empty folder to work in.
    """
    import resource  # Not on Windows.

    place = tempfile.mkdtemp(dir=folder)
    before, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, *arguments], cwd=place, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(cpu, time.perf_counter() - wall)


def in_child(build: Callable[..., Callable[[], Any]], *args: Any) -> Cost:
    """Time a call, and sample its memory, in a fresh process.

    Args:
        build: a module's function that prepares the call and returns it; not measured.
        *args: of ``build``.

    Returns:
        The cost, with the peak of anonymous memory above what was held before the call. Pages of
        mapped files do not count.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_measure_memory, build, *args).result()


def _measure_memory(build: Callable[..., Callable[[], Any]], *args: Any) -> Cost:
    call = build(*args)
    before, peak, done = _anonymous_mib(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, _anonymous_mib())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    cost = measure(call)
    done.set()
    watcher.join()
    return cost._replace(peak_mib=max(peak, _anonymous_mib()) - before)


def _anonymous_mib() -> float:
    """Memory of this process without mapped files; NaN where the system does not tell it."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return math.nan
    return int(status.read_text(encoding="utf-8").split("RssAnon:")[1].split()[0]) / 1024


def alternate(
    contenders: Mapping[str, Contender], repeats: int, seldom: Mapping[str, int] | None = None
) -> dict[str, list[Cost]]:
    """Let contenders take turns.

    Args:
        contenders: by name.
        repeats: how many turns.
        seldom: contender -> in how many of the first turns it takes part, for slow ones.

    Returns:
        The costs by name, turn by turn.
    """
    costs: dict[str, list[Cost]] = {name: [] for name in contenders}
    for turn in range(repeats):
        for name, contender in contenders.items():
            if turn < (seldom or {}).get(name, repeats):
                costs[name].append(contender())
    return costs


def ratios(costs: Costs, name: str, base: str = OURS) -> list[float]:
    """CPU seconds of a contender over those of ours, turn by turn."""
    pairs = zip(costs[name], costs[base], strict=False)
    return [theirs.cpu / ours.cpu for theirs, ours in pairs]


def spread(values: Sequence[float]) -> str:
    """Minimum, median and maximum, such as ``5.1 < 5.4 < 6.0``; one value is printed alone."""
    found = [number(f(values)) for f in (min, statistics.median, max)]
    return " < ".join(found) if len(values) > 1 else found[1]


def show(
    title: str,
    unit: str,
    costs: Costs,
    baselines: Sequence[Baseline] = (),
    base: str = OURS,
    floor: float | None = None,
    remark: str = "",
) -> None:
    """Print a Markdown table of costs and ratios, then whether goals are met; put it on record.

    Args:
        title: heading; on record it names the operation, so it says the sizes.
        unit: of the times, such as ``ms per adapter``; its first word is ``s``, ``ms`` or ``us``.
        costs: by contender.
        baselines: contenders that go on record.
        base: the contender that ratios refer to.
        floor: CPU seconds, of the same unit of work, that cannot be saved.
        remark: what else goes on record, such as a rate and its goal.
    """
    scale = {"s": 1.0, "ms": 1e3, "us": 1e6}[unit.split()[0]]
    memory = any(not math.isnan(c.peak_mib) for found in costs.values() for c in found)
    print(f"\n### {title}\n")
    heads = ["", f"CPU {unit}", f"wall {unit}", f"times the CPU of {base}"]
    print_table([*heads, "peak MiB"] if memory else heads, _rows(costs, scale, base, memory))
    print()
    ours = statistics.median(cost.cpu for cost in costs[base])
    if floor is not None:
        print(f"Floor: {scale * floor:.3g} {unit}, {floor / ours:.0%} of {base}")
    if remark:
        print(remark)
    for baseline in baselines:
        if baseline.goal is not None:
            found = statistics.median(ratios(costs, baseline.contender, base))
            verdict = "reached" if found >= baseline.goal else "MISSED"
            print(f"Goal {baseline.goal:g}x against {baseline.contender}: {verdict}, {found:.3g}x")
        record(
            title,
            baseline,
            ratios(costs, baseline.contender, base),
            ours=scale * ours,
            unit=unit,
            floor=None if floor is None else floor / ours,
            remark=remark,
        )


def record(title: str, baseline: Baseline, found: Sequence[float], **more: Any) -> None:
    """Add a result to the file that ``--record`` names; without one, do nothing.

    Args:
        title: of the operation.
        baseline: the other way.
        found: its ratios.
        **more: fields of `Result`.
    """
    if RUN.record is None:
        return
    few = (min(found), statistics.median(found), max(found)) if len(found) > 1 else tuple(found)
    argv = [one for one in sys.argv[1:] if one not in ("--record", str(RUN.record))]
    run: Any = here(Path(sys.argv[0]).name, argv)
    more |= {"turns": len(found), "goal": baseline.goal, "quick": RUN.quick}
    add([Result(title, baseline.contender, ratios=few, **run, **more)], RUN.record)


def _rows(costs: Costs, scale: float, base: str, memory: bool) -> list[list[str]]:
    rows = []
    for name, found in costs.items():
        row = [name]
        row += [number(scale * statistics.median(c.cpu for c in found))]
        row += [number(scale * statistics.median(c.wall for c in found))]
        row += ["1" if name == base else spread(ratios(costs, name, base))]
        if memory:
            peak = max(c.peak_mib for c in found)
            row += ["-" if math.isnan(peak) else f"{peak:.0f}"]
        rows.append(row)
    return rows


def print_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a Markdown table, numbers to the right."""
    print("| " + " | ".join(heads) + " |")
    print("|---|" + "--:|" * (len(heads) - 1))
    for row in rows:
        print("| " + " | ".join(row) + " |")


def facts(*packages: str, **more: object) -> None:
    """Print the machine, the versions and the sizes, as every benchmark's last line."""
    names = ("lora_ws", "numpy", "torch", *packages)
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    said = [f"{processor()}, {os.cpu_count()} cores, 1 thread{load}"]
    said += [f"{name} {version(name)}" for name in names]
    said += [f"{name} {value}" for name, value in more.items()]
    print("\n" + "; ".join(said))

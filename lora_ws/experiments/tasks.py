"""Experiments side by side: each in its folder, each resumable, several processes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lora_ws.errors import TrainingError
from lora_ws.learn.engine import engine_of
from lora_ws.learn.features import Prepared, open_data, prepare, split_rows
from lora_ws.learn.run import RECORDS, STATE, check_same, run, run_together
from lora_ws.learn.spec import ExperimentSpec
from lora_ws.report.progress import progress
from lora_ws.report.records import RunRecord, read_records
from lora_ws.workers import work_through

NOT_APPLICABLE = "not_applicable.txt"


@dataclass(frozen=True)
class Task:
    """One experiment and where it is kept.

    Attributes:
        spec: with one representation.
        folder: of its run.
        full: with plots, logs and bundle.
        components: principal components to keep, each an experiment in ``folder/k<K>``; one
            decomposition serves all.
    """

    spec: ExperimentSpec
    folder: Path
    full: bool = False
    components: tuple[int, ...] = ()

    @property
    def folders(self) -> tuple[Path, ...]:
        """Where its records are."""
        return tuple(self.folder / f"k{k}" for k in self.components) or (self.folder,)

    @property
    def runs(self) -> list[tuple[ExperimentSpec, Path]]:
        """Its experiments, each with its folder."""
        specs = [self.spec.vary(n_components=k) for k in self.components] or [self.spec]
        return list(zip(specs, self.folders, strict=True))

    @property
    def records(self) -> list[RunRecord]:
        """Those of the seeds that it asks for; the folder may hold more."""
        return read(self.folder, self.spec.seeds)

    @property
    def done(self) -> int:
        """How many seeds have a record."""
        return sum(_lines(folder / RECORDS) for folder in self.folders)

    @property
    def total(self) -> int:
        """How many seeds it will have, those that do not apply left out."""
        given = [f for f in self.folders if not (f / NOT_APPLICABLE).exists()]
        return self.spec.seeds * len(given)


def run_tasks(tasks: Sequence[Task], processes: int, title: str) -> None:
    """Do what is not done yet.

    Raises:
        ConfigError: a folder holds another experiment.
        TrainingError: one failed; what was finished is kept.
    """
    unique = list({task.folder: task for task in tasks}.values())
    todo = [task for task in unique if task.done < task.total]
    for task in unique:
        # Those to do are checked when they are run.
        if task not in todo:
            for spec, folder in task.runs:
                check_same(spec, folder, read_records(folder / RECORDS))
    if not todo:
        return
    held = sum(task.done for task in unique)
    with progress(title, sum(task.total for task in unique), held) as advance:
        shown = held

        def tick() -> None:
            nonlocal shown
            now = sum(task.done for task in unique)
            advance(now - shown)
            shown = now

        if all(_stackable(task) for task in todo):
            state = todo[0].folder.parent / STATE
            run_together([(task.spec, task.folder) for task in todo], state)
            tick()
            return
        if processes == 1 or len(todo) == 1:
            for task in todo:
                perform(task)
                tick()
            return
        try:
            work_through(perform, todo, processes, tick)
        except TrainingError as error:
            raise TrainingError(f"{error} (what was finished is kept)") from error


def perform(task: Task) -> None:
    """Run one task's seeds that have no record yet."""
    if not task.components:
        run(task.spec, task.folder, full=task.full)
        return
    rank = _rank(task.spec)
    whole: Prepared | None = None
    for (own, folder), k in zip(task.runs, task.components, strict=True):
        if (folder / NOT_APPLICABLE).exists() or _lines(folder / RECORDS) >= task.spec.seeds:
            continue
        if k > rank:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / NOT_APPLICABLE).write_text(f"not applicable: rank {rank}\n", encoding="utf-8")
            continue
        if whole is None:
            most = max(k for k in task.components if k <= rank)
            whole = prepare(task.spec.vary(n_components=most))
        run(own, folder, full=task.full, prepared=_cut(whole, own, k))


def _stackable(task: Task) -> bool:
    """Whether many networks train as one for it, as on a CUDA device."""
    return not task.full and not task.components and engine_of(task.spec) == "batched"


def read(folder: Path, seeds: int) -> list[RunRecord]:
    """The records of the first seeds of a run, in their order."""
    held = [record for record in read_records(folder / RECORDS) if record.seed < seeds]
    return sorted(held, key=lambda record: record.seed)


def _rank(spec: ExperimentSpec) -> int:
    """How many components the training rows have: centring takes one off."""
    zoo, _ = open_data(spec)
    return min(len(split_rows(zoo, spec).train) - 1, zoo.layout.size)


def _cut(whole: Prepared, spec: ExperimentSpec, k: int) -> Prepared:
    """The first K components: a principal component does not depend on how many follow it."""
    return replace(
        whole,
        featurizer=spec.featurizer,
        features=whole.features[:, :k],
        mean=whole.mean[:k],
        scale=whole.scale[:k],
    )


def _lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.is_file() else 0

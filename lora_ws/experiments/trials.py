"""Trials: experiments side by side, each resumable in a folder of its own, in several processes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_ws.errors import TrainingError
from lora_ws.learn.engine import engine_of
from lora_ws.learn.features import Prepared, open_data, prepare, split_rows
from lora_ws.learn.run import run, run_together
from lora_ws.learn.run_folder import RECORDS, STATE, check_same
from lora_ws.learn.spec import ExperimentSpec
from lora_ws.report.progress import progress
from lora_ws.report.records import RunRecord, read_records
from lora_ws.workers import current_engine

NOT_APPLICABLE = "not_applicable.txt"


@dataclass(frozen=True)
class Trial:
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

    def records(self) -> list[RunRecord]:
        """Read the records of the seeds that it asks for; the folder may hold more."""
        return first_records(self.folder, self.spec.seeds)

    def done(self) -> int:
        """Count the seeds that have a record."""
        return sum(_lines(folder / RECORDS) for folder in self.folders)

    def total(self) -> int:
        """Count all its seeds, those that do not apply left out."""
        given = [f for f in self.folders if not (f / NOT_APPLICABLE).exists()]
        return self.spec.seeds * len(given)


def run_trials(trials: Sequence[Trial], processes: int, title: str) -> None:
    """Do what is not done yet.

    Raises:
        ConfigError: a folder holds another experiment.
        TrainingError: one failed; what was finished is kept.
    """
    unique = list({trial.folder: trial for trial in trials}.values())
    todo = [trial for trial in unique if trial.done() < trial.total()]
    for trial in unique:
        # Those to do are checked when they are run.
        if trial not in todo:
            for spec, folder in trial.runs:
                check_same(spec, folder, read_records(folder / RECORDS))
    if not todo:
        return
    held = sum(trial.done() for trial in unique)
    with progress(title, sum(trial.total() for trial in unique), held) as advance:
        shown = held

        def tick() -> None:
            nonlocal shown
            now = sum(trial.done() for trial in unique)
            advance(now - shown)
            shown = now

        if all(_stackable(trial) for trial in todo):
            state = todo[0].folder.parent / STATE
            run_together([(trial.spec, trial.folder) for trial in todo], state)
            tick()
            return
        try:
            current_engine().work_through(perform, todo, min(processes, len(todo)), tick)
        except TrainingError as error:
            raise TrainingError(f"{error} (what was finished is kept)") from error


def perform(trial: Trial) -> None:
    """Run one trial's seeds that have no record yet."""
    if not trial.components:
        run(trial.spec, trial.folder, full=trial.full)
        return
    rank = _rank(trial.spec)
    whole: Prepared | None = None
    for (own, folder), k in zip(trial.runs, trial.components, strict=True):
        if (folder / NOT_APPLICABLE).exists() or _lines(folder / RECORDS) >= trial.spec.seeds:
            continue
        if k > rank:
            folder.mkdir(parents=True, exist_ok=True)
            text = f"not applicable: rank {rank}\n"
            (folder / NOT_APPLICABLE).write_text(text, encoding="utf-8")
            continue
        if whole is None:
            most = max(k for k in trial.components if k <= rank)
            whole = prepare(trial.spec.vary(n_components=most))
        # A principal component does not depend on how many follow it.
        few = whole.columns(slice(k), own.featurizer)
        run(own, folder, full=trial.full, prepared=few)


def why_missing(folder: Path) -> str:
    """Say why a folder holds no record."""
    file = folder / NOT_APPLICABLE
    return file.read_text(encoding="utf-8").strip() if file.is_file() else "not measured"


def _stackable(trial: Trial) -> bool:
    """Whether many networks train as one for it, as on a CUDA device."""
    return not trial.full and not trial.components and engine_of(trial.spec) == "batched"


def first_records(folder: Path, seeds: int) -> list[RunRecord]:
    """The records of the first seeds of a run, in their order."""
    held = [record for record in read_records(folder / RECORDS) if record.seed < seeds]
    return sorted(held, key=lambda record: record.seed)


def _rank(spec: ExperimentSpec) -> int:
    """How many components the training rows have: centring takes one off."""
    adapters, _ = open_data(spec)
    return min(len(split_rows(adapters, spec).train) - 1, adapters.layout.size)


def _lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.is_file() else 0

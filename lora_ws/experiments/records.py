"""Records of an experiment, one line of JSON per measurement."""

import json
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from lora_ws import journal
from lora_ws.errors import ConfigError, DataError
from lora_ws.report.progress import progress


class Record(Protocol):
    """A dataclass of one measurement."""

    @property
    def key(self) -> Hashable:
        """Tell it from all others."""


R = TypeVar("R", bound=Record)
K = TypeVar("K", bound=Hashable)
RECORDS, CONFIG = "records.jsonl", "config.json"
# Of a line, beside the record: what making it took, on all cores together.
SECONDS = "cpu_seconds"
# Of a spec, what does not change what is measured.
WORDS = ("kind", "title", "source", "published", "cpu_minutes")


class Records(Generic[R]):
    """The records of one experiment, on disk before the next is made.

    Args:
        out: folder; made if missing.
        spec: dataclass of the experiment.
        kind: dataclass of a record.
        name: of their file.

    Raises:
        ConfigError: the folder holds another experiment.
        DataError: its records are damaged.
    """

    def __init__(self, out: Path, spec: Any, kind: type[R], name: str = RECORDS) -> None:
        self.file, self.held = out / name, list[R]()
        out.mkdir(parents=True, exist_ok=True)
        config = {name: value for name, value in asdict(spec).items() if name not in WORDS}
        plain, file = json.loads(json.dumps(config)), out / CONFIG
        if file.is_file() and json.loads(file.read_text(encoding="utf-8")) != plain:
            raise ConfigError(f"{out} holds another experiment; choose another --out")
        file.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
        try:
            self.held += [read_record(kind, line) for line in journal.read(self.file)]
        except TypeError as error:
            raise DataError(f"{self.file}: damaged ({error}); choose another --out") from error

    def complete(self, title: str, jobs: Mapping[K, Callable[[], R]]) -> dict[K, R]:
        """Make the records that are missing, each on disk before the next is made.

        Args:
            title: of the progress bar.
            jobs: key of every record -> what makes it.

        Returns:
            Key -> record.
        """
        done: dict[Any, R] = {record.key: record for record in self.held}
        with progress(title, len(jobs), len(done)) as advance:
            for key in (key for key in jobs if key not in done):
                begun = time.process_time()
                done[key] = jobs[key]()
                self._append(done[key], time.process_time() - begun)
                advance()
        return done

    def _append(self, record: R, seconds: float) -> None:
        line = {**asdict(record), SECONDS: round(seconds, 2)}  # type: ignore[call-overload]
        journal.append(self.file, [line])
        self.held.append(record)


def read_record(kind: type[R], line: Mapping[str, Any]) -> R:
    """A record from its line.

    Raises:
        TypeError: the line is of another kind of record.
    """
    return kind(**{name: value for name, value in line.items() if name != SECONDS})

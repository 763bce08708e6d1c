"""Child processes that need no start of seconds: one loads the library and forks for each job.

Jobs are real processes: they have their own environment, can be killed and measured. What reads the
environment when it is imported, as the Hub client does, belongs to the job and not before.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Self

# Seconds after which a job hangs, also on a machine that is busy with much else.
HANGS = 600
# With the arguments of `lora-ws`.
COMMAND = "from lora_ws.cli import main; raise SystemExit(main())"


class Job(NamedTuple):
    """A running piece of code; its ``print`` goes to a file beside ``result``."""

    pid: int
    result: Path

    @property
    def ended(self) -> bool:
        """Whether there is an exit status."""
        return self.result.exists()

    def kill(self, seen: Callable[[], bool]) -> None:
        """Kill it once something is seen of its work, which must be before its end."""
        deadline = time.monotonic() + HANGS
        while not seen():
            assert not self.ended, self.wait()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        assert not self.ended, self.wait()
        os.kill(self.pid, signal.SIGKILL)
        assert self.wait()[0] == -signal.SIGKILL

    def wait(self) -> tuple[int, str]:
        """Exit status (negative: the signal) and what was printed, errors included."""
        deadline = time.monotonic() + HANGS
        while not self.ended:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        return int(self.result.read_text(encoding="utf-8")), self.result.with_suffix(
            ".out"
        ).read_text(encoding="utf-8")


class Warm:
    """The parent's side; a context manager."""

    def __init__(self, folder: Path, *modules: str) -> None:
        self.folder = folder
        self.modules = modules
        self.jobs = 0

    def __enter__(self) -> Self:
        self.child = subprocess.Popen(
            [sys.executable, __file__, *self.modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self.child.stdin is not None
        self.child.stdin.close()
        self.child.wait()

    def start(self, code: str, *argv: object, **env: str) -> Job:
        """Run ``code`` with ``sys.argv[1:]`` and additions to the environment."""
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        self.jobs += 1
        result = self.folder / f"{self.jobs}.result"
        job = {"code": code, "argv": [str(a) for a in argv], "env": env, "result": str(result)}
        print(json.dumps(job), file=self.child.stdin, flush=True)
        return Job(int(self.child.stdout.readline()), result)

    def run(self, code: str, *argv: object, **env: str) -> str:
        """What the code printed; it must end well."""
        status, printed = self.start(code, *argv, **env).wait()
        assert status == 0, printed
        return printed


def _work(job: dict) -> None:
    out = os.open(Path(job["result"]).with_suffix(".out"), os.O_WRONLY | os.O_CREAT)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ.update(job["env"])
    sys.argv = ["-", *job["argv"]]
    status = 0
    try:
        exec(job["code"], {"__name__": "__main__"})
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _reap(pid: int, result: Path) -> None:
    _, status = os.waitpid(pid, 0)
    draft = result.with_suffix(".draft")
    draft.write_text(str(os.waitstatus_to_exitcode(status)), encoding="utf-8")
    draft.rename(result)


def _main() -> None:
    for module in sys.argv[1:]:
        importlib.import_module(module)
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if not pid:
            _work(job)
        print(pid, flush=True)
        threading.Thread(target=_reap, args=(pid, Path(job["result"])), daemon=True).start()


if __name__ == "__main__":
    _main()

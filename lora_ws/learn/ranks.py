"""The processes of one run, a device each: how they start, and what only the first of them does.

With several ranks each of them executes every line of a run. What touches files or the terminal is
left to the first, and its answer is everyone's: nobody decides by what a folder seems to hold.
"""

import atexit
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from lora_ws.errors import ConfigError, TrainingError
from lora_ws.learn.quiet import quiet
from lora_ws.learn.spec import TrainerSpec
from lora_ws.system import wait_for_parent

T = TypeVar("T")
# The others wait this long for the first, which may be fitting a representation.
PATIENCE = timedelta(hours=2)
LAUNCHER = "LORA_WS_LAUNCHER"  # process that started the other ranks of its machine


@dataclass(frozen=True)
class Ranks:
    """Which of the processes this is.

    Attributes:
        rank: from 0 up, over all nodes.
        world: how many there are.
    """

    rank: int = 0
    world: int = 1

    def first(self, call: Callable[[], T]) -> T:
        """What ``call`` returns on the first rank, on all ranks; where it fails, all stop."""
        if self.world == 1:
            return call()
        from torch import distributed

        answer: list = [False, None]
        try:
            if self.rank == 0:
                answer = [True, call()]
        finally:
            distributed.broadcast_object_list(answer)
        if not answer[0]:
            raise SystemExit(0)
        return answer[1]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Say in one line that another rank has ended, where the network says that it is gone.

        Raises:
            TrainingError: on the first rank; the others leave silently.
        """
        try:
            yield
        except RuntimeError as error:
            from torch.distributed import DistError

            if self.world == 1 or not (isinstance(error, DistError) or "gloo" in str(error)):
                raise
            text = f"one of the {self.world} processes has ended: it was killed, or out of memory"
            again = "run the same command again, and it goes on from the last checkpoint"
            raise self.same(TrainingError(f"{text}; {again}")) from error

    def same(self, error: Exception) -> BaseException:
        """An error that every rank meets: the first one tells it, the others leave silently."""
        return error if self.rank == 0 else SystemExit(0)


ALONE = Ranks()


def join(trainer: TrainerSpec) -> Ranks:
    """Be a rank: alone, one of those that the scheduler started, or the one that starts them.

    Raises:
        ConfigError: there are fewer devices than ranks, or ranks of another run.
    """
    if trainer.world == 1:
        return ALONE
    from torch import distributed

    if not distributed.is_initialized():
        _launch(trainer)
    ranks = Ranks(distributed.get_rank(), distributed.get_world_size())
    if ranks.world != trainer.world:
        raise ConfigError(
            f"trainer.devices x trainer.num_nodes: expected the {ranks.world} processes that run, "
            f"got {trainer.world}; use one setting in a process"
        )
    return ranks


def check_devices(trainer: TrainerSpec) -> None:
    """Refuse more devices than the machine has."""
    from torch import cuda

    if trainer.accelerator == "gpu" and not cuda.is_available():
        raise ConfigError("trainer.accelerator: expected a GPU for `gpu`, found none; use auto")
    gpus = cuda.device_count() if trainer.accelerator != "cpu" else 0
    if gpus and trainer.devices > gpus:
        raise ConfigError(
            f"trainer.devices: expected at most {gpus}, the GPUs this process sees, got "
            f"{trainer.devices}; more machines are trainer.num_nodes"
        )


def _launch(trainer: TrainerSpec) -> None:
    """Form the group; without a scheduler, first start the same command for each other device."""
    from lightning.fabric import Fabric
    from lightning.fabric.strategies.ddp import DDPStrategy
    from torch import distributed

    check_devices(trainer)
    launcher = int(os.environ.setdefault(LAUNCHER, str(os.getpid())))
    if launcher != os.getpid():
        threading.Thread(target=_follow, args=(launcher,), daemon=True).start()
    with quiet():
        Fabric(
            accelerator=trainer.accelerator,
            devices=trainer.devices,
            num_nodes=trainer.num_nodes,
            strategy=DDPStrategy(timeout=PATIENCE),
        ).launch()
    if distributed.get_backend() == "gloo":
        # Its threads abort the interpreter's exit if they still run; Lightning ends NCCL's.
        atexit.register(distributed.destroy_process_group)


def _follow(launcher: int) -> None:
    """End when the launcher has ended: a kill of it reaches nobody else."""
    wait_for_parent(launcher)
    os._exit(1)

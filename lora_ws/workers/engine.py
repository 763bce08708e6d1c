"""`Engine`: does tasks in several processes, whichever they are."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from lora_ws.errors import LoraWsError, TrainingError

T = TypeVar("T")
R = TypeVar("R")
# Seconds between looks at the processes.
PAUSE = 0.2
# Batches that wait for each process, so that none is idle while results are taken.
AHEAD = 4


class Engine(ABC):
    """Does tasks in several processes; a subclass is final, and says whose they are."""

    @abstractmethod
    def cpus(self) -> int:
        """Count the processes that can work at once."""

    @abstractmethod
    def work_through(
        self,
        target: Callable[[T], None],
        tasks: Sequence[T],
        processes: int,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        """Do tasks side by side, each by one of several processes, until all are done or one fails.

        Args:
            target: what is done with a task; a function of a module, as processes import it.
            tasks: in the order in which they start; picklable.
            processes: how many work at once.
            tick: called several times per second, to show how far things are.

        Raises:
            TrainingError: a task failed; the others are stopped.
        """

    @abstractmethod
    def map_batches(
        self,
        call: Callable[[list[T]], list[R]],
        batches: Iterable[list[T]],
        processes: int,
        lost: Callable[[T], R],
    ) -> Iterator[list[R]]:
        """Results of batches, in order; an item that ends its process costs no other its result.

        Args:
            call: one result an item; picklable.
            batches: of picklable items; so many are taken ahead as keep the processes busy.
            processes: how many work at once.
            lost: the result of an item that ended a process which had it alone.
        """


def told(error: Exception) -> str:
    """What an error says; of one that is none of ours also its kind."""
    return str(error) if isinstance(error, LoraWsError) else f"{type(error).__name__}: {error}"


def failed(why: str, processes: int) -> TrainingError:
    """The error of a task, for whoever waits for all."""
    return TrainingError(f"a process of {processes} failed: {why}")

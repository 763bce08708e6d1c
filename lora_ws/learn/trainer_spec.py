"""`TrainerSpec`: where training runs, what is logged, and which parts of Lightning take part."""

from dataclasses import dataclass, field
from typing import Any, Literal

from lora_ws.config import DEPRECATED
from lora_ws.errors import ConfigError, deprecated

# float16 would need its loss scaled, which the loop over steps leaves out.
Precision = Literal["32-true", "bf16-mixed"]


# A logger or callback, made anew for every seed: a class's name in Lightning or its dotted path;
# with parameters, ``{class_path: …, init_args: {…}}``.
Part = str | dict[str, Any]
PART_KEYS = {"class_path", "init_args"}


@dataclass(frozen=True)
class TrainerSpec:
    """Where training runs, and what is logged.

    Attributes:
        accelerator: Lightning's accelerator; auto takes a GPU where there is one.
        devices: number of devices per node, with one process each.
        num_nodes: number of nodes.
        strategy: ddp splits every batch among the devices; auto takes it for several devices.
        checkpoint_every: epochs between checkpoints, from which an interrupted seed resumes; 0 for
            none, null for 10 on several devices and none on one.
        threads: CPU threads per process; small networks are slower with more than one.
        precision: Lightning's precision; bf16-mixed saves memory.
        loggers: Lightning's, by class name or dotted path, with parameters: WandbLogger (project,
            entity, tags, offline), TensorBoardLogger, MLFlowLogger. The run folder always has a CSV
            file.
        callbacks: Lightning's callbacks or your own, by class name or dotted path, such as
            LearningRateMonitor.
        engine: ``one-by-one`` trains seeds in turn with Lightning, ``batched`` all seeds in one
            stack, on a CPU only with accelerator cpu, for it takes longer there; auto takes batched
            on a CUDA device, unless loggers, callbacks or another precision are set.
        wandb: deprecated, use ``loggers: [WandbLogger]``.
    """

    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: int = 1
    num_nodes: int = 1
    strategy: Literal["auto", "ddp"] = "auto"
    checkpoint_every: int | None = None
    threads: int = 1
    precision: Precision = "32-true"
    loggers: tuple[Part, ...] = ()
    callbacks: tuple[Part, ...] = ()
    engine: Literal["auto", "one-by-one", "batched"] = "auto"
    wandb: Literal["off", "offline", "online"] | None = field(default=None, metadata=DEPRECATED)

    def __post_init__(self) -> None:
        self._take_deprecated()
        for name in ("loggers", "callbacks"):
            for part in getattr(self, name):
                if isinstance(part, dict) and not {"class_path"} <= {*part} <= PART_KEYS:
                    raise ConfigError(
                        f"trainer.{name}: expected a name, or class_path and init_args, got "
                        f"{', '.join(map(str, part)) or 'nothing'}"
                    )
        for name in ("devices", "num_nodes", "threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"trainer.{name}: expected at least 1, got {getattr(self, name)}")
        if self.strategy == "ddp" and self.world == 1:
            raise ConfigError(
                "trainer.strategy: expected several devices for `ddp`, got 1; set trainer.devices "
                "or trainer.num_nodes, or use auto"
            )
        if self.checkpoint_every is not None and self.checkpoint_every < 0:
            raise ConfigError(
                f"trainer.checkpoint_every: expected 0 or more, got {self.checkpoint_every}; "
                "0 writes no checkpoints"
            )
        if self.engine == "batched" and (self.lightning or self.world != 1):
            raise ConfigError(
                f"trainer.engine: expected auto or one-by-one with "
                f"{self.lightning or 'several devices'}, got batched; leave one of them out"
            )

    def _take_deprecated(self) -> None:
        """Translate what earlier versions wrote."""
        if self.wandb in ("offline", "online"):
            deprecated("trainer.wandb", "trainer.loggers: [WandbLogger]")
            settings = {"offline": self.wandb == "offline"}
            made = {"class_path": "WandbLogger", "init_args": settings}
            object.__setattr__(self, "loggers", (*self.loggers, made))
        object.__setattr__(self, "wandb", None)

    @property
    def lightning(self) -> str:
        """The setting that Lightning alone has; empty where there is none."""
        plain = {"loggers": (), "callbacks": (), "precision": "32-true"}
        changed = [name for name, value in plain.items() if getattr(self, name) != value]
        return f"trainer.{changed[0]}" if changed else ""

    @property
    def world(self) -> int:
        """Processes of a run: one per device."""
        return self.devices * self.num_nodes

    @property
    def epochs_to_checkpoint(self) -> int:
        """Epochs between checkpoints, 0 for none."""
        if self.checkpoint_every is not None:
            return self.checkpoint_every
        return 10 if self.world > 1 else 0

"""`ZooSpec`: everything that decides a collection, as plain data."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from lora_ws.config import parse_shard
from lora_ws.errors import ConfigError
from lora_ws.zoo.finetune import FinetuneSpec
from lora_ws.zoo.photos import PhotoSpec
from lora_ws.zoo.sampling import SamplingSpec


@dataclass(frozen=True)
class ZooSpec:
    """A collection to build.

    Attributes:
        out: folder of the new store.
        base: "digit-sd" or "tiny-sd" (bundled), a pipeline's folder, or a repository on the Hub.
        photos: training images; those that the base was trained on are excluded.
        sampling: image sets of the adapters.
        finetune: training of an adapter.
        adapters_at_once: adapters per forward pass; null takes as many as fit in ``memory_gb``, up
            to 100.
        memory_gb: memory per batch and process in GiB, in addition to the model.
        shard: "i/n" builds part i of n, from 0, in a store of its own; `lora-ws zoo merge` merges
            them.
        processes: training processes in parallel, each for its own adapters, with one thread, or
            one GPU each with device cuda.
        device: torch device for training.
        seed: seed of image sets, initial weights, noise and order.
    """

    out: Path = Path("zoo")
    base: str = "digit-sd"
    photos: PhotoSpec = field(default_factory=lambda: PhotoSpec(split="test"))
    sampling: SamplingSpec = field(default_factory=SamplingSpec)
    finetune: FinetuneSpec = field(default_factory=FinetuneSpec)
    adapters_at_once: int | None = None
    memory_gb: float = 2.0
    shard: str = "0/1"
    processes: int = 1
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        parse_shard(self.shard)
        for name in ("adapters_at_once", "processes", "memory_gb"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{name}: expected above 0, got {value}")

    @property
    def share(self) -> tuple[int, int]:
        """Which share of how many this is."""
        return parse_shard(self.shard)

    @property
    def path(self) -> Path:
        """Where the share goes: ``out`` itself if there is one only."""
        share, shares = self.share
        out = Path(self.out)
        return out if shares == 1 else out.with_name(f"{out.name}-{share:05d}-of-{shares:05d}")

    def parts(self) -> list["ZooSpec"]:
        """The share cut once more, one spec per process."""
        share, shares = self.share
        return [
            replace(
                self,
                shard=f"{share + shares * k}/{shares * self.processes}",
                processes=1,
                device=f"cuda:{k}" if self.device == "cuda" else self.device,
            )
            for k in range(self.processes)
        ]

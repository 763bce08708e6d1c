"""`lora-ws zoo`: train a base model, build a collection, publish it."""

from pathlib import Path
from typing import Literal

from rich.console import Console

from lora_ws.collection import AdapterSet, load
from lora_ws.collection.bundled import write_packed
from lora_ws.errors import DataError, NotAvailableError
from lora_ws.zoo.base import BaseSpec, train_base
from lora_ws.zoo.baselines import (
    MEAN_LATENT,
    ORACLE,
    baselines_markdown,
    measure_baselines,
    photo_inputs,
)
from lora_ws.zoo.build import build_zoo, merge_shares
from lora_ws.zoo.publish import publish_zoo, write_folders, write_parquet
from lora_ws.zoo.spec import ZooSpec
from lora_ws.zoo.testbed import TestbedSpec, build_testbed


def base(spec: BaseSpec) -> None:
    """Train a small Stable Diffusion, or resume a training that was interrupted."""
    out = train_base(spec)
    Console().print(f"{spec.name}: {out}, a diffusers pipeline; its quality is in base.json")


def build(spec: ZooSpec) -> None:
    """Train a collection of adapters, many at once, or resume one that was interrupted."""
    _show(build_zoo(spec), spec.path)


def merge(shares: list[str], /, *, out: Path) -> None:
    """Merge the stores of `zoo build --shard i/n` into one.

    Args:
        shares: folders of all n stores
        out: folder of the new store
    """
    _show(merge_shares([Path(share) for share in shares], out), out)


def _show(adapters: AdapterSet, path: Path) -> None:
    console = Console()
    console.print(adapters)
    lost = adapters.manifest["quarantined"]
    if lost:
        console.print(f"{lost} adapters became NaN twice: see quarantine.jsonl in the store")
    console.print(f"look at it: lora-ws data info {path}")


def baselines(collection: str, /, *, photos: str | None = None) -> None:
    """Measure baselines of a collection: logistic regression on A, B, norms or photos.

    Args:
        collection: name of a collection that `zoo build` made, or the folder of its store
        photos: source of the photos, instead of the recipe's
    """
    opened, console = load(collection), Console(highlight=False, markup=False, soft_wrap=True)
    found = None
    try:
        found = photo_inputs(opened, photos)
    except (DataError, NotAvailableError) as error:
        if photos is not None:
            raise
        console.print(
            f"{MEAN_LATENT}, {ORACLE}: not measured ({error}); name the photos with --photos\n"
        )
    console.print(baselines_markdown(measure_baselines(opened, found)))


def testbed(spec: TestbedSpec) -> None:
    """Train the adapters of the composition testbed, one per element of an image."""
    built = build_testbed(spec)
    Console().print(f"{spec.out}: {len(built.members)} adapters of {spec.base}")


def export(
    collection: str, out: str, /, *, format: Literal["folders", "parquet", "packed"] = "folders"
) -> None:
    """Write a collection as the paper's folders, as parquet, or packed like the bundled ones.

    Args:
        collection: name of a collection, or the folder of a store.
        out: output folder.
        format: folders of pytorch_lora_weights.safetensors and metadata.json; parquet of
            fixed-size lists; or float16 with one scale per matrix, as bundled collections are
    """
    write = {"folders": write_folders, "parquet": write_parquet, "packed": write_packed}[format]
    Console().print(str(write(load(collection), Path(out))))


def publish(
    collection: str, repo_id: str, /, *, licence: str = "cc-by-4.0", dry_run: bool = False
) -> None:
    """Upload a collection to the Hub as parquet with a dataset card; without a login, prepare it.

    Args:
        collection: name of a collection, or the folder of a store.
        repo_id: owner/name on the Hub.
        licence: licence identifier on the Hub
        dry_run: prepare the files without uploading
    """
    staging = Path(f"{Path(collection).name}.publish")
    done = publish_zoo(load(collection), repo_id, staging, licence, dry_run)
    console = Console()
    if not done.validated:
        console.print("the Hub could not be reached: its check of the card was not run")
    if done.commit:
        console.print(f"published {repo_id} at {done.commit}")
    else:
        why = "--dry_run" if dry_run else "no token: log in with `hf auth login`"
        console.print(f"{staging}: ready for {repo_id}; nothing was uploaded ({why})")

"""Scanning a folder without a classifier: files per second and core, from the page cache.

A folder of rank-4 files of Stable Diffusion 1.5 as kohya's scripts write them, all projections of
attention, float16, each with a header and weights of its own. Compared, on one core:

* facts, with and without `update_hash`: the stage that every scan is made of, batches of 32;
* its parts: header, whole reading, norms, sketch, hash, the SHA-256 of the file's bytes.

Goal: 60 files per second and core.
"""

import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np
from safetensors.numpy import save_file

from lora_ws.adapters import AdapterFile, AdapterRef, read_adapter
from lora_ws.adapters.source import file_sha256
from lora_ws.audit.classify import classify_files
from lora_ws.audit.similar import adapter_modules
from lora_ws.functional.sketch import module_norms, sketch
from lora_ws.functional.update_hash import update_hash

GOAL, RANK, BATCH = 60, 4, 32
WHOLE, BARE = "facts", "facts without update_hash"
BLOCKS = (
    *(("down_blocks_0", 2, 320), ("down_blocks_1", 2, 640), ("down_blocks_2", 2, 1280)),
    *(("mid_block", 1, 1280), ("up_blocks_1", 3, 1280), ("up_blocks_2", 3, 640)),
    ("up_blocks_3", 3, 320),
)


def layers() -> list[tuple[str, int, int]]:
    """Name, inputs and outputs of every projection of attention."""
    return [
        (
            f"{block}_attentions_{k}_transformer_blocks_0_{attention}_{projection}",
            768 if attention == "attn2" and projection in ("to_k", "to_v") else width,
            width,
        )
        for block, count, width in BLOCKS
        for k in range(count)
        for attention in ("attn1", "attn2")
        for projection in ("to_q", "to_k", "to_v", "to_out_0")
    ]


def write(folder: Path, n: int, random: np.random.Generator) -> list[Path]:
    """Files as a trainer leaves them."""
    files = [folder / f"{k:05d}.safetensors" for k in range(n)]
    for file in files:
        tensors = {}
        for name, inputs, outputs in layers():
            stem = f"lora_unet_{name}"
            tensors[f"{stem}.lora_down.weight"] = random.standard_normal((RANK, inputs))
            tensors[f"{stem}.lora_up.weight"] = random.standard_normal((outputs, RANK)) / 1000
        halves = {key: value.astype(np.float16) for key, value in tensors.items()}
        alphas = {f"lora_unet_{name}.alpha": np.array(2, np.float16) for name, *_ in layers()}
        save_file(halves | alphas, file, {"ss_output_name": file.stem})
    return files


def scan(files: Sequence[Path], hashes: bool) -> None:
    """All that is told of files without a classifier."""
    refs = [AdapterRef.parse(file) for file in files]
    for start in range(0, len(refs), BATCH):
        for one in classify_files(refs[start : start + BATCH], hashes=hashes):
            assert one.finding
            assert not one.finding.reason


def header(file: Path) -> None:
    """A header, checked and sorted into modules."""
    with AdapterFile.of(*AdapterRef.parse(file).open()):
        pass


def compare(files: Sequence[Path], repeats: int) -> None:
    """Time the whole and its parts in turns."""
    modules = [list(adapter_modules(read_adapter(file))) for file in files]

    def each(act: Callable[[Any], object], what: Sequence[object]) -> common.Contender:
        return common.timed(lambda: [act(one) is None for one in what], len(what))

    scan(files[:BATCH], hashes=True)
    costs = common.alternate(
        {
            BARE: common.timed(lambda: scan(files, hashes=False), len(files)),
            WHOLE: common.timed(lambda: scan(files, hashes=True), len(files)),
            "header": each(header, files),
            "reading": each(read_adapter, files),
            "norms": each(module_norms, modules),
            "sketch": each(sketch, modules),
            "update_hash": each(update_hash, modules),
            "SHA-256 of the bytes": each(file_sha256, files),
        },
        repeats,
    )
    said = []
    for way in (BARE, WHOLE):
        rate = 1 / statistics.median(cost.cpu for cost in costs[way])
        verdict = "reached" if rate >= GOAL else "**missed**"
        said.append(f"{way}: {rate:.0f} files/s/core, goal {GOAL} {verdict}")
    title = f"Scan of {len(files)} rank-4 SD1.5 files without a classifier"
    remark = "; ".join(said)
    common.show(title, "ms per file", costs, [common.Baseline(WHOLE)], base=BARE, remark=remark)


def main() -> None:
    """Run and print."""
    args = common.arguments(__doc__, repeats=5)
    n = 4 if args.quick else 256
    with tempfile.TemporaryDirectory() as folder:
        files = write(Path(folder), n, np.random.default_rng(args.seed))
        compare(files, args.repeats)
    common.facts("safetensors", n=n, repeats=args.repeats)


if __name__ == "__main__":
    main()

"""Scanning a folder of adapters: files per second and core, from the page cache.

A folder of rank-4 files of Stable Diffusion 1.5, query and value projections as diffusers names
them, each with a name of its own in its header, so that no two headers are equal. Compared:

* ours, reading: header checked, query and value read, scale applied, brought into the layout;
* ours, reading and StatsLayer: in batches of 32, as a scan goes, and a file at a time;
* ours, reading and DeltaPCA: features that do not depend on how an update is split into factors,
  with 256 landmarks, in batches of 32;
* hashing beside it: what the SHA-256 of the file adds, which a whole read takes;
* the peer's way: `safetensors.torch.load_file`, diffusers' conversion of names, and torch
  statistics of each matrix, one after another.

Before, all agree on the statistics. The share of bytes: reading the whole file and doing nothing.
Goal: 300 files per second and core for reading and StatsLayer.
"""

import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import common
import numpy as np
import torch
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from safetensors.numpy import save_file
from safetensors.torch import load_file

from lora_ws import DeltaPCA, Layout, StatsLayer, read_adapter
from lora_ws.adapters.projection import project_adapter
from lora_ws.adapters.source import file_sha256

LAYOUT = Layout.sd15_qv(rank=4)
ONLY = ("*.to_q", "*.to_v")
GOAL, LANDMARKS, BATCH = 300, 256, 32
READ, STATS, DELTA = "ours, reading", "ours, reading and StatsLayer", "ours, reading and DeltaPCA"
ONE = f"{STATS}, a file at a time"
PEER, BYTES, HASH = "load_file, diffusers, torch", "bytes alone", "SHA-256 alone"


def write(folder: Path, n: int, random: np.random.Generator) -> list[Path]:
    """Files as a trainer leaves them; entries of A near 1 and of B near 1e-3."""
    files = []
    for k in range(n):
        row = random.standard_normal(LAYOUT.size, dtype=np.float32)
        tensors = {
            f"unet.{m.layer.name}.lora.{m.role}.weight": row[m.columns].reshape(m.shape)
            * np.float32(1 if m.role == "down" else 1e-3)
            for m in LAYOUT.matrices
        }
        files.append(folder / f"{k:05d}.safetensors")
        save_file(tensors, files[-1], {"format": "pt", "name": f"adapter {k}"})
    return files


def row(file: Path) -> np.ndarray:
    """The weights of a file in the layout."""
    return project_adapter(read_adapter(file, only=ONLY), LAYOUT).weights


def peer(file: Path) -> np.ndarray:
    """The statistics in the layout's order, by the libraries that users have."""
    tensors = convert_unet_state_dict_to_peft(load_file(file))
    found = []
    for layer in LAYOUT.layers:
        for side in "AB":
            values = tensors[f"unet.{layer.name}.lora_{side}.weight"].flatten()
            mean, std = values.mean(), values.std()
            centred = values - mean
            found += [mean, std, values.median(), values.min(), values.max()]
            found += [(centred**4).mean() / std**4 - 3, (centred**3).mean() / std**3]
    return torch.stack(found).numpy()


def features(files: Sequence[Path], featurizer: StatsLayer | DeltaPCA) -> None:
    """Features of files, a batch at a time, whose memory is mapped once."""
    rows = np.empty((BATCH, LAYOUT.size), np.float32)
    for start in range(0, len(files), BATCH):
        some = files[start : start + BATCH]
        for k, file in enumerate(some):
            rows[k] = row(file)
        featurizer.transform(rows[: len(some)])


def compare(files: Sequence[Path], repeats: int, matrices: Sequence[str]) -> None:
    """Check that all agree, then time them."""
    stats = StatsLayer(layout=LAYOUT).fit(row(files[0])[None])
    some = np.stack([row(file) for file in files[: min(LANDMARKS, len(files))]])
    pca = DeltaPCA(
        layout=LAYOUT, matrices=matrices, landmarks=len(some), n_components=len(some) // 2
    ).fit(some)
    for file in files[:3]:
        mine = stats.transform(row(file)[None])[0]
        np.testing.assert_allclose(mine, peer(file), rtol=1e-2, atol=1e-3)

    def each(act: Callable[[Path], object]) -> common.Contender:
        return common.timed(lambda: [act(file) is None for file in files], len(files))

    seldom = files[: max(BATCH, len(files) // 10)]
    costs = common.alternate(
        {
            STATS: common.timed(lambda: features(files, stats), len(files)),
            ONE: each(lambda file: stats.transform(row(file)[None])),
            READ: each(row),
            DELTA: common.timed(lambda: features(seldom, pca), len(seldom)),
            PEER: each(peer),
            BYTES: each(Path.read_bytes),
            HASH: each(file_sha256),
        },
        repeats,
    )
    rates = {way: 1 / statistics.median(c.cpu for c in found) for way, found in costs.items()}
    verdict = "reached" if rates[STATS] >= GOAL else "**missed**"
    common.show(
        f"Reading a rank-4 SD1.5 file and StatsLayer, {len(files):,} files",
        "ms per file",
        costs,
        [common.Baseline(PEER)],
        base=STATS,
        remark=f"{rates[STATS]:.0f} files/s/core, goal {GOAL} {verdict}",
    )
    print("Files per second and core: " + "; ".join(f"{w} {r:.0f}" for w, r in rates.items()))
    share = statistics.median(
        b.cpu / s.cpu for b, s in zip(costs[BYTES], costs[STATS], strict=True)
    )
    print(f"Reading bytes is {share:.0%} of reading and StatsLayer; landmarks: {len(some)}")


def main() -> None:
    """Run and print."""
    args = common.arguments(__doc__, repeats=5)
    n = 8 if args.quick else 1000
    with tempfile.TemporaryDirectory() as folder:
        files = write(Path(folder), n, np.random.default_rng(args.seed))
        # Fitting takes longest, and is not timed.
        compare(files, args.repeats, ("down_blocks.0.*",) if args.quick else ONLY)
    common.facts("safetensors", "diffusers", n=n, repeats=args.repeats)


if __name__ == "__main__":
    main()

"""Bytes that one layer of a large adapter on the Hub costs, against the whole file.

A file of more than 100 MB, rank 128 on the attention of SDXL's size, lies on a Hub on loopback
(`tests/hub_server.py`). Compared, in bytes that the server sends:

* ours: `read_adapter("hub:…", only=[layer])`, header and settings counted;
* whole file: `huggingface_hub.hf_hub_download`, and the layer out of it.

Both give the same numbers. Goal: at most 10 % of the bytes.
"""

import os
import sys
import tempfile
from pathlib import Path

import common
import numpy as np
from safetensors.numpy import save_file

from lora_ws import read_adapter

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from hub_server import HubServer

REPO, FILE, SHARE = "tester/large", "pytorch_lora_weights.safetensors", 0.1
WIDTH, CONTEXT = 1280, 2048
LAYERS = [
    f"{side}.attentions.0.transformer_blocks.{block}.{projection}"
    for side in ("down_blocks.2", "mid_block", "up_blocks.0")
    for block in range(10)
    for projection in ("attn1.to_q", "attn1.to_v", "attn2.to_q", "attn2.to_v")
]
LAYER = "mid_block.attentions.0.transformer_blocks.4.attn2.to_v"


def write(folder: Path, rank: int, seed: int) -> int:
    """The file; returns its size."""
    random = np.random.default_rng(seed)
    tensors = {}
    for name in LAYERS:
        width = CONTEXT if name.endswith("attn2.to_v") else WIDTH
        shapes = {"down": (rank, width), "up": (WIDTH, rank)}
        for role, shape in shapes.items():
            values = random.standard_normal(shape, dtype=np.float32)
            tensors[f"unet.{name}.lora.{role}.weight"] = values
    folder.mkdir(parents=True)
    save_file(tensors, folder / FILE, {"format": "pt"})
    return (folder / FILE).stat().st_size


def sent(server: HubServer) -> tuple[int, int]:
    """Bytes and answers since the last time."""
    entries = [entry for entry in server.log if entry.method != "HEAD"]
    server.log.clear()
    return sum(entry.bytes_sent for entry in entries), len(entries)


def measure(server: HubServer) -> dict[str, tuple[int, int]]:
    """Read both ways, compare, and count."""
    # Imported here, because it reads the environment only then.
    from huggingface_hub import hf_hub_download

    adapter = read_adapter(f"hub:{REPO}/{FILE}", only=[LAYER])
    ours = sent(server)
    whole = read_adapter(hf_hub_download(REPO, FILE, endpoint=server.url), only=[LAYER])
    np.testing.assert_array_equal(adapter.flat(), whole.flat())
    return {common.OURS: ours, "whole file": sent(server)}


def main() -> None:
    """Run and print."""
    args = common.arguments(__doc__, repeats=1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = write(folder / "models" / REPO, 8 if args.quick else 128, args.seed)
        with HubServer(folder) as server:
            os.environ |= {"HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1"}
            os.environ |= {"HF_HUB_OFFLINE": "0", "HF_HOME": str(folder / "cache")}
            found = measure(server)
    rows = [[way, f"{b:,}", f"{b / size:.1%}", str(n)] for way, (b, n) in found.items()]
    common.print_table(["", "bytes sent", "share of the file", "answers"], rows)
    share = found[common.OURS][0] / size
    title = f"One layer of a {size / 1e6:.0f} MB file on a loopback Hub, bytes sent"
    baseline = common.Baseline("whole file", 1 / SHARE)
    ratio = found["whole file"][0] / found[common.OURS][0]
    common.record(title, baseline, [ratio], ours=100 * share, unit="% of the file")
    print(f"\nGoal at most {SHARE:.0%}: {'reached' if share <= SHARE else 'MISSED'}, {share:.1%}")
    common.facts("huggingface_hub", layers=len(LAYERS), size=size)


if __name__ == "__main__":
    main()

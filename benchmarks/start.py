"""What a command of one file costs before and after its work: CPU seconds of whole processes.

Compared with ``lora-ws --help``, ``predict`` and ``scan`` of one file by the shipped reader, and
``demo``:

* importing torch, which the shipped reader does without;
* numpy and safetensors alone: importing them, and reading the file.

Goal: 1 CPU second for ``predict``.
"""

import tempfile
from pathlib import Path

import common

from lora_ws import Layout

MOST = 1.0
PREDICT, TORCH, NUMPY = "lora-ws predict", "import torch", "numpy and safetensors alone"
READ = "import sys; from safetensors.numpy import load_file; load_file(sys.argv[1])"


def main() -> None:
    """Run and print."""
    args = common.arguments(__doc__, repeats=7)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (file,) = common.adapter_files(folder, Layout.known("tiny_sd_qv"), 1, args.seed)
        ours = ["-m", "lora_ws"]
        scan = ["scan", str(file), "--cache", "cache", "--out", "report.html"]
        processes = {
            PREDICT: [*ours, "predict", str(file)],
            "lora-ws --help": [*ours, "--help"],
            "lora-ws scan": [*ours, *scan],
            "lora-ws demo": [*ours, "demo"],
            TORCH: ["-c", "import torch"],
            NUMPY: ["-c", READ, str(file)],
        }
        contenders = {
            way: lambda arguments=arguments: common.in_process(arguments, folder)
            for way, arguments in processes.items()
        }
        costs = common.alternate(contenders, args.repeats)
    took = sorted(cost.cpu for cost in costs[PREDICT])[args.repeats // 2]
    common.show(
        "`lora-ws predict` of one file, start included",
        "s",
        costs,
        [common.Baseline(TORCH), common.Baseline(NUMPY)],
        base=PREDICT,
        remark=f"goal {MOST:g} s {'reached' if took <= MOST else '**missed**'}",
    )
    common.facts(repeats=args.repeats)


if __name__ == "__main__":
    main()

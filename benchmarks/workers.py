"""A scan by two processes against one: seconds on the wall of whole commands, start included.

``lora-ws scan FOLDER --workers N`` with the shipped reader, where nothing was scanned before.
Processes that wait for each other, or start slowly, show on the wall alone, so run it on a machine
that does nothing else: with 2 busy cores the ratio says nothing.

Goal: 1.7 times for 2 000 files.
"""

import statistics
import tempfile
from pathlib import Path

import common

from lora_ws import Layout

GOAL = 1.7


def main() -> None:
    """Run and print."""
    args = common.arguments(__doc__, repeats=3, files=2000)
    files = 12 if args.quick else args.files
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        common.adapter_files(folder, Layout.known("tiny_sd_qv"), files, args.seed)

        def scan(workers: int) -> common.Cost:
            flags = ["--cache", "cache", "--json", "found.jsonl", "--workers", str(workers)]
            return common.in_process(["-m", "lora_ws", "scan", str(folder), *flags], folder)

        one, two = (f"--workers {n}" for n in (1, 2))
        contenders = {one: lambda: scan(1), two: lambda: scan(2)}
        costs = common.alternate(contenders, args.repeats)
    pairs = zip(costs[one], costs[two], strict=True)
    ratio = statistics.median(alone.wall / both.wall for alone, both in pairs)
    verdict = "reached" if ratio >= GOAL else "**missed**"
    remark = f"on the wall {ratio:.2f} times as fast, goal {GOAL:g} {verdict}"
    title = f"Scan of {files:,} files by two processes"
    common.show(title, "s", costs, [common.Baseline(one)], base=two, remark=remark)
    common.facts(files=files, repeats=args.repeats)


if __name__ == "__main__":
    main()

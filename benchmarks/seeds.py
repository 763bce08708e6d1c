"""Seeds trained side by side: CPU seconds of whole processes, start included.

Four seeds of five epochs of the classifier on `StatsLayer` of the bundled adapters, one after the
other, in one process and with ``--processes 2``: what every process does anew is its start, and
making the representation. On the wall it pays where seeds take longer than that.
"""

import tempfile
from pathlib import Path

import common

SEEDS, EPOCHS = 4, 5
ONE, TWO = "one process", "--processes 2"


def main() -> None:
    """Run and print."""
    args = common.arguments(__doc__, repeats=3)
    seeds = 2 if args.quick else SEEDS
    train = ["-m", "lora_ws", "train", "--featurizer", "StatsLayer", "--seeds", str(seeds)]
    train += ["--fit.max_epochs", str(EPOCHS), "--trainer.engine", "one-by-one", "--out", "run"]
    with tempfile.TemporaryDirectory() as folder:
        costs = common.alternate(
            {
                ONE: lambda: common.in_process(train, Path(folder)),
                TWO: lambda: common.in_process([*train, "--processes", "2"], Path(folder)),
            },
            args.repeats,
        )
    title = f"{seeds} seeds of {EPOCHS} epochs on StatsLayer (`lora-ws train`)"
    common.show(title, "s", costs, [common.Baseline(TWO)], base=ONE)
    common.facts(repeats=args.repeats)


if __name__ == "__main__":
    main()

"""What photos in common between training and test adapters add to accuracy, at the same size.

A collection whose photos are dealt again inside the recorded parts (`passes` above 1), such as
lora-ws-small, is split in two ways: by the recorded parts, whose photos are disjoint, and by rows,
as the published sets are split, so that test adapters come from photos that training adapters saw.
Both train the same reader on the same number of adapters, classes taking turns.

    python benchmarks/photo_effect.py STORE…

reads stores of one collection, such as shares of ``lora-ws zoo build --shard``; without any,
lora-ws-mini's ``per_adapter/constant``, whose photos are dealt once.
"""

import tempfile
from dataclasses import replace
from pathlib import Path

import common
import numpy as np
from learning_curve import drawn, read, spec_of

from lora_ws.collection import AdapterSet, Split, SplitRule, make_split
from lora_ws.learn.features import prepare
from lora_ws.learn.leaks import share_seen
from lora_ws.learn.run import fit_seeds

READER = "UpdateKernel of attn2.to_v > SVC"
DISJOINT, BY_ROWS = "disjoint photos", "split by rows"


def split_of(adapters: AdapterSet, way: str, draw: int) -> Split:
    """Parts as recorded, or as many rows of each drawn without a look at their photos."""
    recorded = adapters.split()
    if way == DISJOINT:
        return recorded
    n = len(adapters)
    shares = (len(recorded.train) / n, len(recorded.val) / n, len(recorded.test) / n)
    return make_split(adapters.labels()[0], None, SplitRule(shares, seed=draw))


def measure(adapters: AdapterSet, way: str, size: int, draw: int) -> tuple[float, float]:
    """Test accuracy, and the share of test adapters with a photo that a training one saw."""
    split = split_of(adapters, way, draw)
    split = split._replace(train=drawn(split.train, adapters.labels()[0], draw)[:size])
    rows = np.concatenate(split)
    names = np.repeat(list(Split._fields), [len(part) for part in split])
    own = adapters.select(rows)
    place = own.rows.column_names.index("part")
    own = replace(own, rows=own.rows.set_column(place, "part", [names.tolist()]))
    own = own.split_by("part")
    seen = share_seen(own.column("images"), own.split())
    with tempfile.TemporaryDirectory() as folder:
        spec = replace(spec_of(READER), dataset=str(own.save(Path(folder, "store"))), split="part")
        (fitted,) = fit_seeds(spec, prepare(spec), [draw])
    hits = np.asarray(fitted.test.scores.argmax(1) == fitted.test.truth)
    return float(hits.mean()), seen


def main() -> None:
    """Print accuracy by size and kind of split."""
    parser = common.flags(__doc__)
    parser.add_argument("stores", nargs="*", help="stores of one collection")
    parser.add_argument("--sizes", type=int, nargs="+", default=[350], help="training rows")
    parser.add_argument("--draws", type=int, default=3, help="of training rows and splits")
    args = parser.parse_args(namespace=common.RUN)
    adapters = read(args.stores)
    draws = 1 if args.quick else args.draws
    rows = []
    for size in args.sizes:
        for way in (DISJOINT, BY_ROWS):
            found = np.array([measure(adapters, way, size, draw) for draw in range(draws)])
            spread = 100 * found[:, 0].std(ddof=1) if draws > 1 else float("nan")
            accuracy = f"{100 * found[:, 0].mean():.1f} ± {spread:.1f}"
            rows.append([f"{size}", way, f"{100 * found[:, 1].mean():.0f} %", accuracy])
    print(f"\n### {READER}, {len(adapters)} adapters\n")
    heads = ["training rows", "split", "test adapters with a seen photo", "accuracy, %"]
    common.print_table(heads, rows)
    common.facts("scikit-learn", draws=draws, test=len(adapters.split().test))


if __name__ == "__main__":
    main()

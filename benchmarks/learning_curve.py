"""How the test error of readers falls with the number of training adapters, and how far.

For each draw the training rows are shuffled, classes taking turns; the first 100, 200, 400, … of
them train, so that draws are nested. Validation and test rows are those of the collection, whatever
the size: of ``part``, no test adapter saw an image that a training one saw; of ``leaf_part``, none
is of a leaf class that a training one is of. Readers are recipes of `training/`, fitted as
`lora-ws train` does.

Fitted to the means: err = a (n / 100)^-b + c, by least squares weighted by their standard errors
(draws and test rows), a, b and c not below 0. An extrapolation is a guess: its interval is that of
fits to draws and test rows taken again with replacement, and knows nothing of how else the law may
fail.

    python benchmarks/learning_curve.py STORE… --out FOLDER

reads stores of one collection, such as shares of ``lora-ws zoo build --shard``; without any,
lora-ws-mini's ``per_adapter/constant``. What records.jsonl of the folder holds already is not
measured again; with ``--draws 0`` it is reported as it stands. So a part of the shares can give the
small sizes and their test rows, and all of them, ``--smallest 4000``, the large ones.
"""

import itertools
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import common
import numpy as np
import pyarrow as pa
from scipy.optimize import least_squares
from sklearn.svm import SVC

import lora_ws
from lora_ws import UpdateKernel
from lora_ws.collection import AdapterSet
from lora_ws.experiments.recipes import recipe
from lora_ws.learn.features import prepare
from lora_ws.learn.run import fit_seeds
from lora_ws.learn.spec import ExperimentSpec
from lora_ws.models import Metanetwork
from lora_ws.report.charts import chart_lines

LEFT = ExperimentSpec(
    featurizer=UpdateKernel(kernel="left", weights="equal"), model=SVC(C=10, kernel="precomputed")
)
READERS = {
    "left kernel of all layers > SVC": LEFT,
    "UpdateKernel of attn2.to_v > SVC": "metanetworks/update_kernel",
    "LeftGram of attn2.to_v": "metanetworks/left_gram",
    "StatsLayer > MLP": "table1/stats_layer",
    "FlatVec > MLP": "table1/flat_vec",
}
SPLITS = {"part": "image-disjoint", "leaf_part": "unseen leaves"}
ASKED = (8_000, 50_000)
RESAMPLES = 200


@dataclass(frozen=True)
class Point:
    """Test rows that a reader got wrong after training on the first rows of a draw.

    Attributes:
        reader: name in `READERS`.
        split: name in `SPLITS`.
        size: training rows.
        draw: seed of their order, and of the network.
        tested: test rows.
        wrong: which of them, a bit each, the first one highest, as a hexadecimal number.
        seconds: of CPU, features and training together.
    """

    reader: str
    split: str
    size: int
    draw: int
    tested: int
    wrong: str
    seconds: float

    @property
    def mistakes(self) -> np.ndarray:
        """Whether each test row is wrong ``[tested]``."""
        return np.array([bit == "1" for bit in f"{int(self.wrong, 16):0{self.tested}b}"])


class Law(NamedTuple):
    """Error in percent at n training rows: a (n / 100)^-b + c."""

    a: float
    b: float
    c: float

    def at(self, n: np.ndarray | float) -> np.ndarray:
        """The error at n rows."""
        return self.a * (np.asarray(n, float) / 100) ** -self.b + self.c


def read(stores: Sequence[str]) -> AdapterSet:
    """All rows of the stores together, as a collection without subsets."""
    sets = [AdapterSet.open(Path(store)) for store in stores]
    sets = sets or [lora_ws.load("lora-ws-mini").subset("per_adapter/constant")]
    weights = np.concatenate([one.weights for one in sets])
    rows, card = pa.concat_tables([one.rows for one in sets]), sets[0].card
    card = replace(card, subset="", subsets=())
    return replace(sets[0], weights=weights, rows=rows, card=card)


def spec_of(name: str) -> ExperimentSpec:
    """The experiment of a reader, on a collection that is still to be named."""
    reader = READERS[name]
    return recipe(reader, "", None, None) if isinstance(reader, str) else reader


def drawn(rows: np.ndarray, labels: np.ndarray, draw: int) -> np.ndarray:
    """Shuffle rows, classes taking turns."""
    order = np.random.default_rng(draw).permutation(rows)
    turns = np.empty(len(order), int)
    for label in np.unique(labels[order]):
        own = labels[order] == label
        turns[own] = np.arange(own.sum())
    return order[np.argsort(turns, kind="stable")]


def measure(adapters: AdapterSet, name: str, split: str, size: int, draw: int) -> Point:
    """Train a reader on the first rows of a draw, and test it."""
    parts = adapters.column(split).astype(str)
    labels, _ = adapters.labels()
    train = drawn(np.flatnonzero(parts == "train"), labels, draw)[:size]
    rows = np.sort(np.concatenate([train, np.flatnonzero(parts != "train")]))
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        store = str(adapters.select(rows).save(Path(folder, "store")))
        spec = replace(spec_of(name), dataset=store, split=split)
        (fitted,) = fit_seeds(spec, prepare(spec), [draw])
    wrong = fitted.test.scores.argmax(1) != fitted.test.truth
    bits = int("".join(str(int(bit)) for bit in wrong.tolist()), 2)
    seconds = round(time.process_time() - start, 1)
    return Point(name, split, size, draw, len(wrong), f"{bits:x}", seconds)


def missing(
    adapters: AdapterSet, names: Sequence[str], draws: int, smallest: int, held: Sequence[Point]
) -> list[tuple[str, str, int, int]]:
    """Reader, split, size and draw of what is not measured yet, few training rows first."""
    known = {(point.reader, point.split, point.size, point.draw) for point in held}
    asked = []
    for split in SPLITS:
        count = int((adapters.column(split) == "train").sum())
        sizes = [size for size in sizes_of(count) if size >= smallest]
        for size, name in itertools.product(sizes, names):
            # All rows are the same rows in every draw, and these classifiers draw nothing.
            same = size == count and not isinstance(spec_of(name).model, Metanetwork)
            asked += [(name, split, size, draw) for draw in range(1 if same else draws)]
    return sorted((key for key in asked if key not in known), key=lambda key: key[2])


def sizes_of(count: int) -> list[int]:
    """Numbers of training rows: 100, 200, 400, … and all.

    Example:
        >>> sizes_of(300)
        [100, 200, 300]
    """
    return [100 * 2**k for k in range(20) if 100 * 2**k < count] + [count]


def fit(sizes: Sequence[int], wrong: Sequence[np.ndarray]) -> Law:
    """The law behind mistakes of each size ``[draws, test]``."""
    draws = [100 * own.mean(axis=1) for own in wrong]
    mean = np.array([own.mean() for own in draws])
    sampling = np.maximum(mean * (100 - mean), 1.0) / [own.shape[1] for own in wrong]
    between = [own.var(ddof=1) / len(own) if len(own) > 1 else 0.0 for own in draws]
    n, error = np.array(sizes, float), np.sqrt(between + sampling)
    found = least_squares(
        lambda law: (Law(*law).at(n) - mean) / error,
        (max(mean[0] / 2, 1.0), 0.5, 1.0),
        bounds=(0, [1000, 3, 100]),
    )
    return Law(*found.x)


def resampled(sizes: Sequence[int], wrong: Sequence[np.ndarray]) -> np.ndarray:
    """Laws of draws and test rows taken again: errors where asked ``[times, asked]``."""
    rng, found = np.random.default_rng(0), []
    tested = dict.fromkeys(own.shape[1] for own in wrong)
    for _ in range(RESAMPLES):
        rows = {count: rng.integers(count, size=count) for count in tested}
        again = [own[rng.integers(len(own), size=len(own))][:, rows[own.shape[1]]] for own in wrong]
        found.append(fit(sizes, again).at(np.array(ASKED)))
    return np.array(found)


class Curve(NamedTuple):
    """A reader's errors in percent.

    Attributes:
        errors: size -> (mean, standard deviation over draws).
        law: fitted to them.
        intervals: of 90 % of the law, at each of `ASKED`: (low, high).
    """

    errors: dict[int, tuple[float, float]]
    law: Law
    intervals: list[tuple[float, float]]


def curve_of(points: Sequence[Point]) -> Curve:
    """Sum up one reader on one split."""
    by_size: dict[int, list[np.ndarray]] = {}
    for point in sorted(points, key=lambda point: point.size):
        by_size.setdefault(point.size, []).append(point.mistakes)
    sizes, wrong = list(by_size), [np.array(own) for own in by_size.values()]
    draws = [100 * own.mean(axis=1) for own in wrong]
    spread = [float(own.std(ddof=1)) if len(own) > 1 else 0.0 for own in draws]
    errors = {n: (float(own.mean()), std) for n, own, std in zip(sizes, draws, spread, strict=True)}
    ends = np.percentile(resampled(sizes, wrong), [5, 95], axis=0)
    return Curve(errors, fit(sizes, wrong), [(low, high) for low, high in ends.T.tolist()])


def report(points: Sequence[Point], split: str, folder: Path) -> None:
    """Print a table of one split, with a law for each reader, and draw it."""
    own = {name: [point for point in points if point.reader == name] for name in READERS}
    curves = {name: curve_of(held) for name, held in own.items() if held}
    sizes = sorted({point.size for point in points})
    rows, laws = [], []
    for name, (errors, law, intervals) in curves.items():
        cells = [f"{errors[n][0]:.1f} ± {errors[n][1]:.1f}" if n in errors else "" for n in sizes]
        rows.append([name, *cells])
        asked = [
            f"{law.at(n):.1f} ({low:.1f} to {high:.1f})"
            for n, (low, high) in zip(ASKED, intervals, strict=True)
        ]
        laws.append([name, f"{law.a:.1f} (n / 100)^-{law.b:.2f} + {law.c:.1f}", *asked])
    counts = {point.tested: None for point in sorted(points, key=lambda point: point.size)}
    tested = f"{' or '.join(map(str, counts))} test rows"
    print(f"\n{SPLITS[split]}: test error in percent; {tested}")
    common.print_table(["reader", *map(str, sizes)], rows)
    print()
    common.print_table(["reader", "law", *(f"at {n} (90 % interval)" for n in ASKED)], laws)
    chart_lines(
        {name: curve.errors for name, curve in curves.items()},
        folder / f"{split}.png",
        title=f"{SPLITS[split]}: mean ± std, {tested}",
        chance=90.0,
        xlabel="training adapters",
        ylabel="test error, percent",
        guess="chance",
    )


def main() -> None:
    """Measure what is missing, fit, print, draw."""
    parser = common.flags(__doc__)
    parser.add_argument("stores", nargs="*", help="folders of stores of one collection")
    parser.add_argument("--draws", type=int, default=3, help="orders of the training rows")
    parser.add_argument("--smallest", type=int, default=100, help="training rows to begin with")
    parser.add_argument("--readers", nargs="+", choices=READERS, default=list(READERS))
    parser.add_argument("--out", type=Path, default=Path("runs", "learning_curve"))
    options = parser.parse_args(namespace=common.RUN)
    if options.quick:
        options.readers, options.draws = options.readers[:1], 1
    options.out.mkdir(parents=True, exist_ok=True)
    file, points = options.out / "records.jsonl", list[Point]()
    if file.is_file():
        points = [Point(**json.loads(line)) for line in file.read_text("utf-8").splitlines()]
    if options.draws:
        adapters = read(options.stores)
        for own in points:
            counted = (adapters.column(own.split) == "test").sum()
            if own.size >= options.smallest and own.tested != counted:
                parser.error(f"--out: expected records of these stores in {file}, got of others")
        for asked in missing(adapters, options.readers, options.draws, options.smallest, points):
            points.append(measure(adapters, *asked))
            with file.open("a", encoding="utf-8") as out:
                out.write(json.dumps(asdict(points[-1])) + "\n")
    common.facts("scipy", "scikit-learn")
    for split in SPLITS:
        if own := [point for point in points if point.split == split]:
            report(own, split, options.out)


if __name__ == "__main__":
    main()

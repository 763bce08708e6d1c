"""How the test error of kernel readers falls with the number of training adapters, and how far.

For each draw the training rows are shuffled; the first 50, 100, 200, … of them train, so that draws
are nested. C is chosen by the validation rows; the test rows are those of the collection's
``part``, whose images no training row has. Fitted to the means: err = a n^-b + c, by least squares
weighted by their standard errors (draws and test rows), c not below 0. An extrapolation is a guess:
its interval is that of fits to draws and test rows taken again with replacement, and knows nothing
of how else the law may fail.

    python benchmarks/learning_curve.py STORE… --out FOLDER

reads stores of one collection, such as shares of ``lora-ws zoo build --shard``; without any,
lora-ws-mini's ``per_adapter/constant``.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import common
import numpy as np
from scipy.optimize import curve_fit
from sklearn.svm import SVC

import lora_ws
from lora_ws import Layout, UpdateKernel
from lora_ws.collection import AdapterSet
from lora_ws.report.charts import chart_lines

READERS = {
    "left, all layers alike": {"kernel": "left", "weights": "equal"},
    "left+probe of attn2.to_v, aligned": {"matrices": ("*.attn2.to_v",)},
}
STRENGTHS = (0.1, 1.0, 10.0)
ASKED = (8_000, 50_000)
RESAMPLES = 200


class Data(NamedTuple):
    """Rows, classes and parts of a collection."""

    layout: Layout
    weights: np.ndarray
    labels: np.ndarray
    parts: np.ndarray


def read(stores: Sequence[str], split: str) -> Data:
    """Take all rows of the stores together."""
    if stores:
        sets = [AdapterSet.open(Path(store)) for store in stores]
    else:
        sets = [lora_ws.load("lora-ws-mini").subset("per_adapter/constant")]
    labels = np.concatenate([one.column("category_label").astype(str) for one in sets])
    parts = np.concatenate([one.column(split).astype(str) for one in sets])
    return Data(sets[0].layout, np.concatenate([one.weights for one in sets]), labels, parts)


def mistakes(data: Data, options: dict[str, object], sizes: Sequence[int], seed: int) -> np.ndarray:
    """Which test rows are wrong at each number of training rows, of one draw ``[sizes, test]``."""
    train, val, test = (np.flatnonzero(data.parts == part) for part in ("train", "val", "test"))
    order = np.random.default_rng(seed).permutation(train)
    found = []
    for size in sizes:
        rows = order[:size]
        kernel = UpdateKernel(layout=data.layout, **options)  # type: ignore[arg-type]
        gram = kernel.fit_transform(data.weights[rows], data.labels[rows])
        asked, truth = kernel.transform(data.weights[val]), data.labels[val]
        machines = [
            SVC(kernel="precomputed", C=strength, break_ties=True).fit(gram, data.labels[rows])
            for strength in STRENGTHS
        ]
        best = max(machines, key=lambda machine: float((machine.predict(asked) == truth).mean()))
        guess = best.predict(kernel.transform(data.weights[test]))
        found.append(guess != data.labels[test])
    return np.array(found)


def law(n: np.ndarray | float, a: float, b: float, c: float) -> np.ndarray | float:
    """Error at n rows; a is that at 100 rows above the floor c."""
    return a * (np.asarray(n) / 100) ** -b + c


def fit(sizes: Sequence[int], wrong: np.ndarray) -> np.ndarray:
    """a, b and c of the law, from mistakes ``[draws, sizes, test]``."""
    draws = 100 * wrong.mean(axis=2)
    mean = draws.mean(axis=0)
    sampling = np.maximum(mean * (100 - mean), 1.0) / wrong.shape[2]
    spread = np.sqrt(draws.var(axis=0, ddof=1) / len(draws) + sampling)
    bounds = ([0, 0, 0], [1000, 3, 100])
    found, _ = curve_fit(
        law, np.array(sizes, float), mean, (mean[0] / 2, 0.5, 1.0), sigma=spread, bounds=bounds
    )
    return found


def resampled(sizes: Sequence[int], wrong: np.ndarray) -> np.ndarray:
    """Errors that the law gives where asked, of draws and rows taken again ``[times, asked]``."""
    rng, found = np.random.default_rng(0), []
    draws, _, rows = wrong.shape
    for _ in range(RESAMPLES):
        again = wrong[rng.integers(draws, size=draws)][:, :, rng.integers(rows, size=rows)]
        found.append(law(np.array(ASKED, float), *fit(sizes, again)))
    return np.array(found)


def main() -> None:
    """Measure, fit, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stores", nargs="*", help="folders of stores of one collection")
    parser.add_argument("--split", default="part", help="column of parts")
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--out", type=Path, help="folder for the plot and the numbers")
    options = parser.parse_args()
    data = read(options.stores, options.split)
    count = {part: int((data.parts == part).sum()) for part in ("train", "val", "test")}
    sizes = [50 * 2**k for k in range(20) if 50 * 2**k < count["train"]] + [count["train"]]
    common.facts("numpy", "scipy", "scikit-learn", **count, draws=options.draws)
    curves, records = {}, {}
    for name, settings in READERS.items():
        start = time.process_time()
        wrong = np.array([mistakes(data, settings, sizes, seed) for seed in range(options.draws)])
        draws, (a, b, c) = 100 * wrong.mean(axis=2), fit(sizes, wrong)
        low, high = np.percentile(resampled(sizes, wrong), [5, 95], axis=0)
        rows = [
            [str(n), f"{mean:.1f} ± {std:.1f}", f"{law(n, a, b, c):.1f}"]
            for n, mean, std in zip(sizes, draws.mean(0), draws.std(0, ddof=1), strict=True)
        ]
        rows += [
            [f"({n})", "not measured", f"{law(n, a, b, c):.1f} ({low[k]:.1f} to {high[k]:.1f})"]
            for k, n in enumerate(ASKED)
            if n > sizes[-1]
        ]
        print(f"\n{name}: err = {a:.2f} (n / 100)^-{b:.3f} + {c:.2f}; ", end="")
        print(f"{time.process_time() - start:.0f} CPU s")
        common.print_table(["training rows", "test error, percent", "fit (90 % interval)"], rows)
        curves[name] = {
            n: (mean, std)
            for n, mean, std in zip(sizes, draws.mean(0), draws.std(0, ddof=1), strict=True)
        }
        records[name] = {"sizes": sizes, "errors": draws.tolist(), "law": [a, b, c]}
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        whole = json.dumps({**count, **records}, indent=1)
        (options.out / "learning_curve.json").write_text(whole, encoding="utf-8")
        chart_lines(
            curves,
            options.out / "learning_curve.png",
            title=f"Mean ± std of {options.draws} draws, {count['test']} test rows",
            chance=None,
            xlabel="training adapters",
            ylabel="test error, percent",
        )


if __name__ == "__main__":
    main()

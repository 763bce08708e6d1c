"""How many photos of a test adapter some training adapter also saw, in the published sets.

The authors' sampling script gives each adapter the next 4 to 16 photos of a leaf class drawn at
random; a leaf whose photos run out is shuffled and dealt again. So photos are shared between rows
once the collection is large, and a split by rows alone leaks them: accuracy that rises with the
number of adapters is confounded with it. The columns on the Hub hold no photo numbers; this is the
arithmetic of the script, with as many photos in every leaf class, in two ways:

* even: every leaf class is drawn equally often, which is the least reuse there can be;
* by class: each of the ten classes holds a tenth of the adapters, as the paper says, and its leaf
  classes share them. How many each has is not published; `LEAVES_OF` sums to the 264 that are, with
  the 118 dogs and 59 birds of ImageNet and a guess for the others.
"""

import common
import numpy as np

PHOTOS = 172_000
LEAVES_OF = {
    "airplane": 2,
    "bird": 59,
    "car": 10,
    "cat": 13,
    "dog": 118,
    "fish": 16,
    "fruit": 10,
    "ship": 12,
    "snake": 17,
    "vegetable": 7,
}
LEAVES = sum(LEAVES_OF.values())
SIZES = {"1k": 1_000, "10k": 9_170, "50k": 45_400, "100k": 91_700}
FEWEST, MOST, TEST = 4, 16, 0.2


def draw_leaves(adapters: int, rng: np.random.Generator, *, by_class: bool) -> np.ndarray:
    """Draw the leaf class of each adapter."""
    if not by_class:
        return rng.integers(LEAVES, size=adapters)
    sizes = np.array(list(LEAVES_OF.values()))
    first = np.cumsum(sizes) - sizes
    classes = rng.permutation(np.arange(adapters) % len(sizes))
    return first[classes] + rng.integers(sizes[classes])


def deal(leaves: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """Deal photos to adapters of these leaf classes; returns the photos of each."""
    per_leaf = PHOTOS // LEAVES
    decks: list[np.ndarray] = [np.empty(0, np.int64)] * LEAVES
    hands = []
    for leaf, wanted in zip(leaves, rng.integers(FEWEST, MOST + 1, size=len(leaves)), strict=True):
        if len(decks[leaf]) < wanted:
            decks[leaf] = leaf * per_leaf + rng.permutation(per_leaf)
        hands.append(decks[leaf][:wanted])
        decks[leaf] = decks[leaf][wanted:]
    return hands


def seen_shares(adapters: int, seed: int, *, by_class: bool) -> tuple[float, float]:
    """Share of test adapters' photos that a training adapter saw, and of adapters with one.

    Rows are split 70/10/20, each for itself.
    """
    rng = np.random.default_rng(seed)
    hands = deal(draw_leaves(adapters, rng, by_class=by_class), rng)
    unit = rng.random(adapters)
    seen = np.zeros(PHOTOS, bool)
    seen[np.concatenate([hands[k] for k in np.flatnonzero(unit >= TEST + 0.1)])] = True
    shares = [seen[hands[k]].mean() for k in np.flatnonzero(unit < TEST)]
    return float(np.mean(shares)), float(np.mean(np.greater(shares, 0)))


def main() -> None:
    """Print one row per published set."""
    args = common.arguments(__doc__, repeats=5)
    heads = ["set", "rows", "uses of a photo"]
    sizes = dict(list(SIZES.items())[: 1 if args.quick else None])
    rows = [[name, f"{n}", f"{n * (FEWEST + MOST) / 2 / PHOTOS:.2f}"] for name, n in sizes.items()]
    for by_class in (False, True):
        drawn = "by class" if by_class else "even"
        heads += [f"{drawn}: photos seen", f"{drawn}: adapters with one"]
        for row, n in zip(rows, sizes.values(), strict=True):
            shares = [seen_shares(n, k, by_class=by_class) for k in range(args.repeats)]
            row += [f"{100 * np.mean(share):.0f} %" for share in zip(*shares, strict=True)]
    common.print_table(heads, rows)
    common.facts(draws=args.repeats)


if __name__ == "__main__":
    main()

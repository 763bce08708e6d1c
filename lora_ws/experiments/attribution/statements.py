"""What the post states, beside what was found here: reproduced, not reproduced, or out of reach."""

from collections.abc import Mapping, Sequence

import numpy as np

from lora_ws.experiments.attribution.spec import CACHED, ORIGINAL, UNGUIDED, AttributionSpec, Values
from lora_ws.experiments.statements import Statement

# Pearson's correlation below which maps count as unrelated.
UNRELATED = 0.1


def statements_of(spec: AttributionSpec, done: Mapping[str, Values]) -> list[Statement]:
    """All statements of the post."""
    return [
        *_of_blocks(done["blocks"]),
        *_of_codes(spec.mixture, spec.pictures["sparse codes"], done["sparse codes"]),
        *_of_boxes(done["boxes"]),
        *_of_inversion(1 / len(spec.adapters), done["inversion"]),
        *OUT_OF_REACH,
    ]


OUT_OF_REACH = (
    Statement(
        "the numbers of Stable Diffusion 1.5 with a sketch, a Pokemon and a backpack adapter",
        "a base of 16 x 16 pixels, adapters of its testbed",
        "the post links no weights, code or boxes, and the base needs a GPU",
        None,
    ),
    Statement(
        "influence functions scale attribution in base models (cited)",
        "not measured",
        "it is about training images, not adapters",
        None,
    ),
)


def _percent(values: Sequence[float], digits: int = 0) -> str:
    return ", ".join(f"{100 * value:.{digits}f}" for value in values) + " %"


def _of_blocks(found: Values) -> list[Statement]:
    free, safe = found["free"], dict(zip(found["blocks"], found["safe"], strict=True))
    adapted = [name for name in safe if name != "conv_in"]
    return [
        Statement(
            "adding adapters changes every block, the first too",
            f"{_percent([free[0]], 1)} in the first, {_percent([max(free)], 1)} at most",
            "every block changes by more than 1 %",
            min(free) > 0.01,
        ),
        Statement(
            "by 60.9 % in the first block, and 94.1 % in deeper ones",
            f"{_percent(free[:2], 1)} in the first two, {_percent([max(free)], 1)} at most",
            "within a half of both numbers",
            bool(np.allclose([free[0], max(free)], [0.609, 0.941], rtol=0.5)),
        ),
        Statement(
            "so early layers cannot be cached",
            f"at the same latents {sum(safe[name] for name in adapted)} of {len(adapted)} blocks "
            "with adapters stay within 1 %",
            "none stays",
            not any(safe[name] for name in adapted),
        ),
    ]


def _of_codes(mixture: Sequence[float], pictures: int, found: Values) -> list[Statement]:
    own, raw = found["codes"]["own"][0], found["activations"]["own"][0]
    weights, spread = np.array(found["codes"]["unit"])
    errors, unsure = 1 - weights / mixture, spread / mixture / pictures**0.5
    off = zip(errors, unsure, strict=True)
    apart = (errors[-1] - errors[0]) / np.hypot(unsure[0], unsure[-1])
    return [
        Statement(
            "codes keep what adapters do: ridge leads from changes of codes to changes of "
            "activations with high accuracy",
            f"R2 {found['code_r2']:.2f} on images left out",
            "R2 of at least 0.5",
            found["code_r2"] >= 0.5,
        ),
        Statement(
            "scales 0.8, 0.4, 0.2 come back too small: 0.73, 0.14, 0.05",
            ", ".join(f"{w:.2f}" for w in weights),
            "all are too small, by more than two standard errors",
            bool((errors > 2 * unsure).all()),
        ),
        Statement(
            "the weaker the adapter, the further off: 9, 65, 75 %",
            f"{', '.join(f'{100 * e:.0f} ± {100 * s:.0f}' for e, s in off)} % "
            f"(standard errors over {pictures} images)",
            "in that order, first and last apart by more than two standard errors",
            bool((np.diff(errors) > 0).all() and apart > 2),
        ),
        Statement(
            "because activations of a mixture are no sum of those of its parts",
            "with references at their own scales, activations give "
            f"{', '.join(f'{w:.2f}' for w in raw)} and codes {', '.join(f'{w:.2f}' for w in own)} "
            f"for 1; off the sum by {found['activations']['additivity']:.2f} and "
            f"{found['codes']['additivity']:.2f}",
            "a weight of activations is off by more than a quarter",
            max(abs(w - 1) for w in raw) > 0.25,
        ),
    ]


def _of_boxes(found: Values) -> list[Statement]:
    own, shares = found["norm"]["own"], np.array(found["norm"]["shares"])
    best = max((found[name]["right"], name) for name in found if name not in ("owners", "norm"))
    owners = np.array(found["owners"])
    majority, placed = owners.sum(axis=0).max() / owners.sum(), owners.trace() / owners.sum()
    return [
        Statement(
            "boxes of Pokemon are ascribed to it in 0 %",
            f"{_percent(own)} by adapter",
            "0 % for an adapter",
            min(own) == 0,
        ),
        Statement(
            "all adapters have a share of about 33.3 % in every box",
            f"{_percent(shares.mean(axis=0))}, the same in every box",
            "all within 5 points",
            bool((abs(shares - 1 / shares.shape[1]) < 0.05).all()),
        ),
        Statement(
            "because the place washes out in backpropagation",
            f"{best[1]} is right in {_percent([best[0]])}, always the same in "
            f"{_percent([majority])}, the one that acts there by construction in "
            f"{_percent([placed])}",
            "no score by gradients beats always naming the same adapter",
            bool(best[0] <= majority),
        ),
    ]


def _of_inversion(chance: float, found: Values) -> list[Statement]:
    maps: dict[str, list[float]] = {}
    for name, _, _, correlation, *_ in found["rows"]:
        maps.setdefault(name, []).append(correlation)
    # Ten steps were left; of other numbers, the nearest.
    own = [row for row in found["rows"] if row[0] == ORIGINAL]
    post = min(own, key=lambda row: abs(row[1] - 10))
    return [
        Statement(
            "maps do not correlate with those of true ablation",
            f"r {post[3]:.2f} in the post's own set-up, "
            f"{min(maps[UNGUIDED]):.2f} to {max(maps[UNGUIDED]):.2f} where that is compared with "
            "the image as it is drawn from the inverted latents",
            f"r below {UNRELATED}",
            abs(post[3]) < UNRELATED,
        ),
        Statement(
            "the first adapter is right in 3.75 %, worse than chance",
            f"{_percent([post[2]])}, chance {_percent([chance])}, always the same adapter "
            f"{_percent([post[-1]])}",
            "below chance",
            post[2] < chance,
        ),
        Statement(
            "with more steps, up to 30, the correlation falls",
            f"{', '.join(f'{r:.2f}' for r in maps[ORIGINAL])}",
            "it falls at every number of steps",
            maps[ORIGINAL] == sorted(maps[ORIGINAL], reverse=True),
        ),
        Statement(
            "because the latents half-way are committed to all adapters",
            f"the true latents themselves: {', '.join(f'{r:.2f}' for r in maps[CACHED])}",
            "the fewer steps are left, the lower",
            maps[CACHED] == sorted(maps[CACHED]),
        ),
        Statement(
            "true ablation alone is accurate; cheaper methods are dead ends",
            f"r up to {max(maps[CACHED][:-1]):.2f} by leaving adapters out late",
            "no late start has r above 0.8",
            max(maps[CACHED][:-1]) < 0.8,
        ),
    ]

"""`lora-ws detector`: folders of adapter files in, a detector for `lora-ws scan` out."""

from rich.console import Console
from rich.markup import escape

from lora_ws.errors import printable
from lora_ws.learn.detector import DetectorSpec, make_detector
from lora_ws.learn.detector_card import CARD, told_left_out, verdict

# Reasons to leave files out that are named on the terminal.
SHOWN = 5


def detector(folders: list[str], /, spec: DetectorSpec) -> None:
    """Train a detector on folders of adapter files, one per class, and measure its quality.

    Ranks, file formats and sets of modules may differ. Quality is measured by cross-validation:
    training folds exclude the file, its copies, and adapters with its start. The policy's
    thresholds keep the false-alarm rate on the harmless folder below `--false_alarms`.

    Args:
        folders: folders of .safetensors files, one per class; the first is the harmless one
        spec: settings of the detector.
    """
    made = make_detector(folders, spec)
    console = Console(highlight=False, soft_wrap=True)
    lost = told_left_out(made.left_out)
    for one in lost[:SHOWN]:
        console.print(f"left out: {escape(printable(one))}")
    if (rest := len(lost) - SHOWN) > 0:
        console.print(f"and for {rest} more reasons; {spec.out / CARD} has them")
    console.print(verdict(made))
    for confound in made.confounds:
        console.print(f"warning: {escape(printable(str(confound)))}")
    for name, share in made.caught.items():
        least = made.policy.classes[name]
        console.print(
            f"{escape(name)}: {100 * share:.0f} % flagged at {least:.3f}, beside "
            f"{100 * made.alarms:.1f} % of the harmless files; n = {len(made.labels)} in "
            f"{len(set(made.groups.tolist()))} groups"
        )
    console.print(f"What was not tested: {spec.out / CARD}")
    console.print(f"lora-ws scan FILES --model {spec.out}")

"""`lora-ws concepts erase` and `amplify`: find the weights that make a concept, and edit them."""

from lora_ws.concepts.spec import AmplifySpec, EraseSpec


def erase(spec: EraseSpec) -> None:
    """Set the weights to zero that do most for a concept."""
    # Here, because diffusers takes seconds to import: a wrong flag is answered at once.
    from lora_ws.concepts import run

    _say(run.erase(spec))


def amplify(spec: AmplifySpec) -> None:
    """Set the weights to zero that work most against a concept, judged on images that it draws."""
    from lora_ws.concepts import run

    _say(run.amplify(spec))


def _say(edited: tuple[int, object]) -> None:
    changed, page = edited
    print(f"{changed} weights set to 0", page, sep="\n")  # noqa: T201

"""`lora-ws concepts erase` and `amplify`: find the weights that make a concept, and edit them."""

from lora_ws.concepts.spec import AmplifySpec, EraseSpec


def erase(spec: EraseSpec) -> None:
    """Erase a concept from a base model by setting the weights that support it most to zero."""
    # Here, because diffusers takes seconds to import: a wrong flag is answered at once.
    from lora_ws.concepts import run

    _say(run.erase(spec))


def amplify(spec: AmplifySpec) -> None:
    """Amplify a concept by setting the weights that work most against it to zero."""
    from lora_ws.concepts import run

    _say(run.amplify(spec))


def _say(edited: tuple[int, object]) -> None:
    changed, page = edited
    print(f"{changed} weights set to 0", page, sep="\n")  # noqa: T201

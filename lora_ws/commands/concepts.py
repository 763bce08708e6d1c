"""`lora-ws concepts erase`, `amplify`, `apply`: find the weights that make a concept, edit them."""

from pathlib import Path

from lora_ws.concepts.spec import AmplifySpec, ApplySpec, EraseSpec


def erase(spec: EraseSpec) -> None:
    """Erase a concept from a base model by setting the weights that support it most to zero."""
    # Here, because diffusers takes seconds to import: a wrong flag is answered at once.
    from lora_ws.concepts import run

    _say(run.erase(spec))


def amplify(spec: AmplifySpec) -> None:
    """Amplify a concept by setting the weights that work most against it to zero."""
    from lora_ws.concepts import run

    _say(run.amplify(spec))


def apply(edit: str, /, spec: ApplySpec) -> None:
    """Write a base model with an edit applied, or the edit as an adapter.

    Args:
        edit: edit.safetensors, as erase and amplify write it
        spec: which base, and what to write.
    """
    from lora_ws.concepts.apply import apply_edit

    written, share = apply_edit(Path(edit), spec)
    if share < 1:
        print(f"{100 * share:.1f} % of the edit's squared norm is in its rank")  # noqa: T201
    print(written)  # noqa: T201


def _say(edited: tuple[int, object]) -> None:
    changed, page = edited
    print(f"{changed} weights set to 0", page, sep="\n")  # noqa: T201

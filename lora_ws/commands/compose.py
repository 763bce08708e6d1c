"""`lora-ws compose`: images with several adapters at once, beside each alone and none."""

from lora_ws.composition.spec import ComposeSpec


def compose(spec: ComposeSpec) -> None:
    """Generate images with several adapters: a row without any, one for each alone, one for all.

    All rows start from the same noise.
    """
    # Here, because diffusers takes seconds to import: a wrong flag is answered at once.
    from lora_ws.composition.run import run

    print(*run(spec), sep="\n")  # noqa: T201

"""`lora-ws attribute`: which adapter of a stack did what to an image."""

from rich.console import Console

from lora_ws.attribution.spec import AttributeSpec


def attribute(spec: AttributeSpec) -> None:
    """Attribute an image to its adapters by generating it again without each of them."""
    # Here, because diffusers takes seconds to import: a wrong flag is answered at once.
    from lora_ws.attribution.report import (
        boxes_grid,
        given_text,
        shares_grid,
        write_attribution,
    )
    from lora_ws.attribution.run import run
    from lora_ws.report.grid import show

    done = run(spec)
    learned = _learned(done.adapters, done.ablation.names, spec.model) if spec.model else None
    page = write_attribution(spec.out, done, learned)
    grids = [shares_grid(done.ablation, done.shapley, learned)]
    grids += [boxes_grid(done.boxes)] if done.boxes else []
    console = Console(highlight=False, soft_wrap=True)
    for grid in grids:
        show(console, grid)
    if done.given is not None:
        console.print(given_text(done))
    console.print(str(page))


def _learned(adapters: tuple[str, ...], names: tuple[str, ...], model: str) -> dict[str, str]:
    """Classify each adapter of the stack, by its name."""
    from lora_ws.adapters import AdapterRef
    from lora_ws.audit.classify import classify_files
    from lora_ws.audit.report import said as prediction_text
    from lora_ws.bundle import Bundle

    refs = [AdapterRef.parse(name) for name in adapters]
    found = classify_files(refs, Bundle.from_pretrained(model))
    findings = [one.finding for one in found if one.finding]
    return {name: prediction_text(f) for name, f in zip(names, findings, strict=True)}

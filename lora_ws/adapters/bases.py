"""Which base model an adapter is for, by the shapes of what it adapts; claims play no part."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from lora_ws.adapters.fused import Part
from lora_ws.adapters.keys import DENOISERS
from lora_ws.adapters.layout import LayerSpec, Layout
from lora_ws.adapters.methods import Form
from lora_ws.adapters.structure import Entry

# Width of the text embedding that cross-attention reads.
CONTEXTS = {768: "SD1.x", 1024: "SD2.x", 2048: "SDXL", 64: "tiny-sd"}
FLUX_WIDTH = 3072
# Width of the context that FLUX' first layer reads.
FLUX_CONTEXTS = {4096: "FLUX.1", 7680: "FLUX.2 Klein 4B", 12288: "FLUX.2 Klein 9B", 15360: "FLUX.2"}
TEXT_WIDTHS = {768: "CLIP-L (SD1.x, or one of SDXL's)", 1024: "SD2.x", 1280: "CLIP-G (SDXL)"}


class Base(NamedTuple):
    """A base model, or what is known of it, and why.

    Attributes:
        name: of the base that most modules are of.
        evidence: which layer tells so.
        odd: names of modules that are of another one: whoever adds some wants it mistaken.
    """

    name: str
    evidence: str
    odd: tuple[str, ...] = ()


def reads_text(name: str) -> bool:
    """Tell whether a module of a U-Net reads the text, which is the same for all that do.

    Example:
        >>> reads_text("mid_block.attentions.0.transformer_blocks.0.attn2.to_v")
        True
    """
    return name.endswith(("attn2.to_k", "attn2.to_v"))


def detect_base(entries: Iterable[Entry]) -> Base:
    """Name the base model that most of the denoiser's modules are of.

    SD1.4 and 1.5, or SDXL and its offspring, have equal shapes and cannot be told apart.

    Args:
        entries: modules of a file.
    """
    entries = list(entries)
    denoiser = [entry for entry in entries if entry.component in DENOISERS]
    if not denoiser:
        return _text_only(entries)
    kinds = Counter(entry.component for entry in denoiser)
    kind = max(DENOISERS, key=kinds.__getitem__)
    found = _transformer if kind == "transformer" else _unet
    base = found([entry for entry in denoiser if entry.component == kind])
    odd = (f"{entry.component}.{entry.path}" for entry in denoiser if entry.component != kind)
    return base._replace(odd=(*base.odd, *odd))


def _unet(denoiser: Sequence[Entry]) -> Base:
    reading = [entry for entry in denoiser if reads_text(entry.path)]
    if reading:
        ((width, _),) = Counter(entry.form.inputs for entry in reading).most_common(1)
        first = next(entry for entry in reading if entry.form.inputs == width)
        said = f"`{first.path}` reads {width} numbers of text"
        odd = tuple(entry.path for entry in reading if entry.form.inputs != width)
        return Base(CONTEXTS.get(width, f"unknown U-Net with a context of {width}"), said, odd)
    for entry in denoiser:
        block = entry.path.partition(".transformer_blocks.")[2].partition(".")[0]
        if block.isdecimal() and int(block) > 0:
            return Base("SDXL", f"`{entry.path}` is one of several blocks in its attention")
    widths = {entry.form.outputs for entry in denoiser if ".attn" in entry.path}
    if widths & {320, 640, 1280}:
        return Base("SD1.x or SD2.x", "widths 320, 640, 1280; nothing that reads text is adapted")
    return Base("unknown U-Net", f"attention widths {sorted(widths) or 'none'}")


def layout_base(layout: Layout) -> Base:
    """The base model of a layout.

    Example:
        >>> layout_base(Layout.sd15_qv()).name
        'SD1.x'
    """
    return detect_base(_entry(layer) for layer in layout.layers)


def _entry(layer: LayerSpec) -> Entry:
    form = Form("lora", layer.rank, layer.rank, layer.in_features, layer.out_features)
    part = Part(layer.name, (slice(0, layer.out_features),))
    return Entry(DENOISERS[0], layer.name, {}, form, (part,))


def _transformer(entries: Sequence[Entry]) -> Base:
    for entry in entries:
        if entry.path == "context_embedder":
            width = entry.form.inputs
            name = FLUX_CONTEXTS.get(width, f"unknown DiT with a context of {width}")
            return Base(name, f"`{entry.path}` reads {width} numbers of text")
    named = [e for e in entries if "single_" in e.path or "double_" in e.path]
    widths = {min(entry.form.inputs, entry.form.outputs) for entry in entries}
    if named and FLUX_WIDTH in widths:
        return Base("FLUX.1", f"`{named[0].path}`, width {FLUX_WIDTH}")
    return Base("unknown DiT", f"`{entries[0].path}`, widths {sorted(widths)}")


def _text_only(entries: list[Entry]) -> Base:
    if not entries:
        return Base("not a diffusion adapter", "no module that is known")
    widths = {entry.form.inputs for entry in entries if "self_attn" in entry.path}
    width = min(widths, default=0)
    name = TEXT_WIDTHS.get(width, f"width {width}")
    return Base(f"text encoder only: {name}", f"`{entries[0].path}`, width {width}")

"""Which base model an adapter is for, by the shapes of what it adapts; claims play no part."""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from lora_ws.adapters.fused import Part
from lora_ws.adapters.keys import DENOISERS, split_ending
from lora_ws.adapters.layout import LayerSpec, Layout
from lora_ws.adapters.methods import Form
from lora_ws.adapters.model_classes import (
    Layer,
    has_module,
    model_classes,
    rank_classes,
    template,
)
from lora_ws.adapters.structure import Entry

# Width of the text embedding that cross-attention reads.
CONTEXTS = {768: "SD1.x", 1024: "SD2.x", 2048: "SDXL", 64: "tiny-sd"}
FLUX, FLUX_WIDTH = "FLUX.1", 3072
FLUX2 = "FLUX.2"
FLUX2_WIDTHS = {3072: "FLUX.2 Klein 4B", 4096: "FLUX.2 Klein 9B", 6144: FLUX2}
# Above this share of modules that Stable Diffusion's U-Net does not have, a file is of another one.
MOST_ODD = 1 / 4
# Models of the same modules that are named; further ones are counted.
MOST_NAMED = 5
# Width of the context that FLUX' first layer reads.
FLUX_CONTEXT = 4096
FLUX2_CONTEXTS = {7680: "FLUX.2 Klein 4B", 12288: "FLUX.2 Klein 9B", 15360: FLUX2}
# Names of modules in repositories of makers of models, and whose they are: what tells models apart
# that have the same modules.
MAKERS = tuple(
    (re.compile(rf"_blocks[._]\d+[._](?:{pattern})"), names)
    for pattern, names in (
        ("processor", (FLUX,)),
        (r"(?:x|context)_block[._]", ("SD3",)),
        (r"(?:img|txt)_(?:attn\.|mlp[._][02]|mod[._]lin\Z)|modulation[._]lin\Z", (FLUX, "Chroma")),
        (
            r"(?<=\.)(?:img|txt)_attn_|(?:img|txt)_(?:mlp[._]fc|mod[._]linear)|modulation[._]linear",
            ("HunyuanVideo", "HunyuanVideoFramepack"),
        ),
    )
)
# Of the models that share modules with FLUX.1, those whose text no CLIP reads.
WITHOUT_CLIP = ("Chroma", "Bria", "BriaFibo", "LongCat")
TEXT_WIDTHS = {768: "CLIP-L (SD1.x, or one of SDXL's)", 1024: "SD2.x", 1280: "CLIP-G (SDXL)"}


class Base(NamedTuple):
    """A base model, or what is known of it, and why.

    Attributes:
        name: of the base that most modules are of; of several where these modules are the same.
        evidence: which layer shows it.
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
    own = [entry for entry in denoiser if entry.component == kind]
    with_clip = any(entry.component.startswith("text_encoder") for entry in entries)
    base = _transformer(own, with_clip) if kind == "transformer" else _unet(own)
    odd = (f"{entry.component}.{entry.path}" for entry in denoiser if entry.component != kind)
    return base._replace(odd=(*base.odd, *odd))


def _unet(denoiser: Sequence[Entry]) -> Base:
    layers = [Layer(entry.path, entry.form.inputs, entry.form.outputs) for entry in denoiser]
    ours = next(iter(model_classes().values())).modules
    odd = tuple(layer.path for layer in layers if template(layer.path) not in ours)
    # Other U-Nets have all that Stable Diffusion has, and more: a module of theirs names none.
    if len(odd) > MOST_ODD * len(layers) and (ranked := rank_classes(layers)):
        kind, count, *_ = ranked[0]
        said = f"{count} of {len(layers)} modules are its own, such as `{odd[0]}`"
        return Base(kind.name, said)
    base = _stable_diffusion(denoiser)
    return base._replace(odd=(*base.odd, *odd))


def _stable_diffusion(denoiser: Sequence[Entry]) -> Base:
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


def may_be(base: str, names: Collection[str]) -> bool:
    """Tell whether a base, by a name that reports have, may be one of some.

    Example:
        >>> may_be("FLUX.1, Chroma or Bria", ["FLUX.1"]), may_be("SD1.x", ["SD2.x"])
        (True, False)
    """
    return not _possible(base).isdisjoint({name for one in names for name in _possible(one)})


def _possible(base: str) -> set[str]:
    # What these words begin names no base that files could share.
    if base.startswith(("unknown", "text encoder", "not a")):
        return {base}
    return {base, *re.split(", | or ", base)}


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
    # U-Nets of one's own may have names that no class has.
    unet, transformer = DENOISERS
    of_unet = has_module(unet, layer.name) or not has_module(transformer, layer.name)
    return Entry(unet if of_unet else transformer, layer.name, {}, form, (part,))


def _transformer(entries: Sequence[Entry], with_clip: bool) -> Base:
    layers = [
        Layer(
            part.path,
            entry.form.inputs,
            sum(len(range(*rows.indices(entry.form.outputs))) for rows in part.rows),
        )
        for entry in entries
        for part in entry.parts
    ]
    ranked = rank_classes(layers)
    if not ranked:
        widths = sorted({min(layer.inputs, layer.outputs) for layer in layers})
        return Base("unknown DiT", f"`{layers[0].path}`, widths {widths}")
    best, count, fitting, complete = ranked[0]
    odd = tuple(layer.path for layer in layers if template(layer.path) not in best.modules)
    alike = [rank.kind.name for rank in ranked if rank[2:] == (fitting, complete)]
    alike = _by_makers(alike, entries)
    # An adapted CLIP is evidence as well: what does not have one is not meant.
    alike = [name for name in alike if not with_clip or name not in WITHOUT_CLIP] or alike
    many = len(alike) > 1
    whose = "the modules in this file are the same in all" if many else "modules are its own"
    such = f"such as `{layers[0].path}`"
    said = f"{whose}, {such}" if many else f"{count} of {len(layers)} {whose}, {such}"
    name = _one_of(alike)
    if FLUX in alike:
        return _flux(layers, name, said, odd)
    if best.name == FLUX2:
        widths = Counter(min(layer.inputs, layer.outputs) for layer in layers)
        return Base(FLUX2_WIDTHS.get(widths.most_common(1)[0][0], FLUX2), said, odd)
    if many and not fitting:
        return Base(f"unknown DiT, perhaps {name}", said, odd)
    return Base(name, said, odd)


def _by_makers(alike: Sequence[str], entries: Sequence[Entry]) -> Sequence[str]:
    """Those of the models whose makers name modules as most of the file's are named."""
    stems = [split_ending(next(iter(entry.keys.values()), "")) for entry in entries]
    counts = [sum(bool(s and names.search(s[0])) for s in stems) for names, _ in MAKERS]
    whose = MAKERS[counts.index(max(counts))][1] if any(counts) else ()
    return [name for name in alike if name in whose] or alike


def _one_of(names: Sequence[str]) -> str:
    """Names of models of which a file is of one."""
    if len(names) > MOST_NAMED:
        names = [*names[: MOST_NAMED - 1], f"{len(names) - MOST_NAMED + 1} others"]
    return " or ".join((", ".join(names[:-1]), names[-1])) if len(names) > 1 else names[0]


def _flux(layers: Sequence[Layer], name: str, said: str, odd: tuple[str, ...]) -> Base:
    """As named, or FLUX.2 by FLUX.1's names: its middle layers are of another width."""
    for layer in layers:
        if layer.path == "context_embedder" and layer.inputs != FLUX_CONTEXT:
            other = FLUX2_CONTEXTS.get(layer.inputs)
            other = other or f"unknown DiT with a context of {layer.inputs}"
            return Base(other, f"`{layer.path}` reads {layer.inputs} numbers of text", odd)
    for layer in layers:
        if (
            layer.path.endswith((".ff.net.0.proj", ".proj_mlp"))
            and layer.outputs == 6 * layer.inputs
        ):
            other = FLUX2_WIDTHS.get(layer.inputs, FLUX2)
            return Base(other, f"`{layer.path}` has {layer.outputs} outputs of {layer.inputs}", odd)
    widths = {min(layer.inputs, layer.outputs) for layer in layers}
    if FLUX_WIDTH in widths:
        return Base(name, f"{said}, width {FLUX_WIDTH}", odd)
    return Base("unknown DiT", f"{said}; widths {sorted(widths)}", odd)


def _text_only(entries: list[Entry]) -> Base:
    if not entries:
        return Base("not a diffusion adapter", "no module that is known")
    widths = {entry.form.inputs for entry in entries if "self_attn" in entry.path}
    width = min(widths, default=0)
    name = TEXT_WIDTHS.get(width, f"width {width}")
    return Base(f"text encoder only: {name}", f"`{entries[0].path}`, width {width}")

"""Every denoiser of diffusers, in every spelling that trainers use: read by its own names."""

import re
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import diffusers
import pytest
import torch

from lora_ws.adapters.bases import FLUX, WITHOUT_CLIP, detect_base, layout_base, may_be
from lora_ws.adapters.layout import LayerSpec, Layout
from lora_ws.adapters.model_classes import TABLE, model_classes, template
from lora_ws.adapters.structure import Structure, check_complete, structure_of
from lora_ws.diffusion.module_table import ARGUMENTS, LAYERS, table_text
from lora_ws.errors import AdapterError

Shapes = dict[str, tuple[int, ...]]
SPELLINGS: dict[str, Callable[[str, str], str]] = {
    "component, A and B": lambda kind, path: f"{kind}.{path}.lora_A",
    "component, down and up": lambda kind, path: f"{kind}.{path}.lora.down",
    "PEFT": lambda _, path: f"base_model.model.{path}.lora_A",
    "component, then PEFT": lambda kind, path: f"{kind}.base_model.model.{path}.lora_A",
    "bare": lambda _, path: f"{path}.lora_A.default",
    "diffusion_model": lambda _, path: f"diffusion_model.{path}.lora_A",
    "kohya": lambda _, path: f"lora_unet_{path.replace('.', '_')}.lora_down",
    "kohya, dots": lambda _, path: f"lora_unet_{path}.lora_down",
    "lora_transformer": lambda _, path: f"lora_transformer_{path.replace('.', '_')}.lora_down",
    "LyCORIS": lambda _, path: f"lycoris_{path.replace('.', '_')}.lora_down",
}
UP = (("lora_A", "lora_B"), ("down", "up"))


@cache
def layers(name: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights of a class, as diffusers builds it."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = getattr(diffusers, name)(**ARGUMENTS.get(name, {}))
    named = model.named_modules()
    return {path: tuple(m.weight.shape) for path, m in named if isinstance(m, LAYERS)}


def spelt(name: str, spelling: str) -> Shapes:
    """Tensors of an adapter of rank 1 of every layer; names other than numbers and letters too."""
    found: Shapes = {}
    for path, (outputs, inputs, *kernel) in layers(name).items():
        key = SPELLINGS[spelling](model_classes()[name].component, path)
        down, up = next(pair for pair in UP if pair[0] in key)
        up = up.join(key.rsplit(down, 1))
        found[f"{key}.weight"] = (1, inputs, *kernel)
        found[f"{up}.weight"] = (outputs, 1, *(1 for _ in kernel))
    return found


def read(name: str, spelling: str) -> Structure:
    structure = structure_of(spelt(name, spelling), name)
    check_complete(structure, name)
    return structure


def modules(structure: Structure) -> list[str]:
    return [entry.path for entry in structure.entries]


def check(name: str, spelling: str) -> None:
    """All of its modules by their own names, and bases that have all of these."""
    known = model_classes()
    structure = read(name, spelling)
    assert modules(structure) == list(layers(name))
    assert {entry.component for entry in structure.entries} == {known[name].component}
    base = detect_base(structure.entries).name.removeprefix("unknown DiT, perhaps ")
    # Published models of a class may have modules that it has not as diffusers builds it.
    ours = {template(path) for path in layers(name)}
    same = {kind.name for kind in known.values() if kind.modules.keys() >= ours}
    if "Stable Diffusion" not in same:
        *named, last = re.split(", | or ", base)
        others = re.fullmatch(r"(\d+) others", last)
        assert {*named, *([] if others else [last])} <= same, base
        assert len(named) + (int(others[1]) if others else 1) <= len(same), base


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", ["ZImageTransformer2DModel", "SanaTransformer2DModel"])
def test_a_class_is_read_in_every_spelling(name: str, spelling: str) -> None:
    check(name, spelling)


@pytest.mark.slow
@pytest.mark.parametrize("name", model_classes())
def test_every_class_is_read_in_every_spelling(name: str) -> None:
    for spelling in SPELLINGS:
        check(name, spelling)


@pytest.mark.slow
def test_the_table_is_that_of_the_installed_diffusers() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert TABLE.read_text(encoding="utf-8") == table_text(), "run `make tables`"


ATTENTION = "single_transformer_blocks.0.attn.to_q"


@pytest.mark.parametrize(
    "path",
    [
        "transformer.single_transformer_blocks.0.attn.to_qq",
        "transformer.single_transformer_blocks.0.attn",
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_qq",
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_qq",
        "diffusion_model.double_blocks.0.img_attn.qkvv",
    ],
)
def test_a_module_that_no_class_has_is_not_read(path: str) -> None:
    with pytest.raises(AdapterError) as refused:
        check_complete(structure_of(pair(path, 8, 8), "f"), "f")
    assert refused.value.reason == "unmapped"


def pair(path: str, outputs: int, inputs: int) -> Shapes:
    down, up = ("lora_down", "lora_up") if "lora_" in path else ("lora_A", "lora_B")
    return {f"{path}.{down}.weight": (1, inputs), f"{path}.{up}.weight": (outputs, 1)}


@pytest.mark.parametrize(
    ("prefix", "expected"),
    [
        ("transformer.base_model.model.", "transformer"),
        ("base_model.model.transformer.", "transformer"),
        ("base_model.model.diffusion_model.", "transformer"),
        ("unet.", "transformer"),
        ("unet.base_model.model.", "transformer"),
        ("module.transformer.", "transformer"),
        ("transformer._orig_mod.", "transformer"),
        ("model.diffusion_model.", "transformer"),
        ("pipe.dit.", "transformer"),
        ("lora_unet_lycoris_", "transformer"),
        ("net." * 200, "transformer"),
    ],
)
def test_prefixes_are_nested_in_any_order(prefix: str, expected: str) -> None:
    (entry,) = structure_of(pair(prefix + ATTENTION, 3072, 3072), "f").entries
    assert (entry.component, entry.path) == (expected, ATTENTION)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("input_blocks.4.1.transformer_blocks.1.attn2.to_k", "down_blocks.1.attentions.0"),
        ("output_blocks.5.1.transformer_blocks.0.ff.net.2", "up_blocks.1.attentions.2"),
        ("middle_block.1.transformer_blocks.9.attn1.to_out.0", "mid_block.attentions.0"),
    ],
)
@pytest.mark.parametrize("form", ["unet.{}", "diffusion_model.{}", "lora_unet_{}", "dots to _"])
def test_sdxls_own_numbers_with_dots(path: str, expected: str, form: str) -> None:
    key = f"lora_unet_{path.replace('.', '_')}" if form == "dots to _" else form.format(path)
    (entry,) = structure_of(pair(key, 640, 2048), "f").entries
    assert entry.path == f"{expected}.{path[path.index('transformer_blocks') :]}"


@pytest.mark.parametrize(
    ("width", "wide", "base"),
    [
        (3072, 4, "FLUX.1 or Chroma"),
        (3072, 6, "FLUX.2 Klein 4B"),
        (4096, 6, "FLUX.2 Klein 9B"),
        (6144, 6, "FLUX.2"),
        (64, 4, "unknown DiT"),
    ],
)
def test_flux_by_its_middle_layers(width: int, wide: int, base: str) -> None:
    shapes = pair("lora_unet_double_blocks_0_img_attn_proj", width, width)
    mlp = pair("lora_unet_double_blocks_0_img_mlp_0", wide * width, width)
    fused = pair("lora_unet_single_blocks_0_linear1", (3 + wide) * width, width)
    assert detect_base(structure_of(shapes | mlp, "f").entries).name == base
    assert may_be(detect_base(structure_of(shapes | fused, "f").entries).name, [base])


# Modules outside the blocks that FLUX's repository names as other models do.
FLUX_TOP = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "final_layer.linear": "proj_out",
}


@pytest.mark.parametrize("block", ["double_blocks.0.img_mlp.0", "single_blocks.3.linear1"])
@pytest.mark.parametrize("prefix", ["lora_unet_", "diffusion_model.", "transformer."])
def test_names_of_flux_beside_its_blocks(prefix: str, block: str) -> None:
    def key(path: str) -> str:
        return prefix + (path.replace(".", "_") if prefix[-1] == "_" else path)

    beside = pair(key(block), 7 * 3072, 3072)
    shapes = {k: v for path in FLUX_TOP for k, v in pair(key(path), 3072, 3072).items()}
    of_flux = {entry.path for entry in structure_of(shapes | beside, "f").entries}
    assert of_flux.issuperset(FLUX_TOP.values())
    assert of_flux.isdisjoint(FLUX_TOP)
    # Alone they stay what the models have that call them so.
    alone = {entry.path for entry in structure_of(shapes, "f").entries}
    assert alone == set(FLUX_TOP)
    joy = pair(key("double_blocks.0.attn.img_attn_qkv"), 3 * 3072, 3072)
    assert set(FLUX_TOP) < {entry.path for entry in structure_of(shapes | joy, "f").entries}


def test_a_module_of_flux_by_both_names_is_refused() -> None:
    names = ("double_blocks.0.img_mlp.0", "img_in", "x_embedder")
    shapes = {k: v for n in names for k, v in pair(f"diffusion_model.{n}", 64, 64).items()}
    with pytest.raises(AdapterError, match="a second time"):
        structure_of(shapes, "f")


ORIGINAL = {
    "lora_unet_joint_blocks_0_x_block_attn_ln_q": "SD3",
    "diffusion_model.double_blocks.0.img_attn_q_norm": "HunyuanVideo",
    "diffusion_model.layers.0.attention.qkv": "Z-Image or Lumina 2",
    "diffusion_model.noise_refiner.1.attention.out": "Z-Image or Lumina 2",
    "lora_unet_context_refiner_0_attention_qkv": "Z-Image or Lumina 2",
    "lora_unet_down_blocks_0_2_attention_attn_to_q": "Stable Cascade",
    "diffusion_model.distilled_guidance_layer.layers.0.in_layer": "Chroma",
}


@pytest.mark.parametrize("path", ORIGINAL)
def test_a_base_by_names_that_are_not_read_is_named(path: str) -> None:
    # Beside a module whose name says nothing.
    shapes = pair("diffusion_model.another", 64, 64) | pair(path, 192, 64)
    with pytest.raises(AdapterError, match=f"are of {ORIGINAL[path]} by names") as refused:
        check_complete(structure_of(shapes, "f"), "f")
    assert refused.value.reason == "unmapped"


@pytest.mark.parametrize(
    "path",
    [
        "base_model.model.model.layers.0.self_attn.q_proj",
        "base_model.model.transformer.h.0.attn.c_attn",
        "base_model.model.encoder.layer.0.attention.self.query",
        "model.layers.3.mlp.down_proj",
    ],
)
def test_an_adapter_of_a_language_model_is_said_to_be_one(path: str) -> None:
    with pytest.raises(AdapterError, match="a language model") as refused:
        check_complete(structure_of(pair(path, 64, 64), "f"), "f")
    assert refused.value.reason == "foreign"


@pytest.mark.parametrize(
    ("ending", "method"),
    [
        ("oft_blocks", "OFT"),
        ("oft_R.default.weight", "OFT"),
        ("on_input", "IA3"),
        ("ia3_l", "IA3"),
        ("a1.weight", "GLoRA"),
        ("vera_lambda_b", "VeRA"),
        ("boft_R", "BOFT"),
        ("hra_u", "HRA"),
    ],
)
def test_a_method_that_is_not_read_is_named(ending: str, method: str) -> None:
    key = f"unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.{ending}"
    with pytest.raises(AdapterError, match=f"of {method}, such") as refused:
        check_complete(structure_of({key: (4, 2, 2)}, "f"), "f")
    assert refused.value.reason == "needs-base"


@pytest.mark.parametrize(
    "clip",
    [
        "text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj",
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
        "base_model.model.text_model.encoder.layers.0.self_attn.q_proj",
        "clip_l.text_model.encoder.layers.0.self_attn.q_proj",
        "te1.text_model.encoder.layers.0.self_attn.q_proj",
        "lycoris_text_model_encoder_layers_0_self_attn_q_proj",
        "text_encoder.module.text_model.encoder.layers.0.self_attn.to_q",
        "conditioner.embedders.0.transformer.text_model.encoder.layers.0.self_attn.q_proj",
    ],
)
@pytest.mark.parametrize(
    "other",
    [
        "text_encoders.t5xxl.transformer.encoder.block.{}.layer.0.SelfAttention.q",
        "lora_te3_encoder_block_{}_layer_0_SelfAttention_q",
        "text_encoders.qwen25_7b.transformer.model.layers.{}.self_attn.q_proj",
        "text_encoder.encoder.block.{}.layer.0.SelfAttention.q",
        "t5xxl.encoder.block.{}.layer.0.SelfAttention.q",
        "text_encoder.text_model.encoder.layers.{}.self_attn.q_projj",
    ],
)
def test_other_encoders_are_listed_apart(clip: str, other: str) -> None:
    shapes = pair(f"transformer.{ATTENTION}", 3072, 3072) | pair(clip, 768, 768)
    for number in range(9):
        shapes |= pair(other.format(number), 64, 64)
    structure = structure_of(shapes, "f")
    check_complete(structure, "f")
    assert [entry.component for entry in structure.entries] == ["transformer", "text_encoder"]
    assert len(structure.other_encoders) == 18
    assert set(structure.other_encoders) <= set(structure.unread)
    with pytest.raises(AdapterError, match="text encoder of another kind"):
        check_complete(structure_of(pair(other.format(0), 64, 64), "f"), "f")


@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize("name", ["lora_te{}_", "text_encoder_{}.", "te{}."])
def test_further_encoders_keep_their_number(name: str, number: int) -> None:
    path = name.format(number) + "text_model.encoder.layers.0.mlp.fc1"
    (entry,) = structure_of(pair(path, 8, 8), "f").entries
    assert (entry.component, entry.path[-7:]) == (f"text_encoder_{number}", "mlp.fc1")


@pytest.mark.parametrize(
    "ending",
    [
        ".dora_scale",
        ".lora_magnitude_vector",
        ".lora_magnitude_vector.default.weight",
        ".lora.magnitude.weight",
        "_lora.dora_scale",
        "_lora_magnitude",
        ".lora_dora_scale",
        ".dora.scale.weight",
        ".weight_m_wdecomp.weight",
    ],
)
@pytest.mark.parametrize("separator", [".", "_"])
def test_magnitudes_of_dora_by_any_name(ending: str, separator: str) -> None:
    stem = f"lora_unet_{ATTENTION.replace('.', separator)}"
    shapes = pair(stem, 3072, 3072) | {stem + ending: (3072,)}
    structure = structure_of(shapes, "f")
    (entry,) = structure.entries
    assert entry.needs_base
    assert entry.path == ATTENTION
    assert structure.unread == (stem + ending,)


HUNYUAN = "HunyuanVideo, HunyuanVideoFramepack or MotifVideo"


def attention(stem: str, blocks: int, width: int) -> Shapes:
    shapes: Shapes = {}
    for number in range(blocks):
        for name in ("to_q", "to_k", "to_v"):
            shapes |= pair(stem.format(number) + name, width, width)
    return shapes


@pytest.mark.parametrize(
    ("stem", "blocks", "width", "expected"),
    [
        ("transformer.transformer_blocks.{}.attn.", 60, 3072, "Qwen-Image"),
        (
            *("transformer.transformer_blocks.{}.attn.", 19, 3072),
            "FLUX.1, Chroma, BriaFibo, Bria or LongCat",
        ),
        ("transformer.transformer_blocks.{}.attn.", 20, 3072, HUNYUAN),
        ("transformer.single_transformer_blocks.{}.attn.", 40, 3072, HUNYUAN),
        ("transformer.transformer_blocks.{}.attn.", 24, 1536, "SD3"),
        ("transformer.transformer_blocks.{}.attn2.", 13, 1536, "SD3"),
        ("diffusion_model.transformer_blocks.{}.attn.", 38, 2432, "SD3"),
        ("diffusion_model.blocks.{}.attn1.", 30, 1536, "Wan"),
        ("transformer.transformer_blocks.{}.attn1.", 42, 3072, "CogVideoX"),
    ],
)
def test_attention_alone_is_told_by_sizes_and_number_of_blocks(
    stem: str, blocks: int, width: int, expected: str
) -> None:
    assert detect_base(structure_of(attention(stem, blocks, width), "f").entries).name == expected


# Modules that FLUX.1 has and the models made from it do not all have, or the other way round.
TELLING = {
    "transformer.single_transformer_blocks.0.norm.linear": (
        9216,
        "FLUX.1, BriaFibo, Bria or LongCat",
    ),
    "transformer.time_text_embed.text_embedder.linear_2": (3072, "FLUX.1"),
    "transformer.time_embed.timestep_embedder.linear_2": (3072, "BriaFibo, Bria or LongCat"),
    "transformer.distilled_guidance_layer.out_proj": (3072, "Chroma"),
}


@pytest.mark.parametrize("path", TELLING)
def test_models_made_from_flux_are_told_by_what_parts_them(path: str) -> None:
    same = attention("transformer.single_transformer_blocks.{}.attn.", 38, 3072)
    base = detect_base(structure_of(same, "f").entries)
    assert base.name == "FLUX.1, Chroma, BriaFibo, Bria or LongCat"
    assert base.evidence.startswith("the modules in this file are the same in all, such as")
    outputs, expected = TELLING[path]
    inputs = 5120 if "distilled" in path else 3072
    found = detect_base(structure_of(same | pair(path, outputs, inputs), "f").entries)
    assert found.name == expected


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("double_blocks.{}.processor.proj_lora1", "FLUX.1"),
        ("double_blocks.{}.img_attn.proj", "FLUX.1 or Chroma"),
        ("double_blocks.{}.img_attn_proj", "HunyuanVideo or HunyuanVideoFramepack"),
        ("single_blocks.{}.modulation.lin", "FLUX.1"),
        ("single_blocks.{}.modulation.linear", "HunyuanVideo or HunyuanVideoFramepack"),
    ],
)
def test_models_of_the_same_modules_are_told_by_their_makers_names(
    path: str, expected: str
) -> None:
    outputs = 9216 if "modulation" in path else 3072
    shapes: Shapes = {}
    for k in range(2):
        stem = path.format(k)
        down, up = (".down", ".up") if "processor" in path else (".lora_A", ".lora_B")
        shapes |= {f"{stem}{down}.weight": (1, 3072), f"{stem}{up}.weight": (outputs, 1)}
    assert detect_base(structure_of(shapes, "f").entries).name == expected


def test_an_adapted_clip_tells_flux_from_models_that_have_none() -> None:
    same = attention("transformer.single_transformer_blocks.{}.attn.", 38, 3072)
    text = attention("text_encoder.text_model.encoder.layers.{}.self_attn.", 2, 768)
    text = {key.replace("to_", "").replace(".lora", "_proj.lora"): s for key, s in text.items()}
    found = structure_of(same | text, "f").entries
    assert {entry.component for entry in found} == {"transformer", "text_encoder"}
    assert detect_base(found).name == "FLUX.1"


@pytest.mark.parametrize("name", [*WITHOUT_CLIP, FLUX])
def test_who_has_a_clip_is_what_its_pipeline_says(name: str) -> None:
    folder = {"Bria": "bria", "BriaFibo": "bria_fibo", "LongCat": "longcat_image", FLUX: "flux"}
    own = folder.get(name, name.lower())
    file = Path(diffusers.__file__).parent / "pipelines" / own / f"pipeline_{own}.py"
    assert ("CLIPTextModel" in file.read_text(encoding="utf-8")) == (name == FLUX)


def test_a_base_of_several_may_be_each() -> None:
    assert may_be("FLUX.1, Chroma or Bria", ["SD3", "Bria"])
    assert may_be("SD1.x", ["SD1.x or SD2.x"])
    assert not may_be("SDXL", ["SD1.x or SD2.x", "FLUX.1"])
    # What is not known is only known to be the same where all that is said of it is.
    assert may_be("unknown DiT, perhaps SD3", ["unknown DiT, perhaps SD3"])
    assert not may_be("unknown DiT, perhaps SD3", ["unknown DiT, perhaps Wan", "SD3"])
    assert not may_be("text encoder only: CLIP-L (SD1.x, or one of SDXL's)", ["SD1.x", "tiny-sd"])


def test_the_base_of_a_layout_is_that_of_its_modules() -> None:
    path = "single_transformer_blocks.{}.attn.to_q"
    specs = [LayerSpec(path.format(k), 3072, 3072, 4) for k in range(38)]
    assert may_be(layout_base(Layout.from_layers(specs)).name, ["Chroma"])


@pytest.mark.parametrize(
    ("width", "expected"),
    [(3072, "FLUX.2 Klein 4B"), (4096, "FLUX.2 Klein 9B"), (6144, "FLUX.2")],
)
def test_sizes_of_flux_2_by_its_own_names(width: int, expected: str) -> None:
    path = "transformer.single_transformer_blocks.{}.attn."
    shapes: Shapes = {}
    for number in range(20):
        shapes |= pair(f"{path.format(number)}to_qkv_mlp_proj", 9 * width, width)
    assert detect_base(structure_of(shapes, "f").entries).name == expected


@pytest.mark.parametrize("ending", ["lora_a.weight", "adapter.0.weight", "LoRA_A"])
def test_an_adapter_by_endings_that_are_not_known_is_no_file_without_one(ending: str) -> None:
    with pytest.raises(AdapterError) as refused:
        check_complete(structure_of({f"unet.{ATTENTION}.{ending}": (4, 8)}, "f"), "f")
    assert refused.value.reason == "unmapped"


def test_what_is_added_does_not_name_the_base() -> None:
    """Classes that have all that Stable Diffusion has, and more."""
    layer = "down_blocks.0.attentions.{}.transformer_blocks.0.attn2.to_k"
    shapes: Shapes = {}
    for number in range(4):
        shapes |= pair("unet." + layer.format(number), 320, 768)
    shapes |= pair("unet.down_blocks.0.motion_modules.0.proj_in", 320, 320)
    base = detect_base(structure_of(shapes, "f").entries)
    assert base.name == "SD1.x"
    assert base.odd == ("down_blocks.0.motion_modules.0.proj_in",)

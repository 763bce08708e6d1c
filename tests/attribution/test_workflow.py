"""ComfyUI's graphs: what leads to the sampler counts, by links; nothing is dropped in silence."""

import json
from typing import Any

import pytest

from lora_ws.attribution.metadata import ImageMetadata, parse_workflow
from lora_ws.errors import DataError

Nodes = dict[str, dict[str, Any]]


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


LINKS = {"model": ["1", 0], "clip": ["1", 1]}


def graph(loader: dict[str, Any], **more: dict[str, Any]) -> Nodes:
    """A base model, one loader, and a sampler that takes the loader's model."""
    return {
        "1": node("CheckpointLoaderSimple", ckpt_name="x.safetensors"),
        "2": loader,
        "3": node("CLIPTextEncode", text="a cat", clip=["2", 1]),
        "4": node("CLIPTextEncode", text="bad", clip=["2", 1]),
        "5": node(
            "KSampler",
            **{"model": ["2", 0], "positive": ["3", 0], "negative": ["4", 0]},
            **{"seed": 18446744073709551615, "steps": 20, "cfg": 5.0, "sampler_name": "euler"},
        ),
        **more,
    }


def read(nodes: Nodes) -> ImageMetadata:
    return parse_workflow(json.dumps(nodes), "p")


def ink(**inputs: Any) -> dict[str, Any]:
    return node("LoraLoader", **LINKS, lora_name="ink.safetensors", **inputs)


LOADERS: dict[str, tuple[dict[str, Any], dict[str, float]]] = {
    "both": (ink(strength_model=0.8, strength_clip=1), {"ink": 0.8}),
    "off": (ink(strength_model=0, strength_clip=0), {"ink": 0.0}),
    "model only": (
        node(
            "LoraLoaderModelOnly", model=["1", 0], lora_name="a\\ink.safetensors", strength_model=1
        ),
        {"a/ink": 1.0},
    ),
    "rgthree": (
        node(
            "Power Lora Loader (rgthree)",
            **LINKS,
            PowerLoraLoaderHeaderWidget={"type": "PowerLoraLoaderHeaderWidget"},
            lora_1={"on": True, "lora": "ink.safetensors", "strength": 0.8, "strengthTwo": 0.1},
            lora_2={"on": False, "lora": "sun.safetensors", "strength": 1},
            lora_3={"on": True, "lora": "None", "strength": 1},
        ),
        {"ink": 0.8},
    ),
    "rgthree, none": (node("Power Lora Loader (rgthree)", **LINKS), {}),
    "rgthree's stack": (
        node(
            "Lora Loader Stack (rgthree)",
            **LINKS,
            **{"lora_01": "ink.safetensors", "strength_01": 0.8, "lora_02": "None"},
            **{"strength_02": 1, "lora_03": "sun.safetensors", "strength_03": -0.5},
        ),
        {"ink": 0.8, "sun": -0.5},
    ),
    "Efficiency": (
        node(
            "Efficient Loader",
            **{"ckpt_name": "x.safetensors", "lora_name": "ink.safetensors"},
            **{"lora_model_strength": 0.8, "lora_clip_strength": 0.3, "positive": "a cat"},
        ),
        {"ink": 0.8},
    ),
    "a manager's list": (
        node(
            "Lora Loader (LoraManager)",
            **LINKS,
            text="<lora:ink:0.8>",
            loras={
                "__value__": [
                    {"name": "ink", "strength": "0.8", "active": True},
                    {"name": "sun", "strength": 1, "active": False},
                ]
            },
        ),
        {"ink": 0.8},
    ),
    "a tag": (node("LoraTagLoader", **LINKS, text="a cat <lora:ink:0.8>"), {"ink": 0.8}),
    "a tag in a prompt": (
        node("ImpactWildcardEncode", **LINKS, wildcard_text="", populated_text="x <lora:ink:0.8>"),
        {"ink": 0.8},
    ),
}


@pytest.mark.parametrize("name", LOADERS)
def test_nodes_that_load_adapters(name: str) -> None:
    loader, adapters = LOADERS[name]
    assert read(graph(loader)).adapters == adapters


STACK = {
    "simple": {"ink": 0.6, "sun": 0.7},
    "advanced": {"ink": 0.8, "sun": -0.1},
}


@pytest.mark.parametrize("mode", STACK)
@pytest.mark.parametrize("through", ["", "Reroute"])
def test_stacks_come_by_their_link(mode: str, through: str) -> None:
    names = {f"lora_name_{k}": f"{n}.safetensors" for k, n in ((1, "ink"), (2, "sun"), (3, "far"))}
    simple = {"lora_wt_1": 0.6, "lora_wt_2": 0.7, "lora_wt_3": 1}
    advanced = {"model_str_1": 0.8, "model_str_2": -0.1, "model_str_3": 1, "clip_str_1": 0.8}
    stack = node("LoRA Stacker", input_mode=mode, lora_count=2, **names, **simple, **advanced)
    loader = node("CR Apply LoRA Stack", **LINKS, lora_stack=["7" if through else "6", 0])
    assert (
        read(graph(loader, **{"6": stack, "7": node("Reroute", **{"": ["6", 0]})})).adapters
        == (STACK[mode])
    )


def test_switches_of_a_stack() -> None:
    rows = {"switch_1": "On", "lora_name_1": "ink.safetensors", "model_weight_1": 0.8}
    rows |= {"switch_2": "Off", "lora_name_2": "sun.safetensors", "model_weight_2": 1.0}
    loader = node("CR Apply LoRA Stack", **LINKS, lora_stack=["6", 0])
    assert read(graph(loader, **{"6": node("CR LoRA Stack", **rows)})).adapters == {"ink": 0.8}


@pytest.mark.parametrize("toggle", [True, False])
def test_a_switch_of_the_whole_node(toggle: bool) -> None:
    row = {"lora_1_name": "ink.safetensors", "lora_1_strength": 0.8, "lora_1_model_strength": 0.1}
    loader = node("easy loraStack", **LINKS, toggle=toggle, mode="simple", num_loras=1, **row)
    assert read(graph(loader)).adapters == ({"ink": 0.8} if toggle else {})
    loader = ink(strength_model=0.8, bypass=not toggle)
    assert read(graph(loader)).adapters == ({"ink": 0.8} if toggle else {})


def test_text_encoders_have_scales_of_their_own() -> None:
    nodes = graph(ink(strength_model=0.8, strength_clip=0.5))
    assert read(nodes).text_scales == {"ink": 0.5}
    assert read(graph(LOADERS["rgthree"][0])).text_scales == {"ink": 0.1}
    assert read(graph(ink(strength_model=0.8, strength_clip=0.8))).text_scales == {}
    # A text that comes past the loader is not changed by it, be it through other nodes.
    nodes["3"]["inputs"]["clip"] = ["6", 0]
    nodes["6"] = node("Reroute", **{"": ["1", 1]})
    assert read(nodes).text_scales == {"ink": 0.0}
    nodes["6"] = node("Reroute", **{"": ["2", 1]})
    assert read(nodes).text_scales == {"ink": 0.5}
    # Loaded once for both, and once more for the model alone.
    more = {"model": ["2", 0], "lora_name": "ink.safetensors", "strength_model": 0.2}
    nodes = graph(ink(strength_model=0.5, strength_clip=0.5), **{"6": node("Only", **more)})
    nodes["5"]["inputs"]["model"] = ["6", 0]
    said = read(nodes)
    assert (said.adapters, said.text_scales) == ({"ink": 0.7}, {"ink": 0.5})


def test_weights_of_blocks_are_named() -> None:
    said = read(graph(ink(strength_model=0.8, block_vector="1,0,0")))
    assert said.adapters == {"ink": 0.8}
    assert "weights of blocks in node `2` (`LoraLoader`)" in said.other_settings


UNREAD = {
    "no name": node("MysteryLoraLoader", **LINKS, preset="ink"),
    "no strength": node("SomeLoraLoader", **LINKS, lora_name="ink.safetensors"),
    "a word": ink(strength_model="strong"),
    "computed": ink(strength_model=["6", 0]),
    "computed for the text": ink(strength_model=1, strength_clip=["6", 0]),
    "two strengths in a tag": node("LoraTagLoader", **LINKS, text="<lora:ink:0.8:0.5>"),
    "a hypernetwork": node("HypernetworkLoader", **LINKS, hypernetwork_name="ink", strength=1),
}


@pytest.mark.parametrize("name", UNREAD)
def test_a_node_that_is_not_read_is_named(name: str) -> None:
    computing = node("SimpleMath", a=["5", 0], b=["3", 0], value="a*b")
    with pytest.raises(DataError, match=r"node `2`.*" + UNREAD[name]["class_type"]):
        read(graph(UNREAD[name], **{"6": computing}))


@pytest.mark.parametrize(
    "held",
    [
        node("PrimitiveFloat", value=0.8),
        node("FloatConstant", Value="0.8"),
        node("Float", float=0.8),
        node("Constant Number", number_type="float", number=0.8),
    ],
)
@pytest.mark.parametrize("through", ["", "Reroute"])
def test_numbers_come_by_links(held: dict[str, Any], through: str) -> None:
    nodes = graph(ink(strength_model=["7" if through else "6", 0], strength_clip=0.8))
    nodes |= {"6": held, "7": node("Reroute", **{"": ["6", 0]})}
    nodes |= {"8": node("INT", value=9), "9": node("Seed", seed=11)}
    nodes["5"]["inputs"] |= {"steps": ["8", 0], "seed": ["9", 0]}
    nodes |= {"10": node("String", string="a dog")}
    nodes["3"]["inputs"]["text"] = ["10", 0]
    said = read(nodes)
    assert (said.adapters, said.seed) == ({"ink": 0.8}, 11)
    assert (said.num_inference_steps, said.prompt) == (9, "a dog")


def test_what_is_not_connected_does_not_count() -> None:
    sun = node("LoraLoader", model=["2", 0], lora_name="sun.safetensors", strength_model=1)
    unread = node("MysteryLoraLoader", model=["1", 0])
    other = node("KSampler", model=["6", 0], seed=1, steps=1, cfg=1)
    nodes = graph(ink(strength_model=0.8), **{"6": sun, "7": unread, "8": other})
    nodes |= {"9": node("VAEDecode", samples=["5", 0]), "10": node("SaveImage", images=["9", 0])}
    said = read(nodes)
    assert said.adapters == {"ink": 0.8}
    assert said.seed == 18446744073709551615
    assert not any("pass" in name for name in said.other_settings)
    del nodes["10"]
    with pytest.raises(DataError, match="expected one sampler that comes first"):
        read(nodes)


def test_chains_add_up_and_a_switch_takes_one() -> None:
    more = {"model": ["2", 0], "strength_model": 0.25, "strength_clip": 0.25}
    nodes = graph(ink(strength_model=0.5, strength_clip=0.5))
    nodes["6"] = node("LoraLoader", lora_name="ink.safetensors", **more)
    nodes["7"] = node("LoraLoader", lora_name="sun.safetensors", **more)
    nodes["8"] = node("ImpactSwitch", select=2, input1=["7", 0], input2=["6", 0])
    nodes["5"]["inputs"]["model"] = ["8", 0]
    assert read(nodes).adapters == {"ink": 0.75}
    nodes["8"] = node("Any Switch (rgthree)", any_02=["6", 0], any_01=["1", 0])
    assert read(nodes).adapters == {}
    nodes["8"] = node("Switch", boolean=False, on_true=["1", 0], on_false=["2", 0])
    assert read(nodes).adapters == {"ink": 0.5}
    nodes["8"] = node("ImpactSwitch", select=1, input1=["1", 0], input2=["6", 0])
    assert read(nodes).adapters == {}
    del nodes["8"]["inputs"]["select"]
    with pytest.raises(DataError, match="ImpactSwitch"):
        read(nodes)


def test_a_sampler_in_parts() -> None:
    nodes = graph(ink(strength_model=0.8, strength_clip=0.8))
    nodes["5"] = node(
        "SamplerCustomAdvanced",
        **{"noise": ["6", 0], "guider": ["7", 0], "sampler": ["8", 0], "sigmas": ["9", 0]},
        latent_image=["10", 0],
    )
    nodes["6"] = node("RandomNoise", noise_seed=3)
    nodes["7"] = node("CFGGuider", model=["2", 0], positive=["3", 0], negative=["4", 0], cfg=2.5)
    nodes["8"] = node("KSamplerSelect", sampler_name="euler")
    nodes["9"] = node("BasicScheduler", model=["2", 0], scheduler="simple", steps=8, denoise=1)
    nodes["10"] = node("EmptyLatentImage", width=512, height=768, batch_size=1)
    said = read(nodes)
    assert (said.prompt, said.negative_prompt, said.adapters) == ("a cat", "bad", {"ink": 0.8})
    assert (said.seed, said.num_inference_steps, said.guidance_scale) == (3, 8, 2.5)
    wanted = {"sampler_name": "euler", "scheduler": "simple", "Size": "512x768"}
    assert dict(said.other_settings) == wanted


def test_what_else_changes_the_picture_is_named() -> None:
    nodes = graph(ink(strength_model=0.8, strength_clip=1))
    nodes["6"] = node("FreeU_V2", model=["2", 0], b1=1.3)
    nodes["7"] = node("CLIPSetLastLayer", clip=["2", 1], stop_at_clip_layer=-2)
    nodes["3"]["inputs"] |= {"clip": ["7", 0], "text": "a (red:1.2) [cat]"}
    nodes["5"]["inputs"] |= {"model": ["6", 0], "denoise": 0.5, "latent_image": ["8", 0]}
    nodes["8"] = node("VAEEncode", pixels=["9", 0])
    nodes["9"] = node("LoadImage", image="x.png")
    again = {**nodes["5"]["inputs"], "latent_image": ["5", 0], "seed": 4}
    nodes["10"] = node("KSampler", **again)
    said = read(nodes)
    assert (said.prompt, said.seed) == ("a red [cat]", 18446744073709551615)
    assert dict(said.other_settings) == {
        "second pass node `10` (`KSampler`)": "left out",
        "node `6` (`FreeU_V2`)": "left out",
        "weights of words": "left out",
        "sampler_name": "euler",
        "denoise": "0.5",
        "image to start from": "left out",
        "clip skip": "-2",
    }


def test_what_is_not_read_is_said() -> None:
    nodes = graph(ink(strength_model=0.8, strength_clip=0.8))
    nodes["5"]["inputs"] |= {"seed": ["77", 0], "positive": ["77", 0]}
    said = read(nodes)
    assert (said.seed, said.prompt) == (None, "")
    assert {"seed", "prompt"} <= set(said.other_settings)

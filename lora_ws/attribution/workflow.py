"""What ComfyUI's graph says about an image: links are followed from the sampler, and only they.

Nodes of any pack are read by what they take: a name of an adapter and a strength beside it. A node
that loads adapters in another way is refused by its name.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from lora_ws.adapters.header import shown
from lora_ws.attribution.lora_nodes import has_strength, loads_adapters, read_loader
from lora_ws.attribution.prompt_text import (
    INSTEAD,
    NO_SCALES,
    TAG,
    ImageMetadata,
    Scales,
    integer_of,
    number_of,
    plain_text,
    text_scales,
)
from lora_ws.errors import DataError

# Inputs of nodes that hold one value, by the names that packs give it.
VALUES = (
    *("value", "populated_text", "string", "text", "int", "float", "number", "seed", "noise_seed"),
    "lora_name",
)
# What a model comes through, what lists of adapters do, and what a sampler is put together from.
DENOISERS = ("model", "unet", "base_model")
MODELS = (*DENOISERS, "guider", "pipe", "basic_pipe", "sdxl_tuple")
PARTS = ("sigmas", "sampler", "noise", "guider")
LATENTS = ("latent_image", "samples", "latent", "latents", "pixels", "image", "images", "any", "")
TEXTS = ("populated_text", "text", "text_g", "t5xxl", "clip_l", "string")
CONDITIONINGS = ("conditioning", "conditioning_1", "conditioning_to", "cond")
# Nodes on the way that change nothing, by a part of their name.
PLAIN = (
    "checkpoint",
    "unetloader",
    "reroute",
    "efficient loader",
    "guider",
    "switch",
    "pipe",
    "diffusion",
)


class Node(NamedTuple):
    """A node of a graph: its number, class and inputs."""

    key: str
    kind: str
    inputs: Mapping[str, Any]

    @property
    def title(self) -> str:
        """What a message calls it."""
        return f"node {shown(self.key)} ({shown(self.kind)})"


class Graph:
    """The nodes of a workflow, by number.

    Args:
        nodes: those that are nodes.
    """

    def __init__(self, nodes: Mapping[str, Node]) -> None:
        self.nodes = nodes

    def at(self, link: Any) -> Node | None:
        """The node that an input comes from; None where it is no link."""
        linked = isinstance(link, list) and len(link) == 2 and not isinstance(link[0], list)
        return self.nodes.get(str(link[0])) if linked else None

    def value(self, given: Any) -> Any:
        """What an input is worth, through nodes that hold one value; None where it is not read."""
        for _ in range(len(self.nodes) + 1):
            if not isinstance(given, list):
                return given
            node = self.at(given)
            if node is None:
                return None
            links = [v for v in node.inputs.values() if isinstance(v, list)]
            named = {k.lower(): v for k, v in node.inputs.items()}
            held = [named[name] for name in VALUES if name in named]
            # One that computes from several inputs is no place where a value is held.
            if len(links) > 1 or (links and held and held[0] is not links[0]):
                return None
            given = (held or links or [None])[0]
        return None

    def upstream(
        self, node: Node, names: tuple[str, ...] | None = None, but: tuple[str, ...] = ()
    ) -> Iterator[Node]:
        """All nodes that one depends on, nearest first; by some inputs, or by all but some."""
        seen, queue = {node.key}, [node]
        while queue:
            inputs = queue.pop(0).inputs
            for name, link in inputs.items():
                taken = name in names if names is not None else name not in but
                found = self.at(link) if taken else None
                if found is not None and found.key not in seen:
                    seen.add(found.key)
                    queue.append(found)
                    yield found


def parse_workflow(text: str, name: str) -> ImageMetadata:
    """Read the graph that ComfyUI writes: its sampler, the texts and adapters that lead to it.

    Raises:
        DataError: it is no such graph, has no sampler, or loads adapters in a way that is not read.

    Example:
        >>> graph = {"1": {"class_type": "CLIPTextEncode", "inputs": {"text": "a cat"}},
        ...          "2": {"class_type": "CheckpointLoaderSimple", "inputs": {}},
        ...          "3": {"class_type": "KSampler", "inputs": {"seed": 7, "steps": 20, "cfg": 5,
        ...                "model": ["2", 0], "positive": ["1", 0]}}}
        >>> said = parse_workflow(json.dumps(graph), "a.png")
        >>> said.prompt, said.seed
        ('a cat', 7)
    """
    graph = _graph(text, name)
    sampler, others = _sampler(graph, name)
    inputs = _settings(graph, sampler)
    adapters = _adapters(graph, sampler, inputs, others)
    texts = [_text(graph, inputs, side, others) for side in ("positive", "negative")]
    seed = integer_of(graph.value(inputs.get("seed", inputs.get("noise_seed"))))
    steps = integer_of(graph.value(inputs.get("steps")))
    guidance = number_of(graph.value(inputs.get("cfg")))
    for what, read in (("seed", seed), ("steps", steps), ("cfg", guidance)):
        if read is None:
            others[what] = "not read"
    _other_settings(graph, inputs, sampler, others)
    return ImageMetadata(
        prompt=texts[0],
        negative_prompt=texts[1],
        adapters={name: scales.denoiser for name, scales in adapters.items()},
        text_scales=text_scales(adapters),
        seed=seed,
        num_inference_steps=steps,
        guidance_scale=guidance,
        other_settings=others,
    )


def _graph(text: str, name: str) -> Graph:
    try:
        nodes = json.loads(text)
        # Some pages nest the graph once more, as an object or as text.
        if isinstance(nodes, dict) and isinstance(nodes.get("prompt"), (dict, str)):
            inner = nodes["prompt"]
            nodes = json.loads(inner) if isinstance(inner, str) else inner
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name}: expected ComfyUI's graph as JSON ({error})") from error
    nodes = nodes if isinstance(nodes, dict) else {}
    return Graph(
        {
            key: Node(key, str(node.get("class_type", "")), node["inputs"])
            for key, node in nodes.items()
            if isinstance(node, dict) and isinstance(node.get("inputs"), dict)
        }
    )


def _sampler(graph: Graph, name: str) -> tuple[Node, dict[str, str]]:
    """The sampler that made the image first, and what came after it."""
    saves = [n for n in graph.nodes.values() if re.search("save|preview", n.kind, re.IGNORECASE)]
    saves = [node for node in saves if any(graph.at(v) for v in node.inputs.values())]
    reached = {found.key for save in saves for found in graph.upstream(save)}
    found = [node for node in graph.nodes.values() if _samples(node)]
    if any(node.key in reached for node in found):
        found = [node for node in found if node.key in reached]
    if not found:
        raise DataError(f"{name}: expected a graph of ComfyUI with a KSampler, found none")
    keys = {node.key for node in found}
    first = [n for n in found if not any(up.key in keys for up in graph.upstream(n))]
    if len(first) != 1:
        listed = ", ".join(node.title for node in (first or found)[:4])
        raise DataError(f"{name}: expected one sampler that comes first, got {listed}; {INSTEAD}")
    later = [node for node in found if node is not first[0]]
    return first[0], {f"second pass {node.title}": "left out" for node in later}


def _samples(node: Node) -> bool:
    kind = node.kind.lower().replace(" ", "")
    if "ksamplerselect" in kind or "loader" in kind:
        return False
    return (
        "ksampler" in kind
        or "samplercustom" in kind
        or {"model", "positive", "seed"} <= set(node.inputs)
    )


def _settings(graph: Graph, sampler: Node) -> dict[str, Any]:
    """What a sampler takes, itself or by the nodes that it is put together from."""
    inputs: dict[str, Any] = {}
    for part in PARTS:
        node = graph.at(sampler.inputs.get(part))
        inputs |= dict(node.inputs) if node else {}
    return inputs | dict(sampler.inputs)


def _adapters(
    graph: Graph, sampler: Node, inputs: Mapping[str, Any], others: dict[str, str]
) -> dict[str, Scales]:
    """All adapters on the way of the model to the sampler."""
    adapters: dict[str, Scales] = {}
    on_way, texts = _model_nodes(graph, sampler), _text_nodes(graph, inputs)
    for node in on_way:
        if loads_adapters(node.kind, node.inputs):
            # Nodes of lists come after the node that takes the list.
            for one in read_loader(node.title, node.kind, node.inputs, graph.value):
                # One that the text encoder does not come through leaves it alone.
                apart = "model" in node.inputs and texts and node.key not in texts
                scales = one.scales._replace(text=0.0) if apart else one.scales
                adapters[one.name] = adapters.get(one.name, NO_SCALES) + scales
                if any("block" in name.lower() for name in node.inputs):
                    others[f"weights of blocks in {node.title}"] = "left out"
        elif not any(part in node.kind.lower() for part in PLAIN):
            others[node.title] = "left out"
    seen = {node.key for node in on_way}
    for node in (node for key, node in texts.items() if key not in seen):
        if loads_adapters(node.kind, node.inputs):
            others[f"{node.title}, which changes the text encoder alone"] = "left out"
    return adapters


def _text_nodes(graph: Graph, inputs: Mapping[str, Any]) -> dict[str, Node]:
    """The nodes that the text of the prompt comes through, and its text encoder."""
    node = graph.at(inputs.get("positive", inputs.get("conditioning")))
    found = [] if node is None else [node, *graph.upstream(node, but=DENOISERS)]
    return {node.key: node for node in found}


def _model_nodes(graph: Graph, sampler: Node) -> list[Node]:
    """The nodes that the model comes through, from the sampler on, and their lists of adapters."""
    found: dict[str, Node] = {}
    queue = [sampler]
    while queue:
        node = queue.pop(0)
        for link in _model_links(graph, node):
            source = graph.at(link)
            if source is not None and source.key not in found:
                found[source.key] = source
                queue.append(source)
        if node is sampler and not found:
            raise DataError(f"{node.title}: expected a model that it samples from, found no link")
    return list(found.values())


def _model_links(graph: Graph, node: Node) -> list[Any]:
    """The inputs of a node that a model, or a list of adapters, comes by."""
    links = {name: v for name, v in node.inputs.items() if graph.at(v) is not None}
    named = [v for name, v in links.items() if name.lower() in MODELS]
    lists = [v for name, v in links.items() if _is_list(graph, name.lower(), v)]
    if named or lists:
        return named + lists
    if chosen := _chosen(graph, node, links):
        return [chosen]
    adapted = [v for v in links.values() if _leads_to_adapters(graph, v)]
    if adapted and len(links) > 1:
        raise DataError(
            f"{node.title}: expected one input that the model comes by, got "
            f"{', '.join(map(shown, links))}; {INSTEAD}"
        )
    return list(links.values())[:1]


def _chosen(graph: Graph, node: Node, links: Mapping[str, Any]) -> Any:
    """The input that a switch lets through; None where the node is none that is known."""
    if "any switch" in node.kind.lower():
        return links[min(links)] if links else None
    select, truth = (graph.value(node.inputs.get(name)) for name in ("select", "boolean"))
    name = f"input{select}" if truth is None else f"on_{str(truth).lower()}"
    return links.get(name)


def _is_list(graph: Graph, name: str, link: Any) -> bool:
    """Whether adapters, and not only the name of one, come by an input."""
    source = graph.at(link)
    if "stack" in name or source is None:
        return source is not None
    return "lora" in name and (graph.value(link) is None or has_strength(source.inputs))


def _leads_to_adapters(graph: Graph, link: Any) -> bool:
    node = graph.at(link)
    if node is None:
        return False
    return any(loads_adapters(n.kind, n.inputs) for n in (node, *graph.upstream(node)))


def _text(graph: Graph, inputs: Mapping[str, Any], side: str, others: dict[str, str]) -> str:
    """The text that a sampler's conditioning comes from."""
    given = inputs.get(side, inputs.get("conditioning") if side == "positive" else None)
    for _ in range(len(graph.nodes)):
        node = graph.at(given)
        if node is None or "zeroout" in node.kind.lower():
            break
        held = [node.inputs[name] for name in (*TEXTS, side) if name in node.inputs]
        texts = [value for value in map(graph.value, held) if isinstance(value, str)]
        if texts:
            tagged = loads_adapters(node.kind, node.inputs)
            written = TAG.sub("", texts[0]) if tagged else texts[0]
            text, weighted = plain_text(written, square=False)
            if weighted:
                others["weights of words"] = "left out"
            return text.strip()
        if "encode" not in node.kind.lower() and "reroute" not in node.kind.lower():
            others[node.title] = "left out"
        through = [node.inputs[k] for k in (side, *CONDITIONINGS) if k in node.inputs]
        links = [v for v in node.inputs.values() if graph.at(v) is not None]
        given = (through or links or [None])[0]
    if side == "positive":
        others["prompt"] = "not read"
    return ""


def _other_settings(
    graph: Graph, inputs: Mapping[str, Any], sampler: Node, others: dict[str, str]
) -> None:
    """Sampler, schedule, size and what else changes the image."""
    for name in ("sampler_name", "scheduler", "denoise"):
        value = graph.value(inputs.get(name))
        if value is not None and (name != "denoise" or number_of(value) != 1):
            others[name] = str(value)
    first, last = (number_of(graph.value(inputs.get(k))) for k in ("start_at_step", "end_at_step"))
    if first:
        others["start_at_step"] = f"{first:g}"
    if last is not None and last < (number_of(graph.value(inputs.get("steps"))) or 0):
        others["end_at_step"] = f"{last:g}"
    for node in graph.upstream(sampler, LATENTS):
        sides = ("width", "height")
        width, height = (
            graph.value(node.inputs.get(side, node.inputs.get(f"empty_latent_{side}")))
            for side in sides
        )
        if width is not None and height is not None:
            others.setdefault("Size", f"{width}x{height}")
        if "encode" in node.kind.lower() or "loadimage" in node.kind.lower():
            others["image to start from"] = "left out"
    for node in graph.upstream(sampler):
        skip = graph.value(node.inputs.get("stop_at_clip_layer", node.inputs.get("clip_skip")))
        if skip is not None and number_of(skip) not in (-1, 0, 1):
            others["clip skip"] = str(skip)

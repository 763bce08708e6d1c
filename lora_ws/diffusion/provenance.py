"""What images were made by, as pages, JSON and the images themselves say it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from lora_ws.adapters.source import tensor_sha256
from lora_ws.diffusion.generation import GenerationSpec
from lora_ws.diffusion.samplers import sampler_of
from lora_ws.diffusion.stack import AdapterStack
from lora_ws.report.grid import Cell
from lora_ws.report.page import Facts

# Digits of a hash that model managers compare.
AUTOV3 = 12


class UsedAdapter(NamedTuple):
    """An adapter that images were made with.

    Attributes:
        name: name in reports.
        called: name in hobby tools: that of the file, with its folder where two are alike.
        file: file that it was read from.
        sha256: hash of the file; empty where it is not known.
        autov3: first digits of the hash of its tensors, likewise.
        scale: multiplier of its update in the denoiser.
        text_scale: multiplier of its update in text encoders.
        blocks: weights per block, as they were given; empty for none.
    """

    name: str
    called: str
    file: str
    sha256: str
    autov3: str
    scale: float
    text_scale: float
    blocks: str = ""

    @property
    def tag(self) -> str:
        """The tag that A1111 writes, with two numbers where the text encoder has another scale."""
        scales = dict.fromkeys((f"{self.text_scale:.9g}", f"{self.scale:.9g}"))
        blocks = f":lbw={self.blocks}" if self.blocks else ""
        return f"<lora:{self.called}:{':'.join(scales)}{blocks}>"


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What images were made by.

    Attributes:
        base: as it was named.
        scheduler: class of diffusers.
        generation: prompt, guidance and steps.
        seeds: one per image.
        size: width and height in pixels.
        adapters: in the order of their turns.
        method: method of composition, as it is typed; "Merge" adds them at their scales.
    """

    base: str
    scheduler: str
    generation: GenerationSpec
    seeds: tuple[int, ...]
    size: tuple[int, int]
    adapters: tuple[UsedAdapter, ...] = ()
    method: str = "Merge"

    def only(self, *places: int) -> "Provenance":
        """With some of the adapters, added at their scales."""
        return replace(self, adapters=tuple(self.adapters[k] for k in places), method="Merge")

    def to_dict(self) -> dict[str, Any]:
        """What JSON holds."""
        generation = self.generation
        return {
            "base": self.base,
            "scheduler": self.scheduler,
            "prompt": generation.prompt,
            "negative_prompt": generation.negative_prompt,
            "guidance_scale": generation.guidance_scale,
            "num_inference_steps": generation.num_inference_steps,
            "seeds": list(self.seeds),
            "width": self.size[0],
            "height": self.size[1],
            "method": self.method,
            "adapters": [adapter._asdict() for adapter in self.adapters],
            "lora_ws": version("lora-ws"),
        }

    def facts(self) -> Facts:
        """What pages show."""
        values = {name: value for name, value in self.to_dict().items() if name != "adapters"}
        values["seeds"] = ", ".join(map(str, self.seeds))
        for adapter in self.adapters:
            digest = f", sha256 {adapter.sha256}" if adapter.sha256 else ""
            blocks = f", blocks {adapter.blocks}" if adapter.blocks else ""
            said = f"scale {adapter.scale:g}{blocks}, {adapter.file}{digest}"
            values[f"adapter {adapter.name}"] = said
        return Facts({name: Cell(str(value)) for name, value in values.items() if value != ""})

    def write(self, file: Path, **more: Any) -> Path:
        """Write it as JSON, with what else is known of the images."""
        text = json.dumps({**self.to_dict(), **more}, indent=1, allow_nan=False)
        file.write_text(text + "\n", encoding="utf-8")
        return file

    def texts(self, seed: int) -> dict[str, str]:
        """What a PNG says of itself: A1111's ``parameters`` and, where it can, ComfyUI's graph."""
        texts = {"parameters": self.parameters(seed)}
        graph = self.workflow(seed)
        return {**texts, "prompt": json.dumps(graph)} if graph else texts

    def parameters(self, seed: int) -> str:
        """The text that A1111 writes into an image, with what it has no word for at the end."""
        prompt = _escaped(str(self.generation.prompt), r"\()[]")
        lines = [" ".join([prompt, *(adapter.tag for adapter in self.adapters)])]
        if self.generation.negative_prompt:
            negative = _escaped(self.generation.negative_prompt, r"\()[]")
            lines.append(f"Negative prompt: {negative}")
        hashes = ", ".join(f"{one.called}: {one.autov3}" for one in self.adapters if one.autov3)
        settings = {
            "Steps": self.generation.num_inference_steps,
            "Sampler": sampler_of(self.scheduler).a1111,
            "CFG scale": f"{self.generation.guidance_scale:g}",
            "Seed": seed,
            "Size": f"{self.size[0]}x{self.size[1]}",
            "Model": self.base,
            "Lora hashes": hashes,
            "Composition": "" if self.method == "Merge" else self.method,
            "Version": f"lora-ws {version('lora-ws')}",
        }
        said = {name: str(value) for name, value in settings.items() if value != ""}
        lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in said.items()))
        return "\n".join(lines)

    def workflow(self, seed: int) -> dict[str, Any] | None:
        """ComfyUI's graph of the same, None where no graph of its own nodes draws it."""
        sampler = sampler_of(self.scheduler).comfy
        weighed = any(adapter.blocks for adapter in self.adapters)
        if self.method != "Merge" or weighed or not sampler:
            return None
        nodes = {"1": _node("CheckpointLoaderSimple", ckpt_name=f"{self.base}.safetensors")}
        last = "1"
        for k, adapter in enumerate(self.adapters):
            loaded = {"model": [last, 0], "clip": [last, 1]}
            scales = {"strength_model": adapter.scale, "strength_clip": adapter.text_scale}
            last = str(10 + k)
            name = f"{adapter.called}.safetensors"
            nodes[last] = _node("LoraLoader", lora_name=name, **scales, **loaded)
        generation, (width, height) = self.generation, self.size
        texts = {"2": str(generation.prompt), "3": generation.negative_prompt}
        for key, text in texts.items():
            nodes[key] = _node("CLIPTextEncode", text=_escaped(text, r"\()"), clip=[last, 1])
        nodes["4"] = _node("EmptyLatentImage", width=width, height=height, batch_size=1)
        nodes["5"] = _node(
            "KSampler",
            model=[last, 0],
            positive=["2", 0],
            negative=["3", 0],
            latent_image=["4", 0],
            seed=seed,
            steps=generation.num_inference_steps,
            cfg=generation.guidance_scale,
            sampler_name=sampler,
            scheduler="ddim_uniform" if sampler == "ddim" else "normal",
            denoise=1.0,
        )
        nodes["6"] = _node("VAEDecode", samples=["5", 0], vae=["1", 2])
        nodes["7"] = _node("SaveImage", images=["6", 0], filename_prefix="lora-ws")
        return nodes


def used_adapters(stack: AdapterStack, text: str = "merged") -> tuple[UsedAdapter, ...]:
    """The adapters of a stack, with their scales in denoiser and text encoders.

    Args:
        stack: the adapters.
        text: what those of text encoders do; see `lora_ws.diffusion.compose`.
    """
    found = []
    ratios = stack.text_ratios or (1.0,) * len(stack)
    given = [text.replace(" ", "") for text in stack.blocks or ("",) * len(stack)]
    blocks = ["" if text == "1" else text for text in given]
    stems = [Path(file).stem for file, _ in stack.files]
    for k, (file, sha256) in enumerate(stack.files):
        path, scale = Path(file), stack.scales[k]
        alike = stems.count(path.stem) > 1
        called = f"{path.parent.name}/{path.stem}" if alike else path.stem
        local = path.suffix == ".safetensors" and path.is_file()
        autov3 = tensor_sha256(path)[:AUTOV3] if local else ""
        read = not stack.texts or text in ("merged", "per_adapter") or (text, k) == ("first", 0)
        text_scale = scale * ratios[k] if read else 0.0
        found.append(
            UsedAdapter(stack.names[k], called, file, sha256, autov3, scale, text_scale, blocks[k])
        )
    return tuple(found)


def _node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def _escaped(text: str, marks: Sequence[str]) -> str:
    """A prompt in which brackets stand for themselves."""
    return "".join(f"\\{c}" if c in marks else c for c in text)


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if set(value) & set(",:\n") else value

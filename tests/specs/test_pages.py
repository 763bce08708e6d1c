"""What README and documentation tell people to type is typed, page by page, in a folder of its own.

The lines of a page run in order, at the smallest size (`SMALLER`), among the files that the pages
speak of (`_provide`). A line that cannot run here stands in `NOT_RUN` with the reason; it is still
parsed, by test_readme.py.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from factories import write_adapter
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import lora_ws
from lora_ws.adapters import read_adapter
from lora_ws.audit.examples import examples
from lora_ws.bundle.hub import SHIPPED
from lora_ws.cli import find_command, main
from lora_ws.diffusion.bank import AdapterBank
from lora_ws.diffusion.pipeline import load_pipeline
from lora_ws.zoo.publish import write_folders

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "training/README.md"]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)

FIT = ["--seeds", "1", "--fit.max_epochs", "1"]
DRAW = ["--num_inference_steps", "2"]
ONE_LAYER = ["--matrices", "['mid_block.*.attn2.to_v']", "--subset", "per_adapter/class"]
# What makes a command small, typed after all else: the last of two equal flags counts.
SMALLER = {
    "train": FIT,
    "sweep": [*FIT, *ONE_LAYER],
    "compose": [*DRAW, "--images", "1"],
    "attribute": DRAW,
    "concepts erase": ["--steps", "2", "--seeds", "1"],
    "concepts amplify": ["--steps", "2"],
    "study": ["--draws", "1"],
    "zoo build": ["--finetune.steps", "2"],
}
# How a line begins that is not run, and why.
NOT_RUN = {
    "lora-ws reproduce": "minutes to hours; tests/experiments run every kind at a small size",
    "lora-ws zoo build --config": "twenty minutes, from photos that are not shipped",
    "lora-ws study all --spec": "trains for minutes; tests/experiments runs these studies",
    "lora-ws scan ./loras --engine ray": "needs a cluster; tests/test_ray.py has one",
    "lora-ws sweep --dataset ./store --featurizer FlatVec --engine ray": "the same",
    "lora-ws train --dataset ./store --seeds 100 --engine ray": "the same",
    "lora-ws train --dataset ./store --seeds 10 --processes 8": "starts processes; tests/learn do",
    "lora-ws scan s3://": "needs a store; tests/audit/test_scan_of_addresses.py has one",
    "lora-ws train --dataset ./store --trainer.devices 8": "needs eight GPUs",
}


def typed(page: Path) -> list[str]:
    """What a page has people type: command lines without remarks, and blocks of Python."""
    found = list[str]()
    for language, block in FENCED.findall(page.read_text(encoding="utf-8")):
        if language == "python" and page != PAGES[0]:  # test_readme.py has that of README
            found.append(block)
        elif language in ("", "bash"):
            short = [line.partition("  #")[0].strip() for line in block.splitlines()]
            found += [line for line in short if line.startswith("lora-ws ")]
    return [text for text in found if "COMMAND" not in text]


def words(line: str) -> list[str]:
    """What a shell makes of a line: quotes, braces and patterns."""
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, check=True)
    return done.stdout.decode().split("\0")[1:-1]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that pages speak of, made once."""
    shelf = tmp_path_factory.mktemp("shelf")
    adapters = lora_ws.load("lora-ws-mini", subset="shared/class")
    write_folders(adapters.select(np.arange(0, len(adapters), 5)), shelf / "my-adapters")
    for folder in ("loras", "uploads", "known"):
        for example in examples():
            (shelf / folder).mkdir(exist_ok=True)
            shutil.copy(example.file, shelf / folder)
    for name, example in zip(("file", "a", "b"), examples(), strict=True):
        shutil.copy(example.file, shelf / f"{name}.safetensors")
    shutil.copy(examples()[0].file, shelf / "c.safetensors")
    for home in ("", "runs/store", "runs/lora-ws-mini/per_adapter/class", "runs/…"):
        shutil.copytree(SHIPPED / "tiny-sd", shelf / home / "bundle")
    lora_ws.import_collection(shelf / "my-adapters", shelf / "store")
    _write(shelf / "policy.yaml", "scan.md", "yaml", 1)
    _write(shelf / "my_net.py", "extending.md", "python", 2)
    adapters = lora_ws.load("lora-ws-mini", subset="per_adapter/class")
    layers = tuple((s.name, s.in_features, s.out_features) for s in adapters.layout.layers)
    for folder, label in (("good", "flower"), ("bad", "reptile")):
        for row in np.flatnonzero(adapters.column("category_label") == label)[:20]:
            write_adapter(shelf / folder / f"{row}.safetensors", adapters.weights[row], layers)
    for name in ("training", "lora_ws"):
        (shelf / name).symlink_to(ROOT / name)
    # Stands in for Stable Diffusion 1.5, and an image that it drew.
    (shelf / "sd15").symlink_to(ROOT / "lora_ws" / "_assets" / "tiny_sd")
    said = PngInfo()
    said.add_text(
        "parameters",
        "a photo of lion <lora:orchid:1> <lora:bicycle:1>\n"
        "Steps: 2, Sampler: DDIM, CFG scale: 3, Seed: 0, Size: 32x32",
    )
    Image.new("RGB", (32, 32)).save(shelf / "image.png", pnginfo=said)
    return shelf


def _write(file: Path, page: str, language: str, most: int) -> None:
    """Write what a page has people write, in its first blocks."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    blocks = [block for found, block in FENCED.findall(text) if found == language]
    file.write_text("\n\n".join(blocks[:most]), encoding="utf-8")


@pytest.fixture(scope="module")
def given() -> dict[str, Any]:
    """Names that blocks of Python take for granted."""
    adapters = [read_adapter(example.file) for example in examples()]
    pipeline = load_pipeline("tiny-sd")
    return {
        "lora_ws": lora_ws,
        "Bundle": lora_ws.Bundle,
        "read_adapter": read_adapter,
        "torch": torch,
        "AdapterBank": AdapterBank,
        "adapters": adapters,
        "words": ["fish", "flower"],
        "files": [example.file for example in examples()],
        "unet": pipeline.unet,
        "sample": torch.zeros(3, 8, 8, 8),
        "timestep": torch.tensor(9),
        "encoder_hidden_states": torch.zeros(3, 5, pipeline.unet.config["cross_attention_dim"]),
    }


@pytest.mark.slow
# Turns of ten steps in two: the last adapters never act.
@pytest.mark.filterwarnings("default::lora_ws.errors.Notice")
@pytest.mark.parametrize(
    "page", [page for page in PAGES if typed(page)], ids=lambda page: page.stem
)
def test_what_a_page_has_people_type_works(
    page: Path, shelf: Path, given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = typed(page)
    made = [name for name in ("store", "zoo") if any(f"--out ./{name}" in text for text in every)]
    here = tmp_path / "here"
    shutil.copytree(shelf, here, symlinks=True, ignore=shutil.ignore_patterns(*made))
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "path", [*sys.path])
    names = dict(given)
    for text in every:
        if text.startswith(tuple(NOT_RUN)):
            continue
        if not text.startswith("lora-ws "):
            exec(text, names)
            continue
        args = words(text)
        name, _ = find_command(args)
        if name == "serve":
            _serve(args)
            continue
        args += _smaller(name, args)
        if "--trainer.devices" in args:  # each device's process starts the command once more
            command = [sys.executable, "-m", "lora_ws", *args, "--featurizer", "StatsFlatVec"]
            subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
            continue
        assert main(args) in (0, 3), text
    sys.modules.pop("my_net", None)


def _serve(args: list[str]) -> None:
    """Start a server as typed, on a free port, ask it what it is, and stop it."""
    command = [sys.executable, "-m", "lora_ws", *args, "--port", "0"]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, encoding="utf-8")
    try:
        assert child.stderr is not None
        said = (re.search(r"running on (http://\S+)", line) for line in child.stderr)
        address = next(match[1] for match in said if match)
        about = json.loads(urlopen(f"{address}/v1/about").read())
        assert about["known"] == len(examples())
    finally:
        child.terminate()
        child.communicate()


def _smaller(name: str, args: list[str]) -> list[str]:
    """The flags of `SMALLER`; of a collection with subsets, one."""
    chosen = {"--dataset", "per_adapter/constant"} & {*args}
    one = ["--subset", "per_adapter/class"] if name == "train" and not chosen else []
    return [*one, *SMALLER.get(name, [])]


def test_no_reason_is_left_over() -> None:
    every = [text for page in PAGES for text in typed(page)]
    assert [start for start in NOT_RUN if not any(t.startswith(start) for t in every)] == []

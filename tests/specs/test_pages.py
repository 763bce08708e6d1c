"""What README and documentation tell people to type is typed, page by page, in a folder of its own.

The lines of a page run in order, at the smallest size (`SMALLER`, `LESS`), among the files that the
pages speak of (`shelf`), with a store of S3's kind and a Ray cluster on loopback.
"""

import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from factories import write_adapter
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import lora_ws
from lora_ws.adapters import read_adapter
from lora_ws.audit.examples import examples
from lora_ws.bundle.hub import SHIPPED
from lora_ws.cli import main
from lora_ws.diffusion.bank import AdapterBank
from lora_ws.diffusion.pipeline import load_pipeline
from lora_ws.zoo.publish import write_folders

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "training/README.md"]
TYPED = ("lora-ws ", "curl ", "ray ")
# Run on a cluster by tests/test_ray.py; here a scan stands for what `--address` does.
ON_RAY = re.compile(r"lora-ws (sweep|train) .*--engine ray")
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)

FIT = ["--seeds", "1", "--fit.max_epochs", "1"]
DRAW = ["--num_inference_steps", "2"]
BASE = ["--checkpoint_every", "4", "--grid_every", "4"]
ONE_LAYER = ["--matrices", "['mid_block.*.attn2.to_v']"]
ZOO = {
    "photos.words": "{fish: fish}",
    "sampling.a_init": "[shared]",
    "sampling.prompt": "[class]",
    "sampling.adapters_per_leaf": "3",
    "sampling.passes": "1",
    "processes": "1",
}
# What makes a command small, by how it begins, typed after all else: the last of two equal flags
# counts.
SMALLER = {
    "train": FIT,
    "train --dataset ./store --trainer.devices 8": [
        "--trainer.devices",
        "2",
        "--trainer.accelerator",
        "cpu",
    ],
    "train --dataset ./store --seeds 10 --processes 8": ["--seeds", "2", "--processes", "2"],
    "sweep": [*FIT, *ONE_LAYER],
    "compose": [*DRAW, "--images", "1"],
    "attribute": DRAW,
    "concepts erase": ["--steps", "2", "--seeds", "1"],
    "concepts amplify": ["--steps", "2"],
    "study": ["--draws", "1"],
    "zoo base --config": [*BASE, "--vae.steps", "4", "--denoiser.steps", "4"],
    "zoo build": ["--finetune.steps", "2"],
    "zoo build --config": [word for key, value in ZOO.items() for word in (f"--{key}", value)],
}
# Keys of recipes and of files of `eval/` that are less than what is shipped.
LESS = {
    "training/table1/delta_pca.yaml": {
        "seeds": 1,
        "fit": {"max_epochs": 1},
        "matrices": ["mid_block.*.attn2.to_v"],
    },
    "eval/cad.yaml": {
        "digits": ["three"],
        "budgets": [0.1],
        "seeds": 1,
        "steps": 2,
        "points": 1,
        "singles": 1,
        "images": 1,
        "neighbours": 1,
    },
    "eval/transfer.yaml": {
        "factors": {"steps": {"2": {}, "1": {"changes": {"finetune.steps": 1}}}},
        "readers": [{"name": "left Gram", "recipe": "table1/delta_pca"}],
        "folds": 3,
    },
    "eval/transfer_base.yaml": {
        "readers": [{"name": "left Gram", "recipe": "table1/delta_pca"}],
        "folds": 3,
    },
    "training/zoo/transfer_base.yaml": {
        "sampling": {"adapters_per_leaf": 3},
        "finetune": {"steps": 2},
    },
    "training/zoo/transfer.yaml": {
        "photos": {"source": "photos", "words": {"fish": "fish", "trees": "tree"}},
        "finetune": {"steps": 2},
    },
}


def typed(page: Path) -> list[str]:
    """What a page has people type: command lines without remarks, and blocks of Python."""
    found = list[str]()
    for language, block in FENCED.findall(page.read_text(encoding="utf-8")):
        if language == "python" and page != PAGES[0]:  # test_readme.py has that of README
            found.append(block)
        elif language in ("", "bash"):
            short = [line.partition("  #")[0].strip() for line in block.splitlines()]
            found += [one for one in short if one.startswith(TYPED) and not ON_RAY.match(one)]
    return [text for text in found if "COMMAND" not in text]


def words(line: str) -> list[str]:
    """What a shell makes of a line: quotes, braces and patterns."""
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, check=True)
    return done.stdout.decode().split("\0")[:-1]


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
    (shelf / "lora_ws").symlink_to(ROOT / "lora_ws")
    shutil.copytree(ROOT / "training", shelf / "training")
    shutil.copytree(ROOT / "eval", shelf / "eval", ignore=shutil.ignore_patterns("results"))
    for name, less in LESS.items():
        full = yaml.safe_load((shelf / name).read_text(encoding="utf-8"))
        parts = ("photos", "sampling", "finetune")
        both = {k: {**full[k], **v} if k in parts else v for k, v in less.items()}
        (shelf / name).write_text(yaml.safe_dump({**full, **both}), encoding="utf-8")
    _draw_photos(shelf / "photos")
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


def _draw_photos(folder: Path) -> None:
    """Noise, as CIFAR-100 is stored: two general classes with five leaf classes each."""
    rng, rows = np.random.default_rng(0), []
    for category, leaf in itertools.product(("fish", "trees"), range(5)):
        for pixels in rng.integers(0, 256, (40, 32, 32, 3), dtype=np.uint8):
            Image.fromarray(pixels).save(file := io.BytesIO(), "png")
            image = {"bytes": file.getvalue(), "path": None}
            rows.append({"img": image, "coarse_label": category, "fine_label": f"{category}{leaf}"})
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), folder / "test.parquet")


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
    page: Path,
    shelf: Path,
    given: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    every = typed(page)
    made = [name for name in ("store", "zoo") if any(f"--out ./{name}" in text for text in every)]
    here = tmp_path / "here"
    shutil.copytree(shelf, here, symlinks=True, ignore=shutil.ignore_patterns(*made))
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr("lora_ws.config.spec_root", lambda folder: _specs(here, folder))
    if any("s3://" in text for text in every):
        shutil.copytree(here / "loras", request.getfixturevalue("s3").root / "bucket" / "loras")
    if any("curl " in text for text in every):
        request.getfixturevalue("as_hub_user")()
        hub = tmp_path / "hub" / "models" / "owner" / "name"
        hub.mkdir(parents=True)
        shutil.copy(here / "file.safetensors", hub)
    names, served = dict(given), ""
    with ExitStack() as running:
        for text in every:
            if not text.startswith(TYPED):
                exec(text, names)
                continue
            program, *args = words(text)
            if program == "curl":
                args = [word.replace("http://127.0.0.1:8000", served) for word in args]
                said = subprocess.run(["curl", "--fail", *args], check=True, capture_output=True)
                assert json.loads(said.stdout)["finding"]["verdict"], text
            elif program == "ray":
                address = running.enter_context(_cluster(args))
                monkeypatch.setenv("RAY_ADDRESS", address)  # which is what `auto` means
            elif args[0] == "serve":
                served = running.enter_context(_server(args))
            else:
                _type(args)
    sys.modules.pop("my_net", None)


def _specs(here: Path, folder: str) -> Path:
    own = here / folder
    return own if own.is_dir() else ROOT / folder


def _type(args: list[str]) -> None:
    """Type a command of this library, with what makes it small."""
    line = " ".join(args)
    small = [more for start, more in SMALLER.items() if f"{line} ".startswith(f"{start} ")]
    args = [*args, *itertools.chain.from_iterable(small)]
    if args[0] in ("train", "sweep") and not {"--dataset", "per_adapter/constant"} & {*args}:
        args += ["--subset", "per_adapter/class"]  # one of those that the collection has
    if "--trainer.devices" in args:  # each device's process starts the command once more
        command = [sys.executable, "-m", "lora_ws", *args, "--featurizer", "StatsFlatVec"]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    else:
        assert main(args) in (0, 3), line


@contextmanager
def _said(command: list[str], pattern: str, **streams: Any) -> Iterator[str]:
    """What a program says that goes on, which ends with the page."""
    child = subprocess.Popen(command, encoding="utf-8", **streams)
    try:
        lines = child.stdout or child.stderr
        assert lines is not None
        yield next(match[1] for line in lines if (match := re.search(pattern, line)))
    finally:
        child.terminate()
        child.communicate()


@contextmanager
def _server(args: list[str]) -> Iterator[str]:
    """Start a server as typed, on a free port, and ask it what it is."""
    command = [sys.executable, "-m", "lora_ws", *args, "--port", "0"]
    with _said(command, r"running on (http://\S+)", stderr=subprocess.PIPE) as address:
        about = json.loads(urlopen(f"{address}/v1/about").read())
        assert about["known"] == len(examples())
        yield address


@contextmanager
def _cluster(args: list[str]) -> Iterator[str]:
    """Start a cluster as typed, on a free port, which ends with its program."""
    program = str(Path(sys.executable).parent / "ray")
    flags = ["--block", "--port", "0", "--num-cpus", "2", "--include-dashboard", "false"]
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT)}
    with _said(
        [program, *args, *flags],
        r"--address='(\S+)'",
        stdout=subprocess.PIPE,
        env={**os.environ, **quiet},
    ) as address:
        yield address

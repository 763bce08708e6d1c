"""Every command of `lora-ws`: where it is, what it does, how it is typed; imported when called."""

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

from lora_ws.memory import bounded
from lora_ws.workers import in_processes, on_engine

Around = Callable[..., AbstractContextManager[None]]


class Command(NamedTuple):
    """A row of the list that `lora-ws --help` prints.

    Attributes:
        where: module and function, imported when the command is called.
        text: what it does, in a few words.
        example: what to type after ``lora-ws`` and the command's name.
        flags: those that its help shows first, at most five.
        around: what is entered around it; its parameters are flags too.
    """

    where: str
    text: str
    example: str
    flags: tuple[str, ...] = ()
    around: tuple[Around, ...] = ()


# Two words are a command and what it acts on.
COMMANDS = {
    "demo": Command(
        "lora_ws.commands.demo:demo",
        "classify three shipped adapter files",
        "",
    ),
    "data list": Command(
        "lora_ws.commands.data:list_collections",
        "list the known collections",
        "",
    ),
    "data info": Command(
        "lora_ws.commands.data:info",
        "describe a collection",
        "lora-ws-mini",
    ),
    "data import": Command(
        "lora_ws.commands.data:import_",
        "import adapters from files or the Hub",
        "my-loras --out my-store --on_error skip",
        ("out", "card", "label", "on_error", "revision"),
        around=(bounded,),
    ),
    "data audit": Command(
        "lora_ws.commands.data:audit",
        "find what leaks between training and test adapters",
        "lora-ws-mini",
        ("subset", "split", "label", "as_json"),
        around=(bounded,),
    ),
    "data prompt-leak": Command(
        "lora_ws.commands.data:prompt_leak",
        "measure how much training prompts reveal of the labels",
        "lora-ws-mini",
        ("label", "base", "templates", "device", "as_json"),
        around=(bounded,),
    ),
    "featurize": Command(
        "lora_ws.commands.featurize:featurize",
        "write a representation to a file",
        "--featurizer StatsLayer --out features.parquet",
        ("out", "featurizer", "dataset", "subset", "label"),
        around=(bounded, on_engine),
    ),
    "train": Command(
        "lora_ws.commands.train:train",
        "train and evaluate classifiers",
        "--subset per_adapter/class --model SVC --seeds 3",
        ("dataset", "subset", "featurizer", "model", "seeds"),
        around=(bounded, on_engine, in_processes),
    ),
    "tune": Command(
        "lora_ws.commands.tune:tune",
        "search hyper-parameters",
        "--model DeepSets --search '{fit.lr: {low: 1e-4, high: 1e-2, log: true}}' --trials 20",
        ("search", "trials", "dataset", "model", "seeds"),
        around=(bounded,),
    ),
    "sweep": Command(
        "lora_ws.commands.reproduce:sweep",
        "train on each layer or matrix alone",
        "--over layers --featurizer FlatVec --seeds 3",
        ("over", "dataset", "subset", "featurizer", "seeds"),
        around=(bounded, on_engine),
    ),
    "reproduce": Command(
        "lora_ws.commands.reproduce:reproduce",
        "reproduce tables and figures of `eval/`",
        "table1 --seeds 3",
        ("dataset", "subset", "protocol", "seeds", "out"),
        around=(bounded, on_engine),
    ),
    "check-reader": Command(
        "lora_ws.commands.check_reader:check_reader",
        "measure the symmetries of a network",
        "MVProbe --rank 4",
        ("init_args", "featurizer", "layout", "rank", "seed"),
    ),
    "evaluate": Command(
        "lora_ws.commands.evaluate:evaluate",
        "evaluate a trained classifier",
        "--model runs/store/bundle --dataset my-store",
        ("model", "dataset", "subset", "part", "label"),
        around=(bounded,),
    ),
    "study": Command(
        "lora_ws.commands.study:study",
        "measure how robust trained classifiers are",
        "weight-noise --model tiny-sd",
        ("model", "spec", "dataset", "draws", "out"),
        around=(bounded, on_engine),
    ),
    "zoo base": Command(
        "lora_ws.commands.zoo:base",
        "train a small diffusion model",
        "--name my-sd --photos.source photos --out my-sd",
        ("name", "photos.source", "photos.category", "size.image_size", "out"),
    ),
    "zoo build": Command(
        "lora_ws.commands.zoo:build",
        "train many adapters at once",
        "--out my-zoo --finetune.rank 4",
        ("out", "base", "photos.source", "finetune.rank", "finetune.steps"),
    ),
    "zoo merge": Command(
        "lora_ws.commands.zoo:merge",
        "merge the shards of a collection",
        "shard-0 shard-1 --out my-zoo",
        ("out",),
    ),
    "zoo testbed": Command(
        "lora_ws.commands.zoo:testbed",
        "train adapters for composition",
        "--out testbed --finetune.rank 4",
        ("out", "base", "photos.source", "targets", "finetune.rank"),
    ),
    "zoo baselines": Command(
        "lora_ws.commands.zoo:baselines",
        "logistic regression on plain inputs",
        "my-zoo",
        ("photos",),
    ),
    "zoo export": Command(
        "lora_ws.commands.zoo:export",
        "write a collection as folders or parquet",
        "my-zoo my-zoo-parquet --format parquet",
        ("format",),
    ),
    "zoo publish": Command(
        "lora_ws.commands.zoo:publish",
        "upload a collection to the Hub",
        "my-zoo me/my-zoo --dry_run true",
        ("licence", "dry_run"),
    ),
    "inspect": Command(
        "lora_ws.commands.adapters:inspect",
        "describe an adapter file",
        "my_lora.safetensors",
        ("as_json",),
    ),
    "convert": Command(
        "lora_ws.commands.adapters:convert",
        "write an adapter in another file format",
        "my_lora.safetensors converted --to peft",
        ("to", "allow_pickle", "dimensions"),
    ),
    "predict": Command(
        "lora_ws.commands.predict:predict",
        "classify adapter files",
        "my_lora.safetensors --model runs/store/bundle",
        ("model", "top", "as_json", "revision", "allow_classes"),
    ),
    "push": Command(
        "lora_ws.commands.push:push",
        "upload a trained classifier to the Hub",
        "runs/store/bundle --repo_id me/my-reader",
        ("repo_id", "private", "allow_classes"),
    ),
    "scan": Command(
        "lora_ws.commands.scan:scan",
        "triage folders, lists and Hub repositories",
        "my-loras --out report.html",
        ("model", "policy", "out", "csv", "workers"),
        around=(on_engine,),
    ),
    "detector": Command(
        "lora_ws.commands.detector:detector",
        "train a detector on folders of files",
        "good bad --out detector",
        ("out", "harmless", "false_alarms"),
    ),
    "similar": Command(
        "lora_ws.commands.similar:similar",
        "find the most similar adapters",
        "my_lora.safetensors --index my-loras",
        ("index", "top", "workers", "cache", "as_json"),
        around=(bounded,),
    ),
    "prompt": Command(
        "lora_ws.commands.prompt:prompt",
        "predict words of the training prompt",
        "my_lora.safetensors --words dog cat lion",
        ("words", "templates", "base", "top", "device"),
    ),
    "search": Command(
        "lora_ws.commands.prompt:search",
        "find adapters that a text describes",
        "'a photo of a dog' --index my-loras",
        ("index", "model", "base", "top", "device"),
    ),
    "compose": Command(
        "lora_ws.commands.compose:compose",
        "generate images with several adapters",
        "--base tiny-sd --adapters a.safetensors b.safetensors --prompt 'a photo of a lion'",
        ("base", "adapters", "prompt", "method", "out"),
    ),
    "attribute": Command(
        "lora_ws.commands.attribute:attribute",
        "attribute an image to its adapters",
        "--base tiny-sd --adapters a.safetensors b.safetensors --prompt 'a photo of a lion'",
        ("base", "adapters", "prompt", "from_image", "out"),
    ),
    "concepts erase": Command(
        "lora_ws.commands.concepts:erase",
        "erase a concept from a base model",
        "--base digit-sd --concept 'a photo of three' --preserve 'a photo of eight'",
        ("base", "concept", "preserve", "budget", "out"),
    ),
    "concepts amplify": Command(
        "lora_ws.commands.concepts:amplify",
        "amplify a concept in a base model",
        "--base digit-sd --concept 'a photo of three'",
        ("base", "concept", "budget", "images", "out"),
    ),
    "concepts apply": Command(
        "lora_ws.commands.concepts:apply",
        "write an edited base model, or the edit as an adapter",
        "erased/edit.safetensors --base digit-sd --out my-sd",
        ("base", "out", "to", "rank"),
    ),
    "serve": Command(
        "lora_ws.commands.serve:serve",
        "serve a web page and an API for single files",
        "--port 8000",
        ("model", "index", "host", "port", "max_mb"),
    ),
    "dedup": Command(
        "lora_ws.commands.similar:dedup",
        "group duplicate and near-duplicate adapters",
        "my-loras --near 0.99",
        ("equal", "near", "workers", "cache", "as_json"),
        around=(bounded,),
    ),
    "completion": Command(
        "lora_ws.commands.completion:completion",
        "print a script that completes commands in a shell",
        "bash",
    ),
}


def function_of(name: str) -> Callable[..., int | None]:
    """Import the function of a command."""
    module, _, function = COMMANDS[name].where.partition(":")
    return getattr(importlib.import_module(module), function)


class Described(NamedTuple):
    """What `lora_ws.config.parse` is told of a command, in its order."""

    prog: str
    example: str
    first: tuple[str, ...]
    around: tuple[Around, ...]


def described(name: str) -> Described:
    """What a command is called, how it is typed, and which flags its help shows first."""
    command = COMMANDS[name]
    typed = f"lora-ws {name} {command.example}".rstrip()
    return Described(f"lora-ws {name}", typed, command.flags, command.around)

"""Adapter files of every kind, spoilt at random: each is a finding, soon, and in little memory.

`python tests/fuzz_adapters.py --cases 20000` says how many were refused for what, and fails where a
finding is `failed` (an exception outside the family), takes more than five CPU seconds or 512 MiB,
is no valid JSON, or holds words that a terminal would act on.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from lora_ws.adapters import AdapterRef
from lora_ws.audit.classify import classify_files
from lora_ws.bundle.shipped import ShippedReader

Tensors = dict[str, np.ndarray]
MOST_SECONDS, MOST_MIB = 5.0, 512
EXAMPLE = Path(str(files("lora_ws"))) / "_assets" / "examples" / "orchid.safetensors"
STEMS = (
    "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_v",
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "base_model.model.transformer_blocks.0.attn.to_q",
    "lora_unet_double_blocks_0_img_attn_qkv",
    "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
    "diffusion_model.single_blocks.0.linear1",
    "module.transformer._orig_mod.blocks.3.attn2.to_out.0",
    "lora_unet_blocks_1_self_attn_q",
    "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q",
    "unet.input_blocks.4.1.transformer_blocks.0.attn2.to_k",
)
FORMS: tuple[dict[str, tuple[int, ...]], ...] = (
    {"lora_A.weight": (4, 24), "lora_B.weight": (24, 4)},
    {"lora_down.weight": (2, 24), "lora_up.weight": (24, 2), "alpha": ()},
    {"lora_A": (3, 24), "lora_B": (24, 3), "lora_E": (3, 1)},
    {"lora_A.weight": (4, 24), "lora_B.weight": (24, 4), "lora_magnitude_vector": (24,)},
    {"lora_down.weight": (2, 8, 1, 1), "lora_mid.weight": (2, 2, 3, 3), "lora_up.weight": (8, 2)},
    {"hada_w1_a": (24, 2), "hada_w1_b": (2, 24), "hada_w2_a": (24, 2), "hada_w2_b": (2, 24)},
    {"lokr_w1": (4, 4), "lokr_w2": (6, 6)},
    {"lokr_w1": (96, 48), "lokr_w2": (96, 64)},
    {"lokr_w1_a": (4, 2), "lokr_w1_b": (2, 4), "lokr_w2": (6, 6), "alpha": ()},
    {"diff": (24, 24), "diff_b": (24,)},
)
ENDINGS = (
    *("alpha", "lora_E", "lokr_w1", "lokr_w2_a", "lokr_t2", "hada_w1_a", "diff", "dora_scale"),
    *(
        "oft_blocks",
        "lora_A",
        "lora_mid.weight",
        "\x1b[2J",
        "w_norm",
        "lora.magnitude",
        "lora_B.bias",
    ),
)
SHAPES = ((), (1,), (4,), (2, 3), (4, 4), (2, 2, 3, 3), (0, 4), (3, 3, 3))
VALUES = (1e38, 3e38, 1e-40, float("nan"), float("inf"), 0.0, -1e20)
TYPES = ("f2", "f4", "f8", "i4", "u1", "i8")
SETTINGS = (
    *("alpha", "lora_alpha", "r", "rank_pattern", "alpha_pattern", "peft_type", "init_r"),
    *("init_lora_weights", "use_rslora", "use_qalora"),
)
SAID: tuple[Any, ...] = (
    *(0, -1, 1e308, -1e308, 10**400, True, None, "8", [1], {"a": 1}, 1e-320, 1e39, 2**70),
    *("LORA", "LOHA", "LOKR", "ADALORA", "IA3", "X\x1b[2J", {"to_q": 4}, {"(": 2}, {"to_q": 1e308}),
)


@cache
def judged() -> Tensors:
    """An adapter that the shipped classifier has a verdict on."""
    return load_file(EXAMPLE)


def adapter(draw: random.Random, numbers: np.random.Generator) -> Tensors:
    """A few modules of one kind, or a whole file, right as they are."""
    if draw.random() < 1 / 20:
        return dict(judged())
    form = draw.choice(FORMS)
    return {
        f"{stem}.{role}": numbers.standard_normal(shape, dtype=np.float32)
        for stem in draw.sample(STEMS, draw.randint(1, 3))
        for role, shape in form.items()
    }


def spoil(tensors: Tensors, draw: random.Random) -> None:
    """Change one tensor, its name or its shape, or add one."""
    key = draw.choice(list(tensors))
    values = tensors[key]
    match draw.randrange(10):
        case 0:
            del tensors[key]
        case 1 if values.ndim:
            tensors[key] = values[: draw.randint(0, len(values))]
        case 2:
            tensors[key] = values.reshape(-1)
        case 3:
            tensors[key] = np.full(values.shape, draw.choice(VALUES), np.float32)
        case 4:
            with np.errstate(all="ignore"):
                tensors[key] = values.astype(draw.choice(TYPES))
        case 5 if values.ndim:
            tensors[key] = np.repeat(values, draw.randint(2, 40), axis=0)
        case 6:
            tensors[key] = values.T
        case 7:
            tensors[key] = values[..., None, None]
        case 8:
            stem = key[: draw.randint(1, len(key))]
            value = np.full(draw.choice(SHAPES), draw.choice((1.0, *VALUES)), np.float32)
            tensors[f"{stem}.{draw.choice(ENDINGS)}"] = value
        case _:
            old, new = draw.choice(((".", "_"), ("unet", "transformer"), ("lora", "hada")))
            tensors[key.replace(old, new, 1)] = values


def damage(file: Path, draw: random.Random) -> None:
    """Change some bytes, cut some off, or put some behind; most of them in the header."""
    data = bytearray(file.read_bytes())
    for _ in range(draw.randint(1, 4)):
        data[min(int(len(data) * draw.random() ** 4), len(data) - 1)] = draw.randrange(256)
    end = draw.choice((len(data), len(data), draw.randint(1, len(data))))
    file.write_bytes(data[:end] + b"\0" * draw.choice((0, 0, 0, 5)))


def settings(draw: random.Random) -> str:
    """What might stand in an adapter_config.json."""
    said = {draw.choice(SETTINGS): draw.choice(SAID) for _ in range(draw.randint(0, 3))}
    return json.dumps({"peft_type": draw.choice(SAID[-9:-4]), **said})


def write(folder: Path, draw: random.Random, numbers: np.random.Generator) -> Path:
    """One file, in most cases with settings beside it or inside."""
    tensors = adapter(draw, numbers)
    for _ in range(draw.randint(0, 3)):
        if tensors:
            spoil(tensors, draw)
    inside = {"lora_adapter_metadata": settings(draw)} if draw.random() < 1 / 3 else None
    file = folder / "adapter_model.safetensors"
    contiguous = {k: np.ascontiguousarray(v) if v.ndim else v for k, v in tensors.items()}
    save_file(contiguous, file, inside)
    if draw.random() < 1 / 8:
        damage(file, draw)
    beside = folder / "adapter_config.json"
    beside.unlink(missing_ok=True)
    if draw.random() < 1 / 3:
        beside.write_text(settings(draw), encoding="utf-8")
    return file


def run(cases: int, seed: int) -> tuple[Counter[str], float]:
    """Write and judge files.

    Returns:
        reason -> how many files, empty for those that are read; the most CPU seconds of one.

    Raises:
        AssertionError: a file got through; says which, to be made again.
    """
    reasons: Counter[str] = Counter()
    longest, reader = 0.0, ShippedReader()
    with tempfile.TemporaryDirectory() as folder:
        for case in range(cases):
            draw, numbers = random.Random(f"{seed} {case}"), np.random.default_rng([seed, case])
            file = write(Path(folder), draw, numbers)
            start = time.process_time()
            finding = classify_files([AdapterRef.parse(file)], reader)[0].finding
            longest = max(longest, taken := time.process_time() - start)
            assert finding is not None
            which = f"seed {seed}, case {case}: {finding.message}"
            assert finding.reason != "failed", which
            assert taken <= MOST_SECONDS, which
            assert finding.message.isprintable(), which
            json.dumps(finding.to_dict(), allow_nan=False)
            reasons[finding.reason] += 1
    return reasons, longest


def main() -> None:
    """Run and print."""
    import resource  # not on Windows

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    # What the classifier takes is no file's doing.
    classify_files([AdapterRef.parse(EXAMPLE)], ShippedReader())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    reasons, longest = run(args.cases, args.seed)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    for reason, count in reasons.most_common():
        sys.stdout.write(f"{reason or 'read':16} {count}\n")
    sys.stdout.write(f"longest {longest:.2f} CPU s; memory grew by {grown:.0f} MiB\n")
    assert grown <= MOST_MIB


if __name__ == "__main__":
    main()

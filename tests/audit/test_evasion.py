"""Files changed to be taken for others: what draws the same is found, the rest told apart."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factories import matrices
from safetensors.torch import save_file
from tolerances import rounding

from lora_ws.adapters import AdapterRef
from lora_ws.audit.classify import Finding, classify_files
from lora_ws.audit.dedup import copies
from lora_ws.audit.lookup import DedupSpec, find_copies
from lora_ws.audit.policy import Policy
from lora_ws.audit.scan import ScanSpec, scan
from lora_ws.audit.triage import triage
from lora_ws.bundle import Bundle
from lora_ws.collection import AdapterSet
from lora_ws.errors import ConfigError

Tensors = dict[str, Any]
DOWN, UP = ".lora.down.weight", ".lora.up.weight"
FIRST = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def classifier(_cache: None) -> Bundle:
    return Bundle.from_pretrained("tiny-sd")


@pytest.fixture(scope="module")
def known(mini: AdapterSet) -> Tensors:
    """An upload that the classifier knows."""
    layers = tuple((s.name, s.in_features, s.out_features) for s in mini.layout.layers)
    row = np.asarray(mini.weights[400], np.float32)
    return {key: np.asarray(value) for key, value in matrices(row, layers, 1).items()}


def each(change: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]):
    """Change the two factors of every module."""

    def changed(tensors: Tensors) -> Tensors:
        found = {}
        for key, down in tensors.items():
            if key.endswith(DOWN):
                stem = key.removesuffix(DOWN)
                found[key], found[stem + UP] = change(down, tensors[stem + UP])
        return found

    return changed


def padded(rows: int) -> Callable[[Tensors], Tensors]:
    return each(lambda a, b: (np.pad(a, ((0, rows), (0, 0))), np.pad(b, ((0, 0), (0, rows)))))


def half_padded(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([a, a[:, ::-1]]), np.pad(b, ((0, 0), (0, len(a))))


def other_padded(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.pad(a, ((len(a), 0), (0, 0))), np.concatenate([b[::-1], b], axis=1)


def scaled(factor: float) -> Callable[[Tensors], Tensors]:
    return each(lambda a, b: (a * np.float32(factor), b / np.float32(factor)))


def split(parts: int) -> Callable[[Tensors], Tensors]:
    return each(lambda a, b: (np.tile(a, (parts, 1)), np.tile(b / parts, (1, parts))))


def with_alpha(tensors: Tensors) -> Tensors:
    """The scale taken out of B and said beside it."""
    changed = each(lambda a, b: (a, 8 * b))(tensors)
    stems = {key.removesuffix(DOWN) for key in tensors if key.endswith(DOWN)}
    return changed | {f"{stem}.alpha": np.float32(1 / 8) for stem in stems}


def renamed(prefix: str, down: str, up: str) -> Callable[[Tensors], Tensors]:
    def changed(tensors: Tensors) -> Tensors:
        return {
            key.replace("unet.", prefix).replace(DOWN, down).replace(UP, up): value
            for key, value in tensors.items()
        }

    return changed


def kohya(tensors: Tensors) -> Tensors:
    found = {}
    for key, value in tensors.items():
        for ending, name in ((DOWN, "lora_down"), (UP, "lora_up")):
            if key.endswith(ending):
                path = key.removesuffix(ending).removeprefix("unet.").replace(".", "_")
                found[f"lora_unet_{path}.{name}.weight"] = value
    return found


def with_zeros(tensors: Tensors) -> Tensors:
    """A module of the same base that does nothing."""
    stem = "unet.down_blocks.0.attentions.0.proj_in"
    zeros = np.zeros((1, 32), np.float32), np.zeros((32, 1), np.float32)
    return tensors | {stem + DOWN: zeros[0], stem + UP: zeros[1]}


# What changes nothing that is drawn, to the last bit.
SAME: dict[str, Callable[[Tensors], Tensors]] = {
    "padded by one": padded(1),
    "padded by three": padded(3),
    "padded by seven": padded(7),
    "padded on one side": each(half_padded),
    "factors times 2 and half": scaled(2.0),
    "factors times 1/64 and 64": scaled(1 / 64),
    "both negative": each(lambda a, b: (-a, -b)),
    "padded on the other side": each(other_padded),
    "tensors in another order": lambda tensors: dict(reversed(tensors.items())),
    "scale beside the factors": with_alpha,
    "wider numbers": each(lambda a, b: (a.astype(np.float64), b.astype(np.float64))),
    "spelt as PEFT": renamed("base_model.model.", ".lora_A.weight", ".lora_B.weight"),
    "spelt as PEFT in diffusers": renamed(
        "unet.", ".lora_A.default.weight", ".lora_B.default.weight"
    ),
    "spelt as kohya": kohya,
    "a module of zeros": with_zeros,
    "another name": lambda tensors: tensors,
}
# What rounds, or splits the update into other parts.
ROUNDED: dict[str, Callable[[Tensors], Tensors]] = {
    "split in two": split(2),
    "split in five": split(5),
    "factors times 3 and a third": scaled(3.0),
    "bfloat16": lambda tensors: {k: torch.tensor(v).bfloat16() for k, v in tensors.items()},
}


def written(folder: Path, name: str, tensors: Tensors, **metadata: str) -> AdapterRef:
    file = folder / f"{name.replace('/', ' of ')}.safetensors"
    stored = {
        key: v if isinstance(v, torch.Tensor) else torch.tensor(np.ascontiguousarray(v))
        for key, v in tensors.items()
    }
    save_file(stored, file, {"ss_name": name, **metadata})
    return AdapterRef.parse(file)


def told(refs: list[AdapterRef], bundle: Bundle | None = None) -> list[Finding]:
    found = [one.finding for one in classify_files(refs, bundle)]
    assert all(one is not None and not one.reason for one in found)
    return [one for one in found if one is not None]


def test_equal_updates_have_equal_verdicts(known: Tensors, classifier: Bundle, tmp_path: Path):
    changes = {**SAME, **ROUNDED}
    refs = [written(tmp_path, "plain", known)]
    refs += [written(tmp_path, name, change(known)) for name, change in changes.items()]
    plain, *others = told(refs, classifier)
    assert plain.verdict is not None
    assert plain.verdict.label
    assert not Policy().flags(plain)
    for name, one in zip(changes, others, strict=True):
        assert one.verdict is not None, name
        assert one.verdict.label == plain.verdict.label, name
        if name in SAME:
            assert one.update_hash == plain.update_hash, name
        # bfloat16 rounds what it reads by eight bits, the others by the network's own sums.
        steps = 2**8 if name == "bfloat16" else 8
        error = rounding(classifier.layout.size, steps=steps)
        assert abs(one.verdict.confidence - plain.verdict.confidence) <= error, name
        assert not Policy().flags(one), name
        assert not one.partly_read
    (group,) = find_copies([str(tmp_path)], DedupSpec(cache=tmp_path / "cache"))[1].equal
    assert len(group) == len(refs)


ZERO_LAYERS = {
    "a transformer": ("transformer.x", 64, 64),
    "a block of FLUX": ("transformer.single_transformer_blocks.0.attn.to_q", 3072, 3072),
    "text of SD1.5": ("unet.down_blocks.0.attentions.0.transformer_blocks.1.attn2.to_k", 768, 32),
    "text of SDXL": ("unet.mid_block.attentions.0.transformer_blocks.1.attn2.to_v", 2048, 64),
}


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("case", ZERO_LAYERS)
def test_a_few_modules_of_another_base_hide_nothing(
    case: str, rank: int, known: Tensors, classifier: Bundle, tmp_path: Path
):
    stem, inputs, outputs = ZERO_LAYERS[case]
    added = {
        f"{stem}.lora_A.weight": np.zeros((rank, inputs), np.float32),
        f"{stem}.lora_B.weight": np.zeros((outputs, rank), np.float32),
    }
    refs = [written(tmp_path, "plain", known), written(tmp_path, "a", known | added)]
    plain, changed = told(refs, classifier)
    assert changed.facts is not None
    assert plain.facts is not None
    assert changed.facts.base == plain.facts.base == "tiny-sd"
    assert changed.update_hash == plain.update_hash
    assert changed.verdict is not None
    assert plain.verdict is not None
    assert changed.verdict.label == plain.verdict.label
    (flag,) = Policy().flags(changed)
    assert flag.startswith(("odd: 1 modules are of another", "odd: 2 tensors are of modules"))
    assert not Policy(oddities=False).flags(changed)


def test_more_modules_of_another_base_than_its_own_are_flagged(known: Tensors, tmp_path: Path):
    added: Tensors = {}
    for number in range(len(known) // 2 + 1):
        stem = f"transformer.transformer_blocks.{number}.attn.to_q"
        added[f"{stem}.lora_A.weight"] = np.zeros((1, 3072), np.float32)
        added[f"{stem}.lora_B.weight"] = np.zeros((3072, 1), np.float32)
    plain, changed = told(
        [written(tmp_path, "plain", known), written(tmp_path, "a", known | added)], None
    )
    assert changed.update_hash == plain.update_hash
    (flag,) = Policy().flags(changed)
    assert flag.startswith(f"odd: {len(known) // 2} modules are of another base model")


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


UNREAD: dict[str, Tensors] = {
    "bias of B": {f"{FIRST}.lora_B.bias": ones(32)},
    "bias of the module": {f"{FIRST}.diff_b": ones(32)},
    "DoRA": {f"{FIRST}.lora_magnitude_vector": ones(32)},
    "DoRA of LyCORIS": {f"{FIRST}.dora_scale": ones(32, 1)},
    "a norm": {"unet.down_blocks.0.attentions.0.norm.w_norm": ones(32)},
    "rotations": {"unet.up_blocks.1.attentions.0.proj_in.oft_blocks": ones(2, 4, 4)},
    "a whole module": {"unet.conv_in.weight": ones(32, 4, 3, 3)},
    "a module of another name": {
        "some.layer.lora_A.weight": ones(1, 4),
        "some.layer.lora_B.weight": ones(4, 1),
    },
    "an embedding": {"bundle_emb.token.string_to_param": ones(1, 64)},
}


def test_what_is_not_read_never_looks_the_same(known: Tensors, classifier: Bundle, tmp_path: Path):
    refs = [written(tmp_path, "plain", known), written(tmp_path, "same", known)]
    refs += [written(tmp_path, name, known | more) for name, more in UNREAD.items()]
    # Of one kind and another value.
    twice = {key: 2 * value for key, value in UNREAD["DoRA"].items()}
    refs.append(written(tmp_path, "DoRA twice", known | twice))
    plain, same, *others = told(refs, classifier)
    allow = Policy(allow=(plain.update_hash,), bases=("SDXL",))
    assert not allow.flags(plain)
    assert not allow.flags(same)
    for ref, one in zip(refs[2:], others, strict=True):
        assert one.partly_read, ref.name
        assert one.modules_ignored > plain.modules_ignored, ref.name
        assert one.facts is not None
        assert one.facts.tensors_unread
        assert allow.flags(one), ref.name
        assert Policy(deny=(plain.update_hash,)).flags(one), ref.name
        assert not Policy(allow=(one.sha256,), bases=("SDXL",)).flags(one)
        assert any("partly read" in flag for flag in Policy(partly_read=True).flags(one))
        assert Finding.from_dict(one.to_dict()) == one
    spec = DedupSpec(cache=tmp_path / "cache")
    equal, near = find_copies([str(tmp_path)], spec)[1]
    assert [{Path(name).stem for name in group} for group in equal] == [{"plain", "same"}]
    assert len(near) == 1


def test_without_hashes_copies_are_told_by_sketches(known: Tensors, tmp_path: Path):
    refs = [written(tmp_path, name, known) for name in ("plain", "same")]
    refs.append(written(tmp_path, "DoRA", known | UNREAD["DoRA"]))
    other = {key: value[..., ::-1].copy() for key, value in known.items()}
    refs.append(written(tmp_path, "other", other))
    spec = ScanSpec(hashes=False, cache=tmp_path / "cache")
    found = scan(refs, spec)
    assert all(not one.update_hash and not one.reason for one in found)
    assert [one.partly_read for one in found] == [False, False, True, False]
    (group,) = copies(found.index()).equal
    assert {Path(name).stem for name in group} == {"plain", "same"}
    lists = tmp_path / "policy.yaml"
    lists.write_text(f"deny: ['{'0' * 64}']", encoding="utf-8")
    with pytest.raises(ConfigError, match="hashes: expected true"):
        triage([str(tmp_path)], replace(spec, policy=lists))

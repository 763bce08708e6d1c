"""Every kind of adapter that the installed PEFT makes: its own update, or a refusal by name."""

import copy
import json
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import numpy as np
import peft
import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file, save_file
from tolerances import rounding
from torch import nn

from lora_ws.adapters import read_adapter
from lora_ws.adapters.adapter import Module
from lora_ws.adapters.settings import OPTIONS, READ, read_configs
from lora_ws.errors import AdapterError

KINDS = cast(
    "dict[str, Any]",
    {str(getattr(kind, "value", kind)): make for kind, make in PEFT_TYPE_TO_CONFIG_MAPPING.items()},
)
INPUTS, OUTPUTS = 16, 24
# What some kinds ask for on layers as small as these.
NEEDS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10},
    "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 8},
    "IA3": {"feedforward_modules": []},
    "MISS": {"r": 4},
    "PSOFT": {"r": 4},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 2},
    "VBLORA": {"vector_length": 4, "num_vectors": 8},
    "WAVEFT": {"n_frequency": 8},
}
# Settings that say how an adapter was trained, where it goes, or who it is: no update hangs on
# them beyond what its matrices show. Everything else of `LoraConfig` is read, or refused.
HARMLESS = {
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "target_modules", "exclude_modules", "lora_dropout", "bias"),
    *("fan_in_fan_out", "modules_to_save", "layers_to_transform", "layers_pattern"),
    *("rank_pattern", "megatron_config", "megatron_core", "trainable_token_indices"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "use_dora", "velora_config"),
    *("qalora_group_size", "runtime_config", "lora_bias", "ensure_weight_tying"),
}
UNDERSTOOD = {"peft_type", "lora_alpha", "alpha_pattern", "use_rslora", "init_lora_weights"}


# Prompts, and parts of language models: PEFT makes none of them for a model such as this.
OF_TEXT = {
    *("ADAPTION_PROMPT", "CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING"),
    *("PROMPT_TUNING", "P_TUNING", "SHADOW", "XLORA"),
}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(INPUTS, OUTPUTS)
        self.to_v = nn.Linear(INPUTS, OUTPUTS)
        self.conv1 = nn.Conv2d(4, 8, 3)
        self.conv2 = nn.Conv2d(8, 8, 3, groups=2)
        self.conv_in = nn.Conv1d(4, 8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.to_q(x) + self.to_v(x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mid_block = Attention()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mid_block(x)


def saved(folder: Path, config: PeftConfig, dtype: torch.dtype = torch.float32) -> Path:
    """Write an adapter of random weights with PEFT, stored as ``dtype``."""
    model = get_peft_model(Net(), config)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    model.save_pretrained(str(folder))
    file = folder / "adapter_model.safetensors"
    save_file({k: v.to(dtype) for k, v in load_file(file).items()}, file)
    return folder


def in_header(**config: Any) -> dict[str, str]:
    """A header's metadata with the settings as diffusers packs them."""
    packed = {f"unet.{key}": value for key, value in config.items()}
    return {"lora_adapter_metadata": json.dumps(packed)}


def merged_updates(folder: Path) -> dict[str, tuple[np.ndarray, float]]:
    """Merged minus base weight of every layer, as PEFT loads the folder; and the sizes of both."""
    base = Net()
    loaded: Any = PeftModel.from_pretrained(copy.deepcopy(base), str(folder))
    merged = loaded.merge_and_unload()
    found = {}
    for name, layer in base.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d):
            after: torch.Tensor = merged.get_parameter(f"{name}.weight").detach()
            delta = (after - layer.weight.detach()).flatten(1)
            found[name] = (
                delta.numpy(),
                float((after.abs().max() + layer.weight.abs().max()).detach()),
            )
    return found


def dense(module: Module) -> np.ndarray:
    return module.scale * module.up.astype(np.float64) @ module.down.astype(np.float64)


def check(folder: Path) -> None:
    adapter = read_adapter(folder)
    expected = merged_updates(folder)
    changed = {name for name, (delta, _) in expected.items() if delta.any()}
    assert set(adapter.modules) == changed
    assert changed
    for name in changed:
        delta, size = expected[name]
        # A sum over the rank, and the difference of two weights; products of three factors each.
        error = rounding(16, size=max(size, float(np.abs(delta).max())), steps=3)
        np.testing.assert_allclose(dense(adapter.modules[name]), delta, rtol=0, atol=error)


LINEAR = ["to_q", "to_v"]
ON_LINEAR = {"target_modules": LINEAR}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("LORA", {"r": 2, "lora_alpha": 16}),
    "LoRA, rank-stabilised": ("LORA", {"r": 4, "lora_alpha": 16, "use_rslora": True}),
    "LoRA, gaussian": ("LORA", {"r": 1, "init_lora_weights": "gaussian"}),
    "LoRA, orthogonal": ("LORA", {"r": 2, "init_lora_weights": "orthogonal", **ON_LINEAR}),
    "LoRA, EVA": ("LORA", {"r": 2, "init_lora_weights": "eva", **ON_LINEAR}),
    "LoRA, MiCA": ("LORA", {"r": 2, "init_lora_weights": "mica", **ON_LINEAR}),
    "LoRA, patterns": (
        "LORA",
        {
            "r": 4,
            "lora_alpha": -6,
            "use_rslora": True,
            "rank_pattern": {"to_v": 8, "^mid_block.conv1": 3},
            "alpha_pattern": {".*to_(v|k)": 5, "conv1": 9},
        },
    ),
    "LoRA of a convolution over one axis": ("LORA", {"r": 2, "target_modules": ["conv_in"]}),
    "AdaLoRA": ("ADALORA", {"init_r": 6, "target_r": 4, "lora_alpha": 16}),
    "AdaLoRA, no alpha": ("ADALORA", {"init_r": 3, "target_r": 2, "lora_alpha": 0}),
    "LoHa": ("LOHA", {"r": 4, "alpha": 16}),
    "LoHa of rank 1": ("LOHA", {"r": 1, "alpha": 3, "alpha_pattern": {"to_v": 5}}),
    "LoHa, Tucker": ("LOHA", {"r": 2, "alpha": 1, "use_effective_conv2d": True}),
    "LoHa, patterns": (
        "LOHA",
        {"r": 3, "rank_pattern": {"to_q": 5, "conv1": 2}, "alpha_pattern": {"conv1": -3}},
    ),
    "LoHa of a convolution in groups": ("LOHA", {"r": 3, "target_modules": ["conv2"]}),
    "LoKr": ("LOKR", {"r": 1, "alpha": 16}),
    "LoKr of whole matrices": ("LOKR", {"r": 8, "alpha": 4}),
    "LoKr, ranks by pattern": (
        "LOKR",
        {"r": 2, "alpha": 6, "rank_pattern": {"to_v": 8}, "alpha_pattern": {"conv1": 5}},
    ),
    "LoKr, both sides": ("LOKR", {"r": 1, "alpha": 2, "decompose_both": True}),
    "LoKr, another factor": ("LOKR", {"r": 2, "alpha": 2, "decompose_factor": 4}),
    "LoKr, Tucker": ("LOKR", {"r": 1, "alpha": 2, "use_effective_conv2d": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_read_is_what_peft_merges(case: str, tmp_path: Path) -> None:
    kind, options = CASES[case]
    options = {"target_modules": [*LINEAR, "conv1"], **NEEDS.get(kind, {}), **options}
    check(saved(tmp_path, KINDS[kind](**options)))


def test_lokr_of_a_convolution_over_one_axis_is_refused_where_peft_wrote_it(
    tmp_path: Path,
) -> None:
    folder = saved(tmp_path, KINDS["LOKR"](r=2, target_modules=["conv_in"]))
    with pytest.raises(AdapterError, match="PEFT multiplies in an order of its own") as error:
        read_adapter(folder)
    assert error.value.reason == "method"


def test_lora_of_a_convolution_in_groups_is_refused_by_name(tmp_path: Path) -> None:
    folder = saved(tmp_path, KINDS["LORA"](r=4, target_modules=["conv2"]))
    with pytest.raises(AdapterError, match="convolution in groups, which is not read"):
        read_adapter(folder)
    file = tmp_path / "none.safetensors"
    stem = "unet.mid_block.attentions.0.proj_in"
    shapes = {"lora_A.weight": (0, 8, 1, 1), "lora_B.weight": (8, 2)}
    save_file({f"{stem}.{role}": torch.zeros(shape) for role, shape in shapes.items()}, file)
    with pytest.raises(AdapterError, match=r"the two must agree$"):
        read_adapter(file)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["ADALORA", "LOHA", "LOKR"])
def test_types_of_numbers_change_nothing(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    config = KINDS[kind](target_modules=LINEAR, **NEEDS.get(kind, {}))
    folder = saved(tmp_path, config, dtype)
    # Read back as float32 by PEFT too, whose own product in half precision would round.
    stored = load_file(folder / "adapter_model.safetensors")
    expected = read_adapter(folder)
    save_file({k: v.float() for k, v in stored.items()}, folder / "adapter_model.safetensors")
    assert all(
        np.array_equal(module.up, read_adapter(folder).modules[name].up)
        for name, module in expected.modules.items()
    )
    check(folder)


def test_a_pruned_adalora_keeps_the_divisor_it_began_with(tmp_path: Path) -> None:
    config = KINDS["ADALORA"](
        init_r=4, target_r=2, lora_alpha=6, target_modules=LINEAR, total_step=10
    )
    kept = [True, False, True, True]
    names = [f"mid_block.{name}.lora_E.default" for name in LINEAR]
    config.rank_pattern = dict.fromkeys(names, kept)
    folder = saved(tmp_path, config)
    assert {m.rank for m in read_adapter(folder).modules.values()} == {sum(kept)}
    check(folder)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"])
@pytest.mark.parametrize("inside", [False, True])
def test_starts_that_change_the_base_are_refused(start: str, inside: bool, tmp_path: Path) -> None:
    folder = saved(tmp_path, peft.LoraConfig(r=2, target_modules=LINEAR))
    file, beside = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    config = {**json.loads(beside.read_text(encoding="utf-8")), "init_lora_weights": start}
    beside.write_text(json.dumps(config), encoding="utf-8")
    if inside:
        file = folder / "a.safetensors"
        stored = load_file(folder / "adapter_model.safetensors")
        save_file(stored, file, in_header(**config))
    with pytest.raises(AdapterError, match=f"`init_lora_weights` is `{start}`") as error:
        read_adapter(file)
    assert error.value.reason == "needs-base"


@pytest.mark.parametrize("option", OPTIONS)
def test_options_that_change_the_product_are_refused(option: str, tmp_path: Path) -> None:
    folder = saved(tmp_path, peft.LoraConfig(r=2, target_modules=LINEAR))
    beside = folder / "adapter_config.json"
    config = {**json.loads(beside.read_text(encoding="utf-8")), option: [1]}
    beside.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(AdapterError, match=f"`{option}` is set") as error:
        read_adapter(folder)
    assert error.value.reason == "method"


def test_no_setting_of_lora_is_passed_over() -> None:
    """A PEFT that brings a new one has it sorted here first."""
    known = HARMLESS | UNDERSTOOD | set(OPTIONS)
    assert {field.name for field in fields(peft.LoraConfig)} <= known


@pytest.mark.parametrize("kind", sorted(set(KINDS) - set(READ)))
def test_settings_alone_refuse_every_other_kind(kind: str) -> None:
    for text, metadata in (
        (json.dumps({"peft_type": kind}), {}),
        (None, in_header(peft_type=kind)),
    ):
        with pytest.raises(AdapterError, match=f"got `{kind}`") as error:
            read_configs(metadata, text, "a.safetensors")
        assert error.value.reason in ("needs-base", "method")


@pytest.mark.slow
def test_every_other_kind_that_peft_writes_is_refused_by_name(tmp_path: Path) -> None:
    unmade = set()
    for kind in sorted(set(KINDS) - set(READ)):
        make = KINDS[kind]
        options = {**ON_LINEAR, **NEEDS.get(kind, {})}
        if "target_modules" not in {field.name for field in fields(make)}:
            options.pop("target_modules")
        try:
            folder = saved(tmp_path / kind, make(**options))
        except (AttributeError, KeyError, TypeError, ValueError):
            unmade.add(kind)
            continue
        with pytest.raises(AdapterError, match=f"got `{kind}`"):
            read_adapter(folder)
    assert unmade <= OF_TEXT

"""Patterns in PEFT's settings, against PEFT: the function that matches them, and whole models."""

import json
import re
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key
from tolerances import rounding
from torch import nn

from lora_ws.adapters import read_adapter
from lora_ws.adapters.patterns import LENGTH, parse_pattern
from lora_ws.errors import AdapterError

PATHS = (
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_v",
    "down_blocks.10.attentions.0.transformer_blocks.0.attn1.to_out.0",
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_q",
    "up_blocks.3.attentions.2.transformer_blocks.0.ff.net.0.proj",
)
PATTERNS = (
    *("to_q", "attn1.to_q", r"attn1\.to_q", "attn.*", ".*attn2.*", "attn.?.to_q", "o_q", ""),
    *("^down_blocks.*", "^to_q", "to_q$", PATHS[0], f"^{PATHS[1]}$", "to_(q|v)", "to_(?:q|v)"),
    *("(attn1|attn2).to_q", "to_q|to_v", "^mid_block.*|to_out.0", "to_[qv]", "to_[^qv]", "to_q?"),
    *(r"down_blocks\.\d+\..*to_q", r"down_blocks.\d\d.*", r"\w+_block[s]?.\d*.*", "a+ttn1.to_q"),
    *("up_blocks.[0-3].*proj", r"ff\.net(\.0)?\.proj", r"ff.net(\.1)?.*(|x)proj", ".*?to_v", "t.+"),
    *(r"[\d]", r"net\.[\w.]+", "((down|up)_blocks|mid_block).*to_(q|v)", "to_(q(x)?|v)"),
)
OUTSIDE = (
    *("(a+)+", "(a|b)*", "a{2}", r"(a)\1", "(?!to_q).*", "(?i)TO_Q", "a**", "a++", "*", "(", ")"),
    *("a)|(b", "[a", "[z-a]", "[]", r"\bto_q", "(?<=x)to_q", "[a--b]", "\\", "a]", "x" * 3000),
    "(" * 20 + ")" * 20,
)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_fits_what_it_fits_in_peft(pattern: str):
    found = parse_pattern(pattern)
    for path in PATHS:
        assert found.fits(path) == (get_pattern_key([pattern], path) == pattern), path


@pytest.mark.slow
@given(
    st.lists(st.sampled_from([*"aab.().|?*+^$", r"\d", r"\.", "[ab]", "[^a]"]), max_size=9),
    st.text("ab.1", max_size=9),
)
@settings(max_examples=500, deadline=None)
def test_any_pattern_is_refused_or_fits_what_it_fits_in_peft(parts: list[str], path: str):
    pattern = "".join(parts)
    try:
        found = parse_pattern(pattern)
    except ValueError:
        return
    assert found.fits(path) == bool(re.match(rf"(.*\.)?({pattern})$", path))


@pytest.mark.parametrize("pattern", OUTSIDE)
def test_other_patterns_are_refused(pattern: str):
    with pytest.raises(ValueError, match=r"at |of 3000 characters|not closed"):
        parse_pattern(pattern)


@pytest.mark.parametrize(
    "pattern",
    ["(a|a)" * 200 + "b", ".*" * 200 + "b", "a?" * 500 + "a" * 500, "(.*a|.*a|.*a)" * 100 + "b"],
)
def test_patterns_made_to_run_for_ever_end(pattern: str):
    """Python's engine would not end."""
    assert len(pattern) <= LENGTH
    assert not parse_pattern(pattern).fits("a" * 300 + "c")


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(4, 4) for _ in range(3))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn1, self.attn2 = Attention(), Attention()


class Net(nn.Module):
    """Modules named like those of a U-Net."""

    def __init__(self) -> None:
        super().__init__()
        self.down_blocks = nn.ModuleList([Block() for _ in range(11)])
        self.mid_block = Block()


def saved(folder: Path, **changes: object) -> peft.PeftModel:
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=["to_q", "to_k", "to_v"],
        init_lora_weights=False,
        **changes,  # type: ignore[arg-type]
    )
    peft.get_peft_model(Net(), config).save_pretrained(folder)
    return peft.PeftModel.from_pretrained(Net(), folder)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_folder_with_patterns_has_the_update_of_the_model_that_peft_loads(
    rslora: bool, tmp_path: Path
):
    alphas = {r"^down_blocks\.1\..*": 5, "attn1.to_(q|k)": 7, r"down_blocks.\d+.*to_[kv]": 11}
    ranks = {"mid_block.*": 3, r"down_blocks\.(0|10)\.attn2\.to_v": 1}
    model = saved(tmp_path, alpha_pattern=alphas, rank_pattern=ranks, use_rslora=rslora)
    adapter = read_adapter(tmp_path)
    layers = {n: m for n, m in model.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert set(adapter.modules) == set(layers)
    for name, layer in layers.items():
        found = adapter.modules[name]
        expected = layer.get_delta_weight("default").detach().numpy()
        size = found.scale * (np.abs(found.up) @ np.abs(found.down)).max()
        atol = rounding(found.rank + 1, size=float(size))
        np.testing.assert_allclose(found.scale * found.up @ found.down, expected, rtol=0, atol=atol)
    scales = {m.scale * m.rank ** (0.5 if rslora else 1) for m in adapter.modules.values()}
    assert {round(scale, 6) for scale in scales} == {3, 5, 7, 11}


@pytest.mark.parametrize("place", ["beside the file", "in its header"])
def test_a_pattern_that_is_not_read_is_named(place: str, tmp_path: Path):
    saved(tmp_path)
    file, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    patterns = {"to_q": 4, "(?!to_q).*": 8}
    if place == "beside the file":
        config.write_text(
            json.dumps({"lora_alpha": 3, "alpha_pattern": patterns}), encoding="utf-8"
        )
    else:
        from safetensors.numpy import load_file, save_file

        text = json.dumps({"unet.lora_alpha": 3, "unet.alpha_pattern": patterns})
        save_file(load_file(file), tmp_path / "a.safetensors", {"lora_adapter_metadata": text})
        file = tmp_path / "a.safetensors"
    with pytest.raises(AdapterError, match=r"`\(\?!to_q\)\.\*`, a regular expression") as error:
        read_adapter(file)
    assert error.value.reason == "config"


def test_ranks_need_no_pattern(tmp_path: Path):
    saved(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(
        json.dumps({"lora_alpha": 3, "rank_pattern": {"(?!to_q).*": 8}}), encoding="utf-8"
    )
    assert {module.scale for module in read_adapter(tmp_path).modules.values()} == {1.5}


@pytest.mark.slow
def test_more_patterns_than_can_be_matched_are_refused(tmp_path: Path):
    saved(tmp_path)
    patterns = {f"{k}" + "(a|b)" * 390: 1 for k in range(300)}
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({"lora_alpha": 3, "alpha_pattern": patterns}), encoding="utf-8")
    with pytest.raises(AdapterError, match=r"300 patterns .* take too long") as error:
        read_adapter(tmp_path)
    assert error.value.reason == "config"

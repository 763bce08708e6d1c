"""`inspect` and `convert` as users meet them, and verdicts on a file in other spellings."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from factories import shared_data, write_adapter
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from tolerances import rounding

from lora_ws import load
from lora_ws.adapters import Adapter, read_adapter
from lora_ws.cli import main
from lora_ws.collection import AdapterSet

LAYERS = (
    ("mid_block.attentions.0.transformer_blocks.0.attn2.to_v", 768, 4),
    ("mid_block.attentions.0.transformer_blocks.0.attn1.to_q", 4, 4),
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    values = np.random.default_rng(0).standard_normal(780, dtype=np.float32)
    return write_adapter(tmp_path / "a.safetensors", values, LAYERS)


def test_inspect_tells_base_ranks_scales_and_norm(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(file)
    tensors["unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_v.alpha"] = np.float32(2)
    tensors["<token>"] = np.ones(3, np.float32)
    metadata = {"ss_output_name": "<b>[red]name", "other": "x"}
    save_file({k: np.asarray(v) for k, v in tensors.items()}, file, metadata)
    assert main(["inspect", str(file), "--as_json", "true"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["base"] == "SD1.x"
    assert facts["scales"] == {"2 (alpha tensor)": 1, "1 (none given, so 1)": 1}
    stem = "unet.mid_block.attentions.0.transformer_blocks.0."
    products = [
        scale * tensors[f"{stem}{name}.lora.up.weight"] @ tensors[f"{stem}{name}.lora.down.weight"]
        for name, scale in (("attn2.to_v", 2), ("attn1.to_q", 1))
    ]
    expected = np.sqrt(sum(np.square(product.astype(float)).sum() for product in products))
    assert facts["norm"] == pytest.approx(expected, rel=rounding(3))
    assert facts["claims"] == {"ss_output_name": "<b>[red]name"}
    assert (
        facts["warnings"]
        == facts["odd"]
        == ["1 tensors are no part of an update, such as `<token>`"]
    )
    assert main(["inspect", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "ss_output_name: <b>[red]name" in shown


def test_a_file_that_is_none_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "page.safetensors").write_text("<!DOCTYPE html><html></html>", encoding="utf-8")
    assert main(["inspect", str(tmp_path / "page.safetensors")]) == 2
    assert "page.safetensors" in capsys.readouterr().err


@pytest.mark.slow
def test_a_converted_file_gets_the_verdict_of_the_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    zoo = load("lora-ws-mini", subset="shared/class")
    layers = tuple((s.name, s.in_features, s.out_features) for s in zoo.layout.layers)
    first = write_adapter(tmp_path / "first.safetensors", zoo.weights[0], layers)
    run = ["train", "--featurizer", "StatsFlatVec", "--subset", "shared/class", "--seeds", "1"]
    assert main([*run, "--fit.max_epochs", "2", "--out", str(tmp_path / "run")]) == 0
    for to in ("peft", "kohya"):
        assert main(["convert", str(first), str(tmp_path / to), "--to", to]) == 0
    verdicts = []
    for path in (first, tmp_path / "peft", tmp_path / "kohya" / "first.safetensors"):
        capsys.readouterr()
        judged = ["predict", str(path), "--model", str(tmp_path / "run" / "bundle")]
        assert main([*judged, "--as_json", "true"]) == 0
        verdicts.append(json.loads(capsys.readouterr().out))
    assert len({verdict.pop("file") for verdict in verdicts}) == 3
    assert verdicts[0] == verdicts[1] == verdicts[2]


PICKLE = ("--allow_pickle", "true")
linux = pytest.mark.skipif("sys.platform != 'linux'", reason="memory is limited on Linux only")


class Attack:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


def updates(adapter: Adapter) -> dict[str, np.ndarray]:
    return {name: m.scale * m.up @ m.down for name, m in adapter.modules.items()}


def bound(update: np.ndarray) -> float:
    """Absolute, of a product of float32 factors: a rank of 4 at most and a scale."""
    return rounding(4 + 1, size=float(np.abs(update).max()))


def test_a_pickle_is_refused_by_the_flag_that_opens_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "old.bin")
    (tmp_path / "old.safetensors").write_bytes((tmp_path / "old.bin").read_bytes())
    for name in ("old.bin", "old.safetensors"):
        out = tmp_path / "out"
        assert main(["convert", str(tmp_path / name), str(out), "--to", "peft"]) == 2
        assert "--allow_pickle true" in capsys.readouterr().err
        assert not out.exists()


@pytest.mark.slow
@linux
@pytest.mark.parametrize(
    "name", ["misnamed.safetensors", pytest.param("old.bin", marks=pytest.mark.slow)]
)
def test_a_pickle_is_converted_on_request(name: str, file: Path, tmp_path: Path) -> None:
    torch.save(load_torch(file), tmp_path / name)
    out = tmp_path / "out"
    assert main(["convert", str(tmp_path / name), str(out), "--to", "kohya", *PICKLE]) == 0
    expected = updates(read_adapter(file))
    found = updates(read_adapter(out / Path(name).with_suffix(".safetensors").name))
    assert found.keys() == expected.keys()
    for module, update in expected.items():
        np.testing.assert_allclose(found[module], update, atol=bound(update))
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["a.safetensors", name, "out"])


@pytest.mark.slow
@linux
@pytest.mark.parametrize("prefix", ["base_model.model.", "lora_unet_"])
def test_rows_of_a_matrix_are_adapters(prefix: str, tmp_path: Path, capsys: Any) -> None:
    # As weights2weights: columns in the order of PEFT's names, A before B; length and shape each.
    rng, shapes = np.random.default_rng(0), {}
    for k, width in ((10, 6), (2, 5)):
        path = f"down_blocks.{k % 3}.attentions.0.transformer_blocks.0.attn1.to_q"
        named = path if "." in prefix else path.replace(".", "_")
        shapes[f"{prefix}{named}.lora_A.weight"] = (1, width)
        shapes[f"{prefix}{named}.lora_B.weight"] = (4, 1)
    sizes = {name: (torch.Size([math.prod(s)]), torch.Size(s)) for name, s in shapes.items()}
    rows = rng.standard_normal((11, sum(map(math.prod, shapes.values()))), dtype=np.float32)
    torch.save(sizes, tmp_path / "weight_dimensions.pt")
    torch.save(torch.tensor(rows), tmp_path / "weights.pt")
    out, dimensions = tmp_path / "out", ["--dimensions", str(tmp_path / "weight_dimensions.pt")]
    command = ["convert", str(tmp_path / "weights.pt"), str(out), "--to", "diffusers"]
    assert main([*command, *dimensions]) == 2
    assert "--allow_pickle true" in capsys.readouterr().err
    assert main([*command, *PICKLE, *dimensions]) == 0
    assert len(list(out.iterdir())) == len(rows)
    for k in (0, 10):
        (file,) = (out / f"{k:02d}").iterdir()
        first = read_adapter(file).modules[
            "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
        ]
        expected = np.outer(rows[k, 6:10], rows[k, :6])
        np.testing.assert_array_equal(first.scaled_up @ first.down, expected)
    torch.save(torch.tensor(rows[:, 1:]), tmp_path / "weights.pt")
    again = [*command[:2], str(tmp_path / "again"), *command[3:], *PICKLE, *dimensions]
    assert main(again) == 2
    assert "rows of 19 numbers" in capsys.readouterr().err
    torch.save(torch.tensor(rows * np.nan), tmp_path / "weights.pt")
    assert main(again) == 2
    assert f"{tmp_path / 'weights.pt'}: `matrix` holds NaN" in capsys.readouterr().err
    assert main([*again[:-2]]) == 2
    assert "--dimensions" in capsys.readouterr().err


@pytest.mark.slow
@linux
def test_a_pickled_folder_of_peft_keeps_its_scale(file: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "old", tmp_path / "out"
    assert main(["convert", str(file), str(folder), "--to", "peft"]) == 0
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")) | {
        "lora_alpha": 3
    }
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    torch.save(load_torch(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    assert main(["convert", str(folder), str(out), "--to", "kohya"]) == 2
    assert main(["convert", str(folder), str(out), "--to", "kohya", *PICKLE]) == 0
    expected, found = updates(read_adapter(file)), updates(read_adapter(out / "old.safetensors"))
    for module, update in expected.items():
        np.testing.assert_allclose(found[module], 3 * update, atol=bound(3 * update))


@pytest.mark.slow
@linux
def test_a_real_pickle_holds_what_torch_reads(tmp_path: Path) -> None:
    file = shared_data("real_adapters") / "catundchat_sd15_attnprocs_r4.bin"
    out = tmp_path / "out"
    assert main(["convert", str(file), str(out), "--to", "peft", *PICKLE]) == 0
    raw = torch.load(file, weights_only=True, map_location="cpu")
    found = updates(read_adapter(out))
    assert 2 * len(found) == len(raw)
    for key, up in raw.items():
        if key.endswith(".up.weight"):
            down = raw[key.replace(".up.", ".down.")]
            path = key.removesuffix("_lora.up.weight").replace(".processor.", ".")
            path += ".0" * path.endswith("to_out")
            update = (up @ down).numpy()
            np.testing.assert_allclose(found[path], update, atol=bound(update))


@pytest.mark.slow
@linux
def test_code_in_a_pickle_does_not_run_on_request_either(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"a": torch.ones(1), "b": Attack(tmp_path / "sprung")}, tmp_path / "old.bin")
    out = tmp_path / "out"
    assert main(["convert", str(tmp_path / "old.bin"), str(out), "--to", "peft", *PICKLE]) == 2
    assert "expected a dictionary of tensors, got UnpicklingError" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["old.bin"]
    # The trap is a good one.
    torch.load(tmp_path / "old.bin", weights_only=False)
    assert (tmp_path / "sprung").exists()


def test_a_pickle_on_the_hub_is_to_be_downloaded_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["convert", "hub:owner/name/old.bin", str(out), "--to", "peft", *PICKLE]) == 2
    assert "expected a file on this machine" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        (
            ["carnivore", "fish", "unheard of"],
            ["adapters of unheard of", "no adapter is of flower"],
        ),
        (["fish"], ["no adapter is of carnivore", "auroc      –"]),
    ],
)
def test_evaluate_measures_the_classes_that_both_have(
    classes: list[str], said: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A store with a class that the shipped bundle lacks, and without most that it has."""
    adapters = load("lora-ws-mini", subset="per_adapter/constant")
    names = adapters.column("category_label")
    taken = ["insect" if name == "unheard of" else name for name in classes]
    rows = np.concatenate([np.flatnonzero(names == name)[:6] for name in taken])
    table = pa.table({"category_label": np.repeat(classes, 6).tolist()})
    AdapterSet(adapters.weights[rows], adapters.layout, table).save(tmp_path / "store")
    command = ["evaluate", "--model", "tiny-sd", "--dataset", str(tmp_path / "store")]
    assert main([*command, "--part", "all"]) == 0
    out = capsys.readouterr().out
    for text in (*said, f"part all: {6 * len(set(classes) - {'unheard of'})} adapters"):
        assert text in out

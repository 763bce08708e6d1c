"""Published collections on a Hub on loopback: miniatures of their documented layouts."""

import csv
import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from factories import list_column, matrices, sd15_layers, write_parquet
from hub_server import Fault, HubServer
from safetensors.numpy import save
from warm import Warm

from lora_ws.collection import DatasetCard, import_collection
from lora_ws.collection.archives import unpack_members
from lora_ws.collection.card import SideTable, find_card
from lora_ws.collection.facts import RowFacts, read_side_table
from lora_ws.errors import DataError

CHILD = """
import json, sys
import numpy as np
import lora_ws
name, rank, subset = sys.argv[1:4]
try:
    zoo = lora_ws.load(name, rank=int(rank) or None, subset=subset or None)
    print(json.dumps({
        "rows": zoo.rows.select([c for c in zoo.rows.column_names if c != "sha256"]).to_pylist(),
        "ranks": zoo.ranks.tolist(), "rank": zoo.layout.layers[0].rank,
        "modules": len(zoo.layout.layers), "manifest": dict(zoo.manifest),
        "updates": [float(np.linalg.norm(up[0] @ down[0])) for down, up in
                    [zoo.layer(zoo.layout.layers[0].name)]],
        "rowsums": zoo.weights.astype(np.float64).sum(axis=1).tolist(),
    }))
except lora_ws.LoraWsError as error:
    print(json.dumps(f"{type(error).__name__}: {error}"))
"""
LAYERS = sd15_layers()
LOL, W2T, WISE = (find_card(n).hub_id for n in ("lol-celeba", "w2t-celeba", "lora-wise"))
MODELJ = find_card("model-j-200")


def factors(rank: int, seed: int) -> dict[str, np.ndarray]:
    size = sum(rank * (inputs + outputs) for _, inputs, outputs in LAYERS)
    vector = np.random.default_rng(seed).standard_normal(size, dtype=np.float32)
    return matrices(vector, LAYERS, rank)


def peft(rank: int, seed: int) -> bytes:
    """As PEFT writes it."""
    named = {
        "base_model.model." + name.removeprefix("unet."): np.ascontiguousarray(value)
        for name, value in factors(rank, seed).items()
    }
    swap = {".lora.down.weight": ".lora_A.weight", ".lora.up.weight": ".lora_B.weight"}
    for old, new in swap.items():
        named = {name.replace(old, new): value for name, value in named.items()}
    return save(named)


def write(path: Path, content: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def first_update(rank: int, seed: int, scale: float = 1.0) -> float:
    down, up = list(factors(rank, seed).values())[:2]
    return scale * float(np.linalg.norm(up.astype(np.float64) @ down))


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    (tmp_path / "hub").mkdir()
    with HubServer(tmp_path / "hub") as server:
        yield server
        assert server.errors == []


@pytest.fixture
def load(tmp_path: Path, hub: HubServer, warm: Warm):
    env = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "LORA_WS_CACHE": str(tmp_path / "ours"),
    }

    def load(name: str, rank: int = 0, subset: str = ""):
        return json.loads(warm.run(CHILD, name, str(rank), subset, **env).splitlines()[-1])

    return load


def write_lol(root: Path) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as held:
        for seed, who in enumerate(("11", "7")):
            folder = f"models_4/model_1e-4_300_2_{seed}_{who}/unet"
            held.writestr(f"{folder}/adapter_model.safetensors", peft(4, seed))
            config = {"peft_type": "LORA", "r": 4, "lora_alpha": 2}
            held.writestr(f"{folder}/adapter_config.json", json.dumps(config))
        held.writestr("models_4/README.txt", "about")
    write(root / "datasets" / LOL / "celeba/models_4.zip", packed.getvalue())
    write(root / "datasets" / LOL / "qwen2_arc.zip", b"never fetched")


def write_w2t(root: Path, count: int = 2) -> None:
    table = io.StringIO()
    out = csv.writer(table)
    out.writerow(["celeb_folder", "num_images_in_folder", "Male", "Young"])
    for k in range(count):
        path = f"data/model_{k}_1e-4_300_2_{k % 3}_{100 + k}/unet/adapter_model.safetensors"
        write(root / "datasets" / W2T / path, peft(8, k))
        out.writerow([100 + k, 20 + k, (-1) ** k, 1 if k % 4 < 2 else -1])
    write(root / "datasets" / W2T / "celeba_labels.csv", table.getvalue())


def write_wise(root: Path) -> None:
    for config, rank, labels in (("low_8", 8, [1, 5]), ("high_32", 32, [900])):
        columns = {"label": labels, "name": list(range(len(labels)))}
        rows = [factors(rank, 10 * rank + k) for k in range(len(labels))]
        for name in rows[0]:
            values = np.stack([row[name].ravel() for row in rows]).astype(np.float64)[:, None]
            columns[name] = list_column(values).flatten()
        # Also the key and output projections, which are not read.
        odd = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_k.lora.down.weight"
        columns[odd] = pa.array([[0.0] * rank * 1280] * len(labels))
        path = root / "datasets" / WISE / config / "train-00000-of-00001.parquet"
        write_parquet(path, pa.table(columns))


def write_model_j(root: Path) -> None:
    repo = root / "models" / MODELJ.hub_id
    rows = []
    for k, (part, number, base) in enumerate(
        [("train", 0, "1-4"), ("test", 0, "1-5"), ("val_holdout", 1, "1-3")]
    ):
        folder = f"{part}/model_idx_{number:04d}"
        write(repo / folder / "pytorch_lora_weights.safetensors", save(factors(16, k)))
        write(repo / folder / "training_images/0.png", b"never fetched")
        rows.append(
            {
                "split": part,
                "output_dir": f"out/model_idx_{number:04d}",
                "imagenet_class_name": "tench",
                "seed": 1,
                "learning_rate": 1e-4,
                "pretrained_model_name_or_path": f"CompVis/stable-diffusion-v{base}",
            }
        )
    side = root / "datasets/ProbeX/Model-J/SD_200/train-00000-of-00001.parquet"
    write_parquet(side, pa.Table.from_pylist(rows))


@pytest.mark.slow
def test_archives_of_peft_folders(hub: HubServer, load, tmp_path: Path):
    write_lol(hub.store.root)
    # A drop in the middle, and a server that is busy.
    hub.faults += [
        Fault("^GET .*/resolve/", "status", status=429),
        Fault("^GET .*/resolve/", "drop"),
    ]
    found = load("lol-celeba")
    assert [row["celebrity"] for row in found["rows"]] == [11, 7]
    row = found["rows"][0]
    assert (row["learning_rate"], row["max_train_steps"], row["prompt_number"]) == (1e-4, 300, 0)
    assert (found["rank"], found["ranks"], found["modules"]) == (4, [4, 4], 64)
    # alpha 2 at rank 4, by the settings beside the file.
    assert found["updates"] == pytest.approx([first_update(4, 0, 0.5)], rel=1e-5)
    assert not any("qwen2" in entry.path for entry in hub.log if entry.method == "GET")
    assert not list((tmp_path / "ours").rglob("unpacked-*"))
    # Cut to rank 1: the largest singular value is what is left of the first update.
    down, up = list(factors(4, 0).values())[:2]
    largest = np.linalg.svd(0.5 * up.astype(np.float64) @ down, compute_uv=False)[0]
    assert load("lol-celeba", rank=1)["updates"] == pytest.approx([largest], rel=1e-5)
    assert load("lol-celeba", rank=8)["rowsums"] == pytest.approx(found["rowsums"], abs=1e-2)


@pytest.mark.slow
def test_folders_with_a_table_of_attributes(hub: HubServer, load):
    write_w2t(hub.store.root, 4)
    found = load("w2t-celeba")
    told = {row["celebrity"]: row for row in found["rows"]}
    assert told[100]["attributes"] == ["Male", "Young"]
    assert told[101]["attributes"] == ["Young"]
    assert told[102]["attributes"] == ["Male"]
    assert told[103]["attributes"] == []
    assert told[103]["num_images_in_folder"] == 23
    assert told[103]["a_seed"] == 3
    # No settings beside the files: the card's alpha, 27 at rank 8.
    assert found["updates"] == pytest.approx([first_update(8, 0, 27 / 8)], rel=1e-5)


TRAIN = """
import sys
from lora_ws.cli import main
raise SystemExit(main(["train", "--dataset", "w2t-celeba", "--task", "multilabel", "--featurizer",
    "StatsLayer", "--seeds", "1", "--fit.max_epochs", "2", "--out", sys.argv[1]]))
"""


@pytest.mark.slow
def test_training_on_attributes_needs_no_label(
    hub: HubServer, load, tmp_path: Path, warm_all: Warm
):
    write_w2t(hub.store.root, 24)
    load("w2t-celeba")
    env = {"LORA_WS_CACHE": str(tmp_path / "ours"), "HF_HUB_OFFLINE": "1"}
    said = warm_all.run(TRAIN, str(tmp_path / "run"), **env)
    record = json.loads(
        next((tmp_path / "run").rglob("records.jsonl")).read_bytes().splitlines()[0]
    )
    assert record["classes"] == ["Male", "Young"], said
    assert record["n_train"] + record["n_val"] + record["n_test"] == 24


@pytest.mark.slow
def test_flattened_matrices_of_several_ranks(hub: HubServer, load):
    write_wise(hub.store.root)
    found = load("lora-wise")
    assert (found["ranks"], found["rank"], found["modules"]) == ([32, 8, 8], 32, 64)
    assert [row["config"] for row in found["rows"]] == ["high_32", "low_8", "low_8"]
    assert not any("to_k" in name for name in found["rows"][0])
    low = load("lora-wise", subset="low_8")
    assert low["updates"] == pytest.approx([first_update(8, 80)], rel=1e-5)
    own = sum(float(value.sum(dtype=np.float64)) for value in factors(8, 80).values())
    assert low["rowsums"][0] == pytest.approx(own, abs=1e-2)


@pytest.mark.slow
def test_one_module_of_model_repositories_by_ranges(hub: HubServer, load):
    write_model_j(hub.store.root)
    hub.faults += [
        Fault("^GET .*/resolve/.*safetensors", "status", status=429),
        Fault("^GET .*/resolve/.*safetensors", "status", status=503),
    ]
    found = load("model-j-200")
    assert (found["rank"], found["modules"]) == (16, 1)
    told = {row["place"]: (row["part"], row["base"]) for row in found["rows"]}
    assert told == {
        "test/model_idx_0000": ("test", "CompVis/stable-diffusion-v1-5"),
        "train/model_idx_0000": ("train", "CompVis/stable-diffusion-v1-4"),
        "val_holdout/model_idx_0001": ("val_holdout", "CompVis/stable-diffusion-v1-3"),
    }
    # The file of train is the first one written.
    name = f"unet.{MODELJ.modules[0]}.lora"
    values = factors(16, 0)
    own = sum(float(values[f"{name}.{s}.weight"].sum(dtype=np.float64)) for s in ("down", "up"))
    places = [row["place"] for row in found["rows"]]
    got = dict(zip(places, found["rowsums"], strict=True))["train/model_idx_0000"]
    assert got == pytest.approx(own, abs=1e-2)
    bodies = sum(e.bytes_sent for e in hub.log if "pytorch_lora_weights" in e.path)
    whole = sum(f.stat().st_size for f in hub.store.root.rglob("pytorch_lora_weights.safetensors"))
    assert bodies < 0.2 * whole
    assert not any("training_images" in e.path for e in hub.log)


@pytest.mark.slow
@pytest.mark.parametrize("action", ["no_range", "wrong_range", "truncate", "short"])
def test_lies_about_ranges_make_no_rows(action, hub: HubServer, load):
    write_model_j(hub.store.root)
    hub.faults += [Fault("^GET .*/resolve/.*safetensors", action, times=20)]
    message = load("model-j-200")
    assert message.startswith("AdapterError: ")
    assert "try again" in message
    hub.faults.clear()
    assert len(load("model-j-200")["rows"]) == 3


def test_pickles_are_refused_with_the_way_out(hub: HubServer, load):
    message = load("weights2weights")
    assert message.startswith("DataError: `weights2weights` was not fetched")
    assert "lora-ws convert" in message
    assert hub.log == []


def test_path_that_is_not_of_the_form_is_a_problem(tmp_path: Path):
    facts = RowFacts(DatasetCard(name="mine", path_columns=r"model_(?P<number>\d+)/"))
    assert facts.of("a/model_12/x") == {"number": 12}
    with pytest.raises(DataError, match="not of the form that card `mine` says"):
        facts.of("a/x")


@pytest.mark.parametrize(
    ("text", "rule", "message"),
    [
        ("who,tall\na,1\na,0\n", SideTable(("*.csv",), ("who",)), "each key once, got `a` twice"),
        ("who,tall\na,1\n", SideTable(("*.csv",), ("name",)), "a value of name in each row"),
    ],
    ids=["twice", "no column"],
)
def test_tables_that_do_not_fit_are_named(text: str, rule: SideTable, message: str, tmp_path: Path):
    file = tmp_path / "labels.csv"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_side_table(rule, [file])


def test_local_copy_needs_its_table(tmp_path: Path):
    place = tmp_path / "data/model_1_1e-4_300_2_0_100/unet/adapter_model.safetensors"
    write(place, b"")
    with pytest.raises(DataError, match=r"expected the table \*.csv of `w2t-celeba`"):
        import_collection(tmp_path / "data", tmp_path / "s", card=find_card("w2t-celeba"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../evil/a.safetensors", "is outside of the folder"),
        ("/evil/a.safetensors", "is outside of the folder"),
        ("big/a.safetensors", "would grow to"),
        ("other.txt", r"expected members like \*\.safetensors"),
    ],
    ids=["above", "absolute", "bomb", "none"],
)
def test_archives_that_are_refused(name: str, message: str, tmp_path: Path):
    file = tmp_path / "a.zip"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as held:
        held.writestr(name, b"\0" * (4 << 20) if name.startswith("big") else b"x")
    with pytest.raises(DataError, match=message):
        unpack_members(file, ["*.safetensors"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_archive_is_no_collection(tmp_path: Path):
    file = tmp_path / "a.zip"
    with zipfile.ZipFile(file, "w") as held:
        held.writestr("a.safetensors", b"0123456789" * 100)
    content = bytearray(file.read_bytes())
    content[200] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match="not a readable zip file"):
        unpack_members(file, ["*"], tmp_path / "out")


@pytest.mark.parametrize(
    "name",
    [
        *("lol-celeba", "lol-imagenette", "w2t-celeba", "model-j-200", "model-j-1k"),
        *("lora-wise", "weights2weights"),
    ],
)
def test_cards_say_that_they_were_not_opened(name: str):
    assert "layout as documented, not opened here" in find_card(name).source

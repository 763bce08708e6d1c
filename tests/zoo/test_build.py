import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
from datasets import load_dataset
from filelock import FileLock
from hub_server import HubServer
from tolerances import EXACT, rounding
from torch.nn import functional as F
from warm import Warm

from lora_ws.adapters import Layout
from lora_ws.cli import main
from lora_ws.collection import AdapterSet, import_collection, load
from lora_ws.diffusion.bank import AdapterBank
from lora_ws.diffusion.pipeline import (
    PipelineSize,
    adapter_layout,
    base_facts,
    build_pipeline,
    load_pipeline,
)
from lora_ws.diffusion.prompts import encode_prompts
from lora_ws.errors import ConfigError, DataError, TrainingError
from lora_ws.zoo.build import build_zoo, merge_shares
from lora_ws.zoo.finetune import FinetuneSpec, finetune
from lora_ws.zoo.memory import adapters_that_fit
from lora_ws.zoo.publish import write_folders, write_parquet
from lora_ws.zoo.sampling import SamplingSpec
from lora_ws.zoo.spec import ZooSpec

SMALL = ZooSpec(
    sampling=SamplingSpec(adapters_per_leaf=3, a_init=("per_adapter", "shared")),
    finetune=FinetuneSpec(steps=3),
    adapters_at_once=8,
)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> AdapterSet:
    return build_zoo(replace(SMALL, out=tmp_path_factory.mktemp("zoo") / "zoo"))


def timeless(zoo: AdapterSet) -> list[dict]:
    return zoo.rows.drop_columns(["duration_s"]).to_pylist()


def assert_same(one: AdapterSet, other: AdapterSet) -> None:
    assert np.array_equal(one.weights, other.weights)
    assert timeless(one) == timeless(other)
    assert one.version == other.version
    assert one.manifest["recipe"] == other.manifest["recipe"]


def double(pipeline: Any) -> Any:
    """In float64: Adam makes a step of the rounding of a gradient near zero."""
    for part in (pipeline.unet, pipeline.text_encoder):
        part.double()
    return pipeline


@pytest.mark.slow
def test_batched_training_equals_peft_one_by_one() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    spec, seeds = FinetuneSpec(steps=30, learning_rate=1e-3, max_grad_norm=0.05), [7, 8, 9]
    prompts = ["a photo of sks even", "a photo of sks odd", "a photo of sks"]
    torch.manual_seed(0)
    latents = [torch.randn(count, 4, 8, 8).double() for count in (4, 2, 3)]
    pipeline = double(load_pipeline("digit-sd"))
    layout = adapter_layout(pipeline.unet)
    bank = AdapterBank.fresh(layout, 3, seed=5, dtype=torch.float64)
    start = bank.rows().clone()
    result = finetune(pipeline, bank, latents, prompts, seeds, spec)
    for n in range(3):
        alone = double(load_pipeline("digit-sd"))
        config = LoraConfig(r=1, lora_alpha=1, target_modules=["to_q", "to_v"])
        unet = inject_adapter_in_model(config, alone.unet)
        factors = [
            (unet.get_submodule(f"{layer.name}.lora_A.default").weight, down)
            for layer, down, _ in layout.pairs()
        ] + [
            (unet.get_submodule(f"{layer.name}.lora_B.default").weight, up)
            for layer, _, up in layout.pairs()
        ]
        with torch.no_grad():
            for weight, columns in factors:
                weight.copy_(start[n, columns].view_as(weight))
        params = [p for p in unet.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(params, 1e-3, weight_decay=1e-2)
        generator = torch.Generator().manual_seed(seeds[n])
        order: list[int] = []
        for step in range(spec.steps):
            order = order or torch.randperm(len(latents[n]), generator=generator).tolist()
            clean = latents[n][[order.pop(0)]]
            noise = torch.randn(clean.shape, generator=generator)  # float32, as it is drawn
            level = torch.randint(1000, (1,), generator=generator)
            noisy = alone.scheduler.add_noise(clean, noise, level)
            said = unet(noisy, level, encode_prompts(alone, [prompts[n]])).sample
            loss = F.mse_loss(said, noise)
            assert loss.item() == pytest.approx(result.step_loss[n, step].item(), rel=EXACT)
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(params, spec.max_grad_norm)
            assert norm.item() == pytest.approx(result.grad_norm[n, step].item(), rel=EXACT)
            optimizer.step()
        for weight, columns in factors:
            torch.testing.assert_close(
                result.rows[n, columns].view_as(weight), weight.detach(), atol=EXACT, rtol=0
            )
    assert (result.rows - start).abs().max() > 1e-3


def test_the_base_runs_in_half_the_digits_and_adapters_stay_whole() -> None:
    torch.manual_seed(0)
    pipeline = load_pipeline("digit-sd")
    latents = [torch.randn(2, 4, 8, 8) for _ in range(3)]
    layout, runs = adapter_layout(pipeline.unet), {}
    for precision in get_args(get_type_hints(FinetuneSpec)["precision"]):
        spec = FinetuneSpec(steps=4, precision=precision)
        bank = AdapterBank.fresh(layout, 3, seed=5)
        runs[precision] = finetune(pipeline, bank, latents, ["sks"] * 3, [7, 8, 9], spec)
        assert runs[precision].rows.dtype == torch.float32
    whole, mixed = runs["32-true"], runs["bf16-mixed"]
    # Every activation is rounded, so a loss moves, and by no more than the 2^-8 of a few of them.
    moved = (mixed.step_loss / whole.step_loss - 1).abs()
    assert 0 < moved.max() < 8 * 2**-8
    # Adapters are not: they hold digits that bfloat16 has not.
    assert (mixed.rows != mixed.rows.bfloat16().float()).float().mean() > 0.9


@pytest.mark.slow
def test_the_unet_of_stable_diffusion() -> None:
    size = PipelineSize(
        image_size=64,
        vae_channels=(8, 8, 8, 8),
        unet_channels=(320, 640, 1280, 1280),
        heads=8,
        text_width=768,
        text_layers=1,
        norm_groups=32,
    )
    pipeline = build_pipeline(size, ["cat", "dog"])
    pipeline.unet.requires_grad_(False)
    pipeline.text_encoder.requires_grad_(False)
    layout = adapter_layout(pipeline.unet)
    assert layout == Layout.sd15_qv()
    most = adapters_that_fit(pipeline, layout, FinetuneSpec(), 4.0)
    assert 1 < adapters_that_fit(pipeline, layout, FinetuneSpec(), 0.5) < most <= 100
    latents = [torch.randn(2, 4, 8, 8) for _ in range(2)]
    prompts = ["a photo of sks cat", "a photo of sks dog"]
    bank = AdapterBank.fresh(layout, 2)
    result = finetune(pipeline, bank, latents, prompts, [0, 1], FinetuneSpec(steps=2))
    assert result.rows.shape == (2, 99_648)
    assert result.rows.isfinite().all()
    ups = torch.cat([result.rows[:, up] for _, _, up in layout.pairs()], dim=1)
    assert (ups.abs().amax(1) > 0).all()


def test_metadata_is_complete(zoo: AdapterSet) -> None:
    assert len(zoo) == 60
    seen = set(base_facts("digit-sd")["photos"])
    for row in zoo.rows.to_pylist():
        assert all(value is not None for value in row.values())
        assert len(row["step_loss"]) == len(row["grad_norm"]) == 3
        assert row["num_images"] == len(set(row["images"]))
        assert seen.isdisjoint(row["images"])
        assert row["prompt"] == f"a photo of sks {row['category_label']}"
        assert np.mean(row["step_loss"]) == pytest.approx(
            np.mean(row["epoch_loss"]), rel=rounding(3)
        )
    split = zoo.split()
    assert [len(part) for part in split] == [40, 8, 12]


def test_shared_and_own_starts(zoo: AdapterSet) -> None:
    for name, same in (("shared/class", True), ("per_adapter/class", False)):
        down, up = zoo.subset(name).layer(zoo.layout.layers[0].name)
        assert (np.abs(down - down[0]).max() < 1e-2) == same
        assert np.abs(up).max() > 0
    assert len({row.tobytes() for row in zoo.weights}) == len(zoo)


@pytest.mark.slow
def test_shards_together_are_the_whole(zoo: AdapterSet, tmp_path: Path) -> None:
    shards = [build_zoo(replace(SMALL, out=tmp_path / "part", shard=f"{k}/2")) for k in range(2)]
    assert sum(map(len, shards)) == len(zoo)
    paths = [Path(shard.weights.filename).parent for shard in shards]
    merged = merge_shares(paths[::-1], tmp_path / "merged")
    assert_same(merged, zoo)
    assert merged.card.name == "part"
    with pytest.raises(DataError, match="missing: 1/2"):
        merge_shares(paths[:1], tmp_path / "half")
    with pytest.raises(DataError, match="named twice"):
        merge_shares([*paths, paths[0]], tmp_path / "twice")
    other = build_zoo(replace(SMALL, out=tmp_path / "other", shard="1/2", seed=1))
    with pytest.raises(DataError, match="another collection"):
        merge_shares([paths[0], Path(other.weights.filename).parent], tmp_path / "mixed")


@pytest.mark.slow
def test_processes_make_the_same(zoo: AdapterSet, tmp_path: Path) -> None:
    assert_same(build_zoo(replace(SMALL, out=tmp_path / "zoo", processes=2)), zoo)
    assert [path.name for path in tmp_path.iterdir()] == ["zoo"]


@pytest.mark.slow
def test_a_process_that_fails_says_why(tmp_path: Path) -> None:
    wild = replace(SMALL.finetune, learning_rate=1e30)
    with pytest.raises(TrainingError, match="NaN or infinite with seeds of both tries"):
        build_zoo(replace(SMALL, out=tmp_path / "zoo", finetune=wild, processes=2))


BUILD = """
from dataclasses import replace
from pathlib import Path
from typing import Any
import sys
from lora_ws.zoo.build import build_zoo
from lora_ws.zoo.finetune import FinetuneSpec
from lora_ws.zoo.sampling import SamplingSpec
from lora_ws.zoo.spec import ZooSpec

sampling = SamplingSpec(adapters_per_leaf=3, a_init=("per_adapter", "shared"))
spec = ZooSpec(sampling=sampling, finetune=FinetuneSpec(steps=3), adapters_at_once=8)
build_zoo(replace(spec, out=Path(sys.argv[1]), processes=int(sys.argv[2])))
"""


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_build_goes_on(
    zoo: AdapterSet, tmp_path: Path, processes: int, warm_all: Warm
) -> None:
    out = tmp_path / "zoo"

    def begun() -> bool:
        journals = tmp_path.glob("*.partial/journal.jsonl")
        return any(file.read_bytes().count(b"\n") >= 3 - (processes > 1) for file in journals)

    warm_all.start(BUILD, out, processes).kill(begun)
    assert not out.exists()
    # Processes that were started end with the one that started them, and let go of their stores.
    for lock in tmp_path.glob("*.lock"):
        with FileLock(lock, timeout=30):
            pass
    assert_same(build_zoo(replace(SMALL, out=out, processes=processes)), zoo)


def test_an_unfinished_zoo_of_another_recipe_is_kept(zoo: AdapterSet) -> None:
    with pytest.raises(DataError, match="exists already"):
        build_zoo(replace(SMALL, out=Path(zoo.weights.filename).parent))


@pytest.mark.slow
def test_nan_twice_is_quarantined(tmp_path: Path) -> None:
    few = SamplingSpec(adapters_per_leaf=3)
    wild = FinetuneSpec(steps=2, learning_rate=1e30)
    with pytest.raises(DataError, match="NaN or infinite with seeds of both tries"):
        build_zoo(replace(SMALL, out=tmp_path / "zoo", sampling=few, finetune=wild))


@pytest.mark.parametrize("shard", ["2/2", "x/2", "1", "-1/2"])
def test_bad_shard(shard: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="shard"):
        build_zoo(replace(SMALL, out=tmp_path / "zoo", shard=shard))


def test_photos_of_the_base_are_refused(tmp_path: Path) -> None:
    seen = replace(SMALL.photos, split="train")
    with pytest.raises(DataError, match="trained on every one"):
        build_zoo(replace(SMALL, out=tmp_path / "zoo", photos=seen))


@pytest.mark.parametrize("write", [write_folders, write_parquet])
def test_importers_read_it_back(write, zoo: AdapterSet, tmp_path: Path) -> None:
    first = zoo.subset("shared/class")
    back = import_collection(write(first, tmp_path / "files"), tmp_path / "store")
    assert back.layout.fingerprint == zoo.layout.fingerprint
    names = [n for n in zoo.rows.column_names if n not in ("source", "sha256", "folder")]
    key = back.rows["image_set"].to_pylist()
    order = np.argsort(key)
    assert np.array_equal(back.weights[order], first.weights)
    assert back.select(order).rows.select(names).to_pylist() == first.rows.select(names).to_pylist()


@pytest.fixture
def publish(
    as_hub_user: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., tuple[int, str, str]]:
    """Run `lora-ws zoo publish` in a folder: status, output and errors."""

    def run(folder: Path, *args: str, **env: str) -> tuple[int, str, str]:
        as_hub_user(**env)
        monkeypatch.chdir(folder)
        capsys.readouterr()
        return main(["zoo", "publish", *args]), *capsys.readouterr()

    return run


@pytest.mark.slow
def test_publish(
    zoo: AdapterSet,
    server: HubServer,
    hub_env: Callable[..., dict[str, str]],
    publish: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
    warm: Warm,
) -> None:
    store = str(Path(zoo.weights.filename).parent)
    status, printed, errors = publish(tmp_path, store, "me/my-zoo")
    assert status == 0, errors
    assert len(printed.split()[-1]) == 40
    assert {request.status for request in server.requests("/api/validate-yaml")} == {200}
    script = (
        "from datasets import load_dataset; rows = load_dataset('me/my-zoo', split='train');"
        "print(len(rows), len(rows.features))"
    )
    columns = len(zoo.rows.column_names) - 2 + len(zoo.layout.matrices)
    read = warm.run(script, **hub_env())
    assert read.splitlines()[-1] == f"{len(zoo)} {columns}"
    status, _, errors = publish(tmp_path, store, "me/my-zoo")
    assert status == 2
    assert "zoo.publish exists already" in errors


def test_publish_dry_run(
    zoo: AdapterSet,
    server: HubServer,
    publish: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
) -> None:
    from huggingface_hub import DatasetCard

    store = str(Path(zoo.weights.filename).parent)
    args = [store, "me/my-zoo", "--dry-run", "true"]
    status, printed, errors = publish(tmp_path, *args)
    assert status == 0, errors
    assert "nothing was uploaded (--dry_run)" in printed
    assert [request.path for request in server.requests()] == ["/api/validate-yaml"]
    staging = tmp_path / "zoo.publish"
    assert DatasetCard.load(staging / "README.md").data.license == "cc-by-4.0"
    rows = load_dataset(str(staging), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(rows) == len(zoo)
    (tmp_path / "away").mkdir()
    status, printed, errors = publish(tmp_path / "away", *args, HF_ENDPOINT="http://127.0.0.1:9")
    assert status == 0, errors
    assert "could not be reached" in printed
    status, _, errors = publish(tmp_path, store, "no name")
    assert status == 2
    assert "expected owner/name" in errors


def test_default_names_the_digits(tmp_path: Path) -> None:
    assert ZooSpec().base == "digit-sd"
    assert (
        json.loads(
            (
                Path(load.__code__.co_filename).parents[1] / "_assets" / "digit_sd" / "base.json"
            ).read_text(encoding="utf-8")
        )["quality"]["recognised"]
        > 0.9
    )

"""`lora-ws reproduce readers`: every row is a recipe, draws are equal and chosen by validation."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import open_page
from sklearn.base import clone

from lora_ws.adapters import Layout
from lora_ws.cli import main
from lora_ws.experiments.kinds import load_eval
from lora_ws.experiments.options import Options, ReproduceSpec
from lora_ws.experiments.readers.run import DECAYS, RATES, draws, run
from lora_ws.experiments.readers.spec import ReadersSpec
from lora_ws.experiments.recipes import recipe
from lora_ws.learn.spec import ExperimentSpec
from lora_ws.models import InputSpec
from lora_ws.report.records import read_records

ROOT = Path(__file__).parents[2]
ROWS = ["UpdateKernel > SVC", "DeepSets", "norms only", "shuffled labels"]


def readers() -> ReadersSpec:
    return load_eval("readers")[1]


@pytest.mark.slow
def test_every_reader_has_a_recipe_and_every_column_of_other_rows_a_number() -> None:
    spec = readers()
    names = [reader.name for reader in spec.readers]
    assert len(set(names)) == len(names)
    for reader in spec.readers:
        own = recipe(reader.recipe, spec.dataset, None, None)
        for sizes in reader.sizes.values():
            clone(own.model).set_params(**sizes)  # type: ignore[attr-defined]
    for values in spec.measured_elsewhere.values():
        assert len(values) == len(spec.columns)


@pytest.mark.slow
def test_networks_of_a_size_have_its_parameters() -> None:
    spec, layout = readers(), Layout.known("tiny_sd_qv")
    # Numbers that each representation of the committed page has.
    file = ROOT / "eval" / "results" / "readers" / "records.jsonl"
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    widths = {record["experiment"].partition("/recipe")[0]: record["dim"] for record in records}
    for reader in spec.readers:
        own = recipe(reader.recipe, spec.dataset, None, None)
        inputs = InputSpec(widths[reader.recipe])
        if own.reads_factors:
            inputs = InputSpec.of(layout.choose(own.matrices).layout)
        for name, sizes in reader.sizes.items():
            model: Any = clone(own.model).set_params(**sizes)  # type: ignore[attr-defined]
            net = model.build(inputs, 10)
            count = sum(value.numel() for value in net.parameters())
            assert count == pytest.approx(1e6 * float(name.removesuffix("M")), rel=0.1), reader.name


def test_all_networks_draw_the_same_settings_within_the_ranges() -> None:
    assert draws(8) == draws(8)
    assert len(set(draws(64))) == 64
    for lr, decay in draws(64):
        assert RATES[0] <= lr <= RATES[1]
        assert DECAYS[0] <= decay <= DECAYS[1]
    # Evenly on a logarithmic scale: five standard errors of the mean of a uniform number.
    middle = np.mean([np.log(d.lr / RATES[0]) / np.log(RATES[1] / RATES[0]) for d in draws(64)])
    assert abs(middle - 0.5) < 5 / np.sqrt(12 * 64)


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--rows", '["DeepSet"]'], "there is no reader `DeepSet`, did you mean `DeepSets`?"),
        (["--columns", '["constant"]'], "there is no column `constant`"),
        (["--size", "7M"], "size: expected one of 0.3M, 1.3M, 5M, got 7M"),
    ],
)
def test_what_there_is_not_is_refused(
    args: list[str], text: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["reproduce", "readers", *args, "--out", str(tmp_path)]) == 2
    assert text in capsys.readouterr().err


def short_recipe(*args: Any) -> ExperimentSpec:
    spec = recipe(*args)
    return replace(spec, fit=replace(spec.fit, max_epochs=2))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two columns, once by the recipes and once with draws and a budget."""
    out, spec = tmp_path_factory.mktemp("readers"), readers()
    spec = replace(spec, measured_elsewhere={"mean latent of the photos": (1.0, 68, 45, 2, 3)})
    names = tuple(column.name for column in spec.columns[1:3])
    flags = ReproduceSpec(seeds=2, rows=tuple(ROWS), columns=names)
    plain = Options("readers", out / "plain", flags)
    flags = replace(flags, rows=("DeepSets",), draws=2, size="0.3M")
    drawn = Options("readers", out / "drawn", flags)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lora_ws.experiments.options.recipe", short_recipe)
        run(spec, plain)
        run(spec, drawn)
    return out


@pytest.mark.slow
def test_the_page_has_every_reader_in_every_column(made: Path, tmp_path: Path) -> None:
    folder = made / "plain" / "readers"
    text = (folder / "report.md").read_text(encoding="utf-8")
    for name in (*ROWS, "mean latent of the photos"):
        assert f"| {name} |" in text
    assert "| mean latent of the photos | 68.0 | 45.0 |" in text
    document, seen = open_page(folder / "report.html", tmp_path)
    assert seen["images"] == seen["shown"] == 1
    assert seen["fetched"] == []
    assert "class, unseen leaves" in document


@pytest.mark.slow
def test_what_draws_has_seeds_and_what_does_not_has_one(made: Path) -> None:
    runs = made / "plain" / "runs"
    for name, seeds in (("metanetworks/deep_sets", 2), ("metanetworks/svc_update_kernel", 1)):
        files = list((runs / name / "recipe").rglob("records.jsonl"))
        assert len(files) == 2
        assert {len(read_records(file)) for file in files} == {seeds}


@pytest.mark.slow
def test_each_network_keeps_the_draw_that_validates_best(made: Path) -> None:
    runs = made / "drawn" / "runs" / "metanetworks" / "deep_sets" / "0.3M"
    for column in runs.iterdir():
        tried = {f.parent.name: read_records(f)[0] for f in column.glob("draws/*/records.jsonl")}
        assert len(tried) == 2
        (chosen,) = (column / "chosen").iterdir()
        assert tried[chosen.name].val["auroc"] == max(r.val["auroc"] for r in tried.values())
        assert len(read_records(chosen / "records.jsonl")) == 2


@pytest.mark.slow
def test_the_page_says_what_the_draws_gave(made: Path) -> None:
    text = (made / "drawn" / "readers" / "report.md").read_text(encoding="utf-8")
    runs = made / "drawn" / "runs" / "metanetworks" / "deep_sets" / "0.3M"
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| DeepSets | c")]
    assert len(rows) == 2
    tried = [
        [100 * read_records(f)[0].test["accuracy"] for f in c.glob("draws/*/records.jsonl")]
        for c in runs.iterdir()
    ]
    ranges = {f"{min(own):.0f} to {max(own):.0f}" for own in tried}
    assert {row[2] for row in rows} == ranges

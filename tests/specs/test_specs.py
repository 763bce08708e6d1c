"""Every file in the spec folders parses and instantiates; the folders hold no Python."""

import importlib.metadata
from functools import cache
from pathlib import Path

import datasets
import pytest

from lora_ws.adapters import Layout
from lora_ws.collection import DatasetCard
from lora_ws.collection.card import card_names, find_card
from lora_ws.config import dump_yaml, load_spec, spec_files, spec_root, to_plain
from lora_ws.errors import ConfigError, NotAvailableError
from lora_ws.experiments.kinds import EvalSpec, eval_file, load_eval, trained
from lora_ws.experiments.layers.spec import LayersSpec, SweepSpec
from lora_ws.experiments.principal_components.spec import PrincipalComponentsSpec
from lora_ws.experiments.recipes import recipe_file
from lora_ws.experiments.table.spec import TableSpec
from lora_ws.learn.spec import ExperimentSpec
from lora_ws.report.metrics import METRICS
from lora_ws.zoo.base import BaseSpec
from lora_ws.zoo.build import ZooSpec
from lora_ws.zoo.testbed import TestbedSpec

ROOT = Path(__file__).parents[2]
CARDS = spec_files("datasets")
TRAINING = spec_files("training")
EVAL = spec_files("eval")
SWEEPS = [name for name in TRAINING if name.startswith("figure2/")]
RECIPES = [name for name in TRAINING if not name.startswith(("zoo/", "figure2/"))]
# The first recipe of each folder. What any network takes goes through YAML in tests/contract, too.
FIRST = {name.rpartition("/")[0]: name for name in reversed(RECIPES)}.values()
ZOO_RECIPES = {
    "zoo/digit_sd": BaseSpec,
    "zoo/digit_testbed": TestbedSpec,
    "zoo/tiny_sd": BaseSpec,
    "zoo/lora_ws_mini": ZooSpec,
    "zoo/lora_ws_mini_flagged": ZooSpec,
    "zoo/lora_ws_small": ZooSpec,
    "zoo/lora_ws_small_class": ZooSpec,
    "zoo/lora_ws_mini_rank4": ZooSpec,
    "zoo/lora_ws_sd15": ZooSpec,
    "zoo/transfer": ZooSpec,
    "zoo/transfer_base": ZooSpec,
}


@cache
def opened(name: str) -> ExperimentSpec | SweepSpec:
    return load_spec(SweepSpec if name in SWEEPS else ExperimentSpec, TRAINING[name])


@pytest.mark.parametrize("name", CARDS)
def test_card(name: str) -> None:
    card = load_spec(DatasetCard, CARDS[name])
    assert card.name == name
    assert card.title
    assert card.licence
    assert card.citation
    assert card.source
    assert sum(card.split.fractions) == pytest.approx(1)
    assert len(set(card.classes)) == len(card.classes)
    if card.layout:
        assert Layout.known(card.layout).size > 0


def test_cards_the_paper_publishes() -> None:
    published = {"lora-ws-1k", "lora-ws-10k", "lora-ws-50k", "lora-ws-100k", "lora-ws-nsfw"}
    assert published | {"weightspace-images", "lora-ws-mini", "lora-ws-mini-flagged"} <= set(
        card_names()
    )
    for name in published:
        card = find_card(name)
        assert card.hub_id == f"jacekduszenko/{name}"
        assert Layout.known(card.layout).size == 99_648
    assert len(find_card("lora-ws-1k").classes) == 10


@pytest.mark.parametrize("name", [*RECIPES, *SWEEPS])
def test_recipe(name: str) -> None:
    assert opened(name).dataset in card_names()
    header = TRAINING[name].read_text(encoding="utf-8").splitlines()[0]
    assert header.startswith("# "), "a recipe states its expected result and cost first"
    assert len(header) > 20


@pytest.mark.parametrize("name", [n for n in EVAL if isinstance(load_eval(n)[1], TableSpec)])
def test_table(name: str) -> None:
    table = load_spec(TableSpec, eval_file(name))
    assert table.source
    for row in table.rows:
        assert row.ours or row.published, "a row of the paper has its published numbers"
        for published in row.published.values():
            assert set(published) <= set(METRICS)
        for recipe in row.recipes.values():
            recipe_file(recipe)
    for entry in table.inputs:
        recipe_file(entry.recipe)
    used = {r for row in table.rows for r in row.recipes.values()}
    # A row of ours may be a recipe of another folder.
    own = {recipe for recipe in used if recipe.startswith(f"{name}/")}
    assert own == {recipe for recipe in RECIPES if recipe.startswith(f"{name}/")}


def test_published_numbers_are_those_printed() -> None:
    rows = {row.name: row for row in load_spec(TableSpec, eval_file("table1")).rows}
    ours = [rows["FlatVecPCA"].published[f"lora-ws-{n}k"]["accuracy"] for n in (1, 10, 50)]
    assert ours == [(42.21, 1.20), (81.36, 1.07), (78.33, 1.37)]
    assert rows["StatsLayerDense"].published["lora-ws-50k"]["f1"] == (44.72, 0.44)
    flagged = {row.name: row for row in load_spec(TableSpec, eval_file("table2")).rows}
    assert flagged["StatsFlatVec"].published["lora-ws-nsfw"]["recall"] == (77.50, 9.35)


def test_figures() -> None:
    layers = load_spec(LayersSpec, eval_file("figure2"))
    for recipe in layers.recipes.values():
        recipe_file(recipe)
    assert max(claim.accuracy for claim in layers.published) == 97.01
    components = load_spec(PrincipalComponentsSpec, eval_file("figure3"))
    printed = [100, 200, 500, 1000, 2000, 3000, 5000, 7500]
    assert list(components.published["lora-ws-10k"]) == printed
    assert set(printed) <= set(components.components)
    for recipe in components.recipes.values():
        recipe_file(recipe)


@pytest.mark.parametrize("name", EVAL)
def test_evaluation(name: str) -> None:
    run, spec = load_eval(name)
    assert callable(run)
    assert isinstance(spec, EvalSpec)
    assert spec.title
    assert spec.source
    assert getattr(spec, "published", True)


@pytest.mark.parametrize("name", EVAL)
def test_the_table_of_evaluations_lists_every_file(name: str) -> None:
    rows = [
        line
        for line in (ROOT / "eval/README.md").read_text(encoding="utf-8").splitlines()
        if line[:2] == "| "
    ]
    (row,) = (row for row in rows if row.startswith(f"| `{name}.yaml` |"))
    assert f"(results/{name}/report.md)" in row
    assert (ROOT / f"eval/results/{name}/report.md").is_file()
    assert len(rows) == 1 + len(EVAL)


def test_all_are_the_tables_and_figures_that_train() -> None:
    assert trained() == ["figure2", "figure3", "readers", "table1", "table2"]


def test_an_unknown_kind_is_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "tables.yaml"
    file.write_text("kind: tabel\ntitle: x\n", encoding="utf-8")
    monkeypatch.setattr("lora_ws.config.spec_files", lambda folder: {"tables": file})
    with pytest.raises(ConfigError, match=r"kind: expected one of table, .*, got tabel"):
        load_eval("tables")


def test_zoo_recipes() -> None:
    assert set(ZOO_RECIPES) == set(TRAINING) - set(RECIPES) - set(SWEEPS)
    for name, kind in ZOO_RECIPES.items():
        spec = load_spec(kind, TRAINING[name])
        assert load_spec(kind, TRAINING[name]) == spec
        assert TRAINING[name].read_text(encoding="utf-8").startswith("# ")


def test_there_are_recipes() -> None:
    assert RECIPES


@pytest.mark.parametrize(
    "name",
    [
        *FIRST,
        *(pytest.param(name, marks=pytest.mark.slow) for name in RECIPES if name not in FIRST),
    ],
)
def test_recipe_survives_a_round_trip(name: str, tmp_path: Path) -> None:
    dump_yaml(opened(name), tmp_path / "again.yaml")
    assert to_plain(load_spec(ExperimentSpec, tmp_path / "again.yaml")) == to_plain(opened(name))


@pytest.mark.parametrize("folder", ["datasets", "training", "eval"])
def test_spec_folders_hold_no_python(folder: str) -> None:
    assert not list((ROOT / folder).rglob("*.py"))
    assert spec_root(folder) == ROOT / folder  # type: ignore[arg-type]


def test_hugging_face_datasets_is_not_shadowed() -> None:
    found = Path(str(datasets.__file__))
    installed = Path(str(importlib.metadata.distribution("datasets").locate_file("datasets")))
    assert found.parent == installed


def test_unknown_key_in_a_card_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("name: x\nlicense: MIT\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="unknown option `license`, did you mean `licence`"):
        load_spec(DatasetCard, tmp_path / "c.yaml")


def test_unknown_card_names_the_nearest() -> None:
    with pytest.raises(NotAvailableError, match="did you mean `lora-ws-mini`"):
        find_card("lora-ws-min")

"""Changes of adapters against dense products in numpy, and studies that go on after a stop."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from lora_ws.adapters import Layout
from lora_ws.adapters.layout import LayerSpec
from lora_ws.commands.study import study
from lora_ws.errors import ConfigError
from lora_ws.experiments.study.changes import CHANGES, SIZES, changed_rows, partners
from lora_ws.experiments.study.report import write_study
from lora_ws.experiments.study.run import CLEAN, RECORDS, Read, run_study
from lora_ws.experiments.study.spec import StudySpec
from lora_ws.experiments.study.trainings import TRAININGS

N, LABELS = 6, np.array([0, 0, 1, 1, 2, 2])
# Rows are float32, so an update keeps about this much of each entry's largest term.
ROUNDING = 2e-6


def zoo(rank: int) -> tuple[np.ndarray, Layout]:
    layers = [LayerSpec("down_blocks.0.attn1.to_q", 6, 5, rank)]
    layers += [LayerSpec(f"up_blocks.{k}.attn2.to_v", 8, 5, rank) for k in range(2)]
    layout = Layout(tuple(layers))
    rng = np.random.default_rng(rank)
    return rng.standard_normal((N, layout.size)).astype(np.float32), layout


def updates(rows: np.ndarray, layout: Layout) -> list[np.ndarray]:
    """Every ``BA``, formed: ``[adapters, outputs, inputs]`` of each module."""
    return [
        rows[:, up].reshape(N, *layer.up_shape).astype(np.float64)
        @ rows[:, down].reshape(N, *layer.down_shape).astype(np.float64)
        for layer, down, up in layout.pairs()
    ]


def after(name: str, level, rank: int, seed: int = 0) -> list[np.ndarray]:
    rows, layout = zoo(rank)
    return updates(*changed_rows(rows, layout, CHANGES[name], level, LABELS, seed))


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize(
    "name", [name for name, own in CHANGES.items() if own.keeps_update and not own.files]
)
def test_the_update_stays_where_a_study_says_so(name: str, rank: int):
    for level in CHANGES[name].levels:
        # Float32 factors of a basis of condition c keep the update to c roundings.
        size = float(level) if name == "gauge" else 1.0
        for new, old in zip(after(name, level, rank), updates(*zoo(rank)), strict=True):
            np.testing.assert_allclose(new, old, atol=ROUNDING * size * np.abs(old).max() * rank)


@pytest.mark.parametrize("name", [name for name, own in CHANGES.items() if not own.keeps_update])
def test_the_update_changes_where_a_study_says_so(name: str):
    for level in CHANGES[name].levels[-1:] if name != "truncation" else (1.0,):
        new, old = after(name, level, 4), updates(*zoo(4))
        assert any(not np.allclose(a, b, atol=1e-4) for a, b in zip(new, old, strict=True))


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("share", [0.9, 0.5])
def test_merges_are_weighted_sums_with_an_adapter_of_another_class(rank: int, share: float):
    other = partners(LABELS, seed=3)
    assert (LABELS[other] != LABELS).all()
    for new, old in zip(after("merging", share, rank, seed=3), updates(*zoo(rank)), strict=True):
        wanted = share * old + (1 - share) * old[other]
        np.testing.assert_allclose(new, wanted, atol=ROUNDING * np.abs(old).max() * 2 * rank)


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("size", [0.1, 3.0])
def test_noise_on_updates_has_the_norm_it_says(rank: int, size: float):
    for new, old in zip(after("update-noise", size, rank), updates(*zoo(rank)), strict=True):
        noise = np.linalg.norm(new - old, axis=(1, 2))
        np.testing.assert_allclose(noise, size * np.linalg.norm(old, axis=(1, 2)), rtol=1e-4)


def test_noise_on_factors_is_of_their_size_and_on_the_side_it_says():
    rows, layout = zoo(4)
    for name, still, moved in (("noise-in-a", 1, 0), ("noise-in-b", 0, 1)):
        new, _ = changed_rows(rows, layout, CHANGES[name], 0.3, LABELS, 0)
        for _, *sides in layout.pairs():
            np.testing.assert_array_equal(new[:, sides[still]], rows[:, sides[still]])
            gap = (new - rows)[:, sides[moved]]
            # Six adapters of at least 20 entries: a standard deviation to 30 %.
            size = gap.std() / np.sqrt((rows[:, sides[moved]] ** 2).mean())
            assert 0.2 < size < 0.4


@pytest.mark.parametrize(("level", "wanted"), SIZES.items())
def test_strengths_scale_the_update(level: str, wanted: float):
    for new, old in zip(after("strength", level, 2), updates(*zoo(2)), strict=True):
        np.testing.assert_allclose(new, wanted * old, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rank", [2, 4])
def test_truncated_updates_are_the_nearest_of_a_rank(rank: int):
    for new, old in zip(after("truncation", 1.0, rank), updates(*zoo(rank)), strict=True):
        u, s, v = np.linalg.svd(old)
        best = s[:, :1, None] * u[:, :, :1] @ v[:, :1]
        np.testing.assert_allclose(new, best, atol=1e-5 * np.abs(old).max())


@pytest.mark.parametrize(
    ("level", "bits"), [("float16", 11), ("bfloat16", 8), ("float8_e4m3fn", 4)]
)
def test_casts_round_to_the_bits_of_a_type(level: str, bits: int):
    rows, layout = zoo(2)
    new, _ = changed_rows(rows, layout, CHANGES["cast"], level, LABELS, 0)
    # Numbers too small for the type are rounded to its smallest step instead.
    large = np.abs(rows) > 0.05
    gap = np.abs(new / rows - 1)[large].max()
    assert 2.0 ** -(bits + 2) < gap <= 2.0**-bits


def test_parts_keep_the_modules_they_name():
    new, old = after("missing-parts", "only cross-attention", 2), updates(*zoo(2))
    assert not new[0].any()
    for k in (1, 2):
        np.testing.assert_allclose(new[k], old[k], atol=1e-6)


@pytest.mark.parametrize("to", CHANGES["spelling"].levels)
def test_files_of_every_format_hold_the_same_rows(to: str):
    layout = Layout.known("tiny_sd_qv")
    rows = np.random.default_rng(0).standard_normal((1, layout.size), np.float32)
    new, after = changed_rows(rows, layout, CHANGES["spelling"], to, np.zeros(1), 0)
    assert after == layout
    np.testing.assert_array_equal(new, rows)


@pytest.mark.parametrize("rank", [1, 4])
def test_camouflage_adds_the_main_direction_of_the_mean_of_another_class(rank: int):
    other = LABELS[partners(LABELS, seed=2)]
    for new, old in zip(after("camouflage", 0.3, rank, seed=2), updates(*zoo(rank)), strict=True):
        means = np.stack([old[label == LABELS].mean(axis=0) for label in other])
        u, _, v = np.linalg.svd(means)
        added = 0.3 * np.linalg.norm(old, axis=(1, 2))[:, None, None] * u[:, :, :1] * v[:, :1]
        np.testing.assert_allclose(new, old + added, atol=1e-5 * np.abs(old).max())


def test_the_help_names_every_study() -> None:
    names = re.findall(r"[a-z]+(?:-[a-z]+)*", (study.__doc__ or "").partition("name:")[2])
    assert {*CHANGES, *TRAININGS} <= {*names}


def test_unknown_studies_are_named():
    # Before whatever else is missing.
    for name, near in (("wieght-noise", ", did you mean"), ("?", "; expected one of"), ("", ";")):
        with pytest.raises(ConfigError, match=rf"no study `{re.escape(name)}`{near}.*weight-noise"):
            run_study(name, StudySpec())


@pytest.mark.slow
def test_a_study_goes_on_where_it_stopped_and_writes_a_page(tmp_path: Path):
    spec = StudySpec(model=["tiny-sd"], draws=2, out=tmp_path)
    found = run_study("missing-parts", spec)
    lines = (tmp_path / RECORDS).read_text(encoding="utf-8").splitlines()
    assert len(lines) == len(found) == 1 + len(CHANGES["missing-parts"].levels)
    # As after a kill: the last line is cut off.
    (tmp_path / RECORDS).write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:20], encoding="utf-8")
    assert run_study("missing-parts", spec) == found
    assert json.loads(lines[0])["study"] == CLEAN
    more = run_study("merging", spec)
    assert more[0] == found[0]
    page, (grid,) = write_study(more, tmp_path)
    text = page.read_text(encoding="utf-8")
    assert "both in top two" in text
    assert len(grid.rows) == 1 + len(CHANGES["merging"].levels)
    for read in more[1:]:
        assert 0 <= read.both <= 1
        assert read.either >= read.hits.mean()


@pytest.mark.slow
def test_readers_of_other_studies_stay_out_of_a_page_s_tables(tmp_path: Path):
    found = [
        Read(model, "d", study, level, 0, "1100", 0.5, 1.0, 0.0)
        for model, study in (("a", "camouflage"), ("b", "weight-noise"))
        for study, level in ((CLEAN, CLEAN), (study, 1.0))
    ]
    _, grids = write_study(found, tmp_path)
    assert [[row[0].text for row in grid.rows] for grid in grids] == [["b", "b"], ["a", "a"]]

"""Words of prompts from files: planted ones in a small base, and the real adapters."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from factories import matrices, write_adapter
from safetensors.numpy import save_file
from scipy.stats import binom, binomtest
from tolerances import EXACT
from warm import COMMAND

from lora_ws.adapters import Layout, read_adapter
from lora_ws.audit.prompt import PromptReader, null_words, subject
from lora_ws.audit.prompt_leak import prompt_leak
from lora_ws.audit.similar import Index, adapter_modules
from lora_ws.cli import main
from lora_ws.collection import AdapterSet, DatasetCard, load
from lora_ws.diffusion.cross_attention import query_correlations
from lora_ws.diffusion.pipeline import adapter_layout
from lora_ws.errors import AdapterError, ConfigError, LayoutError
from lora_ws.functional.factors import cut_to_rank
from lora_ws.learn.leaks import find_prompt_words

DIGITS = ("two", "five", "nine")
FRAME = "a photo of sks {}"
CLASSES = 10


@pytest.fixture(scope="module")
def reader() -> PromptReader:
    return PromptReader("digit-sd", (FRAME, "{}"))


def planted(reader: PromptReader, words: Sequence[str], rank: int = 1, seed: int = 0) -> AdapterSet:
    """Adapters whose queries are drawn as if prompts with these words had been behind them."""
    rng = np.random.default_rng(seed)
    layout = adapter_layout(reader.pipeline.unet, rank)
    weights = rng.standard_normal((len(words), layout.size)).astype(np.float32)
    columns = {layer.name: up for layer, _, up in layout.pairs()}
    prompts = [FRAME.format(word) for word in words]
    states = reader._states
    for name, correlations in query_correlations(reader.pipeline, states, prompts, 1e-4):
        roots = np.linalg.cholesky(correlations)
        up = columns[name]
        for n, root in enumerate(roots):
            # Columns of one update are much alike after training, as here.
            drawn = np.einsum("hde,he->hd", root, rng.standard_normal(root.shape[:2])).ravel()
            weights[n, up] = np.outer(drawn, rng.standard_normal(rank)).ravel()
    card = DatasetCard(name="planted", label="word", base_model=reader.base)
    table = pa.table({"word": list(words), "other": list(words[::-1])})
    return AdapterSet(weights, layout, table, card)


def files_of(zoo: AdapterSet, folder: Path, dtype: type = np.float32) -> list[Path]:
    layers = [(x.name, x.in_features, x.out_features) for x in zoo.layout.layers]
    files = [folder / f"{k}.safetensors" for k in range(len(zoo))]
    for file, row in zip(files, zoo.weights, strict=True):
        found = matrices(row.astype(dtype), layers, zoo.layout.layers[0].rank)
        save_file({key: np.ascontiguousarray(block) for key, block in found.items()}, file)
    return files


def moved_by_rounding(layout: Layout, reader: PromptReader, dtype: type) -> float:
    """By how much factors that are rounded can move a score.

    A head of d numbers scores ``-d/2 log(|W l|^2 / |l|^2)``. Two factors that are each rounded by
    half of eps move l by eps, and the logarithm by twice the condition of W as much. That is the
    root of the correlation's, whose eigenvalues are from ``noise / (1 + noise)`` to d.
    """
    widths = [x.out_features for x in layout.layers if x.name.endswith("attn2.to_q")]
    condition = np.sqrt(max(widths) / 4 * (1 + reader.noise) / reader.noise)
    return float(sum(widths) / 2 * 2 * condition * np.finfo(dtype).eps)


@pytest.mark.parametrize("rank", [1, 4])
def test_planted_words_are_read_from_rows_and_files(
    reader: PromptReader, rank: int, tmp_path: Path
) -> None:
    zoo = planted(reader, DIGITS, rank)
    scores = reader.scores(zoo, ["zero", *DIGITS])
    assert scores.argmax(axis=1).tolist() == [1, 2, 3]
    frames = reader.likelihoods(zoo, DIGITS)
    assert (frames.max(axis=2).argmax(axis=1) == 0).all()
    np.testing.assert_array_equal(scores[:, 1:], frames.max(axis=1))
    half = [read_adapter(file) for file in files_of(zoo, tmp_path, np.float16)]
    bound = moved_by_rounding(zoo.layout, reader, np.float16)
    np.testing.assert_allclose(reader.scores(half, ["zero", *DIGITS]), scores, atol=bound)
    assert reader.scores(half, ["zero", *DIGITS]).argmax(axis=1).tolist() == [1, 2, 3]


def test_a_reading_weighs_words_against_the_rest_of_the_vocabulary(reader: PromptReader) -> None:
    zoo = planted(reader, ["two", "seven"])
    first, second = reader.read(zoo, [*DIGITS, "two"])
    assert first.template == second.template == FRAME
    assert next(iter(first.probabilities)) == "two"
    assert sorted(first.probabilities) == sorted(DIGITS)
    for found in (first, second):
        assert sum(found.probabilities.values()) + found.none == pytest.approx(1, abs=EXACT)
    # "seven" is among the words that stand for all others.
    assert first.probabilities["two"] > 0.5 > first.none
    assert second.none > 0.5
    assert first.fit == pytest.approx(reader.scores(zoo, ["two"])[0, 0], abs=EXACT)
    # As good as an adapter of another base.
    noise = np.random.default_rng(0).standard_normal((1, zoo.layout.size), dtype=np.float32)
    (strange,) = reader.read(AdapterSet(noise, zoo.layout, zoo.rows[:1]), DIGITS)
    assert strange.fit < 0 < first.fit
    assert strange.none > 0.999
    (alone,) = reader.read(zoo.select([0]), ["two"])
    assert alone.nats["two"] == pytest.approx(first.nats["two"], abs=EXACT)


def test_null_words_are_whole_words_that_nobody_asked_for() -> None:
    pairs = ["the</w>", "th", "xx</w>", "a1c</w>", "cat</w>", "dog</w>", "é</w>", "cow</w>"]
    tokenizer = SimpleNamespace(get_vocab=lambda: {token: k for k, token in enumerate(pairs)})
    assert null_words(tokenizer, ["Dog house"]) == ["the", "cat", "cow"]
    assert null_words(tokenizer, [], 2) == ["the", "cow"]


@pytest.mark.parametrize(
    ("text", "found"),
    [("a photo of a red fish", "red fish"), ("An image of the sks dog", "dog"), ("tree", "tree")],
)
def test_frames_are_taken_off_a_text(text: str, found: str) -> None:
    assert subject(text) == found


def test_what_cannot_be_read_is_refused(reader: PromptReader, tmp_path: Path) -> None:
    layer = ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", 32, 32)
    other = ("down_blocks.9.attentions.0.transformer_blocks.0.attn2.to_q", 32, 32)
    values = np.ones(64, np.float32)
    none, strange = (
        read_adapter(write_adapter(tmp_path / f"{k}.safetensors", values, (one,)))
        for k, one in enumerate((layer, other))
    )
    with pytest.raises(AdapterError, match=r"0\.safetensors: expected adapted queries of cross"):
        reader.scores([none], ["two"])
    with pytest.raises(LayoutError, match=r"down_blocks\.9.* digit-sd has no such layer"):
        reader.scores([strange], ["two"])
    zoo = planted(reader, ["two"])
    with pytest.raises(ConfigError, match="words: expected at least one"):
        reader.scores(zoo, [])
    with pytest.raises(ConfigError, match="no `horse`"):
        reader.scores(zoo, ["horse"])
    with pytest.raises(ConfigError, match=r"one \{\} in each.* `a photo`"):
        PromptReader("digit-sd", ("a photo",)).scores(zoo, ["two"])


def test_leak_counts_hits_against_chance(reader: PromptReader) -> None:
    zoo = planted(reader, [*DIGITS, "two"], seed=3)
    (told,) = prompt_leak(zoo, reader)
    assert (told.subset, told.adapters, told.top1, told.top3, told.chance) == ("", 4, 1, 1, 0.5)
    assert told.p_value == pytest.approx(0.5**4)
    interval = binomtest(4, 4).proportion_ci(0.95, "wilson")
    assert (told.low, told.high) == (interval.low, interval.high)
    # Backwards: two, nine, five, two.
    (other,) = prompt_leak(zoo, reader, label="other")
    assert (other.top1, other.top3) == (0.5, 1)


@pytest.mark.slow
def test_audit_says_whether_weights_show_words_of_prompts(reader: PromptReader) -> None:
    zoo = planted(reader, DIGITS * 3, seed=3)

    def labelled(words: Sequence[str]) -> AdapterSet:
        return replace(zoo, rows=pa.table({"word": list(words)}))

    low = round(100 * binomtest(9, 9).proportion_ci(0.95, "wilson").low)
    told = find_prompt_words(zoo)
    assert told.verdict == "leak"
    assert told.found.endswith(f"100 % ({low} to 100; largest class 33 %)")
    assert find_prompt_words(labelled((DIGITS[1:] + DIGITS[:1]) * 3)).verdict == "clean"
    unknown = find_prompt_words(labelled(("two", "five", "horse") * 3), "digit-sd")
    assert unknown.verdict == "not measured"
    assert "no `horse`" in unknown.found
    elsewhere = replace(zoo, card=replace(zoo.card, base_model="Stable Diffusion 1.5"))
    assert find_prompt_words(elsewhere).advice.startswith("--base")


# As in an install without the extra `diffusion`.
PLAIN = """
import sys
class Refuse:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in ("diffusers", "transformers"):
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Refuse())
"""


@pytest.mark.slow
def test_an_audit_without_what_reads_prompts_measures_the_rest() -> None:
    args = ["data", "audit", "lora-ws-mini", "--as_json", "true"]
    command = [sys.executable, "-c", PLAIN + COMMAND, *args]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
    found = {line["what"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert found["copies"]["verdict"] == "clean"
    assert found["words of prompts"]["verdict"] == "not measured"
    assert "lora_ws[diffusion]" in found["words of prompts"]["advice"]


@pytest.mark.slow
def test_commands(reader: PromptReader, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    zoo = planted(reader, DIGITS)
    (tmp_path / "files").mkdir()
    two, five, nine = map(str, files_of(zoo, tmp_path / "files"))
    common = ["--base", "digit-sd", "--templates", FRAME, "--as_json", "true"]
    missing = str(tmp_path / "none.safetensors")
    words = ["--words", "two", "nine"]
    assert main(["prompt", two, missing, nine, *words, *common]) == 1
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    assert [(x["file"], max(x["probabilities"], key=x["probabilities"].get)) for x in lines] == [
        (two, "two"),
        (nine, "nine"),
    ]
    assert "none.safetensors" in err
    modules = [(file, list(adapter_modules(read_adapter(file)))) for file in (two, five)]
    Index.build(tmp_path / "index", modules)
    for where, count in ((tmp_path / "files", 3), (tmp_path / "index", 2)):
        assert main(["search", "a photo of five", "--index", str(where), *common]) == 0
        hits = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert len(hits) == count
        assert hits[0]["file"] == five
        assert hits[0]["probability"] > 0.5
    store = str(zoo.save(tmp_path / "store"))
    assert main(["data", "prompt-leak", store, *common[2:]]) == 0
    assert json.loads(capsys.readouterr().out)["top1"] == 1
    assert main(["prompt", two, *words, "--base", "digit-sd", "--top", "0"]) == 2


@pytest.mark.slow
def test_tables(reader: PromptReader, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (file,) = files_of(planted(reader, ["two"]), tmp_path)
    common = ["--base", "digit-sd", "--templates", FRAME]
    assert main(["prompt", str(file), "--words", "two", "six", *common]) == 0
    shown = capsys.readouterr().out
    assert shown.index("two") < shown.index("(none of these)")
    assert main(["search", "two", "--index", str(tmp_path), *common]) == 0
    assert FRAME in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("start", ["per_adapter", "shared"])
def test_real_adapters(start: str) -> None:
    """Goals: 60 % of ten words where the prompt names the class, 13 % where it does not."""
    reader = PromptReader("tiny-sd")
    zoo = load("lora-ws-mini")
    told, untold = (
        prompt_leak(zoo.subset(f"{start}/{prompt}"), reader)[0] for prompt in ("class", "constant")
    )
    assert told.top1 >= 0.60
    assert untold.top1 <= 0.13
    # As good as chance, at a level of 1 %.
    assert untold.top1 * untold.adapters <= binom.ppf(0.99, untold.adapters, 1 / CLASSES)


@pytest.mark.slow
def test_real_adapters_in_other_factors_score_the_same() -> None:
    reader = PromptReader("tiny-sd", (FRAME,))
    zoo = load("lora-ws-mini", subset="per_adapter/class").select(range(0, 500, 50))
    words = zoo.labels()[1]
    expected = reader.scores(zoo, words)
    layout = Layout.from_layers(
        type(x)(x.name, x.in_features, x.out_features, 4) for x in zoo.layout.layers
    )
    weights = np.empty((len(zoo), layout.size), np.float32)
    for (layer, down, up), (_, a, b) in zip(layout.pairs(), zoo.layout.pairs(), strict=True):
        for n, row in enumerate(zoo.weights):
            cut = cut_to_rank(row[a][None], row[b][:, None], 4)
            weights[n, down], weights[n, up] = cut.down.ravel(), cut.up.ravel()
        assert layer.rank == 4
    again = AdapterSet(weights, layout, zoo.rows, zoo.card)
    bound = moved_by_rounding(layout, reader, np.float32)
    np.testing.assert_allclose(reader.scores(again, words), expected, atol=bound)

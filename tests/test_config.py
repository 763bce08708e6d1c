"""Keys whose values are classes: what their errors and their help say."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.svm import SVC

from lora_ws.config import DEPRECATED, load_spec, parse
from lora_ws.errors import ConfigError
from lora_ws.featurizers import Featurizer, FlatVecPCA, Norms


@dataclass(frozen=True)
class Spec:
    """Base classes of another package, and ours beside them.

    Attributes:
        any: also a transformer of scikit-learn.
        ours: also any other of its estimators.
        rows: a plain value that may be left out.
        names: several.
    """

    any: Featurizer | TransformerMixin | None = None
    ours: Featurizer | BaseEstimator | None = None
    rows: int | None = None
    names: tuple[str, ...] = ()


class Sized(TransformerMixin, BaseEstimator):
    """A class of the user's own."""

    def __init__(self, size: int) -> None:
        self.size = size


@dataclass(frozen=True)
class Base:
    """What another spec has too.

    Attributes:
        files: of any kind, as many as there are,
            on one line or more.
    """

    files: list[str]


@dataclass(frozen=True, kw_only=True)
class Lists(Base):
    """Flags that take several words.

    Attributes:
        sizes: of them.
    """

    sizes: list[float] | None = None


def show(spec: Lists) -> Lists:
    """Return what was read."""
    return spec


def run(spec: Spec) -> Spec:
    """Return what was read."""
    return spec


def read(*args: str) -> Spec:
    call: Callable[[], Spec] = parse(run, args, "run")
    return call()


NAMES = (
    "DeltaPCA, FlatVec, FlatVecPCA, Norms, StatsFlatVec, StatsLayer, StatsLayerDense, UpdateKernel"
)
WRONG = {
    "--config absent.yaml": "there is no file ",
    "--any FlatVecPCB": "--any: no class `FlatVecPCB`, did you mean `FlatVecPCA`?",
    "--ours FlatVecPCB": "--ours: no class `FlatVecPCB`, did you mean `FlatVecPCA`?",
    "--ours sklearn.svm.SCV": "--ours: cannot load `sklearn.svm.SCV` (",
    "--any nowhere.Class": "--any: cannot load `nowhere.Class` (No module named 'nowhere')",
    "--any sklearn.svm.SVC": f"--any: no class `sklearn.svm.SVC`; expected one of {NAMES}",
    "--ours Featurizer": f"--ours: no class `Featurizer`; expected one of {NAMES}",
    "--ours.n_components 5": f"--ours.n_components: expected --ours first, one of {NAMES}",
    "--any.n_components 5": f"--any.n_components: expected --any first, one of {NAMES}",
    "--any FlatVecPCA --any.n_componets 5": (
        "unknown option `n_componets` of FlatVecPCA, did you mean `n_components`?"
    ),
    "--any FlatVecPCA --any.n_components many": (
        "--any.n_components: expected a whole number or null, got `many`"
    ),
    "--any FlatVecPCA --any.solver fast": "--any.solver: expected ",
    "--any sklearn.pipeline.FeatureUnion": (
        "--any: cannot set `transformer_list` of `sklearn.pipeline.FeatureUnion`, which has no type"
    ),
    f"--any {__name__}.Sized": "missing: --any.size",
    "--ours sklearn.svm.SVC --ours.c 1": "unknown option `c` of SVC; expected one of C, ",
    "--names a": "--names: expected a list such as [a, b], got `a`",
    "--rows few": "--rows: expected a whole number or null, got `few`",
}


@pytest.mark.parametrize("args", WRONG)
def test_what_does_not_fit_a_key_is_named_in_one_line(args: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(*args.split())
    (line,) = str(caught.value).splitlines()
    assert line.startswith(WRONG[args])


def test_classes_are_read_by_name_and_by_dotted_path() -> None:
    spec = read("--any", "FlatVecPCA", "--any.n_components", "7", "--ours", "sklearn.svm.SVC")
    assert isinstance(spec.any, FlatVecPCA)
    assert spec.any.n_components == 7
    assert isinstance(spec.ours, SVC)
    own = read("--any", f"{__name__}.Sized", "--any.size", "3").any
    assert isinstance(own, Sized)
    assert own.size == 3


def test_a_short_name_means_our_class_where_the_user_has_one_too(tmp_path: Path) -> None:
    (tmp_path / "namesakes.py").write_text(
        "from lora_ws.featurizers import Norms as Ours\n"
        "class Norms(Ours):\n"
        "    def __init__(self, *, own: int = 0, layout=None, matrices=None):\n"
        "        super().__init__(layout=layout, matrices=matrices)\n"
        "        self.own = own\n",
        encoding="utf-8",
    )
    (tmp_path / "short.yaml").write_text("any: Norms\n", encoding="utf-8")
    (tmp_path / "long.yaml").write_text("any: {class_path: Norms}\n", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        theirs = importlib.import_module("namesakes").Norms
        assert type(read("--any", "Norms").any) is Norms
        assert type(load_spec(Spec, tmp_path / "short.yaml").any) is Norms
        assert type(load_spec(Spec, tmp_path / "long.yaml").any) is Norms
        own = read("--any=namesakes.Norms", "--any.own", "3").any
        assert type(own) is theirs
        assert own.own == 3


def test_a_file_is_explained_as_flags_are(tmp_path: Path) -> None:
    file = tmp_path / "spec.yaml"
    file.write_text(
        "ours: {class_path: FlatVecPCA, init_args: {n_components: many}}\n", encoding="utf-8"
    )
    with pytest.raises(
        ConfigError, match=r"--ours.n_components: expected a whole number or null, got `many`"
    ):
        load_spec(Spec, file)


def test_a_file_without_keys_is_said_to_have_none(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("hello\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"notes.txt: expected keys with values .*, got `hello`"):
        load_spec(Spec, file)


@pytest.mark.parametrize("number", ["-1", "-0.5", "-.5", "-1.", "-1e-1", "-2.5E+3", "-.5e2"])
@pytest.mark.parametrize("place", ["first", "last"])
def test_a_negative_number_is_no_flag(number: str, place: str) -> None:
    sizes = [number, "1"] if place == "first" else ["1", number]
    read = parse(show, ["--files", "a", "--sizes", *sizes], "show")()
    assert read.sizes == [float(size) for size in sizes]


def test_a_list_of_a_spec_is_several_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    read = parse(show, ["--files", "a", "b", "--sizes", "1", "0.5"], "show")()
    assert read == Lists(["a", "b"], sizes=[1, 0.5])
    (tmp_path / "spec.yaml").write_text("files: [a, b]\nsizes: [1, 0.5]\n", encoding="utf-8")
    assert load_spec(Lists, tmp_path / "spec.yaml") == read
    with pytest.raises(ConfigError, match="missing: --files"):
        parse(show, [], "show")
    with pytest.raises(SystemExit):
        parse(show, ["--help"], "show")
    shown = " ".join(capsys.readouterr().out.split())
    assert "of any kind, as many as there are, on one line or more." in shown


def test_a_spec_may_stand_beside_words_without_a_flag() -> None:
    def named(names: list[str], /, spec: Spec) -> tuple[list[str], Spec]:
        """Return what was read."""
        return names, spec

    assert parse(named, ["a", "b", "--rows", "3"], "named")() == (["a", "b"], Spec(rows=3))
    with pytest.raises(ConfigError, match="missing: names"):
        parse(named, ["--rows", "3"], "named")


@dataclass(frozen=True)
class Inner:
    """What another spec holds.

    Attributes:
        width: of it.
        breadth: deprecated, use ``width``.
    """

    width: int = 1
    breadth: int | None = field(default=None, metadata=DEPRECATED)


@dataclass(frozen=True)
class Outer:
    """A spec that holds another.

    Attributes:
        inner: the other.
        amount: how many.
        number: deprecated, use ``amount``.
    """

    inner: Inner = field(default_factory=Inner)
    amount: int = 1
    number: int | None = field(default=None, metadata=DEPRECATED)


def outer(spec: Outer) -> Outer:
    """Return what was read."""
    return spec


@pytest.mark.parametrize("flag", ["--help", "--print_config"])
def test_deprecated_keys_are_read_but_not_shown(
    flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert parse(outer, ["--number", "3", "--inner.breadth", "2"], "outer")() == Outer(
        Inner(breadth=2), number=3
    )
    (tmp_path / "spec.yaml").write_text("inner: {breadth: 4}\nnumber: 5\n", encoding="utf-8")
    assert load_spec(Outer, tmp_path / "spec.yaml") == Outer(Inner(breadth=4), number=5)
    with pytest.raises(SystemExit):
        parse(outer, [flag], "outer")
    shown = capsys.readouterr().out
    assert "amount" in shown
    assert "width" in shown
    assert "number" not in shown
    assert "breadth" not in shown
    with pytest.raises(ConfigError, match="unknown flag") as caught:
        parse(outer, ["--inner.braedth", "1"], "outer")
    assert "`--inner.breadth`" not in str(caught.value)


def test_help_lists_our_classes_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read("--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.count(f"one of {NAMES}, or any by dotted path)") == 2
    assert "sklearn" not in shown

"""Symmetries measured: networks whose symmetries are known on paper, honest and not."""

from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from lora_ws.adapters import LayerSpec, Layout
from lora_ws.cli import main
from lora_ws.featurizers import Norms
from lora_ws.models import InputSpec, MetanetModule, Metanetwork
from lora_ws.models.base import Symmetry
from lora_ws.models.factors import Factors
from lora_ws.models.symmetries import changes, faults, measure


class Reads(Metanetwork):
    """Reads some function of each module's update, formed, or of its factors."""

    reads = "factors"
    what: ClassVar[str] = "update"

    def build(self, inputs: InputSpec, outputs: int) -> MetanetModule:
        return ReadsModule(inputs, outputs, self.what)


class ReadsModule(MetanetModule):
    def __init__(self, inputs: InputSpec, outputs: int, what: str) -> None:
        super().__init__(inputs)
        self.factors, self.what = Factors(inputs.factors), what
        self.out = nn.LazyLinear(outputs)
        self.out(self.embed(torch.zeros(1, inputs.width)))

    def embed(self, rows: Tensor) -> Tensor:
        found = []
        for up, down in self.factors(rows):
            update = up @ down
            found.append(
                {
                    "update": update,
                    "square": update @ update.mT,
                    "direction": update / update.norm(dim=(-2, -1), keepdim=True),
                    "factors": up.abs().sum(-1),
                }[self.what].flatten(1)
            )
        return torch.cat(found, 1)

    def head(self, embedding: Tensor) -> Tensor:
        return self.out(embedding)


HAS: dict[str, set[Symmetry]] = {
    "update": {"gl", "sign"},
    "square": {"gl", "sign", "negation"},
    "direction": {"gl", "sign", "scale"},
    "factors": {"sign", "negation"},
}


def layout(rank: int) -> Layout:
    return Layout.from_layers([LayerSpec("a", 5, 4, rank), LayerSpec("b", 3, 6, rank)])


def network(reads: str, claims: set[Symmetry]) -> Metanetwork:
    return type("Net", (Reads,), {"what": reads, "symmetries": frozenset(claims)})()


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("reads", HAS)
def test_symmetries_are_found_as_on_paper(reads: str, rank: int) -> None:
    assert faults(measure(network(reads, HAS[reads]), layout(rank))) == []


def test_every_wrong_claim_and_every_missing_one_is_named() -> None:
    every: set[Symmetry] = {change.symmetry for change in changes()}
    for reads, has in HAS.items():
        said = faults(measure(network(reads, every - has), layout(2)))
        assert {line.partition(":")[0] for line in said} == every
        lies = {line.partition(":")[0] for line in said if "claimed, but" in line}
        assert lies == every - has


def test_a_network_bound_to_its_rank_cannot_claim_gl() -> None:
    class Bound(Reads):
        symmetries = frozenset({"gl", "sign"})

        def build(self, inputs: InputSpec, outputs: int) -> MetanetModule:
            module = ReadsModule(inputs, outputs, "update")
            module.register_buffer("rank", torch.zeros(inputs.factors.layers[0].rank))
            return module

    found = {entry.change.name: entry for entry in measure(Bound(), layout(2))}
    assert found["rank padded with zeros to twice"].moved is None
    assert [line.partition(":")[0] for line in faults(list(found.values()))] == ["gl"]


def test_a_featurizer_counts_with_the_network_behind_it() -> None:
    class Linear(Metanetwork):
        def build(self, inputs: InputSpec, outputs: int) -> MetanetModule:
            return LinearModule(inputs, outputs)

    class LinearModule(MetanetModule):
        def __init__(self, inputs: InputSpec, outputs: int) -> None:
            super().__init__(inputs)
            self.out = nn.Linear(inputs.width, outputs)

        def embed(self, rows: Tensor) -> Tensor:
            return self.normalizer(rows)

        def head(self, embedding: Tensor) -> Tensor:
            return self.out(embedding)

    found = measure(Linear(), layout(2), Norms(layout=layout(2)))
    assert {e.change.symmetry for e in found if e.unseen} >= {"sign", "negation"}
    assert {e.change.name for e in found if not e.unseen} >= {"update times 3", "10 B, A / 10"}


def test_the_command_checks_a_network_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Path(__file__).read_text(encoding="utf-8").partition("HAS:")[0]
    (tmp_path / "mynet.py").write_text(
        f"{source}\n\nclass MyNet(Reads):\n    symmetries = frozenset({{'gl', 'scale'}})\n",
        encoding="utf-8",
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["check-reader", "mynet.MyNet", "--rank", "2"]) == 1
    told = capsys.readouterr().out
    assert "scale: claimed, but the outputs see: update times 3" in told
    assert "sign: holds, but is not claimed" in told
    assert "gl: " not in told
    assert main(["check-reader", "mynet.MyNet", "--rank", "0"]) == 2
    assert main(["check-reader", "DeepSets", "--featurizer", "Norms"]) == 2
    capsys.readouterr()
    assert main(["check-reader", "pathlib.Path"]) == 2
    assert "expected a subclass of Metanetwork, got `pathlib.Path`" in capsys.readouterr().err

"""Training the small testbed: what its files hold, and that they are what was trained."""

from dataclasses import replace
from pathlib import Path

import pytest

from lora_ws.adapters import read_adapter
from lora_ws.composition.elements import ELEMENTS
from lora_ws.composition.testbed import bundled
from lora_ws.errors import ConfigError
from lora_ws.zoo.finetune import FinetuneSpec
from lora_ws.zoo.testbed import TestbedSpec, build_testbed


@pytest.mark.slow
def test_an_adapter_for_each_element(tmp_path: Path) -> None:
    spec = TestbedSpec(out=tmp_path / "bed", finetune=FinetuneSpec(steps=1, batch_size=1, rank=2))
    built = build_testbed(spec)
    assert [member.id for member in built.members] == [m.id for m in bundled().members]
    for member in built.members:
        adapter = read_adapter(built.file(member))
        # In each of seven blocks two attentions of four matrices, and two of the feed-forward part.
        assert len(adapter.modules) == 70
        assert {module.rank for module in adapter.modules.values()} == {2}
        assert all(abs(module.up).max() > 0 for module in adapter.modules.values())
    with pytest.raises(ConfigError, match="exists already"):
        build_testbed(spec)
    again = build_testbed(replace(spec, out=tmp_path / "again"))
    for one, other in zip(built.members, again.members, strict=True):
        assert built.file(one).read_bytes() == again.file(other).read_bytes()
    assert {member.id for member in built.members} == set(ELEMENTS)

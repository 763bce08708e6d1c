"""The sets of ComposLoRA, and lists of adapters as users have them."""

import json
from pathlib import Path

import pytest

from lora_ws.composition.testbed import CATEGORIES, SIZES, Testbed, bundled
from lora_ws.errors import ConfigError, DataError

COUNTS = {"character": 3, "clothing": 2, "style": 2, "background": 2, "object": 2}


def listed(style: str) -> dict[str, list[dict[str, object]]]:
    return {
        category: [
            {
                "id": f"{category}_{n}",
                "name": f"{style} {category} {n}",
                "trigger": [f"{category} {n}", "detailed"],
                "url": f"https://example.org/{style}/{n}",
            }
            for n in range(1, count + 1)
        ]
        for category, count in COUNTS.items()
    }


def write(folder: Path, content: object, name: str = "reality.json") -> Path:
    file = folder / name
    file.write_text(json.dumps(content), encoding="utf-8")
    return file


def test_two_styles_have_480_sets(tmp_path: Path) -> None:
    styles = [Testbed.open(write(tmp_path, listed(s), f"{s}.json")) for s in ("reality", "anime")]
    counts = [sum(len(style.sets(size)) for style in styles) for size in SIZES]
    assert counts == [48, 144, 192, 96]
    assert sum(counts) == 480
    for size in SIZES:
        sets = styles[0].sets(size)
        assert len({tuple(m.id for m in one) for one in sets}) == len(sets)
        for one in sets:
            categories = [member.category for member in one]
            assert categories[0] == "character"
            assert len(set(categories)) == size
            assert categories == [c for c in CATEGORIES if c in categories]


def test_a_users_copy_is_read_and_must_be_whole(tmp_path: Path) -> None:
    file, folder = write(tmp_path, listed("reality")), tmp_path / "reality"
    folder.mkdir()
    for member in Testbed.open(file).members[:-1]:
        (folder / f"{member.id}.safetensors").write_bytes(b"weights")
    with pytest.raises(DataError, match=r"`object_2.safetensors`.*https://example.org/reality/2"):
        Testbed.open(file, folder)
    (folder / "object_2.safetensors").write_bytes(b"weights")
    testbed = Testbed.open(file, folder)
    assert testbed.file(testbed.members[-1]).read_bytes() == b"weights"


WRONG = {
    "no JSON": ("{", "as JSON"),
    "a list": ("[]", "as JSON"),
    "another category": (json.dumps({"vehicle": []}), "got `vehicle`"),
    "no id": (json.dumps({"style": [{"name": "x", "trigger": []}]}), "records of id"),
    "a path": (
        json.dumps({"style": [{"id": "../x", "name": "x", "trigger": []}]}),
        "plain name, got `../x`",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_no_list_is_named(wrong: str, tmp_path: Path) -> None:
    text, message = WRONG[wrong]
    file = tmp_path / "list.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        Testbed.open(file)


@pytest.mark.parametrize("size", [0, 6])
def test_sets_have_one_to_five_members(size: int) -> None:
    with pytest.raises(ConfigError, match="1 to 5"):
        bundled().sets(size)

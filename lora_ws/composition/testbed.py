"""ComposLoRA: adapters in five categories, and the sets of them that are composed.

Zhong et al. 2024, section 4.1: two styles of eleven adapters each, three characters and two of each
other category; a set is a character and one adapter of some of the other categories, which makes
480 sets. Its weights are of many licences and are not shipped: `Testbed.open` takes a user's own
copy, and `bundled` is a small one of adapters of digit-sd.
"""

import json
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any

from lora_ws.errors import ConfigError, DataError

# In the order in which Switch takes turns.
CATEGORIES = ("character", "clothing", "style", "background", "object")
SIZES = (2, 3, 4, 5)
BUNDLED = Path(__file__).parent.parent / "_assets" / "digit_testbed"


@dataclass(frozen=True)
class Member:
    """An adapter of a testbed.

    Attributes:
        id: file name without suffix, ``<id>.safetensors``.
        name: what it shows.
        category: one of `CATEGORIES`.
        triggers: phrases of the prompt that activate it.
        url: its source.
    """

    id: str
    name: str
    category: str
    triggers: tuple[str, ...]
    url: str = ""


@dataclass(frozen=True)
class Testbed:
    """Adapters of one base that can be composed.

    Attributes:
        members: category by category.
        folder: folder of the files; None where there is only the list.
    """

    __test__ = False  # no test, whatever pytest takes from the name

    members: tuple[Member, ...]
    folder: Path | None = None

    @classmethod
    def open(cls, file: str | Path, folder: str | Path | None = None) -> "Testbed":
        """Read a list as ComposLoRA has it: category -> records of id, name, trigger and url.

        Args:
            file: JSON, one per style.
            folder: of the files ``<id>.safetensors``; None reads the list alone.

        Raises:
            DataError: it is no such list, or a file is missing.
        """
        path = Path(file)
        try:
            listed = json.loads(path.read_text(encoding="utf-8"))
            members = tuple(
                _member(path, category, record)
                for category in CATEGORIES
                for record in listed.get(category, [])
            )
        except (OSError, ValueError, AttributeError) as error:
            raise DataError(f"{path}: expected a list of adapters as JSON ({error})") from error
        if unknown := sorted(set(listed) - set(CATEGORIES)):
            raise DataError(
                f"{path}: expected categories {', '.join(CATEGORIES)}, got `{unknown[0]}`"
            )
        testbed = cls(members, None if folder is None else Path(folder))
        if folder is not None:
            for member in members:
                testbed.file(member)
        return testbed

    def file(self, member: Member) -> Path:
        """Where a member's weights are.

        Raises:
            DataError: nowhere.
        """
        file = (self.folder or Path()) / f"{member.id}.safetensors"
        if self.folder is None or not file.is_file():
            raise DataError(
                f"expected `{file.name}` ({member.name}) in {self.folder or 'a folder of weights'},"
                f" found none; get it from {member.url or 'where the list is from'}"
            )
        return file

    def sets(self, size: int) -> list[tuple[Member, ...]]:
        """Every set of a size: a character, and one of each of ``size - 1`` other categories.

        Raises:
            ConfigError: there are no sets of this size.

        Example:
            >>> [len(bundled().sets(size)) for size in (2, 3, 4, 5)]
            [24, 72, 96, 48]
        """
        if not 1 <= size <= len(CATEGORIES):
            raise ConfigError(f"size: expected 1 to {len(CATEGORIES)} adapters per set, got {size}")
        of = {c: [m for m in self.members if m.category == c] for c in CATEGORIES}
        first, *others = CATEGORIES
        return [
            chosen
            for added in combinations(others, size - 1)
            for chosen in product(of[first], *(of[category] for category in added))
        ]


def bundled() -> Testbed:
    """Eleven adapters of digit-sd; `lora_ws.composition.elements` says what each adds."""
    return Testbed.open(BUNDLED / "adapters.json", BUNDLED)


def _member(file: Path, category: str, record: Any) -> Member:
    try:
        id_, name, triggers = str(record["id"]), str(record["name"]), record["trigger"]
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{file}: {category}: expected records of id, name and trigger, got {record!r:.80}"
        ) from error
    if Path(id_).name != id_ or id_ in ("", ".", ".."):
        raise DataError(f"{file}: {category}: expected an id that is a plain name, got `{id_}`")
    phrases = [triggers] if isinstance(triggers, str) else triggers
    return Member(id_, name, category, tuple(map(str, phrases)), str(record.get("url", "")))

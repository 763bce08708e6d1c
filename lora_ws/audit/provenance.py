"""What made a report, so that it is evidence: who makes it again can tell that it is the same."""

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import yaml

from lora_ws.adapters.source import file_sha256
from lora_ws.audit.policy import Policy
from lora_ws.bundle.formats import INFO
from lora_ws.config import to_plain
from lora_ws.report.grid import Cell
from lora_ws.report.page import Attachment, Facts


@dataclass(frozen=True)
class Provenance:
    """Date, version, classifier and rules of a report.

    Attributes:
        model: the classifier, as the user calls it; empty without one.
        model_sha256: of its ``bundle.json``, which holds the hash of its tensors.
        policy_name: file of the rules; empty where they are the defaults.
        policy: the rules in YAML, as that file has them; empty where none were asked for.
        when: date and time in UTC.
        version: of this library.
    """

    model: str = ""
    model_sha256: str = ""
    policy_name: str = ""
    policy: str = ""
    when: str = ""
    version: str = ""

    @classmethod
    def now(
        cls,
        model: str | None,
        folder: Path | str | None,
        policy: Path | None = None,
        *,
        rules: bool = True,
    ) -> "Provenance":
        """Note what a report is made with now.

        Args:
            model: the classifier, as the user calls it.
            folder: of its bundle; None without one.
            policy: file of rules; None takes the defaults.
            rules: whether there are any.
        """
        text = yaml.safe_dump(to_plain(Policy()), sort_keys=False) if rules else ""
        return cls(
            model=model or "",
            model_sha256=file_sha256(Path(folder) / INFO) if folder else "",
            policy_name=str(policy or ""),
            policy=policy.read_text(encoding="utf-8") if policy else text,
            when=datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
            version=version("lora_ws"),
        )

    def facts(self) -> Facts:
        """The same as names and values."""
        values = {"date": self.when, "lora_ws": self.version, "model": self.model or "none"}
        if self.model_sha256:
            values["sha256 of bundle.json"] = self.model_sha256
        if self.policy:
            values["policy"] = self.policy_name or "the default"
            values["sha256 of the policy"] = hashlib.sha256(self.policy.encode()).hexdigest()
        return Facts({name: Cell(value) for name, value in values.items()})

    def attachment(self) -> Attachment:
        """The rules, shown and to be saved."""
        return Attachment("Save the policy", "policy.yaml", self.policy, shown=True)

"""Classify adapter files one by one: what `lora-ws predict` does, for Python."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lora_ws.adapters import AdapterRef
from lora_ws.audit.classify import Finding, classify_files
from lora_ws.bundle import Bundle
from lora_ws.errors import ConfigError


@dataclass(frozen=True)
class PredictSpec:
    """How adapter files are classified, and how the command shows it.

    Attributes:
        model: bundle: a folder, a Hub repository, or the name of a shipped one (``tiny-sd``, for
            adapters of the bundled base).
        top: number of classes to show.
        revision: Hub revision of the bundle.
        as_json: print one JSON line per file instead of a table.
        allow_classes: dotted paths of representations and networks outside this library that the
            bundle may use.
    """

    model: str = "tiny-sd"
    top: int = 3
    revision: str | None = None
    as_json: bool = False
    allow_classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.top < 1:
            raise ConfigError(f"top: expected at least 1, got {self.top}")

    def bundle(self) -> Bundle:
        """Load the classifier.

        Raises:
            ConfigError: it names a class that is not allowed.
            NotAvailableError: neither this machine nor the Hub has it.
        """
        return Bundle.from_pretrained(
            self.model, revision=self.revision, allow_classes=self.allow_classes
        )


def predict_files(files: Sequence[str], spec: PredictSpec) -> Iterator[Finding]:
    """Classify files one after another; one that cannot be read is a finding with a reason.

    Args:
        files: .safetensors files, PEFT folders, or hub:owner/name/file.safetensors
        spec: by which classifier.

    Yields:
        What was found in each file.
    """
    bundle = spec.bundle()
    for file in files:
        finding = classify_files([AdapterRef.parse(file)], bundle, whole=False)[0].finding
        assert finding is not None  # nothing is known already
        yield finding

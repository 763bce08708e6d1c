"""What a training leaves, without what differs between equal trainings: times, and names in SVG."""

import re
from pathlib import Path

TIMES = rb'"((feature_)?seconds|info_sha256)": [^,}\s]+'


def kept(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by its path there."""
    files = [file for file in folder.rglob("*") if file.is_file() and file.suffix != ".svg"]
    return {
        file.relative_to(folder).as_posix(): re.sub(TIMES, b"", file.read_bytes()) for file in files
    }


def records(folder: Path) -> int:
    """How many seeds have a record."""
    return sum(file.read_bytes().count(b"\n") for file in folder.rglob("records.jsonl"))

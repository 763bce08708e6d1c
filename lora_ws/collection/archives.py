"""Files out of a stranger's zip archive: what is asked for, and nothing outside the folder."""

import shutil
import stat
import zipfile
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from lora_ws.adapters.settings import PEFT_CONFIG
from lora_ws.errors import DataError

# A member unpacks to at most so many times its packed size; weights hardly shrink at all.
RATIO = 200


def unpack_members(archive: Path, patterns: Sequence[str], out: Path) -> list[Path]:
    """Unpack the members that match, and PEFT's settings beside them.

    Args:
        archive: a zip file.
        patterns: globs of paths in it, ``*`` also for slashes.
        out: folder for them; kept are those already there with the right size.

    Returns:
        The files that match a pattern.

    Raises:
        DataError: it is no zip file, is damaged, or a member is a link, encrypted, outside of the
            folder, or grows beyond measure.
    """
    try:
        with zipfile.ZipFile(archive) as held:
            members = [one for one in held.infolist() if not one.is_dir()]
            wanted = [one for one in members if any(fnmatch(one.filename, p) for p in patterns)]
            folders = {PurePosixPath(one.filename).parent for one in wanted}
            beside = [
                one
                for one in members
                if PurePosixPath(one.filename).name == PEFT_CONFIG
                and PurePosixPath(one.filename).parent in folders
            ]
            for one in [*wanted, *(one for one in beside if one not in wanted)]:
                _unpack(held, one, archive, out)
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise DataError(f"{archive}: not a readable zip file ({error}); fetch it again") from error
    if not wanted:
        raise DataError(f"{archive}: expected members like {', '.join(patterns)}, got none")
    return [out / one.filename for one in wanted]


def _unpack(held: zipfile.ZipFile, one: zipfile.ZipInfo, archive: Path, out: Path) -> None:
    path = PurePosixPath(one.filename)
    why = ""
    if path.is_absolute() or ".." in path.parts or "\\" in one.filename:
        why = "is outside of the folder"
    elif stat.S_ISLNK(one.external_attr >> 16):
        why = "is a link"
    elif one.flag_bits & 1:
        why = "is encrypted"
    elif one.file_size > RATIO * max(one.compress_size, 1 << 10):
        why = f"would grow to {one.file_size} bytes"
    if why:
        raise DataError(f"{archive}: refused, as its member `{one.filename}` {why}")
    target = out / path
    if target.is_file() and target.stat().st_size == one.file_size:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    # Reading to the end compares the checksum.
    draft = target.with_name(target.name + ".partial")
    with held.open(one) as packed, draft.open("wb") as written:
        shutil.copyfileobj(packed, written, 1 << 20)
    draft.replace(target)

"""lock.json: what every file of a model folder was, to the last bit, and where it came from.

The text of a lock is a function of its content, and the content has a hash of its own: a bit that flips in lock.json is
found like one in any other file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlxsft.cache import cache_folder
from mlxsft.errors import InputRefused
from mlxsft.models import checks
from mlxsft.models.shards import FileHash

LOCK = "lock.json"
BLOCK_BYTES = 4 << 20

Progress = Callable[[int], None]  # hears how many bytes more were read


@dataclass(frozen=True)
class Lock:
    """What a folder held when it was made."""

    repository: str | None  # on the Hub, of the model itself or of what it was made from
    commit: str | None
    made: Mapping[str, str]  # how: command and versions; empty for what was only downloaded
    files: Mapping[str, FileHash]

    def to_text(self) -> str:
        """lock.json."""
        files = {name: asdict(self.files[name]) for name in sorted(self.files)}
        facts = {"repository": self.repository, "commit": self.commit, "made": dict(self.made), "files": files}
        return json.dumps({**facts, "lock_sha256": _digest(facts)}, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_text(cls, text: str) -> Lock:
        """The lock of a text that `to_text` made. Raises ValueError for any other."""
        try:
            facts = json.loads(text)
            if isinstance(facts, dict) and "base" in facts and "files" not in facts:
                raise ValueError("it is that of a run; verify is for models that were pulled or converted")
            files = {name: FileHash(entry["sha256"], entry["size"]) for name, entry in facts["files"].items()}
            lock = cls(facts["repository"], facts["commit"], facts["made"], files)
            same = lock.to_text() == text
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"is no lock of mlxsft's ({error})") from error
        if not same:
            raise ValueError("does not match its own hash")
        return lock


@dataclass(frozen=True)
class Verdict:
    """How a folder differs from its lock; `changed` says why."""

    changed: Mapping[str, str]
    missing: tuple[str, ...]
    added: tuple[str, ...]
    checked: int  # files that are as they were

    @property
    def same(self) -> bool:
        return not (self.changed or self.missing or self.added)


def write_lock(folder: Path, lock: Lock) -> Path:
    """Write the lock to where `lock_path` says; that place."""
    path = lock_path(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(lock.to_text(), encoding="utf-8")
    return path


def read_lock(folder: Path) -> Lock | None:
    """The lock of a folder; None where it has none. Raises InputRefused for one that was changed."""
    path = lock_path(folder)
    if not path.is_file():
        return None
    try:
        if checks.outside(path.parent, path.name):
            raise ValueError("is a link that leaves the folder")
        return Lock.from_text(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputRefused(
            f"{path}: {error}, so it cannot tell what else was changed", "Pull or convert the model again."
        ) from error


def lock_path(folder: Path) -> Path:
    """lock.json in the folder; for a snapshot of the Hub's cache, which is not ours, a file in our own cache."""
    if checks.blobs(folder) is None:
        return folder / LOCK
    return cache_folder() / "locks" / folder.parent.parent.name / f"{folder.name}.json"


def hashed(folder: Path, names: list[str], progress: Progress = lambda size: None) -> dict[str, FileHash]:
    """{file: its hash} of every byte that is there."""
    return {name: hash_of(folder / name, progress) for name in names}


def hash_of(path: Path, progress: Progress = lambda size: None) -> FileHash:
    """Hash and size of a file. Raises InputRefused where it cannot be read."""
    sha256, size = hashlib.sha256(), 0
    try:
        with path.open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                sha256.update(block)
                size += len(block)
                progress(len(block))
    except OSError as error:
        raise InputRefused(f"{path}: cannot be read ({error.strerror or error})") from error
    return FileHash(sha256.hexdigest(), size)


def names_in(folder: Path, known: Collection[str] = ()) -> list[str]:
    """Every file of the folder and below, as a lock names them, but not the lock; hidden ones are nobody's.

    Of a snapshot of the Hub's cache, where other programs leave files that belong there, only those that are `known` or
    define the model.
    """
    shared = checks.blobs(folder) is not None
    names = []
    for root, folders, files in os.walk(folder):
        links = [name for name in folders if Path(root, name).is_symlink()]  # not gone into
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = [Path(root, name).relative_to(folder).as_posix() for name in (*files, *links) if name[0] != "."]
        names += [path for path in paths if path != LOCK and (not shared or checks.defines(path) or path in known)]
    return sorted(names)


def verify(folder: Path, lock: Lock, progress: Progress = lambda size: None) -> Verdict:
    """Hash every file again and compare. Raises InputRefused where one cannot be read."""
    there = names_in(folder, lock.files)
    changed = {}
    for name in there:
        if (expected := lock.files.get(name)) and (why := _difference(folder, name, expected, progress)):
            changed[name] = why
    missing = tuple(name for name in lock.files if name not in there)
    added = tuple(name for name in there if name not in lock.files)
    return Verdict(changed, missing, added, len(lock.files) - len(changed) - len(missing))


def _difference(folder: Path, name: str, expected: FileHash, progress: Progress) -> str | None:
    """What is other than expected; None where nothing is. No link is followed out of the folder."""
    if checks.outside(folder, name):
        return "is a link that leaves the folder"
    path = folder / name
    if not path.is_file():
        return "is no file any more"
    if (size := path.stat().st_size) != expected.size:
        return f"{size:,} bytes, expected {expected.size:,}"
    found = hash_of(path, progress)
    return None if found == expected else f"SHA-256 {found.sha256[:12]}…, expected {expected.sha256[:12]}…"


def _digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()

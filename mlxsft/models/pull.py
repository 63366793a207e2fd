"""A model of the Hub, downloaded, checked and locked: in the Hub's own cache, or in a folder of one's own."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlxsft.data.render import refuse_unusable
from mlxsft.errors import InputRefused, UsageError
from mlxsft.hub import Tell, optional_file
from mlxsft.models import checks, headers
from mlxsft.models.card import CARD, origin
from mlxsft.models.lock import LOCK, Lock, Verdict, hashed, lock_path, names_in, read_lock, verify, write_lock
from mlxsft.models.shards import FileHash
from mlxsft.models.source import ModelSource, open_model
from mlxsft.models.whole_folder import refuse_existing, refuse_full_disk, whole_folder

Progress = Callable[[int, int], None]  # hears (bytes more, bytes in all)


@dataclass(frozen=True)
class Pulled:
    """Where a model is now."""

    repository: str
    commit: str
    folder: Path
    lock: Path
    files: int
    size: int  # bytes of them

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"folder": str(self.folder), "lock": str(self.lock)}


def pull(
    repository: str,
    out: Path | None = None,
    *,
    revision: str | None = None,
    force: bool = False,
    tell: Tell = lambda line: None,
    progress: Progress = lambda size, total: None,
) -> Pulled:
    """Download a model and lock it; without `out` it stays in the Hub's cache, where every command finds it by name.

    Every byte is hashed, and the weights compared with what the Hub says of them. Raises UsageError for what is no
    Hub id and for an `out` that is there, InputRefused for a model that no command would take, NetworkFailed.
    """
    if out is not None:
        refuse_existing(out, force=force)
    source = open_model(repository, revision=revision, progress=tell)
    name, commit = origin(source)
    if source.commit is None or name is None or commit is None:
        raise UsageError(f"{repository}: is a folder here", "pull takes the id of a model on the Hub, as org/name.")
    refuse_unusable(source)
    optional_file(name, commit, CARD)  # for its licence
    known = [CARD] if (source.folder / CARD).is_file() and not checks.outside(source.folder, CARD) else []
    names = [file for file in names_in(source.folder, known) if file in known or checks.defines(file)]
    total = sum((source.folder / file).stat().st_size for file in names)
    if out is not None:
        refuse_full_disk(out, total)
    files = hashed(source.folder, names, lambda size: progress(size, total))
    _refuse_damaged(source, files)
    lock = Lock(name, commit, {}, files)
    if out is None:
        write_lock(source.folder, lock)
    else:
        with whole_folder(out, force=force, source=source.folder) as folder:
            for file in names:
                (folder / file).parent.mkdir(exist_ok=True)
                shutil.copyfile(source.folder / file, folder / file)
            write_lock(folder, lock)
    place = source.folder if out is None else out
    return Pulled(name, commit, place, lock_path(place), len(files), total)


def _refuse_damaged(source: ModelSource, files: dict[str, FileHash]) -> None:
    """Weights that are not what the Hub's cache calls them: it names a large file after its SHA-256."""
    damaged = [name for name in source.files if files[name].sha256 != source.hash_of(name)]
    if damaged:
        raise InputRefused(
            f"{source.name}: {headers.some(damaged)} in the Hub's cache is not what the Hub has",
            f"Remove {(source.folder / damaged[0]).resolve()} and pull again.",
        )


def verify_model(
    model: str, *, revision: str | None = None, progress: Progress = lambda size, total: None
) -> tuple[Path, Verdict]:
    """(the folder, how it differs from its lock) of a folder or of a pulled model by its Hub id; asks no network.

    Raises InputRefused where there is no such folder, no lock, or one that was changed.
    """
    folder = _locked_folder(model, revision)
    lock = read_lock(folder)
    if lock is None:
        raise InputRefused(
            f"{folder}: has no {LOCK}, so there is nothing to compare with",
            "`mlxsft convert` and `mlxsft pull` write one.",
        )
    total = sum(file.size for file in lock.files.values())
    return folder, verify(folder, lock, lambda size: progress(size, total))


def _locked_folder(model: str, revision: str | None) -> Path:
    """The folder that is meant, in the Hub's cache where `model` is no folder."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    if Path(model).is_dir():
        return Path(model).resolve()
    try:
        return Path(snapshot_download(model, revision=revision, local_files_only=True, allow_patterns=["config.json"]))
    except (OSError, HFValidationError) as error:
        raise InputRefused(f"{model}: no such folder, and no pulled model of that name") from error

"""A folder that is there with everything in it, or not at all, whenever the process is killed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from mlxsft.errors import UsageError
from mlxsft.models.adapter import sync_folder, writing


def refuse_existing(out: Path, *, force: bool, source: Path | None = None) -> None:
    """Nothing, where a model may be written to `out`. Raises UsageError where it may not.

    With `force` what is there may be replaced, but only a model or an adapter, and never `source` or a folder around
    it.
    """
    if source is not None and source.resolve().is_relative_to(out.resolve()):
        raise UsageError(f"{out}: is where the source is, which would be lost", "Name another folder.")
    if not os.path.lexists(out):
        return
    if not force:
        raise UsageError(f"{out}: is there already", "Name another folder, or give --force to replace it.")
    if out.is_symlink() or not out.is_dir() or not _is_ours_to_replace(out):
        raise UsageError(f"{out}: is not a folder with a model, and is not replaced", "Name another folder.")


def _is_ours_to_replace(out: Path) -> bool:
    """Whether a folder is empty or holds a model or an adapter, and is no run, of which the adapter is a part."""
    holds = any((out / name).is_file() for name in ("config.json", "adapter_config.json"))
    return not any(out.iterdir()) or (holds and not (out / "checkpoints").exists())


@contextmanager
def whole_folder(out: Path, *, force: bool = False, source: Path | None = None) -> Iterator[Path]:
    """An empty folder beside `out` to write into, which gets that name when the block has ended well.

    What an earlier try left is removed. Raises UsageError as `refuse_existing` does and where another process is at
    work on the same folder, OutOfResources when the disk is full.
    """
    out = Path(os.path.abspath(out))
    aside, gone = (out.with_name(f".{out.name}.{state}") for state in ("partial", "replaced"))
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    with _alone(out):
        _put_back(out, gone)
        refuse_existing(out, force=force, source=source)
        try:
            with writing(out):
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir()
                yield aside
                _sync_files(aside)
                if os.path.lexists(out):
                    os.replace(out, gone)
                os.replace(aside, out)
                sync_folder(out.parent)
        finally:
            shutil.rmtree(aside, ignore_errors=True)  # of a full disk, every byte counts
            _put_back(out, gone)


def _put_back(out: Path, gone: Path) -> None:
    """What was to be replaced is itself again where nothing came in its place; else it is removed."""
    if gone.is_dir() and not os.path.lexists(out):
        os.replace(gone, out)
    shutil.rmtree(gone, ignore_errors=True)


def _sync_files(folder: Path) -> None:
    """Every file on the disk, and the names of all."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        else:
            sync_folder(path)
    sync_folder(folder)


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """This process alone, among those that write to `out`."""
    path = out.with_name(f".{out.name}.lock")
    lock = FileLock(path)
    try:
        with writing(path):
            lock.acquire(timeout=0)
    except Timeout:
        raise UsageError(f"{out}: another process is writing it", "Wait for it, or name another folder.") from None
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # while it is held, so that nobody's lock is removed
        lock.release()

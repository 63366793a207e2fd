"""What grows with the rows while they are compared: files and a database on disk that vanish when the work ends.

Memory stays flat. The files have no name (on Windows, one that goes when they are closed), so that nothing is left
behind, whatever ends the process.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import cached_property
from typing import IO, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mlxsft.errors import OutOfResources

AT_ONCE = 1 << 17  # records that are read and sorted at once: a few MB
_FULL = {errno.ENOSPC, errno.EFBIG, errno.EIO, getattr(errno, "EDQUOT", errno.ENOSPC)}
_DATABASE_FULL = ("SQLITE_FULL", "SQLITE_IOERR", "SQLITE_CANTOPEN")
_CACHE_KIB = 4000  # of a database; more makes it hardly faster


@contextmanager
def open_scratch() -> Iterator[Scratch]:
    """A place for temporary files. Raises OutOfResources where the disk has no room for them."""
    try:
        with ExitStack() as opened:
            yield Scratch(opened)
    except sqlite3.OperationalError as error:
        if not str(getattr(error, "sqlite_errorname", "")).startswith(_DATABASE_FULL):
            raise
        raise _no_room(str(error)) from error


class Scratch:
    """Hands out temporary files, all closed and gone together."""

    def __init__(self, opened: ExitStack) -> None:
        self._opened = opened

    def spill(self, dtype: DTypeLike, width: int = 1) -> Spill:
        """An empty column of records of `width` numbers."""
        try:
            file = tempfile.TemporaryFile(dir=scratch_folder(), buffering=0)  # noqa: SIM115  # closed by what opened us
        except OSError as error:
            raise _no_room(error.strerror) from error
        return Spill(self._opened.enter_context(file), np.dtype(dtype), width)

    @cached_property
    def database(self) -> sqlite3.Connection:
        """A database; nothing in it outlives the process, so nothing is written twice for safety."""
        database = sqlite3.connect("", isolation_level=None)  # SQLite looks for a folder as scratch_folder does
        self._opened.enter_context(closing(database))
        for setting in (f"cache_size=-{_CACHE_KIB}", "journal_mode=OFF", "synchronous=OFF", "temp_store=FILE"):
            database.execute(f"PRAGMA {setting}")
        database.execute("BEGIN")
        return database


def scratch_folder() -> str:
    """$TMPDIR, or a folder on disk: /tmp is memory on many Linux systems."""
    named = os.environ.get("TMPDIR")
    return named or ("/var/tmp" if os.access("/var/tmp", os.W_OK) else tempfile.gettempdir())


def _no_room(why: str | None) -> OutOfResources:
    return OutOfResources(
        f"{scratch_folder()}: the temporary files of this comparison cannot be written: {why}",
        "About 1 KB is needed for a short row, 6 KB for a long one. Free some space, or name another folder in TMPDIR.",
    )


class Spill:
    """A growing column of records on disk: added at the end, read in stretches or one by one."""

    def __init__(self, file: IO[bytes], dtype: np.dtype[Any], width: int) -> None:
        self._file, self._dtype, self._width = file, dtype, width
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def append(self, records: NDArray[Any]) -> None:
        """Add records, [n] or [n, width]. Raises OutOfResources where they do not fit on the disk."""
        try:
            self._file.seek(0, os.SEEK_END)
            data = memoryview(np.asarray(records, dtype=self._dtype).tobytes())
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            if error.errno not in _FULL:
                raise
            raise _no_room(error.strerror) from error
        self._length += len(records)

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Records from `start` to before `stop`: [n], or [n, width] for records of several numbers."""
        size = self._width * self._dtype.itemsize
        self._file.seek(start * size)
        values = np.frombuffer(self._file.read((stop - start) * size), dtype=self._dtype)
        return values if self._width == 1 else values.reshape(-1, self._width)

    def pieces(self, at_once: int = AT_ONCE) -> Iterator[tuple[int, NDArray[Any]]]:
        """All records in stretches, each with the number of its first."""
        for start in range(0, self._length, at_once):
            yield start, self.read(start, min(start + at_once, self._length))

    def gather(self, numbers: NDArray[np.int64]) -> NDArray[Any]:
        """The records of these numbers, in their order."""
        wanted, places = np.unique(numbers, return_inverse=True)
        found = np.concatenate([self.read(number, number + 1) for number in wanted.tolist()])
        return found[places]

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        """Record by record, of a column of several numbers each."""
        for _, piece in self.pieces():
            yield from map(tuple, piece.tolist())

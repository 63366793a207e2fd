"""Where a command may write: one rule for a file that is there already."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from mlxsft.errors import UsageError


def refuse_existing(file: Path, *, force: bool, instead: str = "Name another file", reads: Iterable[Path] = ()) -> None:
    """Nothing, where `file` may be written; `instead` begins the hint where it may not.

    Raises UsageError for a folder, for what is there and may not be replaced by `force`, and with `force` too for one
    of the files that the command `reads`.
    """
    if file.is_dir():
        raise UsageError(f"{file}: is a folder, expected the name of a file", f"{instead}.")
    if os.path.lexists(file) and not force:
        raise UsageError(f"{file}: is there already", f"{instead}, or give --force to replace it.")
    if file.exists() and any(file.samefile(other) for other in reads):
        raise UsageError(f"{file}: is one of the files to read", f"{instead}.")

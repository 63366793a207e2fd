"""Files → rows, each with the place where it was read; what cannot be read is a LeftOut that says why."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import IO, cast

from mlxsft.data.json_rows import Rows, json_rows
from mlxsft.data.places import LeftOut, Origin
from mlxsft.data.tables import arrow_rows, delimited_rows, parquet_count, parquet_rows
from mlxsft.errors import InputRefused

__all__ = ["ENDINGS", "LeftOut", "Origin", "line_count", "read_rows", "suffix_of"]

_TEXT = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
SUFFIXES = (*_TEXT, *(f"{suffix}.gz" for suffix in _TEXT), ".parquet", ".arrow", ".feather")
ENDINGS = f"{', '.join(_TEXT)} (each also .gz), .parquet, .arrow and .feather"


def suffix_of(name: str) -> str | None:
    """The ending by which a file of this name is read, or None where it is not."""
    return next((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), None)


def read_rows(files: Iterable[Path]) -> Rows:
    """Every row of the files as the JSON value that stands there, or as the LeftOut that says why it is none."""
    for file in files:
        empty = True
        try:
            for row in _file_rows(file):
                empty = False
                yield row
        except (OSError, EOFError, zlib.error) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputRefused(f"{file}: cannot be read: {reason}", "Check what it is and who may read it.") from error
        if empty:
            raise InputRefused(
                f"{file}: holds no rows", "One JSON object a line, an array of objects, or a table is expected."
            )


def line_count(file: Path) -> int | None:
    """How far the lines of a file's rows go: its lines, or a Parquet file's rows; None where only reading tells."""
    suffix = suffix_of(file.name)
    if suffix == ".parquet":
        return parquet_count(file)
    if suffix in (".arrow", ".feather"):
        return None
    try:
        with _opened(file) as stream:
            return sum(block.count(b"\n") for block in iter(lambda: stream.read(1 << 20), b"")) + 1
    except (OSError, EOFError, zlib.error):  # which whoever reads the rows will say better
        return None


def _file_rows(file: Path) -> Rows:
    suffix = suffix_of(file.name)
    if suffix == ".parquet":
        yield from parquet_rows(file)
    elif suffix in (".arrow", ".feather"):
        yield from arrow_rows(file)
    else:
        with _opened(file) as stream:
            if suffix and suffix.startswith((".csv", ".tsv")):
                yield from delimited_rows(file, stream, "\t" if suffix.startswith(".tsv") else ",")
            else:
                yield from json_rows(file, stream)


def _opened(file: Path) -> IO[bytes]:
    if file.name.lower().endswith(".gz"):
        return cast("IO[bytes]", gzip.open(file, "rb"))
    return file.open("rb")

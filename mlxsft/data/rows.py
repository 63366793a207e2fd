"""Files → rows, each with the place where it was read; what cannot be read is a LeftOut that says why."""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import IO, cast

from mlxsft.data.json_rows import Rows, json_rows
from mlxsft.data.places import LeftOut, Origin
from mlxsft.data.tables import arrow_rows, delimited_rows, parquet_rows
from mlxsft.errors import InputRefused

__all__ = ["LeftOut", "Origin", "files_of", "read_rows"]

_TEXT = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
SUFFIXES = (*_TEXT, *(f"{suffix}.gz" for suffix in _TEXT), ".parquet", ".arrow", ".feather")
ENDINGS = f"{', '.join(_TEXT)} (each also .gz), .parquet, .arrow and .feather"


def files_of(paths: Iterable[Path], split: str = "train") -> list[Path]:
    """The files to read, each there and of a known kind; a folder stands for its file of the split.

    That file is `train.jsonl`, `train.csv.gz` and so on, or the shards `train-00000-of-00002.parquet` that the Hub
    makes; `validation` is taken for `valid`.
    """
    files, problems = [], []
    for path in paths:
        found = _in_folder(path, split) if path.is_dir() else [path]
        if not found:
            problems.append(f"{path}: holds no {split}.jsonl or other {split} file")
        elif not path.is_dir() and not path.exists():
            problems.append(f"{path}: no such file")
        elif len(found) > 1 and not all(_is_shard(file) for file in found):
            names = " and ".join(file.name for file in found)
            problems.append(f"{path}: holds {names}; name the one that is meant")
        elif _suffix(found[0]) is None:
            problems.append(f"{path}: got {path.suffix or 'no ending'}; {ENDINGS} are read")
        files += found
    if problems:
        raise InputRefused("\n".join(problems), f"Give files of rows, or a folder with a {split}.jsonl.")
    return files


def _suffix(file: Path) -> str | None:
    name = file.name.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)


def _in_folder(folder: Path, split: str) -> list[Path]:
    names = {split, "validation"} if split == "valid" else {split}
    found = []
    for file in sorted(folder.iterdir()):
        suffix = _suffix(file)
        if suffix and _SHARD.sub("", file.name[: -len(suffix)]) in names:
            found.append(file)
    if not found and (folder / "data").is_dir():  # where a data set of the Hub keeps its files
        return _in_folder(folder / "data", split)
    return found


def _is_shard(file: Path) -> bool:
    return bool(_SHARD.search(file.name[: -len(_suffix(file) or "")]))


_SHARD = re.compile(r"-\d+-of-\d+$")


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


def _file_rows(file: Path) -> Rows:
    suffix = _suffix(file)
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

"""The weights of a verified checkpoint as NumPy arrays, each read from its file when it is asked for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlxsft.errors import InputRefused
from mlxsft.models.headers import header_of, some
from mlxsft.models.source import ModelSource

# safetensors' names → NumPy's. NumPy has no bfloat16: uint16 holds its bits, so a tensor of U16 itself is not read.
DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U64": "<u8",
    "U32": "<u4",
    "U8": "u1",
    "BOOL": "?",
}


@dataclass(frozen=True)
class _Place:
    """Where in which file a tensor lies."""

    path: Path
    offset: int  # bytes from the beginning of the file
    dtype: str
    shape: tuple[int, ...]


class StoredTensors(Mapping[str, NDArray[Any]]):
    """{name: array} of a checkpoint, bfloat16 as uint16. It keeps no array: memory is what the caller holds.

    Raises InputRefused for types that NumPy cannot hold, and for files that were changed after they were verified.
    """

    def __init__(self, source: ModelSource) -> None:
        if foreign := [name for name, info in source.tensors.items() if info.dtype not in DTYPES]:
            found = ", ".join(sorted({source.tensors[name].dtype for name in foreign}))
            raise InputRefused(f"{source.name}: {some(foreign)} stored as {found}, expected {', '.join(DTYPES)}")
        self._places = {name: place for file in source.files for name, place in _places(source.folder / file)}

    def __getitem__(self, name: str) -> NDArray[Any]:
        place = self._places[name]
        count = math.prod(place.shape)
        try:
            array = np.fromfile(place.path, place.dtype, count, offset=place.offset)
        except OSError as error:
            raise InputRefused(f"{place.path}: cannot be read ({error.strerror or error})") from error
        if array.size != count:
            raise InputRefused(f"{place.path}: is shorter than when it was verified", "Read it again.")
        return array.reshape(place.shape)

    def __contains__(self, name: object) -> bool:  # Mapping's own would read the array
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _places(path: Path) -> Iterator[tuple[str, _Place]]:
    """(name, place) of every tensor of a file that was verified before."""
    try:
        begin, entries = header_of(path)
    except InputRefused as error:
        raise InputRefused(f"{path}: was changed after it was verified ({error})", "Read it again.") from error
    for name, entry in entries.items():
        yield name, _Place(path, begin + entry["data_offsets"][0], DTYPES[entry["dtype"]], tuple(entry["shape"]))

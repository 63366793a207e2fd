"""The headers of safetensors files: what the reference parser accepts, and no name twice."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxsft.errors import InputRefused

HEADER_BYTES = 32 << 20  # a hundred thousand experts have 15 MB


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is stored and its shape, as the safetensors header says."""

    file: str
    dtype: str  # the format's own names: F32, BF16, U32, ...
    shape: tuple[int, ...]


def read_headers(folder: Path, files: Iterable[str]) -> dict[str, TensorInfo]:
    """{tensor: where and what} of every weight file."""
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        _, entries = header_of(folder / file)
        found = {name: TensorInfo(file, e["dtype"], tuple(e["shape"])) for name, e in entries.items()}
        if twice := sorted(found.keys() & tensors.keys()):
            raise InputRefused(f"{file}: {some(twice)} stored a second time, first in {tensors[twice[0]].file}")
        tensors |= found
    if not tensors:
        raise InputRefused("the weight files hold no tensor")
    return tensors


def header_of(path: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    """(bytes before the data, {tensor: its dtype, shape and data_offsets}) of a file.

    The reference parser, that of the safetensors package, has to accept the file. It lets a name stand in the header
    twice, of which other readers may take the other one: that is refused here. Messages begin with the file's name.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > HEADER_BYTES:
                raise InputRefused(
                    f"{path.name}: is not valid safetensors (a header of {length:,} bytes)", lfs_hint(path)
                )
            with safe_open(path, framework="np"):
                header = json.loads(file.read(length), object_pairs_hook=unique)
    except OSError as error:
        raise InputRefused(f"{path.name}: cannot be read ({error.strerror or error})") from error
    except (SafetensorError, ValueError) as error:
        raise InputRefused(f"{path.name}: is not valid safetensors ({error})", lfs_hint(path)) from error
    return 8 + length, {name: entry for name, entry in header.items() if name != "__metadata__"}


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object in which no key stands twice. Raises ValueError."""
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
        raise ValueError(f"{some(twice)} stands in it twice")
    return made


def lfs_hint(path: Path) -> str | None:
    """What to do about a file that git cloned without its content."""
    with path.open("rb") as file:
        pointer = file.read(24) == b"version https://git-lfs."
    return "This is a git-lfs pointer, not the file: run `git lfs pull` in the folder." if pointer else None


def some(names: Iterable[str]) -> str:
    """The first three names, and how many more there are."""
    listed = list(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")

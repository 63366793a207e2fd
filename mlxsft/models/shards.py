"""Tensors, one after the other, → safetensors files of bounded size: no file is ever whole in memory.

Names, types and shapes are known before a number is, so each header is written first and the bytes follow as they come.
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mlxsft.models.checks import INDEX

# Bytes of a number, by safetensors' names.
WIDTHS = {
    **{"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4},
    **{"F16": 2, "BF16": 2, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1},
}
BLOCK_BYTES = 16 << 20  # hashed while it is written, and told to the person
SYNC_BYTES = 128 << 20  # sent to the disk while the next ones are made, so that the last fsync has little to do


@dataclass(frozen=True)
class Layout:
    """How a tensor will be stored."""

    dtype: str  # safetensors' name: BF16, U32, ...
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return WIDTHS[self.dtype] * math.prod(self.shape)


@dataclass(frozen=True)
class FileHash:
    """What a file's content is known by."""

    sha256: str
    size: int  # bytes


def planned_shards(layouts: Mapping[str, Layout], max_bytes: int) -> dict[str, dict[str, Layout]]:
    """{file: its tensors}, in order, named as Hugging Face names them; a file over `max_bytes` has a single tensor."""
    shards: list[dict[str, Layout]] = []
    filled = 0
    for name, layout in layouts.items():
        if not shards or filled + layout.size > max_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = layout
        filled += layout.size
    count = len(shards)
    if count == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{count:05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def write_shards(
    folder: Path,
    layouts: Mapping[str, Layout],
    tensors: Iterable[tuple[str, memoryview]],
    *,
    max_bytes: int,
    parameters: int,
    progress: Callable[[int], None] = lambda size: None,
) -> dict[str, FileHash]:
    """Write the shards and their index, each file safe on the disk; the hash of every shard.

    `tensors` gives the bytes in the order of `layouts`. `progress` hears how many bytes were added. Raises OSError as
    the system does.
    """
    shards = planned_shards(layouts, max_bytes)
    hashes, coming = {}, iter(tensors)
    for file, shard in shards.items():
        with _writing(folder / file, progress) as out:
            out.write(memoryview(header_bytes(shard)))
            for name, layout in shard.items():
                came, data = next(coming)
                if (came, data.nbytes) != (name, layout.size):
                    raise ValueError(f"{came} of {data.nbytes} bytes came, {name} of {layout.size} was announced")
                out.write(data)
                del data  # before the next one is made
            hashes[file] = FileHash(out.sha256.hexdigest(), out.written)
    places = {name: file for file, shard in shards.items() for name in shard}
    total = sum(layout.size for layout in layouts.values())
    facts = {"total_size": total, "total_parameters": parameters}
    index = {"metadata": facts, "weight_map": dict(sorted(places.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return hashes


def header_bytes(shard: Mapping[str, Layout], writer: str = "mlx") -> bytes:
    """The first bytes of a file that holds these tensors one after the other; `writer` is whose it is, mlx or pt."""
    entries: dict[str, object] = {"__metadata__": {"format": writer}}
    offset = 0
    for name, layout in shard.items():
        end = offset + layout.size
        entries[name] = {"dtype": layout.dtype, "shape": list(layout.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class _Writer:
    """An open file; its hash is computed, and old bytes are sent to the disk, while new ones are written."""

    def __init__(self, descriptor: int, threads: ThreadPoolExecutor, progress: Callable[[int], None]) -> None:
        self.sha256, self.written = hashlib.sha256(), 0
        self._descriptor, self._threads, self._progress = descriptor, threads, progress
        self._synced = 0  # bytes
        self._syncing: Future[None] | None = None

    def write(self, data: memoryview) -> None:
        for start in range(0, data.nbytes, BLOCK_BYTES):
            block = data[start : start + BLOCK_BYTES]
            hashed = self._threads.submit(self.sha256.update, block)
            try:
                _write_all(self._descriptor, block)
            finally:
                hashed.result()  # the block's memory is not ours any longer than that
            self.written += block.nbytes
            self._progress(block.nbytes)
        if self.written - self._synced >= SYNC_BYTES and (self._syncing is None or self._syncing.done()):
            self._synced = self.written
            self._syncing = self._threads.submit(os.fsync, self._descriptor)

    def close(self) -> None:
        if self._syncing is not None:
            self._syncing.result()
        os.fsync(self._descriptor)


def _write_all(descriptor: int, block: memoryview) -> None:
    while block:
        block = block[os.write(descriptor, block) :]


@contextmanager
def _writing(path: Path, progress: Callable[[int], None]) -> Iterator[_Writer]:
    """A new file that is safe on the disk when the block ends."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        with ThreadPoolExecutor(2) as threads:
            writer = _Writer(descriptor, threads, progress)
            yield writer
            writer.close()
    finally:
        os.close(descriptor)

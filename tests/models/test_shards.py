"""Files of tensors written as they come: what the reference parser reads is what went in."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from mlxsft.models import shards
from mlxsft.models.checks import INDEX
from mlxsft.models.shards import Layout, planned_shards, write_shards

ARRAYS = {
    "a": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b.ü": np.arange(5, dtype=np.uint8),
    "c": np.zeros((0, 3), np.float16),
    "d": np.array(7, np.int64),
    "e": np.arange(100, dtype=np.uint32).reshape(10, 10),
}
NAMES = {"float32": "F32", "uint8": "U8", "float16": "F16", "int64": "I64", "uint32": "U32"}
LAYOUTS = {name: Layout(NAMES[array.dtype.name], array.shape) for name, array in ARRAYS.items()}


@pytest.mark.parametrize("most", [1, 60, 10**9])
@pytest.mark.parametrize("block", [7, 1 << 20])
def test_round_trip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int, block: int) -> None:
    monkeypatch.setattr(shards, "BLOCK_BYTES", block)
    monkeypatch.setattr(shards, "SYNC_BYTES", 3 * block)
    told: list[int] = []
    data = ((name, memoryview(array.tobytes())) for name, array in ARRAYS.items())
    hashes = write_shards(tmp_path, LAYOUTS, data, max_bytes=most, parameters=1, progress=told.append)
    read = {name: array for file in hashes for name, array in load_file(tmp_path / file).items()}
    assert read.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert read[name].dtype == array.dtype
        np.testing.assert_array_equal(read[name], array)
    for file, known in hashes.items():
        content = (tmp_path / file).read_bytes()
        assert (known.sha256, known.size) == (hashlib.sha256(content).hexdigest(), len(content))
    assert sum(told) == sum(known.size for known in hashes.values())
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["weight_map"].keys() == ARRAYS.keys()
    assert set(index["weight_map"].values()) == set(hashes)
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in ARRAYS.values())


def test_a_shard_is_never_larger_unless_a_tensor_is() -> None:
    sizes = [sum(layout.size for layout in shard.values()) for shard in planned_shards(LAYOUTS, 60).values()]
    assert sizes == [53, 8, 400]


def test_bytes_that_were_not_announced_are_a_bug(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="4 bytes came, a of 48 was announced"):
        write_shards(tmp_path, LAYOUTS, [("a", memoryview(b"1234"))], max_bytes=100, parameters=1)

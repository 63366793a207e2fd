"""The tensors of a verified checkpoint, as they are stored."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mlxsft.errors import InputRefused
from mlxsft.models.source import open_model
from mlxsft.models.tensors import StoredTensors
from tests.tiny import write_llama


def append(path: Path, name: str, dtype: str, shape: list[int], data: bytes) -> None:
    """One more tensor, of a type that NumPy may not know, in a safetensors file."""
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header: dict[str, Any] = json.loads(content[8 : 8 + length])
    body = content[8 + length :]
    header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body + data)


def test_every_tensor_of_every_shard_is_read_when_it_is_asked_for(tmp_path: Path) -> None:
    folder = write_llama(tmp_path)
    stored = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(stored)
    for i, part in enumerate((names[::2], names[1::2])):
        save_file({name: stored[name] for name in part}, folder / f"model-0000{i + 1}-of-00002.safetensors")
    tensors = StoredTensors(open_model(str(folder)))
    assert sorted(tensors) == names
    assert len(tensors) == len(names)
    assert all(np.array_equal(tensors[name], stored[name]) for name in names)
    assert "lm_head.weight" not in tensors


def test_every_type_is_read_and_bfloat16_as_its_bits(tmp_path: Path) -> None:
    folder = write_llama(tmp_path)
    path = folder / "model.safetensors"
    expected = {
        "I64": np.int64([[-1, 2]]),
        "U32": np.uint32([[1 << 31, 2]]),
        "U8": np.uint8([[200, 2]]),
        "BOOL": np.array([[True, False]]),
        "F16": np.float16([[0.5, 2]]),
        "F64": np.float64([[0.1, 2]]),
        "BF16": np.uint16([[0x3F80, 0xC000]]),
    }
    for dtype, array in expected.items():
        append(path, dtype, dtype, [1, 2], array.tobytes())
    append(path, "one", "F32", [], np.float32(3).tobytes())
    append(path, "none", "F32", [0, 4], b"")
    tensors = StoredTensors(open_model(str(folder)))
    for dtype, array in expected.items():
        assert tensors[dtype].dtype == array.dtype
        assert np.array_equal(tensors[dtype], array)
    assert (tensors["one"].shape, float(tensors["one"]), tensors["none"].shape) == ((), 3.0, (0, 4))


def test_types_that_numpy_has_not_are_refused_by_name(tmp_path: Path) -> None:
    folder = write_llama(tmp_path)
    append(folder / "model.safetensors", "x", "F8_E4M3", [2], b"12")
    append(folder / "model.safetensors", "y", "U16", [1], b"12")
    with pytest.raises(InputRefused, match="x, y stored as F8_E4M3, U16, expected F64"):
        StoredTensors(open_model(str(folder)))


def test_a_file_that_was_changed_after_it_was_verified_is_refused(tmp_path: Path) -> None:
    folder = write_llama(tmp_path)
    path, source = folder / "model.safetensors", open_model(str(folder))
    tensors = StoredTensors(source)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputRefused, match="is shorter than when it was verified"):
        list(tensors.values())
    path.write_bytes(content[:4])
    with pytest.raises(InputRefused, match="was changed after it was verified"):
        StoredTensors(source)
    path.unlink()
    with pytest.raises(InputRefused, match="cannot be read"):
        tensors["model.norm.weight"]

"""Safetensors files gone wrong, read by us, the reference parser and MLX: `python -m tests.models.mutations COUNT`.

It is a process of its own, so that a crash is seen. Prints one JSON object: how many were `accepted`, how many
`rejected`, and `wrong`, the disagreements.
"""

from __future__ import annotations

import json
import random
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, deserialize

from mlxsft.backends.blas import load_blas
from mlxsft.errors import InputRefused
from mlxsft.models.source import open_model
from mlxsft.models.tensors import StoredTensors

load_blas()
import mlx.core as mx  # noqa: E402

DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "F4", "C64", "X32", "f32", "", None, 3)
NUMBERS = (
    0,
    1,
    2,
    3,
    4,
    7,
    8,
    16,
    64,
    1 << 31,
    1 << 32,
    (1 << 63) - 1,
    1 << 63,
    1 << 64,
    -1,
    0.5,
    4.0,
    "4",
    None,
    [],
    True,
)
SOME_FILE = {  # one of each kind; the embedding has a row for each of the 8 tokens
    "model.embed_tokens.weight": ("F32", [8, 4], 128),
    "half": ("F16", [3, 2], 12),
    "brain": ("BF16", [2, 2], 8),
    "long": ("I64", [2], 16),
    "bytes": ("U8", [2, 2, 1], 4),
    "one": ("F32", [], 4),
    "none": ("F32", [0, 4], 0),
}


def good() -> tuple[dict[str, Any], bytes]:
    """Header and data of a file that is right."""
    header, end = {}, 0
    for name, (dtype, shape, size) in SOME_FILE.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    return header, bytes(i % 120 for i in range(end))


def packed(text: str | bytes, body: bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data + body


def of_bytes(rng: random.Random) -> bytes:
    """The file cut, longer, or with other bytes."""
    data = bytearray(packed(json.dumps(good()[0]), good()[1]))
    kind = rng.randrange(4)
    if kind == 0:
        return bytes(data[: rng.randrange(len(data))])
    if kind == 1:
        return bytes(data) + bytes(rng.randrange(1, 9))
    for _ in range(rng.randrange(1, 4)):
        data[rng.randrange(8, len(data) - len(good()[1]))] = (
            rng.randrange(256) if kind == 2 else rng.choice(b'{}[]",:0-')
        )
    return bytes(data)


def of_length(rng: random.Random) -> bytes:
    """Another length of the header, with or without the spaces to go with it."""
    text = json.dumps(good()[0]).encode()
    if rng.random() < 0.4:
        return packed(
            rng.choice([b" ", b"", b"\0", b"\n"]) * rng.randrange(3) + text + b" " * rng.randrange(9), good()[1]
        )
    length = rng.choice(
        [0, 1, len(text) - 1, len(text) + 1, len(text) + 4, 100_000_001, 1 << 40, 1 << 63, (1 << 64) - 1]
    )
    return struct.pack("<Q", length) + text + good()[1]


def of_entry(rng: random.Random) -> bytes:
    """One tensor described differently."""
    header, body = good()
    entry = header[rng.choice(list(header))]
    kind = rng.randrange(5)
    if kind == 0:
        entry["dtype"] = rng.choice(DTYPES)
    elif kind == 1:
        entry["shape"] = [rng.choice(NUMBERS) for _ in range(rng.randrange(4))]
    elif kind == 2:
        entry["data_offsets"][rng.randrange(2)] = rng.choice((*NUMBERS, *range(0, 180, 4)))
    elif kind == 3:
        rng.shuffle(entry["shape"])
        entry["data_offsets"].reverse() if rng.random() < 0.3 else None
    else:
        entry[rng.choice(["dtype", "shape", "data_offsets", "more"])] = rng.choice([{}, [], "F32", 1, None])
    return packed(json.dumps(header), body)


def of_entries(rng: random.Random) -> bytes:
    """Tensors left out, exchanged, overlapping, in another order, or with other names."""
    header, body = good()
    a, b = rng.sample(list(header), 2)
    kind = rng.randrange(6)
    if kind == 0:
        del header[a]
    elif kind == 1:
        header[a], header[b] = header[b], header[a]
    elif kind == 2:
        header[a] = {**header[a], "data_offsets": header[b]["data_offsets"]}
    elif kind == 3:
        header = dict(rng.sample(list(header.items()), len(header)))
    elif kind == 4:
        header[rng.choice(["", "__metadata__", "a\0b", "\x1b[2J", "../x", "é" * 300])] = header.pop(a)
    else:
        header["__metadata__"] = rng.choice([{"a": "b"}, {"a": 1}, [], None, "x", {"a": None}, {"": ""}])
    return packed(json.dumps(header), body)


def of_text(rng: random.Random) -> bytes:
    """JSON that one parser takes and another may not: a name twice, comments, NaN, odd numbers, odd escapes."""
    header, body = good()
    text, name = json.dumps(header), rng.choice(list(header))
    entry = json.dumps({**header[name], "shape": rng.choice([header[name]["shape"], [1], [2, 2]])})
    other = json.dumps(header[rng.choice(list(header))])
    changes: list[Callable[[], str]] = [
        lambda: text[:-1] + f', "{name}": {entry}}}',
        lambda: "{" + f'"{name}": {other}, ' + text[1:],
        lambda: text.replace('"shape"', f'"shape": [{rng.randrange(5)}], "shape"', 1),
        lambda: text.replace('"dtype"', '"dtype": "U8", "dtype"', rng.randrange(1, 4)),
        lambda: text.replace(", ", rng.choice([",", ",,", " , ", "\t,\n", ";"]), rng.randrange(1, 9)),
        lambda: text.replace(
            "[8, 4]", rng.choice(["[8.0, 4]", "[8e0, 4]", "[08, 4]", "[+8, 4]", "[0x8, 4]", "[8, 4,]", "[-0]"])
        ),
        lambda: text.replace("128]", rng.choice(["128.0]", "1.28e2]", "NaN]", "Infinity]", "-128]", "128"])),
        lambda: text.replace('"', "'", 2),
        lambda: text + rng.choice(["{}", "x", "//", "/* */", "\0", "\ufeff"]),
        lambda: rng.choice(["[]", "null", "{}", '""', "1", "[" * 5000, '{"a":' * 5000, "\ufeff" + text]),
        lambda: text.replace("half", rng.choice(["\\ud800", "\\u0000", "h\\alf", "\\/", "long", "\\u006cong"])),
    ]
    return packed(rng.choice(changes)(), body)


def reference(data: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    """{tensor: dtype, shape, data} by the reference parser, None where it rejects the file."""
    try:
        return {name: (e["dtype"], tuple(e["shape"]), bytes(e["data"])) for name, e in deserialize(data)}
    except SafetensorError:
        return None


def disagreement(folder: Path, data: bytes) -> tuple[bool, str]:
    """Whether we accept the file, and in what we or MLX then differ from the reference parser."""
    path = folder / "model.safetensors"
    path.write_bytes(data)
    expected = reference(data)
    try:
        source = open_model(str(folder))
    except InputRefused:
        return False, ""
    if expected is None:
        return True, "the reference parser rejects it"
    if {name: (info.dtype, info.shape) for name, info in source.tensors.items()} != {
        name: (dtype, shape) for name, (dtype, shape, _) in expected.items()
    }:
        return True, "other tensors than the reference parser's"
    try:
        ours = {name: array.tobytes() for name, array in StoredTensors(source).items()}
    except InputRefused:  # a type that NumPy has not
        ours = {name: content for name, (_, _, content) in expected.items()}
    if ours != {name: content for name, (_, _, content) in expected.items()}:
        return True, "other bytes than the reference parser's"
    try:
        theirs = mx.load(str(path))
        loaded = {name: np.array(array.view(mx.uint8)).tobytes() for name, array in theirs.items() if array.size > 1}
    except (RuntimeError, ValueError):  # a type that MLX has not
        return True, ""
    return True, "" if all(loaded[name] == ours[name] for name in loaded) else "other bytes in MLX"


def main(count: int) -> None:
    rng, kinds = random.Random(0), (of_bytes, of_length, of_entry, of_entries, of_text)
    told: dict[str, Any] = {"accepted": 0, "rejected": 0, "wrong": []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 8}))
        vocabulary = {f"w{i}": i for i in range(8)}
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "WordLevel", "vocab": vocabulary}}))
        for number in range(count):
            accepted, wrong = disagreement(folder, kinds[number % len(kinds)](rng))
            told["accepted" if accepted else "rejected"] += 1
            told["wrong"] += [f"{number}: {wrong}"] if wrong else []
    print(json.dumps(told))


if __name__ == "__main__":
    main(int(sys.argv[1]))

"""A model folder, dense or quantized → one GGUF file, for llama.cpp, Ollama and LM Studio.

Every tensor is read once, in the order of the checkpoint's files, and written where it belongs: no more than one of
them, as float32, is in memory. https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlxsft.data.template import Template
from mlxsft.errors import InputRefused, OutOfResources, UsageError
from mlxsft.models.adapter import sync_folder, writing
from mlxsft.models.card import origin, source_metadata
from mlxsft.models.dequantize import dequantized_shapes, dequantized_tensors
from mlxsft.models.gguf_names import (
    Names,
    Place,
    family_of,
    refuse_incomplete,
    rotary_tensors,
    settings,
    text_config,
    window_note,
)
from mlxsft.models.gguf_tokenizer import strips_behind, tokenizer_facts
from mlxsft.models.source import ModelSource
from mlxsft.models.tensors import StoredTensors
from mlxsft.outputs import refuse_existing

TYPES = ("f16", "bf16", "q8_0", "f32")
FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}  # llama.cpp's llama_ftype
PHI3 = re.compile("phi-?3", re.IGNORECASE)
ALIGNMENT = 32  # bytes; GGUF's own
# What llama.cpp wants as float32 whatever the rest is: single rows, routers of experts, learned positions.
FULL_PRECISION = ("ffn_gate_inp.weight", "position_embd.weight")

Progress = Callable[[int, int], None]  # hears (bytes more, bytes in all)
Facts = Mapping[str, Any]
Tune = Callable[[Iterable[tuple[str, NDArray[Any]]]], Iterable[tuple[str, NDArray[Any]]]]


@dataclass(frozen=True)
class Exported:
    """What came of it."""

    out: Path
    size: int  # bytes
    tensors: int
    dtype: str
    architecture: str  # llama.cpp's
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"out": str(self.out)}


def export_gguf(
    source: ModelSource,
    out: Path,
    *,
    dtype: str = "f16",
    template: Template | None = None,
    tune: Tune = lambda tensors: tensors,
    force: bool = False,
    progress: Progress = lambda size, total: None,
) -> Exported:
    """Write a verified checkpoint to the file `out`, whole or not at all; matrices as f32, f16, bf16 or q8_0.

    `template` is the chat template that is written in place of the model's own, and `tune` changes the numbers as they
    pass, as an adapter does both (`gguf_adapter.Tuned`). Raises
    UsageError where the extra `gguf` is not installed and for an `out` that is there, InputRefused for models that
    llama.cpp would compute otherwise, OutOfResources for want of disk.
    """
    require_gguf()
    refuse_existing(out, force=force)
    family = family_of(source.config)
    notes = [note for note in [window_note(source.config)] if note]
    tokens, tokenizer_notes = tokenizer_facts(source, template)
    named = {"general.architecture": family.arch, **_general(source, family.arch, dtype)}
    facts = {**named, **settings(source.config, source.embedding_rows or 0), **tokens}
    plan = _plan(source, dtype)
    others = dict(rotary_tensors(source.config))
    layouts = {**plan.layouts, **{name: Layout("f32", array.shape) for name, array in others.items()}}
    with write_gguf(out, facts, layouts, progress) as write:
        for name, array in others.items():
            write(name, 0, array)
        for name, array in tune(dequantized_tensors(StoredTensors(source), source.config)):
            for place in plan.places.get(name, ()):
                write(place.name, place.expert or 0, place.change(array))
    return Exported(out, out.stat().st_size, len(layouts), dtype, family.arch, [*notes, *plan.notes, *tokenizer_notes])


def require_gguf() -> None:
    """Returns where the package `gguf` is installed. Raises UsageError with the install command where it is not."""
    if importlib.util.find_spec("gguf") is None:
        raise UsageError(
            "GGUF files need the package gguf, not installed here", "Install it: pip install 'mlxsft[gguf]'"
        )


def _general(source: ModelSource, arch: str, dtype: str) -> dict[str, Any]:
    """general.* of GGUF: what the file is of."""
    repository, _ = origin(source)
    name = (repository or source.folder.name).rpartition("/")[2]
    # By its name llama.cpp takes a model for one whose special tokens take in the white space behind them, and dies
    # where such a one has not Phi-3's tokens.
    strips = arch == "phi3" and strips_behind(source)
    if strips != bool(PHI3.search(name)):
        name = f"phi3 {name}" if strips else PHI3.sub("phi 3", name)
    facts = {"general.type": "model", "general.name": name, "general.file_type": FILE_TYPES[dtype]}
    licence = source_metadata(source).get("license")
    facts |= {"general.license": licence} if isinstance(licence, str) else {}
    return facts | {"general.quantization_version": 2}


# ---- what goes where ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """How a tensor is stored."""

    dtype: str
    shape: tuple[int, ...]  # in NumPy's order
    pieces: int = 1  # that come one by one

    @property
    def size(self) -> int:
        """Bytes."""
        numbers = int(np.prod(self.shape, dtype=np.int64))
        return {"f32": 4 * numbers, "f16": 2 * numbers, "bf16": 2 * numbers, "q8_0": numbers // 32 * 34}[self.dtype]


@dataclass(frozen=True)
class _Plan:
    """Tensors of the file, and by tensor of the checkpoint the places it goes to."""

    layouts: dict[str, Layout]
    places: dict[str, list[Place]]
    notes: list[str]


def _plan(source: ModelSource, dtype: str) -> _Plan:
    """Raises InputRefused for tensors without a place, and where some are missing."""
    stored = {name: (info.dtype, info.shape) for name, info in source.tensors.items()}
    names, config = Names(source.config), text_config(source.config)
    tied = bool(config.get("tie_word_embeddings", names.family.shifted_norms or names.family.arch == "gpt2"))
    places: dict[str, list[Place]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    pieces: dict[str, set[int]] = {}
    left = []
    for name, shape in dequantized_shapes(stored, source.config).items():
        place = names.place(name)
        if place is None:
            left.append(name)
            continue
        places[name] = [place]
        pieces.setdefault(place.name, set()).add(place.expert or 0)
        shapes[place.name] = shape if place.expert is None else (config["num_local_experts"], *shape)
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) and place.change is np.transpose:
            shapes[place.name] = shape[::-1]
    if tied:
        _tie(names, places, shapes)
    for name, found in pieces.items():
        if (name in shapes and found != set(range(len(found)))) or len(found) not in (1, shapes.get(name, (1,))[0]):
            raise InputRefused(f"{source.name}: some experts of {name} are missing")
    refuse_incomplete(set(shapes), names.family, config["num_hidden_layers"])
    other = [name for name in left if name.startswith(("vision_tower", "multi_modal_projector", "model.vision_tower"))]
    notes = [f"{len(other)} tensors of other modalities are left out: the file is of the language model"] * bool(other)
    layouts = {n: Layout(_type_of(n, s, dtype), s, len(pieces.get(n, [0]))) for n, s in shapes.items()}
    if dtype == "q8_0" and (wide := [n for n, layout in layouts.items() if layout.dtype == "f16"]):
        notes.append(f"{len(wide)} matrices stay f16: their rows do not divide into groups of 32")
    return _Plan(layouts, places, notes)


def _tie(names: Names, places: dict[str, list[Place]], shapes: dict[str, tuple[int, ...]]) -> None:
    """One matrix for both ends: stored once, under the embedding's name, or twice where llama.cpp needs both."""
    head = [name for name, found in places.items() if found[0].name == "output.weight"]
    embedding = [name for name, found in places.items() if found[0].name == "token_embd.weight"]
    if head and embedding:
        del places[head[0]], shapes["output.weight"]
    elif head:  # published under the head's name alone
        shapes["token_embd.weight"] = shapes.pop("output.weight")
        places[head[0]] = [Place("token_embd.weight", None, places[head[0]][0].change)]
    if names.family.head and (embedding or head):
        name = (embedding or head)[0]
        places[name] = [*places[name], Place("output.weight", None, places[name][0].change)]
        shapes["output.weight"] = shapes["token_embd.weight"]


def _type_of(name: str, shape: tuple[int, ...], dtype: str) -> str:
    """As llama.cpp's own conversion chooses."""
    if len(shape) < 2 or name.endswith(FULL_PRECISION):
        return "f32"
    return "f16" if dtype == "q8_0" and shape[-1] % 32 else dtype


# ---- the file -------------------------------------------------------------------------------------------------------


@contextmanager
def write_gguf(
    out: Path, facts: Facts, layouts: Mapping[str, Layout], progress: Progress = lambda size, total: None
) -> Iterator[Callable[[str, int, NDArray[Any]], None]]:
    """A function that takes (tensor, piece, numbers) in any order; the file gets its name once all are there."""
    aside = out.with_name(f".{out.name}.partial")
    total = sum(layout.size for layout in layouts.values())
    out.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(out.parent).free) < total:
        raise OutOfResources(f"{out}: takes {total / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free", "Free some space.")
    try:
        with writing(out):
            offsets = _write_head(aside, facts, layouts)
            missing = {(name, piece) for name, layout in layouts.items() for piece in range(layout.pieces)}
            with aside.open("rb+") as file:

                def write(name: str, piece: int, numbers: NDArray[Any]) -> None:
                    layout = layouts[name]
                    data = encoded(name, numbers, layout.dtype)
                    file.seek(offsets[name] + piece * (layout.size // layout.pieces))
                    file.write(data.data.cast("B") if data.size else b"")
                    missing.remove((name, piece))
                    progress(data.nbytes, total)

                yield write
                file.truncate(
                    max(offsets[n] + -(-layout.size // ALIGNMENT) * ALIGNMENT for n, layout in layouts.items())
                )
                file.flush()
                os.fsync(file.fileno())
            if missing:
                raise ValueError(f"never written: {sorted(missing)[:3]}")
            os.replace(aside, out)
            sync_folder(out.parent)
    finally:
        aside.unlink(missing_ok=True)


def _write_head(path: Path, facts: Facts, layouts: Mapping[str, Layout]) -> dict[str, int]:
    """All but the numbers, with the package `gguf`; where the numbers of each tensor begin, in bytes."""
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(path, facts["general.architecture"])
    for key, value in facts.items():
        if key != "general.architecture":  # which the writer has added
            _add(writer, key, value)
    for name, layout in layouts.items():
        kind = GGMLQuantizationType[layout.dtype.upper()]
        writer.add_tensor_info(name, layout.shape, np.dtype(np.float32), layout.size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    begin, offsets = writer.fout[0].tell(), {}
    writer.close()
    for name, layout in layouts.items():
        begin = _padded(begin)
        offsets[name] = begin
        begin += layout.size
    return offsets


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _add(writer: Any, key: str, value: Any) -> None:
    """A key of the type that llama.cpp reads it as."""
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    kinds.get(type(value), writer.add_array)(key, value)


def encoded(name: str, numbers: NDArray[Any], dtype: str) -> NDArray[Any]:
    """The numbers in one of GGUF's types. Raises InputRefused where they do not fit into it."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    with np.errstate(over="ignore"):
        data = np.ascontiguousarray(
            quantize(np.ascontiguousarray(numbers, np.float32), GGMLQuantizationType[dtype.upper()])
        )
    if dtype == "f16" and np.isinf(data).any():
        raise InputRefused(f"{name}: holds numbers that f16 cannot hold (over 65,504)", "Take --dtype bf16 or f32.")
    return data

"""An adapter folder in mlx-lm's layout: written atomically, read with every problem named.

`adapters.safetensors` holds `<module>.lora_a` [inputs, rank] and `<module>.lora_b` [rank, outputs] of each tuned
module, `adapter_config.json` how they apply. Keys that mlx-lm does not know, as our passport `mlxsft`, do no harm.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlxsft.errors import Diverged, InputRefused, OutOfResources, UsageError
from mlxsft.models.checks import read_json, refuse_links
from mlxsft.models.headers import header_of
from mlxsft.models.sizes import refuse_beyond_memory
from mlxsft.terminal import one_line

WEIGHTS = "adapters.safetensors"
CONFIG = "adapter_config.json"
SHOWN = 20  # problems of one adapter
FLOATS = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}  # safetensors' names → NumPy's, little-endian

# No room on the disk, over the quota, or over the size that a file may have.
FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}


@dataclass(frozen=True)
class Adapter:
    """What a tuned model adds to its base."""

    config: dict[str, Any]
    tensors: dict[str, NDArray[np.float32]]


def save_adapter(folder: Path, tensors: Mapping[str, NDArray[Any]], config: Mapping[str, Any]) -> None:
    """An adapter folder that mlx-lm loads; the tensors are replaced first, then the config, each in one step."""
    from safetensors.numpy import save

    if not tensors:
        raise InputRefused(f"{folder}: the adapter has no tensors", "Check which layers and modules are tuned.")
    with np.errstate(over="ignore"):  # float64 beyond float32 becomes infinite, and is refused below
        # safetensors writes the memory as it lies: a transposed view would be stored scrambled
        arrays = {name: np.asarray(tensor, dtype=np.float32, order="C") for name, tensor in tensors.items()}
    refuse_non_finite(folder, arrays)
    text = json.dumps(dict(config), indent=4, sort_keys=True, ensure_ascii=False, allow_nan=False)
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / WEIGHTS, save(arrays, metadata={"format": "mlx"}))
    atomic_write(folder / CONFIG, f"{text}\n".encode())


def load_adapter(folder: Path) -> Adapter:
    """The adapter of a run, of one of its checkpoints or of any folder in mlx-lm's layout, as float32."""
    _refuse_other_layouts(folder)
    config = _read_config(folder)
    tensors = _read_tensors(folder)
    if problems := [*_config_problems(config), *_tensor_problems(config, tensors)]:
        raise InputRefused(listed(f"{folder}: this adapter cannot be used:", problems))
    return Adapter(config, {name: tensor for name, tensor in tensors.items() if isinstance(tensor, np.ndarray)})


def hashes_of(folder: Path) -> dict[str, str]:
    """SHA-256 of the tensors and of the config as it is read."""
    tensors = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    config = json.dumps(_read_config(folder), sort_keys=True)
    return {WEIGHTS: tensors, CONFIG: hashlib.sha256(config.encode()).hexdigest()}


def refuse_non_finite(target: Path, tensors: Mapping[str, NDArray[Any]]) -> None:
    """Raises Diverged, with the names, when a tensor that is about to be saved holds NaN or infinity."""
    if bad := sorted(name for name, tensor in tensors.items() if not np.isfinite(tensor).all()):
        raise Diverged(f"{target}: not saved, {len(bad)} tensors are not finite: {', '.join(bad)}")


def atomic_write(path: Path, data: bytes) -> None:
    """The file with this content, or as it was before; never a part of it, even when the power fails."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path):
            with aside.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
            sync_folder(path.parent)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Errors of the operating system while `path` is written, as OutOfResources or UsageError."""
    try:
        yield
    except OSError as error:
        message = f"{path}: cannot be written ({error.strerror})"
        if error.errno in FULL:
            raise OutOfResources(message, "Free some disk space; what was saved before is untouched.") from error
        raise UsageError(message, "Choose a folder that can be written to.") from error


def sync_folder(folder: Path) -> None:
    """The rename itself on disk; Windows cannot open folders and does not need it."""
    if os.name != "nt":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _refuse_other_layouts(folder: Path) -> None:
    """Refuses what is no adapter folder of mlx-lm, with the name of what it is."""
    if os.path.lexists(folder / WEIGHTS):
        return
    if not folder.is_dir():
        raise InputRefused(f"{folder}: no such adapter folder", f"Give the run folder, the one that holds {WEIGHTS}.")
    for peft in ("adapter_model.safetensors", "adapter_model.bin"):
        if (folder / peft).is_file():
            raise InputRefused(
                f"{folder}: this is a PEFT adapter ({peft}), not one in mlx-lm's layout",
                f"Convert it first; mlxsft reads {WEIGHTS} with {CONFIG}.",
            )
    if (folder / "config.json").is_file():
        raise InputRefused(f"{folder}: this is a whole model, not an adapter", "Give it as the model.")
    raise InputRefused(f"{folder}: {WEIGHTS} is missing", "Give a run folder that has saved at least once.")


def listed(what: str, problems: Sequence[str]) -> str:
    """A message with a line for each problem, and how many more there are."""
    more = [f"and {len(problems) - SHOWN} more"] * (len(problems) > SHOWN)
    return "\n  ".join([what, *map(one_line, problems[:SHOWN]), *more])


def _read_config(folder: Path) -> dict[str, Any]:
    """The adapter's config; a checkpoint of a run has the run's."""
    place = folder.resolve()
    if not (place / CONFIG).exists() and place.parent.name == "checkpoints":
        place = place.parent.parent
    if not os.path.lexists(place / CONFIG):
        raise InputRefused(f"{folder}: {CONFIG} is missing", "Without it the adapter's scale is unknown.")
    with _named_after(folder):
        refuse_links(place, [CONFIG])
        return read_json(place / CONFIG)


@contextmanager
def _named_after(folder: Path) -> Iterator[None]:
    """Refusals that begin with a file, beginning with its folder."""
    try:
        yield
    except InputRefused as refusal:
        raise InputRefused(one_line(f"{folder}: {refusal.message}"), refusal.hint) from refusal


def _config_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """What mlx-lm would miss in the config, a line each."""
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora", "full"):
        yield f"{CONFIG}: fine_tune_type is {kind!r}, expected lora, dora or full"
    if kind == "full":
        return
    layers = config.get("num_layers")
    if not isinstance(layers, int) or not _is_number(layers) or layers < -1:  # -1 stands for all
        yield f"{CONFIG}: num_layers is {layers!r}, expected a whole number"
    parameters = config.get("lora_parameters")
    if not isinstance(parameters, dict):
        yield f"{CONFIG}: lora_parameters is {parameters!r}, expected an object with rank and scale"
        return
    if not _is_number(parameters.get("rank"), whole=True) or parameters["rank"] < 1:
        yield f"{CONFIG}: lora_parameters.rank is {parameters.get('rank')!r}, expected a whole number from 1"
    if not _is_number(parameters.get("scale")):  # a file may have alpha beside it; mlx-lm applies scale alone
        yield f"{CONFIG}: lora_parameters.scale is {parameters.get('scale')!r}, expected a number"
    dropout = parameters.get("dropout", 0.0)
    if not _is_number(dropout) or not 0 <= dropout < 1:
        yield f"{CONFIG}: lora_parameters.dropout is {dropout!r}, expected a number from 0 to below 1"
    keys = parameters.get("keys")
    if keys is not None and not (isinstance(keys, list) and all(isinstance(key, str) for key in keys)):
        yield f"{CONFIG}: lora_parameters.keys is {keys!r}, expected a list of module names"


def _is_number(value: object, whole: bool = False) -> bool:
    """Whether a JSON value is a finite number (true and false are not)."""
    if isinstance(value, float):
        return not whole and math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 53


def _read_tensors(folder: Path) -> dict[str, NDArray[np.float32] | str]:
    """{name: float32 array} of the weights; where the dtype is no float, its name stands for the array."""
    from safetensors import deserialize

    path = folder / WEIGHTS
    with _named_after(folder):
        refuse_links(folder.resolve(), [WEIGHTS])
        _, header = header_of(path)
    refuse_beyond_memory(str(path), path.stat().st_size)
    entries = deserialize(path.read_bytes())  # type: ignore[no-untyped-call]  # its stub has no types
    if not header:
        raise InputRefused(f"{path}: holds no tensor")
    found = sorted(entries, key=lambda entry: str(entry[0]))
    return {name: _as_float32(e["dtype"], e["shape"], e["data"]) for name, e in found}


def _as_float32(dtype: str, shape: list[int], data: bytes) -> NDArray[np.float32] | str:
    """The little-endian bytes of a float tensor as float32; the dtype's name where it is no float."""
    if dtype == "BF16":  # the upper half of a float32
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32).reshape(shape)
    if dtype not in FLOATS:
        return dtype
    with np.errstate(over="ignore"):  # what float32 cannot hold is named among the infinite ones
        return np.frombuffer(data, FLOATS[dtype]).astype(np.float32).reshape(shape)


def _tensor_problems(config: Mapping[str, Any], tensors: Mapping[str, NDArray[np.float32] | str]) -> Iterator[str]:
    """What is wrong with the tensors, a line each."""
    for name, tensor in tensors.items():
        if isinstance(tensor, str):
            yield f"{name}: is stored as {tensor}, expected F32, F16 or BF16"
        elif not np.isfinite(tensor).all():
            yield f"{name}: {np.count_nonzero(~np.isfinite(tensor))} of {tensor.size} values are not finite"
    if config.get("fine_tune_type", "lora") == "full":
        return
    parameters = config.get("lora_parameters")
    rank = parameters.get("rank") if isinstance(parameters, dict) else None
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        partner = {"lora_a": f"{module}.lora_b", "lora_b": f"{module}.lora_a", "m": f"{module}.lora_a"}.get(leaf)
        if partner is None:
            yield f"{name}: is no part of a low-rank adapter, expected names that end in lora_a, lora_b or m"
        elif partner not in tensors:
            yield f"{name}: {partner} is missing"
        elif leaf != "m" and not isinstance(tensor, str):
            axis = 1 if leaf == "lora_a" else 0 if tensor.ndim == 2 else 2  # three axes: one matrix an expert
            if tensor.ndim not in (2, 3) or tensor.shape[axis] != rank:
                yield f"{name}: has the shape {tensor.shape}, which is not of rank {rank}"

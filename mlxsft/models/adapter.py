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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlxsft.errors import Diverged, InputRefused, OutOfResources, UsageError
from mlxsft.models.checks import read_json, refuse_links
from mlxsft.models.headers import header_of
from mlxsft.models.names import layer_of
from mlxsft.models.shards import WIDTHS, Layout, header_bytes
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
    tensors = _read_tensors(folder)
    config = _modern(_read_config(folder), tensors)
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
                "`mlxsft import PEFT_DIR OUT` turns it into one.",
            )
    if (folder / "config.json").is_file():
        raise InputRefused(
            f"{folder}: this is a whole model, not an adapter", "Give the folder of a run or of an adapter."
        )
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


def _modern(config: dict[str, Any], tensors: Iterable[str]) -> dict[str, Any]:
    """The config as mlx-lm writes it today.

    Until the end of 2024 it wrote `lora_layers` for `num_layers`, `use_dora` for `fine_tune_type`, and for a while the
    parameters beside them. Without keys mlx-lm tuned what its version of that day thought good, which the names of the
    tensors tell. A file may have alpha beside scale; mlx-lm applies scale alone.
    """
    if "lora_layers" in config and "num_layers" not in config:
        config = {**config, "num_layers": config["lora_layers"]}
    if config.get("use_dora") is True and "fine_tune_type" not in config:
        config = {**config, "fine_tune_type": "dora"}
    if config.get("fine_tune_type", "lora") == "full":
        return config
    beside = {name: config[name] for name in ("rank", "alpha", "scale", "dropout", "keys") if name in config}
    if "lora_parameters" not in config and beside:
        config = {**config, "lora_parameters": beside}
    parameters = config.get("lora_parameters")
    if isinstance(parameters, dict) and parameters.get("keys") is None:
        config = {**config, "lora_parameters": {**parameters, "keys": keys_of(tensors)}}
    return config


def keys_of(tensors: Iterable[str]) -> list[str]:
    """mlx-lm's keys for the modules of these tensors: the path within its layer, else the whole path."""
    modules = sorted({name.rpartition(".")[0] for name in tensors})
    places = [(module, layer_of(module)) for module in modules]
    return sorted({place[1] if place else module for module, place in places})


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
    if not isinstance(layers, int) or not is_number(layers) or layers < -1:  # -1 stands for all
        yield f"{CONFIG}: num_layers is {layers!r}, expected a whole number"
    parameters = config.get("lora_parameters")
    if not isinstance(parameters, dict):
        yield f"{CONFIG}: lora_parameters is {parameters!r}, expected an object with rank and scale"
        return
    if not is_number(parameters.get("rank"), whole=True) or parameters["rank"] < 1:
        yield f"{CONFIG}: lora_parameters.rank is {parameters.get('rank')!r}, expected a whole number from 1"
    if not is_number(parameters.get("scale")):  # a file may have alpha beside it; mlx-lm applies scale alone
        yield f"{CONFIG}: lora_parameters.scale is {parameters.get('scale')!r}, expected a number"
    dropout = parameters.get("dropout", 0.0)
    if not is_number(dropout) or not 0 <= dropout < 1:
        yield f"{CONFIG}: lora_parameters.dropout is {dropout!r}, expected a number from 0 to below 1"
    keys = parameters.get("keys")
    if keys is not None and not (isinstance(keys, list) and all(isinstance(key, str) for key in keys)):
        yield f"{CONFIG}: lora_parameters.keys is {keys!r}, expected a list of module names"


def is_number(value: object, whole: bool = False) -> bool:
    """Whether a JSON value is a finite number (true and false are not)."""
    if isinstance(value, float):
        return not whole and math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 53


def _read_tensors(folder: Path) -> dict[str, NDArray[np.float32] | str]:
    """{name: float32 array} of the weights; where the dtype is no float, its name stands for the array."""
    with _named_after(folder):
        refuse_links(folder.resolve(), [WEIGHTS])
        stored = read_safetensors(folder / WEIGHTS)
    return {name: float32_of(tensor) for name, tensor in stored.items()}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a safetensors file has it."""

    dtype: str  # the format's own names: F32, BF16, ...
    shape: tuple[int, ...]
    data: bytes  # little-endian


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """{name: tensor} of a file, by name. Raises InputRefused for an invalid or an empty one."""
    from safetensors import deserialize

    _, header = header_of(path)
    refuse_beyond_memory(str(path), path.stat().st_size)
    entries = deserialize(path.read_bytes())  # type: ignore[no-untyped-call]  # its stub has no types
    if not header:
        raise InputRefused(f"{path.name}: holds no tensor")
    found = sorted(entries, key=lambda entry: str(entry[0]))
    return {name: StoredTensor(e["dtype"], tuple(e["shape"]), bytes(e["data"])) for name, e in found}


def float32_of(tensor: StoredTensor) -> NDArray[np.float32] | str:
    """A float tensor as float32; the dtype's name where it is no float."""
    if tensor.dtype == "BF16":  # the upper half of a float32
        halves = np.frombuffer(tensor.data, "<u2").astype(np.uint32)
        return (halves << 16).view(np.float32).reshape(tensor.shape)
    if tensor.dtype not in FLOATS:
        return tensor.dtype
    with np.errstate(over="ignore"):  # what float32 cannot hold is named among the infinite ones
        return np.frombuffer(tensor.data, FLOATS[tensor.dtype]).astype(np.float32).reshape(tensor.shape)


def stored(array: NDArray[np.float32], dtype: str) -> StoredTensor:
    """The reverse of `float32_of`, where the type can hold the values."""
    if dtype == "BF16":
        data = (np.ascontiguousarray(array).view(np.uint32) >> 16).astype("<u2").tobytes()
    else:
        with np.errstate(over="ignore"):
            data = array.astype(FLOATS[dtype]).tobytes()
    return StoredTensor(dtype, array.shape, data)


def safetensors_bytes(tensors: Mapping[str, StoredTensor], writer: str) -> bytes:
    """A file of these tensors, in the order of the safetensors package; `writer` is whose it is, mlx or pt."""
    order = sorted(tensors, key=lambda name: (-WIDTHS[tensors[name].dtype], name))
    header = header_bytes({name: Layout(tensors[name].dtype, tensors[name].shape) for name in order}, writer)
    return b"".join([header, *(tensors[name].data for name in order)])


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
    yield from _key_problems(parameters, tensors)
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


def _key_problems(parameters: object, tensors: Iterable[str]) -> Iterator[str]:
    """Where the config promises other modules than there are, a line each; how many layers, only the base can tell."""
    keys = parameters.get("keys") if isinstance(parameters, dict) else None
    if not isinstance(keys, list):
        return
    named: set[str] = set()
    for module in sorted({name.rpartition(".")[0] for name in tensors if name.endswith((".lora_a", ".lora_b", ".m"))}):
        place = layer_of(module)
        names = {module, place[1]} if place else {module}
        named |= names
        if names.isdisjoint(keys):
            yield f"{module}: lora_parameters.keys does not name this module"
    for key in keys:
        if key not in named:
            yield f"{key}: is in lora_parameters.keys, but there are no tensors of it"

"""Matrices that MLX has quantized → float32, in NumPy alone: what every mode of `mx.quantize` means, written down.

A row of codes is one stream of bits, the first code in the lowest ones; a group of codes shares a scale.
    affine         code · scale + bias, each step rounded to the type of scale and bias, as MLX does on the CPU
    mxfp4, mxfp8   E2M1 or E4M3 number · 2^(scale - 127)     https://www.opencompute.org/documents/
    nvfp4          E2M1 number · E4M3 scale                  ocp-microscaling-formats-mx-v1-0-spec-final-pdf
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlxsft.errors import InputRefused

Array = NDArray[Any]
Floats = NDArray[np.float32]

BFLOAT16 = np.dtype(np.uint16)  # NumPy has no bfloat16: an array of uint16 holds its bits, the upper half of a float32
PARTS = ("weight", "scales", "biases", "global_scale")  # of a quantized module
BLOCK_VALUES = 1 << 18  # worked on at once: what stays in the cache


@dataclass(frozen=True)
class Mode:
    """The widths and group sizes that a mode of `mx.quantize` has; the first ones are MLX's defaults."""

    bits: tuple[int, ...]
    group_sizes: tuple[int, ...]


MODES = {
    "affine": Mode((4, 1, 2, 3, 5, 6, 8), (64, 32, 128)),
    "mxfp4": Mode((4,), (32,)),
    "mxfp8": Mode((8,), (32,)),
    "nvfp4": Mode((4,), (16,)),
}


# ---- one matrix -----------------------------------------------------------------------------------------------------


def dequantize(
    weight: Array,
    scales: Array,
    biases: Array | None = None,
    *,
    group_size: int,
    bits: int,
    mode: str,
    global_scale: Array | None = None,
) -> Floats:
    """The numbers that a quantized matrix stands for, float32 [..., rows, columns].

    weight: uint32 [..., rows, columns · bits / 32]; scales: [..., rows, columns / group_size], for `affine` float32,
    float16 or bfloat16 (its bits, as uint16) with biases alike, for the other modes uint8; global_scale: [...], one
    a matrix, for `nvfp4` alone. Bit for bit the values of `mx.dequantize` on the CPU: for `affine` in the type of the
    scales (give them as float32 for values that are rounded once), else in float32. Raises InputRefused for modes,
    types and shapes that MLX has not.
    """
    _refuse_settings(group_size, bits, mode)
    _refuse_types(weight, scales, biases, global_scale, mode)
    _refuse_shapes(weight, scales, biases, global_scale, group_size, bits)
    rows, groups = math.prod(scales.shape[:-1]), scales.shape[-1]
    values = np.empty((rows, groups, group_size), np.float32)
    packed, factors = (
        weight.reshape(rows, weight.shape[-1]),
        _factors(scales, global_scale, mode).reshape(rows, groups, 1),
    )
    offsets = None if biases is None else as_float32(biases).reshape(rows, groups, 1)
    sums = scales.dtype if biases is None or biases.dtype == scales.dtype else np.dtype(np.float32)
    table = {"affine": np.arange(256, dtype=np.float32), "mxfp8": E4M3}.get(mode, E2M1)
    step = max(1, BLOCK_VALUES // max(1, groups * group_size))
    with np.errstate(over="ignore", invalid="ignore"):  # infinite scales and biases do as IEEE says
        for block in (slice(start, start + step) for start in range(0, rows, step)):
            part = values[block]
            np.take(table, _unpack(packed[block], bits).reshape(part.shape), out=part, mode="clip")
            part *= factors[block]
            _round(part, scales.dtype)
            if offsets is not None:
                part += offsets[block]
                _round(part, sums)
    return values.reshape(*scales.shape[:-1], groups * group_size)


def _factors(scales: Array, global_scale: Array | None, mode: str) -> Floats:
    """What the codes of each group are multiplied by, as float32."""
    if mode == "affine":
        return as_float32(scales)
    factors = np.take(E4M3 if mode == "nvfp4" else E8M0, scales)
    if global_scale is not None:  # the largest number of the matrix, which the largest scale and code stand for
        factors *= (as_float32(global_scale) / np.float32(448 * 6))[..., None, None]
    return factors


def _unpack(weight: Array, bits: int) -> NDArray[np.uint8]:
    """The codes of rows of uint32, one a byte. After lcm(bits, 8) bits a code begins with a byte again."""
    period = math.lcm(bits, 8)
    packs = np.ascontiguousarray(weight, "<u4").view(np.uint8).reshape(len(weight), -1, period // 8)
    codes = np.empty((*packs.shape[:2], period // bits), np.uint8)
    for i in range(period // bits):
        byte, shift = divmod(i * bits, 8)
        code = packs[..., byte] >> shift
        if shift + bits > 8:
            code |= packs[..., byte + 1] << (8 - shift)
        np.bitwise_and(code, (1 << bits) - 1, out=codes[..., i])
    return codes.reshape(len(weight), -1)


def _round(values: Floats, dtype: np.dtype[Any]) -> None:
    """To the nearest number of the type, ties to even, in place."""
    if dtype == np.float16:
        values[...] = values.astype(np.float16)
    elif dtype == BFLOAT16:  # NaN stays NaN: made of bfloat16 alone, its lower half is zero and nothing carries
        bits = values.view(np.uint32)
        bits += 0x7FFF + (bits >> 16 & 1)
        bits &= 0xFFFF0000


def as_float32(array: Array) -> Floats:
    """Floating-point numbers of any width, bfloat16 as uint16 among them, as float32."""
    if array.dtype == BFLOAT16:
        widened: Floats = (array.astype(np.uint32) << 16).view(np.float32)
        return widened
    return array.astype(np.float32, copy=False)


def _small_floats(exponent_bits: int, mantissa_bits: int, bias: int) -> Floats:
    """What every code of a small floating-point format stands for: sign, exponent, mantissa from the highest bit."""
    codes = np.arange(1 << (1 + exponent_bits + mantissa_bits))
    mantissa = codes & ((1 << mantissa_bits) - 1)
    exponent = codes >> mantissa_bits & ((1 << exponent_bits) - 1)
    significand = mantissa + np.where(exponent > 0, 1 << mantissa_bits, 0)
    sizes = np.ldexp(significand.astype(np.float32), np.maximum(exponent, 1) - bias - mantissa_bits)
    values: Floats = np.where(codes >> (exponent_bits + mantissa_bits), -sizes, sizes)
    return values


E2M1 = _small_floats(2, 1, bias=1)
E4M3 = _small_floats(4, 3, bias=7)
E4M3[[0x7F, 0xFF]] = np.nan
with np.errstate(over="ignore"):
    E8M0 = np.ldexp(np.float32(1), np.arange(256) - 127)  # the last is infinite in MLX, NaN in the specification


# ---- a checkpoint ---------------------------------------------------------------------------------------------------


def dequantized_tensors(tensors: Mapping[str, Array], config: Mapping[str, Any]) -> Iterator[tuple[str, Array]]:
    """(name, array) of a checkpoint as if it had never been packed: plain float32 `X.weight`, one at a time.

    `tensors` may read each array when it is asked for; bfloat16 is given as uint16. `config` is config.json, where
    MLX writes `quantization`. Arrays of whole numbers come as they are. Raises InputRefused, with the module's name.
    """
    quantization = _quantization(config)
    names = dict.fromkeys(tensors)  # to look up without reading
    modules = {name.removesuffix(".scales") for name in names if name.endswith(".scales")}
    packed = {module for module in modules if f"{module}.weight" in names}
    parts = {f"{module}.{part}" for module in packed for part in PARTS[1:]}
    for name in names:
        module = name.removesuffix(".weight")
        if name in parts:
            continue
        is_weight = name != module
        if is_weight and module in packed:
            stored = {part: f"{module}.{part}" for part in PARTS if f"{module}.{part}" in names}
            yield name, _module_weight({part: tensors[stored[part]] for part in stored}, module, quantization)
            continue
        array = tensors[name]
        if is_weight and (array.dtype == np.uint32 or isinstance(quantization.get(module), dict)):
            raise InputRefused(f"{module}: is quantized, but {module}.scales is missing")
        yield name, as_float32(array) if array.dtype.kind == "f" or array.dtype == BFLOAT16 else array


def dequantized_shapes(
    stored: Mapping[str, tuple[str, tuple[int, ...]]], config: Mapping[str, Any]
) -> dict[str, tuple[int, ...]]:
    """{name: shape} of what `dequantized_tensors` gives, in its order, without a number being read.

    `stored` has safetensors' dtype and the shape of each tensor. Raises InputRefused as that does.
    """
    dtypes = {"U32": np.uint32, "U8": np.uint8}  # all that decides
    stand_ins = {n: np.broadcast_to(np.zeros((), dtypes.get(d, np.float32)), shape) for n, (d, shape) in stored.items()}
    quantization = _quantization(config)
    packed = {name.removesuffix(".scales") for name in stand_ins if name.endswith(".scales")}
    packed = {module for module in packed if f"{module}.weight" in stand_ins}
    parts = {f"{module}.{part}" for module in packed for part in PARTS[1:]}
    shapes = {}
    for name, array in stand_ins.items():
        module = name.removesuffix(".weight")
        if name in parts:
            continue
        shapes[name] = array.shape
        if name != module and module in packed:
            scales = stand_ins[f"{module}.scales"]
            group_size = _settings(quantization, module, array, scales)["group_size"]
            if type(group_size) is not int:
                raise InputRefused(f"{module}: quantization with group_size {group_size!r}, expected a number")
            shapes[name] = (*scales.shape[:-1], scales.shape[-1] * group_size)
    return shapes


def _quantization(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """`quantization` of config.json; empty where nothing is quantized."""
    found = config.get("quantization")
    if found is None and config.get("quantization_config") is None:
        return {}
    if found is None:
        method = config["quantization_config"]
        name = method.get("quant_method") if isinstance(method, dict) else method
        raise InputRefused(
            f"config.json: quantized by {name!r}, expected `quantization` as MLX writes it",
            "Take the model as it was before it was quantized, or one that mlx-lm has converted.",
        )
    if not isinstance(found, dict):
        raise InputRefused(f"config.json: quantization is {found!r}, expected an object with group_size and bits")
    return found


def _module_weight(arrays: Mapping[str, Any], module: str, quantization: Mapping[str, Any]) -> Floats:
    """The dequantized weight of one module, from its parts."""
    try:
        return dequantize(**arrays, **_settings(quantization, module, arrays["weight"], arrays["scales"]))
    except InputRefused as refusal:
        raise InputRefused(f"{module}: {refusal.message}", refusal.hint) from refusal


def _settings(quantization: Mapping[str, Any], module: str, weight: Array, scales: Array) -> dict[str, Any]:
    """group_size, bits and mode of a module, found as mlx-lm finds them.

    The module's own entry counts, with MLX's defaults for what it lacks; else scales of 8 bits tell, for their modes
    differ in how many bits share a scale; else what is said for all.
    """
    own = quantization.get(module, True)
    if own is False or not quantization:
        raise InputRefused("has scales, but config.json says that it is not quantized")
    if own is True and scales.dtype == np.uint8:
        words, groups = math.prod(weight.shape[-1:]), math.prod(scales.shape[-1:])
        for name in MODES.keys() - {"affine"}:
            (bits,), (group_size,) = MODES[name].bits, MODES[name].group_sizes
            if 32 * words == bits * group_size * groups:
                return {"group_size": group_size, "bits": bits, "mode": name}
    entry = quantization if own is True else own
    if not isinstance(entry, dict):
        raise InputRefused(f"config.json: its quantization is {entry!r}, expected true, false or an object")
    name = entry.get("mode", "affine")
    known = MODES.get(name) if isinstance(name, str) else None
    defaults = {"group_size": known.group_sizes[0], "bits": known.bits[0]} if known else {}
    return {key: entry.get(key, defaults.get(key)) for key in ("group_size", "bits")} | {"mode": name}


# ---- what is refused ------------------------------------------------------------------------------------------------


def _refuse_settings(group_size: object, bits: object, mode: object) -> None:
    """Combinations that `mx.quantize` does not make."""
    known = MODES.get(mode) if isinstance(mode, str) else None
    if known is None:
        raise InputRefused(f"quantization mode {mode!r}, expected {', '.join(MODES)}")
    for name, value, choices in (("bits", bits, known.bits), ("group_size", group_size, known.group_sizes)):
        if type(value) is not int or value not in choices:
            expected = " or ".join(map(str, sorted(choices)))
            raise InputRefused(f"quantization with {name} {value!r}, expected {expected} for {mode}")


def _refuse_types(weight: Array, scales: Array, biases: Array | None, global_scale: Array | None, mode: str) -> None:
    """Arrays that the mode does not have, or stores in another type."""
    floats = ("float32", "float16", "uint16")
    parts = (
        ("weight", weight, ("uint32",)),
        ("scales", scales, floats if mode == "affine" else ("uint8",)),
        ("biases", biases, floats if mode == "affine" else ()),
        ("global_scale", global_scale, floats if mode == "nvfp4" else ()),
    )
    for name, array, types in parts:
        if array is not None and array.dtype.name not in types:
            expected = " or ".join(types).replace("uint16", "bfloat16 as uint16") or "none"
            raise InputRefused(f"{name} of {array.dtype}, expected {expected} for {mode}")
    if biases is None and mode == "affine":
        raise InputRefused("no biases, which affine has")


def _refuse_shapes(
    weight: Array, scales: Array, biases: Array | None, global_scale: Array | None, group_size: int, bits: int
) -> None:
    """Shapes that do not belong together."""
    named = {"weight": weight, "scales": scales, "biases": biases, "global_scale": global_scale}
    shapes = {name: array.shape for name, array in named.items() if array is not None}
    fits = (
        weight.ndim >= 2
        and scales.shape[:-1] == weight.shape[:-1]
        and shapes.get("biases", scales.shape) == scales.shape
        and shapes.get("global_scale", weight.shape[:-2]) == weight.shape[:-2]
        and 32 * weight.shape[-1] == scales.shape[-1] * group_size * bits
    )
    if not fits:
        found = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise InputRefused(
            f"the shapes do not belong together, with {bits} bits and groups of {group_size}: {found}",
            "The file is damaged, or config.json belongs to another one.",
        )

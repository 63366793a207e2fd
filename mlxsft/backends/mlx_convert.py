"""Checkpoints on their way to MLX's layout: mlx-lm's own model, its arrays never all read.

MLX's arrays are lazy: casting, stacking experts and quantizing are noted, and made when a tensor is asked for. On the
CPU device `mx.quantize` works on one thread and makes temporary arrays of up to 10 (mxfp4) or 20 (nvfp4) times a
bfloat16 matrix. In blocks of rows, one chain of blocks a core, the result has the same bits, takes what one block takes
beside the matrix, and half to a third of the time on two cores.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from mlxsft.backends.blas import load_blas
from mlxsft.errors import InputRefused, OutOfResources, UsageError
from mlxsft.models.dequantize import MODES
from mlxsft.models.headers import some
from mlxsft.models.quantize import QuantizationPlan, Scheme
from mlxsft.models.shards import Layout

load_blas()  # before MLX is imported, which would take its own

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
from mlx.utils import tree_flatten, tree_map, tree_unflatten  # noqa: E402

from mlxsft.backends.mlx_adapters import MlxAdapter  # noqa: E402
from mlxsft.backends.mlx_fuse import plain  # noqa: E402
from mlxsft.backends.mlx_models import (  # noqa: E402
    load_checkpoint_and_config,
    mlx_lm,
    parameter_count,
    quantized_modules,
)
from mlxsft.backends.mlx_random import RandomKeys  # noqa: E402

if TYPE_CHECKING:
    from mlxsft.backends import Tensors
    from mlxsft.models.source import ModelSource

BLOCK_VALUES = 1 << 16
AHEAD_BYTES = 16 << 20  # of tensors that are made while the one before is written

DTYPES = {
    **{mx.float64: "F64", mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16", mx.bool_: "BOOL"},
    **{mx.int64: "I64", mx.int32: "I32", mx.int16: "I16", mx.int8: "I8"},
    **{mx.uint64: "U64", mx.uint32: "U32", mx.uint16: "U16", mx.uint8: "U8"},
}


class MlxConversion:
    """A checkpoint of which nothing is read until `read`; see `backends.Conversion`."""

    framework = "mlx"

    def __init__(self, source: ModelSource) -> None:
        self.name = source.name
        self.model, self.config = load_checkpoint_and_config(source)
        self.config.pop("_name_or_path", None)
        _refuse_bare_float8(self.model, source)
        method = self.config.get("quantization_config")
        if not self.quantized() and isinstance(method, dict) and method.get("quant_method") == "fp8":
            del self.config["quantization_config"]  # mlx-lm has made plain numbers of it
        mx.reset_peak_memory()

    # ---- what it is

    def quantized(self) -> set[str]:
        return quantized_modules(self.model)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {path: tuple(module.weight.shape) for path, module in self._quantizable()}

    def preferred(self, scheme: Scheme, mixed: str | None) -> dict[str, Scheme | None]:
        rule = self._mixed(mixed, scheme.group_size) if mixed else getattr(self.model, "quant_predicate", None)
        found: dict[str, Scheme | None] = {}
        for path, module in self._quantizable():
            wanted = rule(path, module) if rule else True
            if not wanted or module.weight.shape[-1] % scheme.group_size:
                found[path] = None
            else:
                found[path] = _scheme_of(wanted) if isinstance(wanted, dict) else scheme
        return found

    def parameters(self) -> int:
        return parameter_count(self.model)

    # ---- what it is to become

    def cast(self, dtype: str | None) -> None:
        arrays = tree_flatten(self.model.parameters())
        floats = [(name, a) for name, a in arrays if mx.issubdtype(a.dtype, mx.floating)]
        self.model.load_weights([(n, a.astype(self._cast_to(dtype, n, a.dtype))) for n, a in floats], strict=False)
        if dtype:  # so that nothing turns it back into what it was
            self.config |= {"torch_dtype": dtype} | {key: dtype for key in ("dtype",) if key in self.config}

    def fuse(self, config: Mapping[str, Any], tensors: Tensors, dtype: str | None) -> None:
        self._refuse_scaled_experts()
        self.model.freeze()  # so that an adapter knows what is its own
        if config.get("fine_tune_type") == "full":
            self.cast(dtype)  # before, so that its numbers are rounded to that alone
        MlxAdapter.saved(self.model, config, tensors, RandomKeys())
        modules = dict(self.model.named_modules())
        below = tuple(f"{path}." for path, module in modules.items() if "lora_a" in module)
        rebuilt = [p for p, m in modules.items() if "lora_a" in m or ("scales" in m and not p.startswith(below))]
        numbers = {path: self._cast_to(dtype, f"{path}.weight", _number_type(modules[path])) for path in rebuilt}
        self.model.update_modules(tree_unflatten([(path, plain(modules[path], numbers[path])) for path in rebuilt]))
        for key in ("quantization", "quantization_config"):
            self.config.pop(key, None)
        self.cast(dtype)

    def dequantize(self) -> None:
        self._refuse_scaled_experts()
        mlx_lm("utils").dequantize_model(self.model)
        if left := sorted(self.quantized()):
            raise InputRefused(f"{self.name}: mlx-lm cannot dequantize {some(left)}")
        for key in ("quantization", "quantization_config"):
            self.config.pop(key, None)

    def quantize(self, plan: QuantizationPlan, learned: nn.Module | None = None) -> None:
        modules = dict(self._quantizable())
        quantized = [(path, quantized_module(modules[path], scheme)) for path, scheme in plan.modules.items()]
        self.model.update_modules(tree_unflatten(quantized))
        if learned is not None:
            types = {name: array.dtype for name, array in tree_flatten(self.model.parameters())}
            arrays = [(name, array.astype(types[name])) for name, array in tree_flatten(learned.parameters())]
            self.model.load_weights(arrays)
        self.config["quantization"] = plan.block()

    # ---- the result

    def layouts(self) -> dict[str, Layout]:
        return {name: Layout(DTYPES[a.dtype], tuple(a.shape)) for name, a in tree_flatten(self.model.parameters())}

    def read(self) -> Iterator[tuple[str, memoryview]]:
        waiting, ahead, size = deque(_bytes_of(self.model)), deque[tuple[str, mx.array]](), 0
        most = min(AHEAD_BYTES, max(array.nbytes for _, array in waiting) // 2)
        self.model.update(tree_map(lambda _: mx.array([]), self.model.parameters()))  # nothing holds them but us
        try:
            while waiting or ahead:
                while waiting and (not ahead or size + waiting[0][1].nbytes <= most):
                    name, array = waiting.popleft()
                    mx.async_eval(array)  # type: ignore[no-untyped-call]  # its stub has no types
                    ahead.append((name, array))
                    size += array.nbytes
                name, array = ahead.popleft()
                size -= array.nbytes
                yield name, memoryview(array) if array.size else memoryview(b"")  # type: ignore[arg-type]  # it is a buffer
        except RuntimeError as error:  # of MLX
            if "alloc" in str(error):
                raise OutOfResources(f"{self.name}: memory does not suffice for {name} ({error})") from error
            raise InputRefused(f"{self.name}: {name} cannot be read or made ({error})") from error

    def write_config(self, path: str) -> None:
        vision = "vision_tower" in getattr(self.model, "model", {})
        mlx_lm("utils").save_config(self.config, path, keep_vision_config=vision)

    def peak_bytes(self) -> int:
        return int(mx.get_peak_memory())

    # ---- inside

    def _cast_to(self, dtype: str | None, name: str, stored: mx.Dtype) -> mx.Dtype:
        """The type of a tensor of floating-point numbers in the result, as mlx-lm chooses it."""
        wanted = dtype or self.config.get("torch_dtype")
        if wanted is None and isinstance(text_config := self.config.get("text_config"), dict):
            wanted = text_config.get("dtype")
        keeps = getattr(self.model, "cast_predicate", lambda name: True)
        if wanted not in mlx_lm("convert").MODEL_CONVERSION_DTYPES or not keeps(name):
            return stored
        number: mx.Dtype = getattr(mx, str(wanted))
        return number

    def _refuse_scaled_experts(self) -> None:
        if scaled := [name for name, _ in tree_flatten(self.model.parameters()) if name.endswith(".global_scale")]:
            raise InputRefused(f"{self.name}: mlx-lm cannot dequantize a scale for each expert ({some(scaled)})")

    def _quantizable(self) -> list[tuple[str, nn.Module]]:
        leaves = tree_flatten(self.model.leaf_modules(), is_leaf=nn.Module.is_module)
        return [(path, module) for path, module in leaves if hasattr(module, "to_quantized")]

    def _mixed(self, name: str, group_size: int) -> Any:
        try:
            return mlx_lm("convert").mixed_quant_predicate_builder(name, self.model, group_size)
        except ValueError as error:
            model_type = self.config.get("model_type")
            raise UsageError(
                f"--mixed {name}: mlx-lm has no mixed bits for {model_type}, whose layers have no down_proj",
                "Take --bits, and --bits-for for what needs more.",
            ) from error


def quantized_module(dense: Any, scheme: Scheme) -> nn.Module:
    """The module that mlx-lm makes of one that can be quantized; nothing is computed yet."""
    module: nn.Module = dense.to_quantized(**scheme.entry())
    if isinstance(dense, _plain_types()) and mx.default_device().type == mx.cpu:
        parts = quantized_in_blocks(dense.weight, scheme)
        module.update(dict(zip(("weight", "scales", "biases"), parts, strict=False)))
    return module


def quantized_in_blocks(weight: mx.array, scheme: Scheme, threads: int | None = None) -> list[mx.array]:
    """What `mx.quantize` gives for [..., rows, columns], made block by block of rows; nothing is computed yet.

    Each block waits for the one before it in its chain, so that the temporary arrays of one are gone before the next
    ones are made.
    """
    rows, count = weight.reshape(-1, weight.shape[-1]), threads or min(os.cpu_count() or 1, 8)
    step = max(1, BLOCK_VALUES // weight.shape[-1])
    chains, done = _chains(count), list[list[mx.array]]()
    for i, start in enumerate(range(0, rows.shape[0], step)):
        with mx.stream(chains[i % count]):
            block = rows[start : start + step]
            if i >= count:
                (block,) = mx.depends([block], done[i - count])
            done.append(list(mx.quantize(block, **scheme.entry())))
    return [mx.concatenate(list(parts)).reshape(*weight.shape[:-1], -1) for parts in zip(*done, strict=True)]


_streams: list[mx.Stream] = []  # MLX never gives one back


def _chains(count: int) -> list[mx.Stream]:
    """So many streams of the CPU, each with a thread of its own."""
    while len(_streams) < count:
        _streams.append(mx.new_stream(mx.cpu))
    return _streams[:count]


def _bytes_of(model: nn.Module) -> Iterator[tuple[str, mx.array]]:
    """(name, its bytes in rows as a file has them) of every parameter, not computed yet."""
    for name, array in tree_flatten(model.parameters()):
        yield name, mx.contiguous(array).reshape(-1).view(mx.uint8)


def _number_type(layer: Any) -> mx.Dtype:
    """The type of the numbers of a layer, with an adapter or without; of a packed one that of its scales."""
    base = layer.linear if "linear" in layer else layer.embedding if "embedding" in layer else layer
    number: mx.Dtype = base.scales.dtype if "scales" in base else base.weight.dtype
    return number if mx.issubdtype(number, mx.floating) else mx.bfloat16  # scales of 8 bits


def _plain_types() -> tuple[Any, ...]:
    """Modules whose `to_quantized` quantizes their weight as it is, and nothing else."""
    return (nn.Linear, nn.Embedding, mlx_lm("models.switch_layers").SwitchLinear)


def _scheme_of(entry: Mapping[str, Any]) -> Scheme:
    """The scheme that an architecture's own rule asks for, with MLX's defaults."""
    known = MODES[mode := entry.get("mode", "affine")]
    return Scheme(entry.get("bits") or known.bits[0], entry.get("group_size") or known.group_sizes[0], mode)


def _refuse_bare_float8(model: nn.Module, source: ModelSource) -> None:
    """Tensors of FP8 that mlx-lm's architecture takes for whole numbers, because it does not read FP8."""
    if not any(info.dtype.startswith("F8") for info in source.tensors.values()):
        return
    packed = tuple(f"{path}." for path in quantized_modules(model))
    arrays = tree_flatten(model.parameters())
    if bare := [name for name, a in arrays if a.dtype == mx.uint8 and not name.startswith(packed)]:
        raise InputRefused(
            f"{source.name}: {some(bare)} stored as FP8, which mlx-lm does not read for {source.config['model_type']}",
            "Look for the same model in bfloat16.",
        )

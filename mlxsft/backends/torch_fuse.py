"""Checkpoints with an adapter fused in, in transformers' layout: tensor by tensor, the model itself is never loaded.

Tensors keep the names that they have in the source's files. Each is read twice: once to learn its shape, which comes
before the numbers in a file, and once to be written.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from mlxsft.backends.torch_models import empty_model, is_tied, read_tensors
from mlxsft.errors import InputRefused
from mlxsft.machine import peak_resident_bytes
from mlxsft.models.adapter import listed
from mlxsft.models.names import mlx_name
from mlxsft.models.shards import Layout

if TYPE_CHECKING:
    from mlxsft.backends import Tensors
    from mlxsft.models.source import ModelSource

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {number: name for name, number in DTYPES.items()} | {
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8"},
    **{torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8", torch.bool: "BOOL"},
}
BLOCK_ROWS = 1024  # of a matrix that are changed at once
PREFIXES = {"gpt2": "transformer."}  # that files may leave out


class TorchRewrite:
    """A checkpoint of which one tensor at a time is in memory; see `backends.Rewrite`."""

    framework = "pt"

    def __init__(self, source: ModelSource) -> None:
        self._bytes_before = psutil.Process().memory_info().rss
        self._source = source
        self._kind = str(source.config.get("model_type"))
        self._model = empty_model(source)
        self._modules = {mlx_name(self._kind, path): module for path, module in self._model.named_modules()}
        self.config = {k: v for k, v in source.config.items() if k not in ("quantization", "quantization_config")}
        self._dtype: str | None = None
        self._own: Tensors = {}  # that replace the model's, by mlx-lm's names
        self._low_rank: dict[str, dict[str, torch.Tensor]] = {}  # by mlx-lm's paths
        self._scale = 1.0

    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self._model.parameters())

    def fuse(self, config: Mapping[str, Any], tensors: Tensors, dtype: str | None) -> None:
        if config.get("fine_tune_type") == "full":
            self._own = tensors
        else:
            self._scale = float(config["lora_parameters"]["scale"])
            for name, array in tensors.items():
                path, _, leaf = name.rpartition(".")
                self._low_rank.setdefault(path, {})[leaf] = torch.from_numpy(array)
        self._refuse_misfits()
        said = self.config.get("torch_dtype") or self.config.get("dtype")
        self._dtype = dtype or (said if said in ("float32", "float16", "bfloat16") else None)
        if dtype:
            self.config |= {"torch_dtype": dtype} | {key: dtype for key in ("dtype",) if key in self.config}

    def layouts(self) -> dict[str, Layout]:
        return {name: Layout(NAMES[self._number(name, t)], tuple(t.shape)) for name, t in self._tensors()}

    @torch.no_grad()  # type: ignore[untyped-decorator]  # torch is taken without its types
    def read(self) -> Iterator[tuple[str, memoryview]]:
        for name, tensor in self._tensors():
            made = self._changed(name, tensor).to(self._number(name, tensor)).contiguous()
            yield name, memoryview(made.view(-1).view(torch.uint8).numpy()) if made.numel() else memoryview(b"")

    def write_config(self, path: str) -> None:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(self.config, file, indent=2, ensure_ascii=False)
            file.write("\n")

    def peak_bytes(self) -> int:
        return max(0, peak_resident_bytes() - self._bytes_before)

    # ---- inside

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of the source; the head of a tied model is its embedding, which is stored once."""
        tied, embedding = is_tied(self._model), self._path_of(self._model.get_input_embeddings())
        stored = {self._mlx_name(name) for name in self._source.tensors}
        for name, tensor in read_tensors(self._source):
            if tied and name == "lm_head.weight":
                if f"{embedding}.weight" in stored:
                    continue
                name = next(n for n, p in self._model.named_parameters() if p is self._embedding_weight())
            yield name, tensor

    def _changed(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor with the adapter in it."""
        known = self._mlx_name(name)
        path, _, leaf = known.rpartition(".")
        module = self._modules.get(path)
        if (own := self._own.get(known)) is not None:
            turned = leaf == "weight" and isinstance(module, (Conv1D, nn.Conv1d))
            return torch.from_numpy(own).mT if turned else torch.from_numpy(own)
        if leaf != "weight" or (parts := self._low_rank.get(path)) is None:
            return tensor
        left, right = parts["lora_a"], parts["lora_b"]  # what the matrix is changed by, as an embedding has it
        if isinstance(module, nn.Linear):
            left, right = right.T, left.T
        for start in range(0, len(tensor), BLOCK_ROWS):
            rows = slice(start, start + BLOCK_ROWS)
            tensor[rows] += self._scale * (left[rows] @ right)
        if (lengths := parts.get("m")) is None:
            return tensor
        rows_at = 0 if isinstance(module, Conv1D) else 1  # Conv1D has them as columns
        now = torch.linalg.vector_norm(tensor, dim=rows_at).clamp(min=1e-10)
        return tensor.mul_((lengths / now).unsqueeze(rows_at))

    def _number(self, name: str, tensor: torch.Tensor) -> torch.dtype:
        """The type of a tensor in the result; of what was quantized it is that of the scales, where nothing is said."""
        if not tensor.is_floating_point():
            return tensor.dtype
        if self._dtype:
            number: torch.dtype = getattr(torch, self._dtype)
            return number
        scales = f"{name.removesuffix('.weight')}.scales"
        stored = self._source.tensors.get(scales) or self._source.tensors.get(name)
        return DTYPES.get(stored.dtype, torch.bfloat16) if stored else torch.float32

    def _mlx_name(self, name: str) -> str:
        prefix = PREFIXES.get(self._kind, "")
        if not name.startswith((prefix, "lm_head")) and mlx_name(self._kind, name) == name:
            name = prefix + name
        return mlx_name(self._kind, name)

    def _path_of(self, wanted: nn.Module) -> str:
        return next((path for path, module in self._modules.items() if module is wanted), "")

    def _embedding_weight(self) -> Any:
        return self._model.get_input_embeddings().weight

    def _shape(self, path: str) -> tuple[int, ...]:
        """Of a matrix as an adapter takes it: inputs or tokens, and outputs."""
        module: Any = self._modules[path]
        shape = tuple(module.weight.shape)
        return shape[::-1] if isinstance(module, nn.Linear) else shape

    def _refuse_misfits(self) -> None:
        """Raises InputRefused for what the adapter has on modules that are no matrices here, or not there."""
        tied = is_tied(self._model)
        stored = {self._mlx_name(name) for name, _ in self._tensors()}
        takes = {
            path
            for path, module in self._modules.items()
            if isinstance(module, (nn.Linear, nn.Embedding, Conv1D)) and not (tied and path == "lm_head")
        }
        problems = [
            f"{path}: is no matrix of this model that has an adapter on PyTorch"
            for path in self._low_rank
            if path not in takes or f"{path}.weight" not in stored
        ]
        problems += [
            f"{path}: the adapter is for {found}, the matrix is {expected}"
            for path, parts in self._low_rank.items()
            if path in takes
            and (found := (len(parts["lora_a"]), parts["lora_b"].shape[-1])) != (expected := self._shape(path))
        ]
        problems += [f"{name}: the model has no such tensor" for name in self._own if name not in stored]
        if problems:
            raise InputRefused(
                listed("the adapter cannot be fused by the torch backend:", problems),
                "Was it made on another base? Where it was not, take --backend mlx.",
            )

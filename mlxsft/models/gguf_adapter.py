"""An adapter on its way to GGUF: added to the base's numbers as they pass, or by itself, for llama.cpp's `--lora`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlxsft.errors import InputRefused
from mlxsft.models.adapter import Adapter
from mlxsft.models.base_modules import is_embedding
from mlxsft.models.gguf import Layout, require_gguf, write_gguf
from mlxsft.models.gguf_names import Names, family_of
from mlxsft.models.headers import some
from mlxsft.models.names import TURNED, mlx_name
from mlxsft.models.source import ModelSource
from mlxsft.outputs import refuse_existing

Array = NDArray[Any]
Floats = NDArray[np.float32]

_EXPERT = re.compile(r"(.+\.block_sparse_moe)\.experts\.(\d+)\.(w1|w2|w3)")
_PARTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


class Tuned:
    """The weights of a base with an adapter in them, float32, one at a time.

    W + scale · (A B)ᵀ for LoRA, with rows of length m for DoRA, the tuned tensor itself for full tuning; the sums are
    made in float32, as base + adapter compute.
    """

    def __init__(self, adapter: Adapter, kind: str) -> None:
        self._config, self._tensors, self._kind = adapter.config, adapter.tensors, kind
        self._unused = set(adapter.tensors)

    def __call__(self, tensors: Iterable[tuple[str, Array]]) -> Iterator[tuple[str, Array]]:
        """The same tensors with the adapter in them. Raises InputRefused for what of it belongs to none of them."""
        for name, array in tensors:
            yield name, self._tuned(name, array)
        if self._unused:
            raise InputRefused(f"the base has no place for {some(sorted(self._unused))}", "Is it of another model?")

    def _tuned(self, name: str, array: Array) -> Array:
        path, expert = self._module(name)
        turned = self._kind == "gpt2" and TURNED.search(name) and not name.startswith("model.")
        weight = np.swapaxes(array, -1, -2) if turned else array
        leaf = name.rpartition(".")[2]
        if whole := self._take(f"{path}.{leaf}", expert):
            weight = whole[0].reshape(weight.shape)
        elif leaf == "weight" and (a := self._take(f"{path}.lora_a", expert)):
            b, scale = self._take(f"{path}.lora_b", expert)[0], np.float32(self._config["lora_parameters"]["scale"])
            if expert is not None or weight.ndim == 3:  # experts: [rank, inputs] and [outputs, rank]
                product = b @ a[0]
            else:  # [inputs, rank] and [rank, outputs], or of an embedding [tokens, rank] and [rank, width]
                product = a[0] @ b if is_embedding(path) else (a[0] @ b).T
            weight = weight + scale * product
            if length := self._take(f"{path}.m", expert):
                weight *= (length[0] / np.linalg.norm(weight, axis=1))[:, None]
        return np.swapaxes(weight, -1, -2) if turned else weight

    def _take(self, name: str, expert: int | None) -> list[Floats]:
        """The tensor of this name, or its part for an expert, in a list; an empty list where there is none."""
        if name not in self._tensors:
            return []
        self._unused.discard(name)
        return [self._tensors[name] if expert is None else self._tensors[name][expert]]

    def _module(self, name: str) -> tuple[str, int | None]:
        """(mlx-lm's path of a tensor's module, which expert it is)."""
        path = name.rpartition(".")[0]
        if found := _EXPERT.fullmatch(path):
            return f"{found[1]}.switch_mlp.{_PARTS[found[3]]}", int(found[2])
        if self._kind == "gpt2" and not path.startswith(("model.", "transformer.", "lm_head")):
            path = f"transformer.{path}"  # as OpenAI published it
        return mlx_name(self._kind, path), None


def export_lora(source: ModelSource, adapter: Adapter, out: Path, *, force: bool = False) -> int:
    """Write the adapter alone to the file `out`, as float32, for llama.cpp with the base's GGUF; how many modules.

    Raises InputRefused for what llama.cpp has no such file for: DoRA, full tuning, embeddings, experts.
    """
    require_gguf()
    refuse_existing(out, force=force)
    family, names = family_of(source.config), Names(source.config)
    kind = adapter.config.get("fine_tune_type", "lora")
    hint = "Leave --lora-only out: base and adapter become one file."
    if kind != "lora":
        raise InputRefused(f"llama.cpp has no file for adapters of the kind {kind}", hint)
    scale, tensors = np.float32(adapter.config["lora_parameters"]["scale"]), {}
    for name in sorted(adapter.tensors):
        module, _, leaf = name.rpartition(".")
        if leaf != "lora_a":
            continue
        place, a, b = names.place(f"{module}.weight"), adapter.tensors[name], adapter.tensors[f"{module}.lora_b"]
        if place is None or a.ndim != 2 or place.name.startswith(("token_embd", "position_embd")):
            raise InputRefused(f"{module}: llama.cpp's adapters have neither embeddings nor experts", hint)
        # The scale is put into B, for llama.cpp divides the one of the file by each module's rank.
        change = names.rows_of(place)
        tensors[f"{place.name}.lora_a"] = np.ascontiguousarray(a.T)
        tensors[f"{place.name}.lora_b"] = np.ascontiguousarray(change(b.T * scale))
    facts = {
        **{"general.architecture": family.arch, "general.type": "adapter", "adapter.type": "lora"},
        **{"general.name": out.stem, "adapter.lora.alpha": 0.0},
    }
    layouts = {name: Layout("f32", tensor.shape) for name, tensor in tensors.items()}
    with write_gguf(out, facts, layouts) as write:
        for name, tensor in tensors.items():
            write(name, 0, tensor)
    return len(tensors) // 2

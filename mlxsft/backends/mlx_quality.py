"""A model beside itself quantized: how far what it says of the next token moves, and how far its numbers do.

The model may have an adapter, and is then held against what is fused of the two. It is in memory once, and every trial
shares all its arrays but those of the modules that are quantized. Its input of the head is kept between trials; logits
exist for a chunk of judged positions at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mlxsft.backends import Divergence
from mlxsft.backends.blas import load_blas

load_blas()  # before MLX is imported, which would take its own

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
from mlx.utils import tree_unflatten  # noqa: E402

from mlxsft.backends.mlx import MlxBackend  # noqa: E402
from mlxsft.backends.mlx_convert import DTYPES, quantized_module  # noqa: E402
from mlxsft.backends.mlx_fuse import plain  # noqa: E402
from mlxsft.backends.mlx_head import Head  # noqa: E402
from mlxsft.backends.mlx_learned import learned, sensitivities  # noqa: E402
from mlxsft.backends.mlx_models import make_float32, why_not_float32  # noqa: E402

if TYPE_CHECKING:
    from mlxsft.data.batches import Batch
    from mlxsft.models.adapter import Adapter
    from mlxsft.models.quantize import QuantizationPlan, Scheme
    from mlxsft.models.source import ModelSource

KEPT_BYTES = 256 << 20  # of the unquantized model's inputs of the head; what is beyond is computed again
WHOLE_ROWS = 128  # positions compared at once where the head cannot be called on chosen ones


class MlxComparison:
    """See `backends.Comparison`."""

    def __init__(self, source: ModelSource, batches: Sequence[Batch], adapter: Adapter | None = None) -> None:
        backend = MlxBackend(source)
        if adapter is not None:
            backend.attach_saved(adapter.config, adapter.tensors)
        self.notes = backend.notes
        self._base, self._batches = _Judged(backend.model), batches
        self._modules = dict(backend.model.named_modules())
        self._dequantized = backend.device == "cpu" and why_not_float32(backend.model) is None
        self._kept: dict[int, mx.array] = {}
        self._model_type = str(source.config.get("model_type"))

    def stored(self, source: ModelSource, which: Iterable[int]) -> Divergence:
        return self._divergence(_Judged(MlxBackend(source).model), which)

    def planned(
        self, schemes: Mapping[str, Scheme | None], dtypes: Mapping[str, str], which: Iterable[int]
    ) -> Divergence:
        trial = self._rounded(schemes, dtypes)
        return self.learned(trial, which)

    def sensitivities(self, low: Scheme, high: Scheme, tokens: NDArray[np.int32]) -> dict[str, float]:
        return sensitivities(copy.deepcopy(self._base.model), low, high, tokens)

    def learn(
        self, method: str, plan: QuantizationPlan, dtypes: Mapping[str, str], tokens: NDArray[np.int32]
    ) -> nn.Module:
        rounded = self._rounded(plan.modules, dtypes)
        return learned(method, self._base.model, self._model_type, plan, rounded, tokens)

    def learned(self, model: nn.Module, which: Iterable[int]) -> Divergence:
        trial = copy.deepcopy(model)  # its arrays are the same ones
        if self._dequantized:
            make_float32(trial)
        return self._divergence(_Judged(trial, like=self._base), which)

    def weight_error(self, path: str, scheme: Scheme, dtype: str) -> float:
        exact = plain(self._modules[path], mx.float32).weight
        rounded = _in_float32(self._written(path, scheme, dtype)).weight
        norms = mx.stack([((rounded - exact) ** 2).sum(), (exact**2).sum()]).tolist()
        error, norm = np.sqrt(np.array(norms, dtype=np.float64))
        return float(error / norm) if norm else 0.0

    def peak_bytes(self) -> int:
        return int(mx.get_peak_memory())

    # ---- inside

    def _rounded(self, schemes: Mapping[str, Scheme | None], dtypes: Mapping[str, str]) -> nn.Module:
        """The model with these modules quantized; all other arrays are the same ones."""
        trial = copy.deepcopy(self._base.model)
        modules = [(path, self._written(path, scheme, dtypes[path])) for path, scheme in schemes.items()]
        trial.update_modules(tree_unflatten(modules))
        return trial

    def _written(self, path: str, scheme: Scheme | None, dtype: str) -> nn.Module:
        """The module as a conversion writes it: fused and cast first, then quantized."""
        number = next(number for number, name in DTYPES.items() if name == dtype)
        module = plain(self._modules[path], number)
        module.set_dtype(number)
        return quantized_module(module, scheme) if scheme else module

    def _ends(self, i: int) -> mx.array:
        """What the unquantized model gives to its head for a batch."""
        if (kept := self._kept.get(i)) is not None:
            return kept
        ends = self._base.ends(self._batches[i])
        mx.eval(ends)
        if ends.nbytes + sum(array.nbytes for array in self._kept.values()) <= KEPT_BYTES:
            self._kept[i] = ends
        return ends

    def _divergence(self, other: _Judged, which: Iterable[int]) -> Divergence:
        sums, tokens = np.zeros(4), 0
        for i in which:
            batch = self._batches[i]
            targets = mx.array(batch.tokens[:, 1:][batch.mask[:, 1:]])
            ends, moved = self._ends(i), other.ends(batch)
            for start in range(0, targets.size, rows := self._base.chunk_rows):
                part = slice(start, start + rows)
                sums += _sums(self._base.logits(ends[part]), other.logits(moved[part]), targets[part])
            tokens += targets.size
        base_loss, loss, kl, changed = sums.tolist()
        return Divergence(tokens, base_loss, loss, kl, round(changed))


class _Judged:
    """A model whose head is called on judged positions only; where that cannot be, on all, and the logits chosen."""

    def __init__(self, model: nn.Module, like: _Judged | None = None) -> None:
        """`like` is the same model with other numbers, which saves the trial of the head."""
        self.model, head = model, Head(model, lambda arrays: None)
        if like is None:
            self._head = head if head.why_not() is None else None
            self.chunk_rows = head.chunk_rows if self._head else WHOLE_ROWS
        else:
            self._head = head if like._head else None
            self.chunk_rows = like.chunk_rows

    def ends(self, batch: Batch) -> mx.array:
        """What `logits` takes, [N, ...], for the N judged positions of a batch."""
        tokens, chosen = mx.array(batch.tokens[:, :-1]), mx.array(np.flatnonzero(batch.mask[:, 1:]).astype(np.int32))
        ends = self._head.hidden(tokens) if self._head else self.model(tokens)
        return ends.reshape(-1, ends.shape[-1])[chosen]

    def logits(self, ends: mx.array) -> mx.array:
        """Logits, float32 [N, V]."""
        logits = self._head.logits(ends) if self._head else ends
        return logits.astype(mx.float32)


def _sums(base: mx.array, other: mx.array, targets: mx.array) -> Any:
    """Over positions: both cross-entropies in nats, KL(base ‖ other) in nats, and how often the top choice differs."""
    p, q = (x - mx.logsumexp(x, axis=-1, keepdims=True) for x in (base, other))
    losses = [-mx.take_along_axis(x, targets[:, None], axis=-1).sum() for x in (p, q)]
    kl = (mx.exp(p) * (p - q)).sum(axis=-1)
    changed = (p.argmax(axis=-1) != q.argmax(axis=-1)).sum()
    return np.array(mx.stack([*losses, mx.maximum(kl, 0).sum(), changed.astype(mx.float32)]), dtype=np.float64)


def _in_float32(module: nn.Module) -> Any:
    """A quantized module as a plain one, with the numbers that a backend on the CPU gives it."""
    holder = nn.Module()
    holder.part = module
    make_float32(holder)
    return holder.part

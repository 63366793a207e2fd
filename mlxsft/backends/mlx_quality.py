"""A model beside itself quantized: how far what it says of the next token moves, and how far its numbers do.

The model may have an adapter, and is then held against what is fused of the two. It is in memory once, and every trial
shares all its arrays but those of the modules that are quantized. Kept between trials are its inputs of the head, its
answers, and what those layers give that are below the first one with a quantized module; logits exist for a chunk of
judged positions at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import partial
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
from mlxsft.backends.mlx_head import TOLERANCE, TRIED, Head  # noqa: E402
from mlxsft.backends.mlx_learned import learned, sensitivities  # noqa: E402
from mlxsft.backends.mlx_models import LOADING_ERRORS, make_float32, why_not_float32  # noqa: E402
from mlxsft.backends.mlx_trunk import Trunk  # noqa: E402

if TYPE_CHECKING:
    from mlxsft.data.batches import Batch
    from mlxsft.models.adapter import Adapter
    from mlxsft.models.quantize import QuantizationPlan, Scheme
    from mlxsft.models.source import ModelSource

KEPT_BYTES = 256 << 20  # of each kind that is kept of the unquantized model; what is beyond is computed again
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
        self._ends, self._answers = Kept(), Kept()
        self._below = LayersBelow(self._base)
        self._model_type = str(source.config.get("model_type"))

    def stored(self, source: ModelSource, which: Iterable[int]) -> Divergence:
        return self._divergence(_Judged(MlxBackend(source).model), which)

    def planned(
        self, schemes: Mapping[str, Scheme | None], dtypes: Mapping[str, str], which: Iterable[int]
    ) -> Divergence:
        trial = self._rounded(schemes, dtypes)
        return self._divergence(self._judged(trial), which, self._below.untouched(schemes))

    def sensitivities(self, low: Scheme, high: Scheme, tokens: NDArray[np.int32]) -> dict[str, float]:
        return sensitivities(copy.deepcopy(self._base.model), low, high, tokens)

    def learn(
        self, method: str, plan: QuantizationPlan, dtypes: Mapping[str, str], tokens: NDArray[np.int32]
    ) -> nn.Module:
        rounded = self._rounded(plan.modules, dtypes)
        return learned(method, self._base.model, self._model_type, plan, rounded, tokens)

    def learned(self, model: nn.Module, which: Iterable[int]) -> Divergence:
        return self._divergence(self._judged(copy.deepcopy(model)), which)  # its arrays are the same ones

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

    def _judged(self, trial: nn.Module) -> _Judged:
        if self._dequantized:
            make_float32(trial)
        return _Judged(trial, like=self._base)

    def _divergence(self, other: _Judged, which: Iterable[int], untouched: int = 0) -> Divergence:
        """Of a model whose lowest `untouched` layers, and all below them, are those of the unquantized one."""
        sums, tokens = np.zeros(4), 0
        for i in which:
            batch = self._batches[i]
            targets = mx.array(batch.tokens[:, 1:][batch.mask[:, 1:]])
            below = self._below.outputs(i, batch, untouched) if untouched else None
            moved = other.ends(batch, untouched, below)
            for start in range(0, targets.size, rows := self._base.chunk_rows):
                part = slice(start, start + rows)
                answers = self._answers.get((i, start), partial(self._answer, i, part))
                sums += _sums(answers, _log_probabilities(other.logits(moved[part])), targets[part])
            tokens += targets.size
        base_loss, loss, kl, changed = sums.tolist()
        return Divergence(tokens, base_loss, loss, kl, round(changed))

    def _answer(self, i: int, part: slice) -> mx.array:
        """The unquantized model's log-probabilities [N, V] at some judged positions of a batch."""
        ends = self._ends.get(i, lambda: self._base.ends(self._batches[i]))
        return _log_probabilities(self._base.logits(ends[part]))


class Kept:
    """Arrays that are made once, as many as KEPT_BYTES have room for."""

    def __init__(self) -> None:
        self._arrays: dict[Hashable, mx.array] = {}

    def get(self, key: Hashable, make: Callable[[], mx.array]) -> mx.array:
        """The array of this key, made and computed where it is not kept."""
        if (kept := self._arrays.get(key)) is not None:
            return kept
        made = make()
        mx.eval(made)
        if made.nbytes + sum(array.nbytes for array in self._arrays.values()) <= KEPT_BYTES:
            self._arrays[key] = made
        return made


class LayersBelow:
    """What the lower layers of the unquantized model give: trials in which only upper ones differ begin there.

    Of each batch it is kept for one number of layers, the last that was asked for: modules are tried layer by layer.
    """

    def __init__(self, base: _Judged) -> None:
        self._model, self._kept = base.model, dict[int, tuple[int, mx.array]]()
        paths = {id(module): f"{path}." for path, module in base.model.named_modules()}
        self._layers = [paths[id(layer)] for layer in base.model.layers] if _begins_anywhere(base) else []

    def untouched(self, modules: Iterable[str]) -> int:
        """How many layers are below the first one that holds any of these modules; 0 where one is in none."""
        places = (next((n for n, layer in enumerate(self._layers) if path.startswith(layer)), 0) for path in modules)
        return min(places, default=0)

    def outputs(self, i: int, batch: Batch, count: int) -> mx.array:
        """What the layer above the lowest `count` gets [B, T, D] for batch number i."""
        known, kept = self._kept.get(i, (0, None))
        if known > count:
            known, kept = 0, None
        if kept is None or known < count:
            with Trunk(self._model, known).given(kept):
                kept = Trunk(self._model, count).outputs(_inputs(batch))
            mx.eval(kept)
            self._keep(i, count, kept)
        return kept

    def _keep(self, i: int, count: int, outputs: mx.array) -> None:
        others = sum(array.nbytes for other, (_, array) in self._kept.items() if other != i)
        if outputs.nbytes + others <= KEPT_BYTES:
            self._kept[i] = count, outputs


def _begins_anywhere(base: _Judged) -> bool:
    """Whether the model gives the same when it begins in the middle: its layers hand on nothing but one array."""
    tokens = mx.arange(TRIED[0] * TRIED[1], dtype=mx.int32).reshape(TRIED)
    middle = len(base.model.layers) // 2
    try:
        expected, trunk = base.hidden(tokens), Trunk(base.model, middle)
        with trunk.given(trunk.outputs(tokens)):
            given = base.hidden(tokens)
        tolerance = TOLERANCE if expected.dtype == mx.float32 else 0.02
        return bool(mx.allclose(given, expected, rtol=tolerance, atol=tolerance).item())
    except LOADING_ERRORS:
        return False


class _Judged:
    """A model whose head is called on judged positions only; where that cannot be, on all, and the logits chosen."""

    def __init__(self, model: nn.Module, like: _Judged | None = None) -> None:
        """`like` is the same model with other numbers, which saves the trial of the head."""
        self.model, head = model, Head(model, lambda arrays: None)
        if like is None:
            self._head = head if head.why_not() is None else None
        else:
            self._head = head if like._head else None
            if like._head:
                head.trust(like._head)
        self.chunk_rows = head.chunk_rows if self._head else WHOLE_ROWS

    def hidden(self, tokens: mx.array) -> mx.array:
        """What `logits` takes for every position, [B, T, ...]."""
        hidden: mx.array = self._head.hidden(tokens) if self._head else self.model(tokens)
        return hidden

    def ends(self, batch: Batch, count: int = 0, below: mx.array | None = None) -> mx.array:
        """What `logits` takes, [N, ...], for the N judged positions of a batch.

        `below` [B, T, D] is what the lowest `count` layers give, where that is known.
        """
        chosen = mx.array(np.flatnonzero(batch.mask[:, 1:]).astype(np.int32))
        with Trunk(self.model, count).given(below):
            ends = self.hidden(_inputs(batch))
        return ends.reshape(-1, ends.shape[-1])[chosen]

    def logits(self, ends: mx.array) -> mx.array:
        """Logits, float32 [N, V]."""
        logits = self._head.logits(ends) if self._head else ends
        return logits.astype(mx.float32)


def _inputs(batch: Batch) -> mx.array:
    """The tokens [B, T] that something follows."""
    return mx.array(batch.tokens[:, :-1])


def _log_probabilities(logits: mx.array) -> mx.array:
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def _sums(p: mx.array, q: mx.array, targets: mx.array) -> Any:
    """Of log-probabilities [N, V]: both cross-entropies and KL(p ‖ q) in nats, and how often the top choice differs."""
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

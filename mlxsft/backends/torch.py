"""Models on PyTorch's CPU: transformers' own, with PEFT's layers and a generator of ours; everything is float32."""

from __future__ import annotations

import inspect
import math
import re
import time
from collections.abc import Generator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import DynamicCache

from mlxsft.backends import Alone, Constraint, Ranks, Sampling, Streams, Tensors, Watch
from mlxsft.backends.adapters import frozen_layers, refuse_mismatch
from mlxsft.backends.initial_values import token_keys
from mlxsft.backends.optimizers import state_shapes, step_numbers, updated
from mlxsft.backends.packing import why_different
from mlxsft.backends.streams import OneByOne
from mlxsft.backends.torch_adapters import Change, TorchAdapter, low_rank_layers
from mlxsft.backends.torch_generation import Sampler
from mlxsft.backends.torch_loss import Loss, pieces
from mlxsft.backends.torch_models import LOADING_ERRORS, decoder_layers, load_checkpoint, parameter_count
from mlxsft.backends.torch_random import RandomKeys, noisy
from mlxsft.backends.torch_trunk import Trunk
from mlxsft.machine import peak_resident_bytes

if TYPE_CHECKING:
    from mlxsft.data.batches import Batch
    from mlxsft.models.source import ModelSource
    from mlxsft.recipe_training import AdapterRecipe, TrainRecipe

RATE_SECONDS = 0.3  # of the products that are timed
PREFILL = 2048  # tokens of a prompt that are computed at once
# Tokens of a micro-batch that are trained at once, or one row: more would take memory for their activations.
AT_ONCE = 768
PLAIN = {"full_attention", "sliding_attention", "chunked_attention"}  # layers whose cache can forget its last tokens


class TorchBackend:
    """A checkpoint on PyTorch's CPU; see `mlxsft.backends.Backend` for what each method does."""

    name = "torch"

    def __init__(self, source: ModelSource) -> None:
        self.device = "cpu"
        self._bytes_before = psutil.Process().memory_info().rss
        self._source = source
        self.model: nn.Module
        self.notes: list[str]
        self.model, self.notes = load_checkpoint(source)
        self._base_parameters = parameter_count(self.model)
        self._adapter = TorchAdapter(self.model, {})  # none yet
        self.in_use: str | None = None
        self._added: dict[str, tuple[TorchAdapter, Change]] = {}
        self._keys = RandomKeys()
        self._loss_of: Loss | None = None
        self._released = 0  # of the lowest layers
        self._sums = Sums()
        self.ranks: Ranks = Alone()

    # ---- adapter

    def attach(self, adapter: AdapterRecipe, seed: int) -> None:
        quantized = {name.removesuffix(".scales") for name in self._source.tensors if name.endswith(".scales")}
        self._adapter = TorchAdapter.new(self.model, adapter, seed, quantized, self._keys)

    def attach_saved(self, config: Mapping[str, Any], tensors: Tensors) -> None:
        self._adapter = TorchAdapter.saved(self.model, config, tensors, self._keys)

    def add_adapter(self, name: str, config: Mapping[str, Any], tensors: Tensors) -> None:
        before = self.in_use
        self.use(None)
        self.model.requires_grad_(False)  # of a full fine-tune that was added earlier
        change = Change(self.model)
        try:
            self._added[name] = TorchAdapter.saved(self.model, config, tensors, self._keys), change
        finally:
            change.take_out()
            self.use(before)

    def use(self, name: str | None) -> None:
        if name == self.in_use:
            return
        adapter, change = self._added[name] if name is not None else (TorchAdapter(nn.Module(), {}), None)
        if self.in_use is not None:
            self._added[self.in_use][1].take_out()
        if change is not None:
            change.put_in()
        self._adapter, self.in_use = adapter, name

    def adapter_config(self) -> dict[str, Any]:
        return self._adapter.config

    # ---- training

    def optimize(self, train: TrainRecipe) -> None:
        self._recipe = train
        self._step = 0
        self._state = {name: torch.zeros(shape) for name, shape in state_shapes(train, self._adapter.weights).items()}
        self._begin_step()
        self._noise = self._keys.number()

    def accumulate(self, batch: Batch) -> tuple[float, int]:
        self._restore(batch)
        keys = token_keys(batch, self._recipe.seed, self._step)
        loss = sum(self._accumulate(batch.part(*place), keys[place]) for place in pieces(batch, AT_ONCE))
        return loss, int(batch.mask[:, 1:].sum())

    def _accumulate(self, piece: Batch, keys: NDArray[np.uint32]) -> float:
        recipe, sums, loss = self._recipe, self._sums, self._loss  # the loss is tried out before there is noise
        self._train_mode(keys[:, :-1])
        with ExitStack() as stack:
            stack.callback(self._train_mode, None)
            if (alpha := recipe.neftune_alpha) is not None:
                embedding = self.model.get_input_embeddings()
                stack.enter_context(noisy(embedding, alpha, self._keys, self._noise))
            value = loss.backward(piece, self._trunk_of(piece), recipe)
        trained = int(piece.mask[:, 1:].sum())
        self._sums = Sums(sums.loss + value, sums.tokens + trained)
        return value

    @torch.no_grad()  # type: ignore[untyped-decorator]  # torch is taken without its types
    def apply(self, learning_rate: float, clip_norm: float | None) -> float:
        sums, summed = self._sums, self._adapter.gradient()
        self._begin_step()
        if not sums.tokens:
            raise ValueError("apply() needs a trained token, but nothing was accumulated")
        norm = float(torch.stack([slope.square().sum() for slope in summed.values()]).sum().sqrt()) / sums.tokens
        if not math.isfinite(norm + sums.loss):
            return norm if not math.isfinite(norm) else math.nan
        clipped = clip_norm / norm if clip_norm is not None and norm > clip_norm else 1.0
        gradient = {name: slope * (clipped / sums.tokens) for name, slope in summed.items()}
        self._step += 1
        numbers, ratio = step_numbers(self._recipe, self._step, learning_rate), self._adapter.b_ratio
        weights, self._state = updated(
            torch, self._recipe, ratio, self._adapter.weights, gradient, self._state, numbers
        )
        self._adapter.place(weights)
        return norm

    def losses(self, batch: Batch) -> NDArray[np.float32]:
        self._restore(batch)
        losses = np.zeros(batch.tokens.shape, dtype=np.float32)
        losses[:, 1:][batch.mask[:, 1:]] = self._loss.each(batch, self._trunk_of(batch))
        return losses

    def why_not_packed(self, packed: Batch, padded: Batch) -> str | None:
        try:
            return why_different(self.losses, packed, padded, float32=True)
        except LOADING_ERRORS as error:
            return f"transformers' model does not take them: {type(error).__name__}: {error}"

    def trunk_layers(self) -> int:
        noise = self._recipe.neftune_alpha is not None  # other noise in every epoch
        return 0 if noise else frozen_layers(self._adapter.weights, self._loss.above_layers)

    def trunk(self, batch: Batch) -> NDArray[Any]:
        self._restore()
        outputs: NDArray[np.float32] = self._loss.trunk_outputs(batch, Trunk(self.model, self.trunk_layers()))
        return outputs

    def release_trunk(self) -> None:
        self._released = self.trunk_layers()
        for layer in decoder_layers(self.model)[: self._released]:
            layer.to("meta")

    @property
    def _loss(self) -> Loss:
        """Made when it is first needed: the adapter must be there."""
        if self._loss_of is None:
            self._loss_of = Loss(self.model)
            self.notes += [self._loss_of.note] if self._loss_of.note else []
        return self._loss_of

    def _trunk_of(self, batch: Batch) -> Trunk | None:
        return None if batch.trunk is None else Trunk(self.model, self.trunk_layers())

    def _restore(self, batch: Batch | None = None) -> None:
        """Read released layers again, unless this batch brings what they give."""
        if self._released and (batch is None or batch.trunk is None):
            fresh, _ = load_checkpoint(self._source)
            layers = decoder_layers(self.model)
            for index, layer in enumerate(decoder_layers(fresh)[: self._released]):
                layers[index] = layer
            self._released = 0

    def _begin_step(self) -> None:
        self._sums = Sums()
        self._adapter.forget_gradient()

    def _train_mode(self, keys: NDArray[np.uint32] | None) -> None:
        """Dropout with these keys, or none. The model's own dropout is always off, as it is on MLX."""
        self._keys.value = keys
        if self._adapter.config.get("fine_tune_type") == "dora":  # PEFT's leaves dropout to a training layer
            for layer in low_rank_layers(self.model).values():
                layer.training = keys is not None

    # ---- generation

    def new_cache(self) -> Any:
        kinds = set(getattr(self.model.config.get_text_config(), "layer_types", None) or PLAIN)
        # Without a config the cache keeps every token, and can forget the last ones; windows are in the mask.
        return DynamicCache() if kinds <= PLAIN else DynamicCache(config=self.model.config)

    def trim(self, cache: Any, tokens: int) -> bool:
        if tokens and any(getattr(layer, "is_sliding", True) for layer in cache.layers):
            return False
        if tokens:
            cache.crop(-tokens)
        return True

    def read(self, tokens: list[int], cache: Any) -> None:
        self._restore()
        self._next(tokens, cache)

    def stream(
        self,
        tokens: list[int],
        sampling: Sampling,
        cache: Any,
        watch: Watch | None = None,
        constraint: Constraint | None = None,
    ) -> Generator[int, None, None]:
        self._restore()
        sampler = Sampler(sampling, tokens, constraint)
        for start in range(0, len(tokens), PREFILL):
            logits = self._next(tokens[start : start + PREFILL], cache)
        while True:
            logits = sampler.constrained(sampler.penalized(logits))
            token = sampler(logits)
            if watch is not None:
                watch(token, torch.log_softmax(logits, dim=-1).numpy())
            logits = self._next([token], cache)  # before the token is yielded, so that the cache holds it by then
            yield token

    @torch.no_grad()  # type: ignore[untyped-decorator]  # torch is taken without its types
    def _next(self, tokens: list[int], cache: Any) -> torch.Tensor:
        """The logits [V] of what follows the cache and these tokens, which are then in it."""
        ids, head = torch.tensor([tokens]), self._loss.head
        if head is None:
            logits: torch.Tensor = self.model(input_ids=ids, **self._cached(cache)).logits[0, -1]
            return logits
        return head.logits(head.hidden(ids, **self._cached(cache))[0, -1:])[0]

    def _cached(self, cache: Any) -> dict[str, Any]:
        """The arguments of a model that reads a cache and adds to it; newer transformers call the first `cache`."""
        names = inspect.signature(self.model.forward).parameters
        return {"cache" if "cache" in names else "past_key_values": cache, "use_cache": True}

    def streams(self, at_once: int) -> Streams:
        return OneByOne(self)

    # ---- state

    def adapter_state(self) -> dict[str, NDArray[np.float32]]:
        return self._adapter.state()

    def load_adapter_state(self, tensors: Tensors) -> None:
        self._adapter.load(tensors)

    def optimizer_state(self) -> dict[str, NDArray[np.float32]]:
        state = {name: array.numpy().copy(order="C") for name, array in self._state.items()}
        return {"step": np.array([self._step], dtype=np.float32), **state}

    def load_optimizer_state(self, tensors: Tensors) -> None:
        refuse_mismatch("the optimizer state", self.optimizer_state(), tensors)
        self._state = {name: torch.from_numpy(np.array(tensors[name], np.float32)) for name in self._state}
        self._step = int(tensors["step"][0])
        self._begin_step()

    # ---- facts

    def peak_bytes(self) -> int:
        return max(0, peak_resident_bytes() - self._bytes_before)  # PyTorch has no count of its own on the CPU

    def memory_bytes(self) -> int:
        return psutil.virtual_memory().available + psutil.Process().memory_info().rss

    def matmul_rate(self) -> float:
        a = torch.randn((1024, 1024), generator=torch.Generator().manual_seed(0))
        products, began = 0, time.perf_counter()
        while (spent := time.perf_counter() - began) < RATE_SECONDS:
            a @ a
            products += 1
        return 2 * 1024**3 * products / spent

    def multiplies_with(self) -> str:
        found = re.search(r"\bBLAS_INFO=(\w+)", torch.__config__.show())
        name = found[1] if found else "PyTorch's own BLAS"
        return {"mkl": "MKL", "open": "OpenBLAS", "accelerate": "Accelerate"}.get(name, name)

    def parameters(self) -> tuple[int, int]:
        trained = sum(array.numel() for array in self._adapter.weights.values())
        return self._base_parameters + self._adapter.added, trained

    def close(self) -> None:
        self.model = nn.Module()
        self._adapter, self._loss_of = TorchAdapter(self.model, {}), None
        self._added.clear()


# ---- parts ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sums:
    """What the micro-batches of one step have added up beside the gradient."""

    loss: float = 0.0  # nats
    tokens: int = 0  # trained ones

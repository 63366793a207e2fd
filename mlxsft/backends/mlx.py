"""Models on MLX: mlx-lm's own, with its generator.

On the CPU device everything is float32, quantized checkpoints included where memory allows, because MLX multiplies
other types there 30 times slower; and nothing is compiled, because `mx.compile` calls g++ for seconds a shape and gains
nothing (SmolLM2-135M: 53 ms a token with it, 54 ms without). On the GPU dtypes stay as they are and the training step
is compiled. The GPU half was written without one at hand: the compiled step was only run on the CPU device.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial, reduce
from operator import add
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mlxsft.backends import Alone, Constraint, Ranks, Sampling, Streams, Tensors, Watch
from mlxsft.backends.adapters import frozen_layers, refuse_mismatch
from mlxsft.backends.blas import load_blas
from mlxsft.backends.initial_values import token_keys
from mlxsft.backends.optimizers import state_shapes, step_numbers, updated
from mlxsft.backends.streams import OneByOne

BLAS, BLAS_HINT = load_blas()  # before MLX is imported, which would take its own

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402

from mlxsft.backends.mlx_adapters import Change, MlxAdapter  # noqa: E402
from mlxsft.backends.mlx_cores import Cores, Part  # noqa: E402
from mlxsft.backends.mlx_generation import processors, sampler  # noqa: E402
from mlxsft.backends.mlx_layers import together  # noqa: E402
from mlxsft.backends.mlx_loss import Inputs, Loss  # noqa: E402
from mlxsft.backends.mlx_memory import give_back, limit_memory, memory_bytes  # noqa: E402
from mlxsft.backends.mlx_models import (  # noqa: E402
    load_checkpoint,
    make_float32,
    mlx_lm,
    parameter_count,
    quantized_modules,
    token_embedding,
    why_not_float32,
)
from mlxsft.backends.mlx_packing import why_not_packed  # noqa: E402
from mlxsft.backends.mlx_random import RandomKeys, noisy  # noqa: E402
from mlxsft.backends.mlx_ranks import sum_of_ranks  # noqa: E402
from mlxsft.backends.mlx_streams import Batched  # noqa: E402
from mlxsft.backends.mlx_trunk import Trunk, to_numpy  # noqa: E402

if TYPE_CHECKING:
    from mlxsft.data.batches import Batch
    from mlxsft.models.source import ModelSource
    from mlxsft.recipe_training import AdapterRecipe, TrainRecipe


class MlxBackend:
    """A checkpoint on MLX's default device; see `mlxsft.backends.Backend` for what each method does."""

    name = "mlx"

    def __init__(self, source: ModelSource, *, stored: bool = False) -> None:
        self.device: str = device_kind()
        self.notes: list[str] = []
        self.ranks: Ranks = Alone()
        self._compiled = self.device == "gpu"
        if self.device == "cpu":
            mx.disable_compile()  # mlx-lm's models compile small functions when they are first called
            self.notes += [BLAS_HINT] if BLAS_HINT else []
        limit_memory(self.device)
        mx.reset_peak_memory()
        self._source = source
        self.model = load_checkpoint(source)
        self._base_parameters = parameter_count(self.model)
        self._quantized = quantized_modules(self.model)
        why = why_not_float32(self.model, stored=stored)
        self._float32 = self.device == "cpu" and why is None
        if self._float32:
            self.notes += make_float32(self.model)
        elif self.device == "cpu":
            self.notes += [why] if why else []
        for _, array in tree_flatten(self.model.parameters()):
            mx.eval(array)  # one at a time, so that a converted array and its origin exist only once each
        self.model.freeze()
        self.model.eval()
        self._adapter = MlxAdapter(self.model, {})  # none yet
        self.in_use: str | None = None
        self._added: dict[str, tuple[MlxAdapter, Change]] = {}
        self._keys = RandomKeys()
        self._cores = Cores(self.device)
        self._by_layer = False  # whether the gradient is made layer by layer
        self._loss_of: Loss | None = None

    # ---- adapter

    def attach(self, adapter: AdapterRecipe, seed: int) -> None:
        self._adapter = MlxAdapter.new(self.model, adapter, seed, self._quantized, self._keys)
        mx.eval(self.model.parameters())

    def attach_saved(self, config: Mapping[str, Any], tensors: Tensors) -> None:
        self._adapter = MlxAdapter.saved(self.model, config, tensors, self._keys)
        mx.eval(self.model.parameters())

    def add_adapter(self, name: str, config: Mapping[str, Any], tensors: Tensors) -> None:
        before = self.in_use
        self.use(None)
        self.model.freeze()  # of a full fine-tune that was added earlier
        change = Change(self.model)
        try:
            adapter = MlxAdapter.saved(self.model, config, tensors, self._keys)
            mx.eval(self.model.parameters())
            self._added[name] = adapter, change
        finally:
            change.take_out()
            self.use(before)

    def use(self, name: str | None) -> None:
        if name == self.in_use:
            return
        adapter, change = self._added[name] if name is not None else (MlxAdapter(nn.Module(), {}), None)
        if self.in_use is not None:
            self._added[self.in_use][1].take_out()
        if change is not None:
            change.put_in()
        self.model.eval()
        self._adapter, self.in_use, self._loss_of = adapter, name, None

    def adapter_config(self) -> dict[str, Any]:
        return self._adapter.config

    # ---- training

    def optimize(self, train: TrainRecipe) -> None:
        self._recipe = train
        self._by_layer, self._loss_of = train.checkpoint_activations, None
        limit_memory(self.device, train.cache_limit)
        self._step = 0
        self._state = {name: mx.zeros(shape) for name, shape in state_shapes(train, self._trainable()).items()}
        self._sums = Sums()
        self._gradient: Callable[..., tuple[mx.array, dict[str, mx.array]]]
        self._gradient = mx.value_and_grad(self._summed_loss)
        self._update: Callable[..., tuple[dict[str, mx.array], dict[str, mx.array]]]
        self._update = partial(updated, mx, train, self._adapter.b_ratio)
        if self._compiled:
            self._gradient, self._update = mx.compile(self._gradient), mx.compile(self._update)
        self._noise = self._keys.number()

    def accumulate(self, batch: Batch) -> tuple[float, int]:
        self._train_mode(True)
        sums, parts = self._sums, self._cores.parts(batch)
        with self._cores.sharing(parts):
            keys = token_keys(batch, self._recipe.seed, self._step)
            losses, gradients = zip(*self._gradients(parts, keys), strict=True)
            gradient = added([sums.gradient, *gradients] if sums.gradient else gradients)
            mx.eval(losses, gradient)
        value, trained = sum(float(np.array(loss)) for loss in losses), int(batch.mask[:, 1:].sum())
        self._sums = Sums(gradient, sums.loss + value, sums.tokens + trained)
        return value, trained

    def apply(self, learning_rate: float, clip_norm: float | None) -> float:
        sums, self._sums = sum_of_ranks(self.ranks, self._sums, self._trainable()), Sums()
        if not sums.tokens:
            raise ValueError("apply() needs a trained token, but nothing was accumulated")
        squares = [mx.square(array).sum() for array in sums.gradient.values()]
        norm = float(np.array(mx.sqrt(mx.stack(squares).sum()))) / sums.tokens
        if not math.isfinite(norm + sums.loss):
            return norm if not math.isfinite(norm) else math.nan
        clipped = clip_norm / norm if clip_norm is not None and norm > clip_norm else 1.0
        gradient = {name: array * (clipped / sums.tokens) for name, array in sums.gradient.items()}
        self._step += 1
        numbers = step_numbers(self._recipe, self._step, learning_rate)
        arrays = {name: mx.array(number) for name, number in numbers.items()}  # a compiled update takes them anew
        self._adapter.weights, self._state = self._update(self._trainable(), gradient, self._state, arrays)
        self._set(self._adapter.weights)
        mx.eval(self.model.trainable_parameters(), self._adapter.weights, self._state)
        return norm

    def losses(self, batch: Batch) -> NDArray[np.float32]:
        self._train_mode(False)
        losses = np.zeros(batch.tokens.shape, dtype=np.float32)
        parts = self._cores.parts(batch)
        trunk = self._trunk if batch.trunk is not None else None
        found = self._computed(parts, lambda part: self._loss.each(part, trunk))
        for part, values in zip(parts, found, strict=True):
            losses[part.place][part.batch.mask] = values
        return losses

    def why_not_packed(self, packed: Batch, padded: Batch) -> str | None:
        return why_not_packed(self.losses, packed, padded, self.model)

    def trunk_layers(self) -> int:
        noise = self._recipe.neftune_alpha is not None  # other noise in every epoch
        return 0 if noise else frozen_layers(self._trainable(), self._loss.above_layers)

    def trunk(self, batch: Batch) -> NDArray[Any]:
        self._train_mode(False)
        parts = self._cores.parts(batch, whole=True)
        found = self._computed(parts, lambda part: self._loss.trunk_outputs(part, self._trunk))
        outputs = np.empty((*batch.tokens.shape, found[0].shape[-1]), to_numpy(found[0][:0]).dtype)
        for part, values in zip(parts, found, strict=True):
            outputs[part.place] = to_numpy(values)
        return outputs

    def release_trunk(self) -> None:
        fresh = load_checkpoint(self._source)  # nothing of it is in memory before it is used
        if self._float32:
            make_float32(fresh)
        for layer, again in zip(self.model.layers[: self.trunk_layers()], fresh.layers, strict=False):
            layer.update(again.parameters())
        give_back()

    @property
    def _loss(self) -> Loss:
        """Made when it is first needed: the adapter must be there."""
        if self._loss_of is None:
            self._loss_of = Loss(self.model, self._set, by_layer=self._by_layer)
            self.notes += [note for note in self._loss_of.notes if note not in self.notes]
        return self._loss_of

    @property
    def _trunk(self) -> Trunk:
        return Trunk(self.model, self.trunk_layers())

    def _gradients(
        self, parts: list[Part], token_keys: NDArray[np.uint32]
    ) -> list[tuple[mx.array, dict[str, mx.array]]]:
        """The summed loss of each part and its gradient; the keys are those of the whole batch."""
        weights, steps, found = self._trainable(), [], []
        for part in parts:
            with part.making():
                keys = mx.array(token_keys[part.place][:, :-1])
                inputs = self._loss.inputs(part.batch, few_shapes=self._compiled)
                if self._loss.is_by_layer:
                    within = partial(self._within, keys, part.making)
                    steps.append(self._loss.by_layer(weights, inputs, self._trunk, self._recipe, within))
                else:
                    found.append(self._gradient(weights, keys, *inputs))
        found += together(steps)
        self._set(weights)  # differentiating leaves its own arrays in the model
        return found

    def _summed_loss(self, parameters: dict[str, mx.array], keys: mx.array, *inputs: mx.array) -> mx.array:
        self._set(parameters)
        with self._within(keys):
            return self._loss.summed(parameters, Inputs(*inputs), self._trunk, self._recipe)

    @contextmanager
    def _within(
        self, keys: mx.array, making: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> Iterator[None]:
        """Within it, what is random in the model comes from the keys of these tokens."""
        self._keys.value = keys
        with ExitStack() as stack:
            stack.enter_context(making())
            if (alpha := self._recipe.neftune_alpha) is not None:
                stack.enter_context(noisy(token_embedding(self.model), alpha, self._keys, self._noise))
            yield

    def _computed(self, parts: list[Part], function: Callable[[Batch], mx.array]) -> list[mx.array]:
        """What a function makes of each part of a batch."""
        found = []
        for part in parts:
            with part.making():
                found.append(function(part.batch))
        with self._cores.sharing(parts):
            mx.eval(found)
        return found

    def _train_mode(self, training: bool) -> None:
        if self.model.training != training:
            self.model.train(training)

    # ---- generation

    def new_cache(self) -> Any:
        return mlx_lm("models.cache").make_prompt_cache(self.model)

    def trim(self, cache: Any, tokens: int) -> bool:
        return tokens == 0 or mlx_lm("models.cache").trim_prompt_cache(cache, tokens) == tokens

    def read(self, tokens: list[int], cache: Any) -> None:
        self._train_mode(False)
        self.model(mx.array(tokens)[None], cache=cache)
        mx.eval([layer.state for layer in cache])

    def stream(
        self,
        tokens: list[int],
        sampling: Sampling,
        cache: Any,
        watch: Watch | None = None,
        constraint: Constraint | None = None,
    ) -> Generator[int, None, None]:
        self._train_mode(False)
        # generate_step computes the step after a token before it yields the token, so the cache holds it by then.
        steps = mlx_lm("generate").generate_step(
            mx.array(tokens),
            self.model,
            max_tokens=-1,
            sampler=sampler(sampling),
            logits_processors=processors(sampling, constraint),
            prompt_cache=cache,
        )
        for token, logprobs in steps:
            if watch is not None:
                watch(int(token), np.array(logprobs.astype(mx.float32)))
            yield int(token)

    def streams(self, at_once: int) -> Streams:
        self._train_mode(False)
        together = at_once > 1 and all(hasattr(layer, "merge") for layer in self.new_cache())
        return Batched(self.model, at_once) if together else OneByOne(self)

    # ---- state

    def adapter_state(self) -> dict[str, NDArray[np.float32]]:
        return self._adapter.state()

    def load_adapter_state(self, tensors: Tensors) -> None:
        self._adapter.load(tensors)

    def optimizer_state(self) -> dict[str, NDArray[np.float32]]:
        state = {name: np.array(array) for name, array in self._state.items()}
        return {"step": np.array([self._step], dtype=np.float32), **state}

    def load_optimizer_state(self, tensors: Tensors) -> None:
        refuse_mismatch("the optimizer state", self.optimizer_state(), tensors)
        self._state = {name: mx.array(tensors[name]) for name in self._state}
        self._step = int(tensors["step"][0])
        self._sums = Sums()

    def _trainable(self) -> dict[str, mx.array]:
        return self._adapter.weights

    def _set(self, weights: Mapping[str, mx.array]) -> None:
        self._adapter.place(weights)

    # ---- facts

    def peak_bytes(self) -> int:
        return int(mx.get_peak_memory())

    def memory_bytes(self) -> int:
        return memory_bytes()

    def matmul_rate(self) -> float:
        return matmul_rate()

    def multiplies_with(self) -> str:
        if self.device == "gpu":
            return device_name()
        if BLAS is not None:
            return f"{BLAS.name} {BLAS.version or ''}".rstrip()
        return "Accelerate" if sys.platform == "darwin" else "MLX's own BLAS"

    def parameters(self) -> tuple[int, int]:
        trained = sum(array.size for array in self._trainable().values())
        return self._base_parameters + self._adapter.added, trained

    def close(self) -> None:
        self.model = nn.Module()
        self._adapter, self._loss_of = MlxAdapter(self.model, {}), None
        self._added.clear()
        give_back()


# ---- parts ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sums:
    """What the micro-batches of one step have added up."""

    gradient: dict[str, mx.array] = field(default_factory=dict)  # of the summed loss
    loss: float = 0.0  # nats
    tokens: int = 0  # trained ones


def added(gradients: Sequence[dict[str, mx.array]]) -> dict[str, mx.array]:
    """The sum of some gradients."""
    first, *others = gradients
    return {name: reduce(add, (other[name] for other in others), array) for name, array in first.items()}


def device_kind() -> str:
    """What MLX computes on: gpu or cpu."""
    return "gpu" if mx.default_device().type == mx.gpu else "cpu"


def device_name() -> str:
    """The name of that processor."""
    return str(mx.device_info(mx.default_device()).get("device_name", "unknown"))


def matmul_rate(seconds: float = 0.3) -> float:
    """Floating-point operations a second in float32 products of two 1024 by 1024 matrices, measured now."""
    a = mx.random.normal((1024, 1024), key=mx.random.key(0))
    mx.eval(a @ a)
    products, began = 0, time.perf_counter()
    while (spent := time.perf_counter() - began) < seconds:
        mx.eval(a @ a)
        products += 1
    return 2 * 1024**3 * products / spent

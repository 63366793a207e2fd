"""Models on MLX: mlx-lm's own, with its own LoRA layers and its own generator.

On the CPU device everything is float32, quantized checkpoints included where memory allows, because MLX multiplies
other types there 30 times slower; and nothing is compiled, because `mx.compile` calls g++ for seconds a shape and gains
nothing (SmolLM2-135M: 53 ms a token with it, 54 ms without). On the GPU dtypes stay as they are and the training step
is compiled. The GPU half was written without one at hand: the compiled step was only run on the CPU device.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mlxsft.backends import Alone, Ranks, Sampling, Tensors, initial_lora_a
from mlxsft.backends.blas import load_blas
from mlxsft.errors import InputRefused, UsageError

BLAS, BLAS_HINT = load_blas()  # before MLX is imported, which would take its own

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
from mlx.utils import tree_flatten, tree_unflatten  # noqa: E402

from mlxsft.backends.mlx_models import load_checkpoint, make_float32, mlx_lm, parameter_count, target_keys  # noqa: E402
from mlxsft.backends.mlx_packing import isolation, unusual_cache, why_different  # noqa: E402
from mlxsft.backends.mlx_ranks import sum_of_ranks  # noqa: E402

if TYPE_CHECKING:
    from mlxsft.data.batches import Batch
    from mlxsft.models.source import ModelSource
    from mlxsft.recipe_training import AdapterRecipe, TrainRecipe

EPSILON = 1e-8  # of AdamW, added to the square root


class MlxBackend:
    """A checkpoint on MLX's default device; see `mlxsft.backends.Backend` for what each method does."""

    name = "mlx"

    def __init__(self, source: ModelSource) -> None:
        self.device: str = device_kind()
        self.notes: list[str] = []
        self.ranks: Ranks = Alone()
        self._compiled = self.device == "gpu"
        if self.device == "cpu":
            mx.disable_compile()  # mlx-lm's models compile small functions when they are first called
            self.notes += [BLAS_HINT] if BLAS_HINT else []
        mx.reset_peak_memory()
        self.model = load_checkpoint(source)
        self._base_parameters = parameter_count(self.model)
        if self.device == "cpu":
            self.notes += make_float32(self.model)
        for _, array in tree_flatten(self.model.parameters()):
            mx.eval(array)  # one at a time, so that a converted array and its origin exist only once each
        self.model.freeze()
        self.model.eval()
        self._config: dict[str, Any] = {}
        self._keys = DropoutKeys()
        self._unpatched: list[tuple[nn.Module, type]] = []  # layers that compute their activations again

    # ---- adapter

    def attach(self, adapter: AdapterRecipe, seed: int) -> None:
        count = len(self.model.layers)
        layers = count if adapter.layers == "all" else adapter.layers
        if layers > count:
            raise UsageError(f"adapter.layers: {layers}, but the model has {count} layers")
        keys = target_keys(self.model, layers, adapter.targets)
        scale = adapter.alpha / adapter.rank
        self._add_lora(layers, {"rank": adapter.rank, "scale": scale, "dropout": adapter.dropout, "keys": keys})
        for name, array in self._trainable().items():
            if ".lora_a" in name:
                self._set({name: mx.array(initial_lora_a(name, seed, tuple(array.shape)))})

    def attach_saved(self, config: Mapping[str, Any], tensors: Tensors) -> None:
        kind = config.get("fine_tune_type", "lora")
        if kind != "lora":
            raise InputRefused(f"adapter_config.json: fine_tune_type is {kind!r}, expected 'lora'")
        try:
            self._add_lora(config["num_layers"], dict(config["lora_parameters"]))
        except (KeyError, TypeError, ValueError) as error:
            raise InputRefused(f"adapter_config.json: mlx-lm cannot make these adapter layers: {error}") from error
        self.load_adapter_state(tensors)

    def adapter_config(self) -> dict[str, Any]:
        return self._config

    def _add_lora(self, layers: int, parameters: dict[str, Any]) -> None:
        linear_to_lora_layers = mlx_lm("tuner.utils").linear_to_lora_layers

        linear_to_lora_layers(self.model, layers, {"dropout": 0.0, **parameters})
        self._config = {"fine_tune_type": "lora", "num_layers": layers, "lora_parameters": parameters}
        for _, module in self.model.named_modules():
            if "lora_a" in module and parameters.get("dropout"):
                module.dropout = KeyedDropout(parameters["dropout"], self._keys)
        self.model.eval()  # new modules begin in training mode
        mx.eval(self.model.parameters())

    # ---- training

    def optimize(self, train: TrainRecipe) -> None:
        self._recipe = train
        self._step = 0
        self._first = {name: mx.zeros_like(array) for name, array in self._trainable().items()}
        self._second = dict(self._first)
        self._sums = Sums()
        self._gradient: Callable[..., tuple[mx.array, dict[str, mx.array]]]
        self._gradient = mx.value_and_grad(self._summed_loss)
        if self._compiled:
            self._gradient = mx.compile(self._gradient)
        if train.checkpoint_activations and not self._unpatched:
            self._unpatched = [(layer, compute_again(layer)) for layer in self.model.layers]

    def accumulate(self, batch: Batch) -> tuple[float, int]:
        self._train_mode(True)
        parameters, sums = self._trainable(), self._sums
        chosen, weights = self._positions(batch)
        key = mx.random.key(_seed(self._recipe.seed, self._step, sums.batches, self.ranks.rank))
        tokens, segments = _arrays(batch)
        loss, gradient = self._gradient(parameters, key, tokens, segments, chosen, mx.array(weights))
        self._set(parameters)  # differentiating leaves its own arrays in the model
        if sums.gradient:
            gradient = {name: sums.gradient[name] + array for name, array in gradient.items()}
        mx.eval(loss, gradient)
        value, trained = float(np.array(loss)), int(batch.mask[:, 1:].sum())
        self._sums = Sums(gradient, sums.loss + value, sums.tokens + trained, sums.batches + 1)
        return value, trained

    def apply(self, learning_rate: float, clip_norm: float | None) -> float:
        sums, self._sums = sum_of_ranks(self.ranks, self._sums, self._trainable()), Sums()
        if not sums.tokens:
            raise ValueError("apply() needs a trained token, but nothing was accumulated")
        gradient = {name: array / sums.tokens for name, array in sums.gradient.items()}
        squares = [mx.square(array).sum() for array in gradient.values()]
        norm = float(np.array(mx.sqrt(mx.stack(squares).sum())))
        if not math.isfinite(norm + sums.loss):
            return norm if not math.isfinite(norm) else math.nan
        if clip_norm is not None and norm > clip_norm:
            gradient = {name: array * (clip_norm / norm) for name, array in gradient.items()}
        self._step += 1
        self._adamw(gradient, learning_rate)
        return norm

    def _adamw(self, gradient: dict[str, Any], rate: float) -> None:
        """One update by AdamW, https://arxiv.org/abs/1711.05101, with bias correction, as torch.optim.AdamW has it."""
        beta1, beta2, decay = self._recipe.beta1, self._recipe.beta2, self._recipe.weight_decay
        unbias1, unbias2 = 1 - beta1**self._step, math.sqrt(1 - beta2**self._step)
        updated = {}
        for name, array in self._trainable().items():
            self._first[name] = beta1 * self._first[name] + (1 - beta1) * gradient[name]
            self._second[name] = beta2 * self._second[name] + (1 - beta2) * mx.square(gradient[name])
            kept = array * (1 - rate * decay) if array.ndim > 1 else array  # no decay of biases and norms
            updated[name] = kept - (rate / unbias1) * self._first[name] / (
                mx.sqrt(self._second[name]) / unbias2 + EPSILON
            )
        self._set(updated)
        mx.eval(updated, self._first, self._second)

    def losses(self, batch: Batch) -> NDArray[np.float32]:
        self._train_mode(False)
        chosen, weights = self._positions(batch)
        losses = np.zeros(batch.tokens.shape, dtype=np.float32)
        losses[:, 1:][batch.mask[:, 1:]] = np.array(self._token_losses(*_arrays(batch), chosen))[weights]
        return losses

    def why_not_packed(self, packed: Batch, padded: Batch) -> str | None:
        if (kind := unusual_cache(self.model)) is not None:
            return f"its layers keep what they have read as a {kind}, which knows nothing of rows in a sequence"
        return why_different(self.losses, packed, padded, self.model)

    def _positions(self, batch: Batch) -> tuple[Any, NDArray[np.bool_]]:
        """Places in the flattened tokens[:, 1:] that get a loss [N], and which of them count [N].

        All places (None) where the step is compiled, so that a shape of tokens is one shape of the step; else only
        the trained ones, which on the CPU saves a quarter of a step with a vocabulary of 49 K.
        """
        trained = batch.mask[:, 1:].reshape(-1)
        if self._compiled:
            return None, trained
        chosen = np.flatnonzero(trained)
        return mx.array(chosen.astype(np.int32)), trained[chosen]

    def _token_losses(self, tokens: mx.array, segments: mx.array | None, chosen: mx.array | None) -> mx.array:
        """Cross-entropy in nats, float32 [N], of the chosen places of tokens[:, 1:]; here alone inputs are shifted."""
        cache = {} if segments is None else {"cache": isolation(self.model, segments[:, :-1])}
        logits: mx.array = self.model(tokens[:, :-1], **cache).reshape(tokens[:, 1:].size, -1)
        targets = tokens[:, 1:].reshape(-1)
        if chosen is not None:
            logits, targets = logits[chosen], targets[chosen]
        losses: mx.array = nn.losses.cross_entropy(logits.astype(mx.float32), targets)
        return losses

    def _summed_loss(
        self,
        parameters: dict[str, mx.array],
        key: mx.array,
        tokens: mx.array,
        segments: mx.array | None,
        chosen: mx.array | None,
        weights: mx.array,
    ) -> mx.array:
        self._set(parameters)
        self._keys.value = key
        return mx.where(weights, self._token_losses(tokens, segments, chosen), 0).sum()

    def _train_mode(self, training: bool) -> None:
        if self.model.training != training:
            self.model.train(training)

    # ---- generation

    def new_cache(self) -> Any:
        return mlx_lm("models.cache").make_prompt_cache(self.model)

    def trim(self, cache: Any, tokens: int) -> bool:
        return tokens == 0 or mlx_lm("models.cache").trim_prompt_cache(cache, tokens) == tokens

    def stream(self, tokens: list[int], sampling: Sampling, cache: Any) -> Generator[int, None, None]:
        self._train_mode(False)
        processors = mlx_lm("sample_utils").make_logits_processors(repetition_penalty=sampling.repetition_penalty)
        # generate_step computes the step after a token before it yields the token, so the cache holds it by then.
        steps = mlx_lm("generate").generate_step(
            mx.array(tokens),
            self.model,
            max_tokens=-1,
            sampler=sampler(sampling),
            logits_processors=processors,
            prompt_cache=cache,
        )
        for token, _ in steps:
            yield int(token)

    # ---- state

    def adapter_state(self) -> dict[str, NDArray[np.float32]]:
        return {name: np.array(array.astype(mx.float32)) for name, array in self._trainable().items()}

    def load_adapter_state(self, tensors: Tensors) -> None:
        refuse_mismatch("the adapter", self._trainable(), tensors)
        self._set({name: mx.array(tensor.astype(np.float32)) for name, tensor in tensors.items()})

    def optimizer_state(self) -> dict[str, NDArray[np.float32]]:
        moments = {"first": self._first, "second": self._second}
        state = {f"{kind}.{name}": np.array(a) for kind, arrays in moments.items() for name, a in arrays.items()}
        return {"step": np.array([self._step], dtype=np.float32), **state}

    def load_optimizer_state(self, tensors: Tensors) -> None:
        refuse_mismatch("the optimizer state", self.optimizer_state(), tensors)
        self._first = {name: mx.array(tensors[f"first.{name}"]) for name in self._first}
        self._second = {name: mx.array(tensors[f"second.{name}"]) for name in self._second}
        self._step = int(tensors["step"][0])
        self._sums = Sums()

    def _trainable(self) -> dict[str, mx.array]:
        return dict(tree_flatten(self.model.trainable_parameters()))

    def _set(self, tensors: Mapping[str, mx.array]) -> None:
        self.model.update(tree_unflatten(list(tensors.items())))

    # ---- facts

    def peak_bytes(self) -> int:
        return int(mx.get_peak_memory())

    def parameters(self) -> tuple[int, int]:
        trained = sum(array.size for array in self._trainable().values())
        return self._base_parameters + trained, trained

    def close(self) -> None:
        for layer, plain in self._unpatched:
            layer.__class__ = plain
        self._unpatched = []
        self.model = nn.Module()
        mx.clear_cache()


# ---- parts ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sums:
    """What the micro-batches of one step have added up."""

    gradient: dict[str, mx.array] = field(default_factory=dict)  # of the summed loss
    loss: float = 0.0  # nats
    tokens: int = 0  # trained ones
    batches: int = 0


class DropoutKeys:
    """The random key of the micro-batch that is being trained, for all dropouts of one model."""

    def __init__(self) -> None:
        self.value: mx.array = mx.random.key(0)
        self.users = 0


class KeyedDropout(nn.Module):  # type: ignore[misc]  # MLX comes without types
    """Dropout whose zeros depend on the micro-batch's key and this module's number alone.

    nn.Dropout draws from a global state: activations that `mx.checkpoint` computes again then get other zeros than in
    the forward pass, and the gradient is wrong.
    """

    def __init__(self, share: float, keys: DropoutKeys) -> None:
        super().__init__()
        self._kept, self._keys, self._number = 1 - share, keys, keys.users
        keys.users += 1

    def __call__(self, x: mx.array) -> mx.array:
        if not self.training:
            return x
        key = mx.random.split(self._keys.value, self._keys.users)[self._number]
        return mx.where(mx.random.bernoulli(self._kept, x.shape, key=key), x / self._kept, 0)


def compute_again(layer: nn.Module) -> type:
    """Make this one layer compute its activations again in the backward pass; returns the class to give back to it.

    mlx-lm patches the layer's class, and so every model of the process; here this instance gets a class of its own.
    """
    plain = type(layer)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.training:
            return plain.__call__(self, *args, **kwargs)

        def run(parameters: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            self.update(parameters)
            return plain.__call__(self, *args, **kwargs)

        return mx.checkpoint(run)(self.trainable_parameters(), *args, **kwargs)

    layer.__class__ = type(plain.__name__, (plain,), {"__call__": call})
    return plain


def sampler(sampling: Sampling) -> Callable[[mx.array], mx.array]:
    """Log-probabilities [1, V] to token ids [1], with mlx-lm's filters and a random key of its own."""
    filters = mlx_lm("sample_utils")
    if sampling.temperature == 0:
        greedy: Callable[[mx.array], mx.array] = filters.greedy_sampler
        return greedy
    key = mx.random.key(_seed(time.time_ns()) if sampling.seed is None else sampling.seed)

    def sample(logprobs: mx.array) -> mx.array:
        nonlocal key
        if 0 < sampling.top_p < 1:
            logprobs = filters.apply_top_p(logprobs, sampling.top_p)
        if sampling.min_p > 0:
            logprobs = filters.apply_min_p(logprobs, sampling.min_p)
        if 0 < sampling.top_k < logprobs.shape[-1]:
            logprobs = filters.apply_top_k(logprobs, sampling.top_k)
        key, now = mx.random.split(key)
        return mx.random.categorical(logprobs / sampling.temperature, key=now)

    return sample


def refuse_mismatch(what: str, expected: Mapping[str, Any], tensors: Tensors) -> None:
    """Raises InputRefused with every tensor that is missing, unexpected or of another shape than expected."""
    shapes = {name: tuple(array.shape) for name, array in expected.items()}
    problems = [f"{name}: is missing, expected {shape}" for name, shape in shapes.items() if name not in tensors]
    problems += [f"{name}: the model has no such tensor" for name in tensors if name not in shapes]
    problems += [
        f"{name}: got {tensors[name].shape}, expected {shape}"
        for name, shape in shapes.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if problems:
        raise InputRefused("\n  ".join([f"{what} does not fit this model:", *problems]), "Was it made on another base?")


def _arrays(batch: Batch) -> tuple[mx.array, mx.array | None]:
    """Tokens and segments of a batch, int32 [B, T]."""
    return mx.array(batch.tokens), None if batch.segments is None else mx.array(batch.segments)


def _seed(*words: int) -> int:
    """A 64-bit seed from any numbers."""
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])


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

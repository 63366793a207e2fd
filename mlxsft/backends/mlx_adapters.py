"""What is trained of a model on MLX: low-rank layers beside its own, or its own weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mlxsft.backends.adapters import chosen_layers, rank_axis, refuse_mismatch, refuse_quantized
from mlxsft.backends.blas import load_blas
from mlxsft.backends.initial_values import initial_lora_a, principal_factors
from mlxsft.errors import InputRefused, UsageError

load_blas()  # before MLX is imported, which would take its own

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
from mlx.utils import tree_flatten, tree_unflatten  # noqa: E402

from mlxsft.backends.mlx_dora import DoRAEmbedding, DoRALinear, dense_weight  # noqa: E402
from mlxsft.backends.mlx_lora import LowRankLinear  # noqa: E402
from mlxsft.backends.mlx_models import mlx_lm, own_weights, target_keys  # noqa: E402
from mlxsft.backends.mlx_random import KeyedDropout, RandomKeys  # noqa: E402

if TYPE_CHECKING:
    from mlxsft.backends import Tensors
    from mlxsft.recipe_training import AdapterRecipe


class MlxAdapter:
    """The trained numbers of a model: float32 here, in the model in the number format that it computes with.

    PiSSA, https://arxiv.org/abs/2404.02948, trains W − s·B₀A₀ + s·BA from A₀ and B₀. That is W + s·(BA − B₀A₀): an
    ordinary LoRA of twice the rank on the unchanged weight, of which half, `_fixed`, is not trained. It is what the
    model holds and what is saved; so the adapter needs no conversion, and any base will do, quantized ones included.
    Dropout acts on that change as a whole.
    """

    def __init__(self, model: nn.Module, config: dict[str, Any], b_ratio: float = 1.0) -> None:
        self.config = config
        self.b_ratio = b_ratio  # how many times faster B learns than A
        self.model = model
        in_model = dict(tree_flatten(model.trainable_parameters()))
        self._types = {name: array.dtype for name, array in in_model.items()}
        self._fixed: dict[str, mx.array] = {}
        self.weights: dict[str, mx.array] = {name: array.astype(mx.float32) for name, array in in_model.items()}

    @property
    def added(self) -> int:
        """How many numbers the adapter adds to the model."""
        own = self.config.get("fine_tune_type") == "full"
        return 0 if own else sum(array.size for array in self._whole(self.weights).values())

    @classmethod
    def new(
        cls, model: nn.Module, recipe: AdapterRecipe, seed: int, quantized: set[str], keys: RandomKeys
    ) -> MlxAdapter:
        """What a recipe asks for, at its start, where the model answers as before.

        `quantized` are the paths of modules that the checkpoint holds quantized. Raises UsageError for what this model
        does not have or cannot take.
        """
        layers = chosen_layers(recipe.layers, len(model.layers))
        if recipe.kind == "full":
            names = own_weights(model, layers, recipe.targets)
            refuse_quantized(names, quantized)
            _unfreeze(model, names)
            return cls(model, {"fine_tune_type": "full", "num_layers": layers})
        pissa = recipe.init == "pissa"
        parameters = {
            "rank": 2 * recipe.rank if pissa else recipe.rank,
            "scale": recipe.scale,
            "dropout": recipe.dropout,
            "keys": target_keys(model, layers, recipe.targets),
        }
        try:
            config = add_layers(model, recipe.kind, layers, parameters, keys)
        except ValueError as error:
            raise UsageError(f"adapter.targets: {error}", "Name other targets, or take adapter.kind lora.") from error
        adapter = cls(model, config, recipe.loraplus_lr_ratio)
        adapter._start_at_principal_factors(recipe) if pissa else adapter._start_at_random(seed)
        return adapter

    @classmethod
    def saved(cls, model: nn.Module, config: Mapping[str, Any], tensors: Tensors, keys: RandomKeys) -> MlxAdapter:
        """An adapter in mlx-lm's layout. Raises InputRefused for what does not make layers, or does not fit."""
        kind = config.get("fine_tune_type", "lora")
        if kind == "full":
            refuse_mismatch("the adapter", dict(tree_flatten(model.parameters())), tensors, whole=False)
            _unfreeze(model, set(tensors))
            adapter = cls(model, {key: config[key] for key in ("fine_tune_type", "num_layers") if key in config})
        else:
            try:
                made = add_layers(model, kind, config["num_layers"], dict(config["lora_parameters"]), keys)
            except (KeyError, TypeError, ValueError) as error:
                raise InputRefused(f"adapter_config.json: no adapter layers can be made of it: {error}") from error
            adapter = cls(model, made)
        adapter.load(tensors)
        return adapter

    def _start_at_random(self, seed: int) -> None:
        for name, array in self.weights.items():
            if name.endswith(".lora_a"):
                self.weights[name] = mx.array(initial_lora_a(name, seed, tuple(array.shape)))
        self.place(self.weights)

    def _start_at_principal_factors(self, recipe: AdapterRecipe) -> None:
        modules = dict(self.model.named_modules())
        for path in {name.rpartition(".")[0] for name in self.weights}:
            a, b = _principal(modules[path], path, recipe.rank)
            for name, start, fixed in ((f"{path}.lora_a", a, a), (f"{path}.lora_b", b, -b)):
                root = np.float32(recipe.scale**-0.5)
                self.weights[name], self._fixed[name] = mx.array(start * root), mx.array(fixed * root)
        self.place(self.weights)

    def place(self, weights: Mapping[str, mx.array]) -> None:
        """Put these numbers, or what is differentiated in their place, into the model."""
        arrays = [(name, array.astype(self._types[name])) for name, array in self._whole(weights).items()]
        self.model.update(tree_unflatten(arrays))

    def state(self) -> dict[str, NDArray[np.float32]]:
        """The adapter's tensors, under mlx-lm's names and in mlx-lm's shapes."""
        return {name: np.array(array) for name, array in self._whole(self.weights).items()}

    def load(self, tensors: Tensors) -> None:
        """Take over what `state` gave. Raises InputRefused for tensors that do not fit."""
        refuse_mismatch("the adapter", self._whole(self.weights), tensors)
        for name, tensor in tensors.items():
            array = mx.array(tensor.astype(np.float32))
            if name in self._fixed:
                array, self._fixed[name] = mx.split(array, 2, axis=rank_axis(name, array.ndim))
            self.weights[name] = array
        self.place(self.weights)

    def _whole(self, weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """The trained numbers, each with its half that is not."""
        fixed = self._fixed
        return {
            name: mx.concatenate([array, fixed[name]], axis=rank_axis(name, array.ndim)) if name in fixed else array
            for name, array in weights.items()
        }


class Change:
    """What an adapter changes in a model: modules by path and numbers by name, to be taken out and put in again."""

    def __init__(self, model: nn.Module) -> None:
        """Of a model that the adapter is not in yet."""
        self._model = model
        self._modules, self._numbers = self._found()
        self._changed: tuple[dict[str, nn.Module], dict[str, mx.array]] | None = None

    def take_out(self) -> None:
        """Let the model be as it was; the first time, with all that was changed since this was made."""
        if self._changed is None:
            modules, numbers = self._found()
            self._changed = _others(self._modules, modules), _others(self._numbers, numbers)
            self._modules = {path: self._modules[path] for path in self._changed[0]}
            self._numbers = {name: self._numbers[name] for name in self._changed[1]}
        self._place(self._modules, self._numbers)

    def put_in(self) -> None:
        """Let the model be as it is with the adapter."""
        if self._changed is not None:
            self._place(*self._changed)

    def _found(self) -> tuple[dict[str, nn.Module], dict[str, mx.array]]:
        return dict(self._model.named_modules()), dict(tree_flatten(self._model.parameters()))

    def _place(self, modules: Mapping[str, nn.Module], numbers: Mapping[str, mx.array]) -> None:
        self._model.update_modules(tree_unflatten(list(modules.items())))
        self._model.update(tree_unflatten(list(numbers.items())))


def _others(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """What is another one than before under the same name."""
    return {name: value for name, value in now.items() if name in before and before[name] is not value}


def add_layers(
    model: nn.Module, kind: str, layers: int, parameters: dict[str, Any], keys: RandomKeys
) -> dict[str, Any]:
    """Adapter layers in the model, B zero; returns mlx-lm's adapter_config.json. Raises ValueError where none fit."""
    if kind not in ("lora", "dora"):
        raise ValueError(f"fine_tune_type is {kind!r}, expected lora, dora or full")
    mlx_lm("tuner.utils").linear_to_lora_layers(model, layers, {"dropout": 0.0, **parameters})
    low_rank = [(path, module) for path, module in model.named_modules() if "lora_a" in module]
    low_rank = [(path, (_as_dora if kind == "dora" else _as_lora)(path, module)) for path, module in low_rank]
    model.update_modules(tree_unflatten(low_rank))
    if share := parameters.get("dropout"):
        for _, module in low_rank:
            module.dropout = KeyedDropout(share, keys)
    model.eval()  # new modules begin in training mode
    return {"fine_tune_type": kind, "num_layers": layers, "lora_parameters": parameters}


def _as_lora(_: str, lora: nn.Module) -> nn.Module:
    """Of one matrix, a layer of our own; embeddings, experts and fused projections stay mlx-lm's."""
    return LowRankLinear(lora) if isinstance(lora, mlx_lm("tuner.lora").LoRALinear) else lora


def _as_dora(path: str, lora: nn.Module) -> nn.Module:
    lora_types = mlx_lm("tuner.lora")
    if isinstance(lora, lora_types.LoRALinear):
        return DoRALinear(lora)
    if isinstance(lora, lora_types.LoRAEmbedding):
        return DoRAEmbedding(lora)
    raise ValueError(f"{path} takes no DoRA: it is no single matrix, but a {type(lora).__name__}")


def _unfreeze(model: nn.Module, names: set[str]) -> None:
    """Make these weights trainable."""
    modules = dict(model.named_modules())
    for name in names:
        path, _, leaf = name.rpartition(".")
        modules[path].unfreeze(keys=leaf, recurse=False)


def _principal(module: nn.Module, path: str, rank: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """A and B in mlx-lm's shapes, whose product is the nearest to the weight of a module."""
    base = module.linear if "linear" in module else module.embedding
    weight = np.array(dense_weight(base))
    if rank > min(weight.shape[-2:]):
        raise UsageError(f"adapter.rank: {rank}, but {path} has {min(weight.shape[-2:])} singular values")
    if weight.ndim == 3:  # experts: A [experts, rank, inputs], B [experts, outputs, rank]
        factors = [principal_factors(matrix, rank) for matrix in weight]
        return np.stack([right for _, right in factors]), np.stack([left for left, _ in factors])
    return principal_factors(weight.T if "linear" in module else weight, rank)

"""What is trained of a model on PyTorch: PEFT's low-rank layers beside its own, or its own weights."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from mlxsft.backends.adapters import chosen_layers, rank_axis, refuse_mismatch, refuse_quantized
from mlxsft.backends.initial_values import initial_lora_a, principal_factors
from mlxsft.backends.torch_low_rank import without_detours
from mlxsft.backends.torch_models import decoder_layers, is_tied, own_weights, target_keys
from mlxsft.backends.torch_random import KeyedDropout, RandomKeys
from mlxsft.errors import InputRefused, UsageError
from mlxsft.models.names import mlx_name

if TYPE_CHECKING:
    from mlxsft.backends import Tensors
    from mlxsft.recipe_training import AdapterRecipe

NAME = "default"  # what PEFT calls the adapter
# What PEFT calls the tensors of a low-rank layer, and what mlx-lm does; matrices are transposed between the two.
LEAVES = {
    f"lora_A.{NAME}.weight": "lora_a",
    f"lora_B.{NAME}.weight": "lora_b",
    f"lora_embedding_A.{NAME}": "lora_a",
    f"lora_embedding_B.{NAME}": "lora_b",
    f"lora_magnitude_vector.{NAME}.weight": "m",
}


class TorchAdapter:
    """The trained numbers of a model, as views of its parameters under mlx-lm's names and in mlx-lm's shapes.

    PiSSA, https://arxiv.org/abs/2404.02948, is a LoRA of twice the rank of which half is not trained, as in
    `mlx_adapters.MlxAdapter`; `weights` and `gradient` have the other half alone.
    """

    def __init__(self, model: nn.Module, config: dict[str, Any], b_ratio: float = 1.0) -> None:
        self.config = config
        self.b_ratio = b_ratio  # how many times faster B learns than A
        self._half = False  # PiSSA
        self._turned: dict[str, bool] = {}
        self._parameters: dict[str, nn.Parameter] = {}
        for path, parameter in model.named_parameters():
            if parameter.requires_grad:
                name, turned = _name(model, path)
                self._parameters[name], self._turned[name] = parameter, turned

    @classmethod
    def new(
        cls, model: nn.Module, recipe: AdapterRecipe, seed: int, quantized: set[str], keys: RandomKeys
    ) -> TorchAdapter:
        """What a recipe asks for, at its start, where the model answers as before.

        `quantized` are the paths of modules that the checkpoint holds quantized. Raises UsageError for what this model
        does not have or cannot take.
        """
        layers = chosen_layers(recipe.layers, len(decoder_layers(model)))
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
        adapter._start_at_principal_factors(model, recipe) if pissa else adapter._start_at_random(seed)
        return adapter

    @classmethod
    def saved(cls, model: nn.Module, config: Mapping[str, Any], tensors: Tensors, keys: RandomKeys) -> TorchAdapter:
        """An adapter in mlx-lm's layout. Raises InputRefused for what does not make layers, or does not fit."""
        kind = config.get("fine_tune_type", "lora")
        if kind == "full":
            refuse_mismatch("the adapter", _own_shapes(model), tensors, whole=False)
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

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """What is trained, as views: what is written into them is in the model."""
        return {name: self._trained(name, whole) for name, whole in self._whole().items()}

    @property
    def added(self) -> int:
        """How many numbers the adapter adds to the model."""
        own = self.config.get("fine_tune_type") == "full"
        return 0 if own else sum(parameter.numel() for parameter in self._parameters.values())

    def gradient(self) -> dict[str, torch.Tensor]:
        """What has been added up in the parameters, by the names of `weights`."""
        slopes = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in self._parameters.items()}
        return {name: self._trained(name, self._turn(name, slope)) for name, slope in slopes.items()}

    def forget_gradient(self) -> None:
        """Begin anew with adding up."""
        for parameter in self._parameters.values():
            parameter.grad = None

    def place(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Put these numbers into the model."""
        for name, view in self.weights.items():
            view.copy_(weights[name])

    def state(self) -> dict[str, NDArray[np.float32]]:
        """The adapter's tensors, under mlx-lm's names and in mlx-lm's shapes."""
        return {name: whole.numpy().copy(order="C") for name, whole in self._whole().items()}

    def load(self, tensors: Tensors) -> None:
        """Take over what `state` gave. Raises InputRefused for tensors that do not fit."""
        whole = self._whole()
        refuse_mismatch("the adapter", whole, tensors)
        for name, tensor in tensors.items():
            whole[name].copy_(torch.from_numpy(tensor.astype(np.float32)))

    def _start_at_random(self, seed: int) -> None:
        for name, weight in self.weights.items():
            if name.endswith(".lora_a"):
                weight.copy_(torch.from_numpy(initial_lora_a(name, seed, tuple(weight.shape))))
            elif name.endswith(".lora_b"):
                weight.zero_()  # of an embedding, PEFT lets A begin there

    def _start_at_principal_factors(self, model: nn.Module, recipe: AdapterRecipe) -> None:
        whole, root = self._whole(), np.float32(recipe.scale**-0.5)
        for path, layer in low_rank_layers(model).items():
            a, b = (torch.from_numpy(factor * root) for factor in _principal(layer, path, recipe.rank))
            whole[f"{path}.lora_a"].copy_(torch.cat([a, a], dim=1))
            whole[f"{path}.lora_b"].copy_(torch.cat([b, -b], dim=0))
        self._half = True

    def _whole(self) -> dict[str, torch.Tensor]:
        """Everything that the adapter holds, as views, with what is not trained of it."""
        return {name: self._turn(name, parameter.detach()) for name, parameter in self._parameters.items()}

    def _turn(self, name: str, array: torch.Tensor) -> torch.Tensor:
        return array.mT if self._turned[name] else array

    def _trained(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        if not self._half:
            return whole
        axis = rank_axis(name, whole.ndim)
        return whole.narrow(axis, 0, whole.shape[axis] // 2)


def add_layers(
    model: nn.Module, kind: str, layers: int, parameters: dict[str, Any], keys: RandomKeys
) -> dict[str, Any]:
    """Adapter layers in the model, B zero; returns mlx-lm's adapter_config.json. Raises ValueError where none fit."""
    if kind not in ("lora", "dora"):
        raise ValueError(f"fine_tune_type is {kind!r}, expected lora, dora or full")
    paths = _paths(model, layers, parameters.get("keys"))
    if kind == "dora":
        _refuse_dora(paths)
    for group in ([p for p, m in paths.items() if isinstance(m, Conv1D) is conv] for conv in (True, False)):
        _inject(model, kind, group, parameters, isinstance(paths[group[0]], Conv1D)) if group else None
    added = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in added:
        layer.scaling[NAME] = parameters["scale"]
        if share := parameters.get("dropout"):
            layer.lora_dropout[NAME] = KeyedDropout(share, keys)
        without_detours(layer, NAME)
    if is_tied(model):
        _adapt_tied_head(model)
    model.eval()  # new modules begin in training mode
    return {"fine_tune_type": kind, "num_layers": layers, "lora_parameters": parameters}


def _paths(model: nn.Module, layers: int, keys: list[str] | None) -> dict[str, nn.Module]:
    """The modules that get layers, by transformers' paths; `keys` are mlx-lm's."""
    chosen = list(decoder_layers(model))[-max(layers, 0) :]
    if keys is None:  # mlx-lm's default
        keys = target_keys(model, layers, "all-linear")
    inside = [module for layer in chosen for path, module in layer.named_modules() if path in keys]
    beyond = [
        m for p, m in model.named_modules() if mlx_name(model.config.model_type, p) in keys
    ]  # by their whole path
    beyond = [m for m in beyond if m is not model.get_output_embeddings() or not is_tied(model)]
    wanted = {id(module) for module in [*inside, *beyond]}
    return {path: module for path, module in model.named_modules() if id(module) in wanted}


def _inject(model: nn.Module, kind: str, paths: list[str], parameters: dict[str, Any], turned: bool) -> None:
    config = LoraConfig(
        r=parameters["rank"], target_modules=paths, use_dora=kind == "dora", fan_in_fan_out=turned, lora_dropout=0.0
    )
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):  # PEFT draws A, which is drawn again below
        warnings.simplefilter("ignore")  # of tied weights, which are taken care of
        inject_adapter_in_model(config, model, adapter_name=NAME)


def _refuse_dora(paths: Mapping[str, nn.Module]) -> None:
    embeddings = [path for path, module in paths.items() if isinstance(module, nn.Embedding)]
    if embeddings:
        raise ValueError(f"{embeddings[0]} takes no DoRA here: PEFT's has a length for each column of an embedding")


def _adapt_tied_head(model: nn.Module) -> None:
    """Let a head that is the embedding have the embedding's adapter, as in mlx-lm."""
    layer = model.get_input_embeddings()
    if not isinstance(layer, LoraLayer):
        return

    def adapted(head: nn.Module, inputs: tuple[torch.Tensor, ...], logits: torch.Tensor) -> torch.Tensor:
        a, b = layer.lora_embedding_A[NAME], layer.lora_embedding_B[NAME]
        x = layer.lora_dropout[NAME](inputs[0])
        return logits + layer.scaling[NAME] * ((x @ b) @ a)

    model.get_output_embeddings().register_forward_hook(adapted)


def low_rank_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """PEFT's layers in a model, by mlx-lm's paths."""
    kind = model.config.model_type
    return {mlx_name(kind, path): module for path, module in model.named_modules() if isinstance(module, LoraLayer)}


def _name(model: nn.Module, path: str) -> tuple[str, bool]:
    """mlx-lm's name of a parameter, and whether mlx-lm has its last two axes the other way round."""
    kind = model.config.model_type
    for leaf, other in LEAVES.items():
        if path.endswith(f".{leaf}"):
            return mlx_name(kind, path.removesuffix(leaf)) + other, other != "m"
    owner = model.get_submodule(path.rpartition(".")[0])
    return mlx_name(kind, path), isinstance(owner, (Conv1D, nn.Conv1d)) and path.endswith(".weight")


def _own_shapes(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's own parameters as mlx-lm has them."""
    named = ((_name(model, path), parameter) for path, parameter in model.named_parameters())
    return {name: parameter.mT if turned else parameter for (name, turned), parameter in named}


def _unfreeze(model: nn.Module, names: set[str]) -> None:
    """Make these weights, by mlx-lm's names, trainable."""
    for path, parameter in model.named_parameters():
        if _name(model, path)[0] in names:
            parameter.requires_grad_(True)


def _principal(layer: Any, path: str, rank: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """A and B in mlx-lm's shapes, whose product is the nearest to the weight of a module."""
    base = layer.get_base_layer()
    weight = base.weight.detach().numpy()
    if rank > min(weight.shape):
        raise UsageError(f"adapter.rank: {rank}, but {path} has {min(weight.shape)} singular values")
    return principal_factors(weight.T if isinstance(base, nn.Linear) else weight, rank)

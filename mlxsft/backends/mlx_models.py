"""Checkpoints as mlx-lm's models: tensors repaired that it refuses, numbers turned to float32, targets found."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import psutil

from mlxsft.backends.adapters import matching
from mlxsft.backends.blas import load_blas
from mlxsft.errors import InputRefused, UsageError

load_blas()  # before MLX is imported, which would take its own

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402

from mlxsft.backends.rope import add_short_factors, complete_rope, refuse_other_rotation  # noqa: E402

if TYPE_CHECKING:
    from mlxsft.models.source import ModelSource

# What mlx-lm raises for config.json and tensors that it cannot use; it checks little itself.
LOADING_ERRORS = (
    *(ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, NameError),
    *(RuntimeError, OSError),  # of MLX, reading the files
    SystemExit,  # of OLMo's first model, where a package is missing
)
EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embeddings|embed_in|tok_embeddings)\.weight$")
HEAD = "lm_head.weight"
CORRECTION = "e_score_correction_bias"
# What mlx-lm wants said in config.json, and where else transformers may have said it.
OTHER_NAMES = {
    "num_experts": ("num_local_experts", "n_routed_experts"),
}


def load_checkpoint(source: ModelSource) -> nn.Module:
    """mlx-lm's model of a checkpoint, its arrays not yet read. Raises InputRefused where mlx-lm has none for it."""
    return load_checkpoint_and_config(source)[0]


def load_checkpoint_and_config(source: ModelSource) -> tuple[nn.Module, dict[str, Any]]:
    """As `load_checkpoint`, and config.json as mlx-lm has to have it for this model."""
    utils = mlx_lm("utils")

    def classes(config: dict[str, Any]) -> tuple[type, type]:
        tied = config.get("tie_word_embeddings", True)
        complete(config, source)
        model_class, arguments = utils._get_classes(config)
        return repairing(model_class, tied), arguments

    try:
        model, config = utils.load_model(source.folder, lazy=True, get_model_classes=classes)
        add_short_factors(model, config)
        refuse_other_rotation(model, config, str(source.folder))
    except LOADING_ERRORS as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        reason = re.sub(r"\s+", " ", f"{kind}{error}")
        raise InputRefused(
            f"{source.folder}: mlx-lm cannot load this checkpoint: {reason[:300]}",
            f"Its model_type is {source.config.get('model_type')!r}; `pip install -U mlx-lm` may bring new ones.",
        ) from error
    return model, config


def complete(config: dict[str, Any], source: ModelSource) -> None:
    """Add what transformers leaves out of config.json, and mlx-lm needs or takes for something else."""
    if config.get("model_type") == "gpt2" and "n_positions" in config:
        config.setdefault("n_ctx", config["n_positions"])  # its name of long ago
    for name, others in OTHER_NAMES.items():
        if config.get(name) is None and (found := next((config[n] for n in others if config.get(n)), None)):
            config[name] = found
    if config.get("model_type") == "lfm2" and not config.get("block_dim"):
        config["block_dim"] = config.get("hidden_size")
    if config.get("model_type") == "apertus":  # what is no choice any more for transformers
        config.update({"qk_norm": True, "post_norm": False, "mlp_bias": False} | config)
    complete_rope(config)
    # A head of its own is a Llama's default for transformers; for mlx-lm it is a tied one, and the tensor is dropped.
    if HEAD in source.tensors and any(map(EMBEDDING.search, source.tensors)):
        config.setdefault("tie_word_embeddings", False)


def repairing(model_class: type, tied: bool) -> type:
    """The model class, with a `sanitize` that first gives tensors the names that mlx-lm expects in a file."""

    def sanitize(self: Any, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        own = [name for name, _ in tree_flatten(self.parameters())]
        refuse_dropped(weights, own)
        weights = repaired(weights, own, tied)
        plain = getattr(model_class, "sanitize", None)
        return plain(self, weights) if plain else weights

    return type(model_class.__name__, (model_class,), {"sanitize": sanitize, "__module__": model_class.__module__})


def refuse_dropped(weights: dict[str, mx.array], own: list[str]) -> None:
    """Raise InputRefused for numbers that choose experts, where mlx-lm's model has no place and drops them (ERNIE)."""
    dropped = [name for name in weights if name.endswith(CORRECTION) and not any(o.endswith(CORRECTION) for o in own)]
    if name := next((name for name in dropped if mx.any(weights[name] != 0).item()), None):
        raise InputRefused(
            f"{name}: mlx-lm does not read this tensor, and would send tokens to other experts than the model does",
            "`pip install -U mlx-lm` may bring a version that reads it.",
        )


def repaired(weights: dict[str, mx.array], own: list[str], tied: bool) -> dict[str, mx.array]:
    """The tensors of a checkpoint that transformers loads, named so that mlx-lm does; `own` are the model's names."""
    prefix = "transformer."  # of GPT-2 as transformers saves it; mlx-lm expects it as OpenAI published it
    prefixed = all(name.startswith(prefix) or name == HEAD for name in weights)
    if prefixed and not any(name.startswith(prefix) for name in own):
        weights = {name.removeprefix(prefix): array for name, array in weights.items()}
    if not any(name.endswith(".attn.bias") for name in own):  # GPT-2's causal mask, which is no parameter
        weights = {name: a for name, a in weights.items() if not re.search(r"\.attn\.(masked_)?bias$", name)}
    if tied and HEAD in weights and not any(name.endswith(HEAD) for name in own):
        _head_to_embedding(weights, own)
    return weights


def _head_to_embedding(weights: dict[str, mx.array], own: list[str]) -> None:
    """Use the head of a tied model as its embedding where it has none; a head that differs from it stays, to fail."""
    stored, expected = (list(filter(EMBEDDING.search, names)) for names in (weights, own))
    if not stored and len(expected) == 1:
        weights[expected[0]] = weights.pop(HEAD)
    elif any(mx.array_equal(weights[name], weights[HEAD]).item() for name in stored):
        del weights[HEAD]


def why_not_float32(model: nn.Module, *, stored: bool = False) -> str | None:
    """Why the numbers of a model are not turned into float32, as a sentence; None where they are, or are so already.

    They are where memory allows it, unless they are to stay as they are stored.
    """
    needed, available = 4 * parameter_count(model), psutil.virtual_memory().available
    if _is_float32(model):
        return None
    if stored:
        return "train.base_dtype: the model stays in its own number format, which is slow on the CPU"
    if needed <= 0.8 * available:  # a fifth is left for activations
        return None
    return (
        "the model stays in its own number format, which is slow on the CPU: as float32 it would need "
        f"{needed / 2**30:.1f} GiB, and {available / 2**30:.1f} GiB of memory are available"
    )


def make_float32(model: nn.Module) -> list[str]:
    """Turn every number of a model into float32, quantized too; a note where some stay. It computes nothing yet."""
    if _is_float32(model):
        return []
    model.set_dtype(mx.float32)  # the scales first, so that nothing is rounded when they are multiplied
    mlx_lm("utils").dequantize_model(model)
    model.set_dtype(mx.float32)
    packed = sum(name.endswith(".scales") for name, _ in tree_flatten(model.parameters()))
    return [f"{packed} matrices stay quantized, which is slow on the CPU"] if packed else []


def _is_float32(model: nn.Module) -> bool:
    return all(array.dtype == mx.float32 for _, array in tree_flatten(model.parameters()))


def quantized_modules(model: nn.Module) -> set[str]:
    """Paths of the modules whose weights are quantized."""
    return {path for path, module in model.named_modules() if "scales" in module}


def token_embedding(model: nn.Module) -> nn.Module:
    """The module that turns token ids into vectors. Raises UsageError where it is not found."""
    embeddings = {path: m for path, m in model.named_modules() if EMBEDDING.search(f"{path}.weight")}
    if not embeddings:
        raise UsageError("train.neftune_alpha: the embedding of this model was not found", "Leave this out.")
    return embeddings[min(embeddings, key=len)]


def parameter_count(model: nn.Module) -> int:
    """How many numbers a model has; a quantized one as many as before."""
    return int(mlx_lm("utils").get_total_parameters(model))


# ---- targets --------------------------------------------------------------------------------------------------------


def target_keys(model: nn.Module, layers: int, targets: str | tuple[str, ...]) -> list[str]:
    """mlx-lm's keys for the modules of the last `layers` layers that get an adapter.

    `all-linear` is every linear module of a layer, experts included, but not the router that chooses among them: a
    small change there sends tokens to other experts. A name is the end of a module's path in its layer (`q_proj`,
    `self_attn.q_proj`), or the whole path of a module outside the layers (`lm_head`, `model.embed_tokens`). Raises
    UsageError with every name that fits no module.
    """
    return sorted(_chosen(model, layers, targets, _takes_lora))


def own_weights(model: nn.Module, layers: int, targets: str | tuple[str, ...]) -> set[str]:
    """Names of the model's own floating-point weights that full tuning trains; `all` is all of the chosen layers.

    Else as `target_keys`, with names for norms and everything that holds weights.
    """
    keys = _chosen(model, layers, targets, _own_arrays)
    chosen, modules = {id(layer) for layer in model.layers[-layers:]}, dict(model.named_modules())
    roots = [f"{path}." for path, module in modules.items() if id(module) in chosen]
    paths = {f"{root}{key}".rstrip(".") for root in roots for key in keys} | (keys - {""})
    return {f"{path}.{leaf}" for path in paths & modules.keys() for leaf in _own_arrays(modules[path])}


def _chosen(
    model: nn.Module, layers: int, targets: str | tuple[str, ...], takes: Callable[[nn.Module], object]
) -> set[str]:
    """Paths of the modules that are targets, inside a layer or from the root; `takes` says which modules can be."""
    chosen = model.layers[-layers:]
    inside = {path for layer in chosen for path, module in layer.named_modules() if takes(module)}
    linear = {path for layer in chosen for path, module in layer.named_modules() if _takes_lora(module)}
    embeddings = {path for layer in chosen for path, module in layer.named_modules() if _is_embedding(module)}
    routers = {path for layer in chosen for path in _routers(layer)}
    in_layers = {id(module) for layer in model.layers for module in layer.modules()}
    outside = {path for path, m in model.named_modules() if id(m) not in in_layers and takes(m)}
    return matching(targets, inside, linear - routers - embeddings, outside)


def _own_arrays(module: nn.Module) -> list[str]:
    """Names of the floating-point arrays that a module itself holds as parameters."""
    arrays = {name: value for name, value in module.items() if isinstance(value, mx.array) and name[0] != "_"}
    return [name for name, array in arrays.items() if mx.issubdtype(array.dtype, mx.floating)]


def _takes_lora(module: nn.Module) -> bool:
    linear = (nn.Linear, nn.QuantizedLinear)
    return hasattr(module, "to_lora") or isinstance(module, (*linear, *_expert_types())) or _is_embedding(module)


def _is_embedding(module: nn.Module) -> bool:
    return isinstance(module, (nn.Embedding, nn.QuantizedEmbedding))


def _expert_types() -> tuple[Any, ...]:
    switch = mlx_lm("models.switch_layers")
    return (switch.SwitchLinear, switch.QuantizedSwitchLinear)


def _routers(layer: nn.Module) -> set[str]:
    """Paths of the linear modules that choose experts: called gate or router, with an output for each, or with one."""
    experts, linear = _expert_types(), (nn.Linear, nn.QuantizedLinear)
    outputs = {module.num_experts for module in layer.modules() if isinstance(module, experts)}
    sizes = {path: module.weight.shape[0] for path, module in layer.named_modules() if isinstance(module, linear)}
    return {
        path for path, size in sizes.items() if outputs and size in outputs | {1} and re.search("gate|router", path)
    }


# ---- mlx-lm ---------------------------------------------------------------------------------------------------------


def mlx_lm(module: str) -> Any:
    """A module of mlx-lm, imported without lowering the number of files that this process may open.

    mlx-lm sets RLIMIT_NOFILE when it is imported, and the hard limit with it, which only root could raise again.
    """
    import resource  # MLX exists on POSIX systems only

    if "mlx_lm" in sys.modules:
        return importlib.import_module(f"mlx_lm.{module}")

    def raise_soft_limit(kind: int, limits: tuple[int, int]) -> None:
        soft, hard = resource.getrlimit(kind)
        if 0 <= soft < limits[0]:  # negative: no limit
            setrlimit(kind, (limits[0] if hard < 0 else min(limits[0], hard), hard))

    setrlimit, resource.setrlimit = resource.setrlimit, raise_soft_limit
    try:
        return importlib.import_module(f"mlx_lm.{module}")
    finally:
        resource.setrlimit = setrlimit

"""Checkpoints as transformers' models in float32: read by our own source, no file of theirs opened by anyone else."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from mlxsft.backends.adapters import matching
from mlxsft.errors import InputRefused, UsageError
from mlxsft.models.dequantize import BFLOAT16, as_float32, dequantized_tensors
from mlxsft.models.names import TURNED, mlx_name, transformers_name
from mlxsft.models.tensors import StoredTensors

if TYPE_CHECKING:
    from mlxsft.models.source import ModelSource

Tensors = dict[str, torch.Tensor]

# What transformers raises for config.json and tensors that it cannot use.
LOADING_ERRORS = (
    *(ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, NameError),
    *(RuntimeError, OSError, ImportError),
)
# mlx-lm stacks the matrices of all experts; in files of transformers each expert has its own.
STACKED = re.compile(r"(.+)\.switch_mlp\.(gate_proj|up_proj|down_proj)\.(weight|bias)")
EXPERT_NAMES = {"mixtral": {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}}


def load_checkpoint(source: ModelSource) -> tuple[nn.Module, list[str]]:
    """transformers' model of a checkpoint, frozen, float32, and what the person should know about it.

    Raises InputRefused where transformers has none for it, or tensors are missing.
    """
    try:
        with quiet():
            config = AutoConfig.from_pretrained(source.folder, local_files_only=True, trust_remote_code=False)
            if hasattr(config, "quantization_config"):
                del config.quantization_config  # the tensors are dequantized here
            config.return_dict = True  # a config.json may say otherwise
            with torch.device("meta"):
                model_class = type(AutoModelForCausalLM.from_config(config, trust_remote_code=False))
            tensors = read_tensors(source)
            model, told = model_class.from_pretrained(
                None, config=config, state_dict=tensors, dtype=torch.float32, output_loading_info=True
            )
    except LOADING_ERRORS as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        reason = re.sub(r"\s+", " ", f"{kind}{error}")
        raise InputRefused(
            f"{source.folder}: transformers cannot load this checkpoint: {reason[:300]}",
            f"Its model_type is {source.config.get('model_type')!r}; `pip install -U transformers` may bring new ones.",
        ) from error
    if missing := sorted(told["missing_keys"]):
        raise InputRefused(
            f"{source.folder}: tensors are missing that transformers' model has: {', '.join(missing[:5])}"
            + f" and {len(missing) - 5} more" * (len(missing) > 5)
        )
    model.requires_grad_(False).eval()
    model.config.pad_token_id = None  # rows are padded on the right, where no mask is needed: it warns without one
    if (embedding := model.get_input_embeddings()) is not None:
        embedding.padding_idx = None  # an id like all others, which may be trained
    unused = sorted(told["unexpected_keys"])
    return model, [f"{len(unused)} tensors of the checkpoint have no use, {unused[0]} the first"] if unused else []


def read_tensors(source: ModelSource) -> Tensors:
    """The tensors of a checkpoint under transformers' names, float32, dequantized where they must be."""
    stored = StoredTensors(source)
    # Scales too, so that nothing is rounded when they are multiplied: as on MLX's CPU.
    wide = {name: as_float32(a) if a.dtype.kind == "f" or a.dtype == BFLOAT16 else a for name, a in stored.items()}
    tensors = {name: torch.from_numpy(array) for name, array in dequantized_tensors(wide, source.config)}
    kind = str(source.config.get("model_type"))
    if kind == "gpt2" and any(name.startswith("model.h.") for name in tensors):  # as mlx-lm saves it
        tensors = {
            transformers_name(kind, name): tensor.T.contiguous() if TURNED.search(name) else tensor
            for name, tensor in tensors.items()
        }
    return {name: part for whole, tensor in tensors.items() for name, part in _experts(kind, whole, tensor)}


def _experts(kind: str, name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """(transformers' name, matrix) of every expert in a stack of mlx-lm's; any other tensor as it is."""
    found = STACKED.fullmatch(name)
    if found is None:
        yield name, tensor
        return
    module, projection, leaf = found.groups()
    projection = EXPERT_NAMES.get(kind, {}).get(projection, projection)
    for i, matrix in enumerate(tensor):
        yield f"{module}.experts.{i}.{projection}.{leaf}", matrix


@contextmanager
def quiet() -> Iterator[None]:
    """Within it, transformers neither logs nor draws progress bars."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The layers of a model, the lowest first. Raises InputRefused where they are not found."""
    count = model.config.get_text_config().num_hidden_layers
    for module in model.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise InputRefused(f"the {count} layers of this {type(model).__name__} were not found", "Take --backend mlx.")


def is_tied(model: nn.Module) -> bool:
    """Whether the output head is the embedding."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return head is not None and embedding is not None and head.weight is embedding.weight


def parameter_count(model: nn.Module) -> int:
    """How many numbers a model has; a tied matrix counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


# ---- targets --------------------------------------------------------------------------------------------------------


def target_keys(model: nn.Module, layers: int, targets: str | tuple[str, ...]) -> list[str]:
    """mlx-lm's keys for the modules of the last `layers` layers that get an adapter; `targets` as on MLX.

    Raises UsageError with every name that fits no module, and for experts, which PEFT's layers do not take.
    """
    chosen = list(decoder_layers(model))[-layers:]
    _refuse_experts(chosen, targets)
    inside = {path for layer in chosen for path, module in layer.named_modules() if takes_lora(module)}
    linear = {path for layer in chosen for path, m in layer.named_modules() if takes_lora(m) and not _is_embedding(m)}
    return sorted(matching(targets, inside, linear, {p for p, m in outside(model).items() if takes_lora(m)}))


def own_weights(model: nn.Module, layers: int, targets: str | tuple[str, ...]) -> set[str]:
    """mlx-lm's names of the model's own weights that full tuning trains; `all` is all of the chosen layers.

    Raises UsageError as `target_keys`.
    """
    chosen = list(decoder_layers(model))[-layers:]
    _refuse_experts(chosen, targets)
    named = [dict(layer.named_modules()) for layer in chosen]
    inside = {path for modules in named for path, module in modules.items() if _leaves(module)}
    linear = {path for modules in named for path, m in modules.items() if takes_lora(m) and not _is_embedding(m)}
    beyond = {path: module for path, module in outside(model).items() if _leaves(module)}
    keys = matching(targets, inside, linear, set(beyond))
    modules = [module for by_path in named for path, module in by_path.items() if path in keys]
    ids = {id(module) for module in [*modules, *(beyond[key] for key in keys & beyond.keys())]}
    kind = model.config.model_type
    return {
        mlx_name(kind, f"{path}.{leaf}")
        for path, module in model.named_modules()
        if id(module) in ids
        for leaf in _leaves(module)
    }


def _refuse_experts(layers: list[nn.Module], targets: str | tuple[str, ...]) -> None:
    """Raises UsageError where all of layers with experts are targets: mlx-lm keeps experts in other matrices."""
    groups = {"all", "all-linear"} & set((targets,) if isinstance(targets, str) else targets)
    modules = [m for layer in layers for m in layer.modules() if not isinstance(m, nn.Conv1d)]
    if groups and any(p.ndim == 3 for module in modules for p in module.parameters(recurse=False)):
        raise UsageError(
            f"adapter.targets: {min(groups)} includes experts, which the torch backend cannot train",
            "Name the modules, as for instance [q_proj, v_proj], or take --backend mlx.",
        )


def outside(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that are in no layer, by mlx-lm's paths; a tied head is the embedding, and not among them."""
    hidden = {id(module) for layer in decoder_layers(model) for module in layer.modules()}
    hidden |= {id(model.get_output_embeddings())} if is_tied(model) else set()
    kind = model.config.model_type
    return {mlx_name(kind, path): module for path, module in model.named_modules() if id(module) not in hidden}


def takes_lora(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D)) or _is_embedding(module)


def _is_embedding(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding)


def _leaves(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters(recurse=False)]

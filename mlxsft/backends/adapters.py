"""What every backend says of adapters alike: which modules are targets, which layers lie below, which tensors fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from mlxsft.errors import InputRefused, UsageError
from mlxsft.models.adapter import listed
from mlxsft.models.names import layer_of

if TYPE_CHECKING:
    from mlxsft.backends import Tensors

HEADS = ("lm_head", "output", "embed_out", "head")  # how the paths of output matrices end


def matching(targets: str | tuple[str, ...], inside: set[str], linear: set[str], outside: set[str]) -> set[str]:
    """Paths of the modules that `targets` names, in a layer or from the root.

    `inside`: paths in the chosen layers, of which `linear` are `all-linear`; `outside`: paths from the root. A name is
    the end of a path inside, or a whole path outside. Raises UsageError with every name that fits no module.
    """
    names = (targets,) if isinstance(targets, str) else targets
    found = {name: {p for p in inside if f".{p}".endswith(f".{name}")} | (outside & {name}) for name in names}
    groups = {"all": inside, "all-linear": linear}
    found |= {name: paths for name, paths in groups.items() if name in names}
    if unknown := [name for name, paths in found.items() if not paths]:
        known = sorted({path.rpartition(".")[2] for path in inside if path} | outside)
        guesses = [guess for name in unknown for guess in get_close_matches(name, known, n=1)]
        meant = f"; did you mean {', '.join(guesses)}?" if guesses else ""
        no_head = "lm_head" in unknown and not any(path.endswith(HEADS) for path in outside)
        tied = " This model has no head of its own; its embeddings are that too." if no_head else ""
        raise UsageError(
            f"adapter.targets: no module of the chosen layers is named {', '.join(unknown)}{meant}",
            f"There are: {', '.join(known)}.{tied}",
        )
    return set().union(*found.values())


def chosen_layers(layers: Any, count: int) -> int:
    """How many of the last layers a recipe's `adapter.layers` stands for. Raises UsageError where there are fewer."""
    if layers != "all" and layers > count:
        raise UsageError(f"adapter.layers: {layers}, but the model has {count} layers")
    return count if layers == "all" else int(layers)


def frozen_layers(trained: Iterable[str], above: tuple[str, ...]) -> int:
    """How many layers lie below everything that is trained, by the names of the trained tensors.

    Names that begin with one of `above` lie above all layers; any other name outside the layers is below them.
    """
    numbers = []
    for name in trained:
        if place := layer_of(name):
            numbers.append(place[0])
        elif not name.startswith(above):
            return 0
    return min(numbers, default=0)


def refuse_quantized(names: set[str], quantized: set[str]) -> None:
    """Raises UsageError where weights to train belong to modules that the checkpoint holds quantized."""
    if found := sorted({name.rpartition(".")[0] for name in names} & quantized):
        raise UsageError(
            f"adapter.kind: full, but the model is quantized: {len(found)} modules, {found[0]} the first, have no "
            "weights that could be trained",
            "Take adapter.kind lora or dora, or the model as it was before it was quantized.",
        )


def rank_axis(name: str, dimensions: int) -> int:
    """The axis of a LoRA A or B that is as long as the rank, in mlx-lm's shapes."""
    return 1 if name.endswith(".lora_a") else 0 if dimensions == 2 else 2


def refuse_mismatch(what: str, expected: Mapping[str, Any], tensors: Tensors, *, whole: bool = True) -> None:
    """Raises InputRefused with every tensor that is missing, unexpected or of another shape than expected.

    Where it need not be `whole`, none is missing.
    """
    shapes = {name: tuple(array.shape) for name, array in expected.items()}
    problems = [
        f"{name}: is missing, expected {shape}" for name, shape in shapes.items() if whole and name not in tensors
    ]
    problems += [f"{name}: the model has no such tensor" for name in tensors if name not in shapes]
    problems += [
        f"{name}: got {tensors[name].shape}, expected {shape}"
        for name, shape in shapes.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if problems:
        raise InputRefused(listed(f"{what} does not fit this model:", problems), "Was it made on another base?")

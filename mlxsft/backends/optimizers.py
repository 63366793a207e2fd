"""The update rules, written once for MLX and PyTorch.

A rule is a pure function of weights, gradient and state. It uses operators and methods that `mx.array` and
`torch.Tensor` both have, and `sign`, `sqrt` and `clip` of the array library that it is handed as `xp`. Nothing is kept
between calls: the state is a dict of float32 arrays, `<slot>.<name of the weight>`, that goes in and comes out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlxsft.recipe_training import TrainRecipe

Array = Any  # mx.array or torch.Tensor
Arrays = dict[str, Array]
Shape = tuple[int, ...]

TOGETHER = 2**18  # numbers that are updated at once: they stay in the processor's cache
EPSILON = 1e-8  # of Adam, added to the square root
# Of Adafactor: how fast the memory of squares grows, what is added to squares, and the largest root mean square.
FORGETTING, SQUARE_EPSILON, CLIP_RMS = -0.8, 1e-30, 1.0
# Of Muon: the quintic whose five-fold application takes singular values to about 1.
QUINTIC, ITERATIONS, NORM_EPSILON = (3.4445, -4.7750, 2.0315), 5, 1e-7
# Weights that look like matrices, and are tables, the head or filters: Muon leaves them to AdamW.
NO_HIDDEN_MATRIX = re.compile(
    r"(^|\.)(embed_tokens|wte|wpe|word_embeddings|embeddings|embed_in|tok_embeddings|lm_head|embed_out|[^.]*conv[^.]*)\."
)


@dataclass(frozen=True)
class Rule:
    """One optimizer: the shapes that it remembers for a weight, and its update.

    `elementwise`: each number of a weight is updated alone, and remembered in slots of the weight's shape.
    """

    slots: Callable[[Shape], dict[str, Shape]]
    update: Callable[[Any, Array, Array, Arrays, Settings], tuple[Array, Arrays]]
    elementwise: bool = True


@dataclass(frozen=True)
class Settings:
    """What one update of one weight depends on beside weight, gradient and state.

    Numbers that change with the step are numbers or arrays of one number, so that a compiled update takes any step.
    """

    train: TrainRecipe
    rate: Any
    decay: float  # 0 for biases and norms
    numbers: Mapping[str, Any]  # what `step_numbers` returns

    @property
    def beta1(self) -> float:
        return self.train.beta1 or 0.0

    @property
    def beta2(self) -> float:
        return self.train.beta2 or 0.0

    @property
    def momentum(self) -> float:
        return self.train.momentum or 0.0


def step_numbers(train: TrainRecipe, step: int, learning_rate: float) -> dict[str, float]:
    """The numbers of update `step` (1-based), computed in float64: `1 - 0.999` in float32 is off by 5e-5."""
    return {
        "rate": learning_rate,
        "unbias1": 1 - (train.beta1 or 0.0) ** step,
        "unbias2": math.sqrt(1 - (train.beta2 or 0.0) ** step),
        "newest": step**FORGETTING,  # weight of the newest squares in Adafactor's mean
    }


def state_shapes(train: TrainRecipe, weights: Mapping[str, Array]) -> dict[str, Shape]:
    """What the optimizer remembers between updates, by name; it begins as zeros, float32."""
    return {
        f"{slot}.{name}": shape
        for name, weight in weights.items()
        for slot, shape in _rule(train, name, weight).slots(tuple(weight.shape)).items()
    }


def updated(
    xp: Any,
    train: TrainRecipe,
    b_ratio: float,
    weights: Mapping[str, Array],
    gradient: Mapping[str, Array],
    state: Mapping[str, Array],
    numbers: Mapping[str, Any],
) -> tuple[Arrays, Arrays]:
    """Weights and state after one update; all are float32. LoRA's B learns `b_ratio` times as fast as the rest.

    That ratio is LoRA+, https://arxiv.org/abs/2402.12354.
    """
    new_weights: Arrays = {}
    new_state: Arrays = {}
    for names in _alike(train, weights):
        name, weight = names[0], weights[names[0]]
        rule = _rule(train, name, weight)
        rate = numbers["rate"] * (b_ratio if name.endswith(".lora_b") else 1.0)
        settings = Settings(train, rate, train.weight_decay if _is_matrix(name, weight) else 0.0, numbers)
        together = partial(_together, xp, names)
        slots = {slot: together(state, f"{slot}.") for slot in rule.slots(tuple(weight.shape))}
        new, after = rule.update(xp, together(weights), together(gradient), slots, settings)
        new_weights |= _apart(names, new)
        for slot, array in after.items():
            new_state |= _apart([f"{slot}.{name}" for name in names], array)
    return {name: new_weights[name] for name in weights}, {name: new_state[name] for name in state}


def _alike(train: TrainRecipe, weights: Mapping[str, Array]) -> list[list[str]]:
    """The names of weights that one computation updates: a model has hundreds of small ones, of few shapes."""
    groups: dict[Any, list[str]] = {}
    for name, weight in weights.items():
        shape, b = tuple(weight.shape), name.endswith(".lora_b")
        alone = not _rule(train, name, weight).elementwise
        group = groups.setdefault(name if alone else (shape, b, _is_matrix(name, weight)), [])
        group.append(name)
    most = {key: TOGETHER // max(1, math.prod(weights[group[0]].shape)) or 1 for key, group in groups.items()}
    return [g[start : start + most[key]] for key, g in groups.items() for start in range(0, len(g), most[key])]


def _together(xp: Any, names: list[str], arrays: Mapping[str, Array], prefix: str = "") -> Array:
    """The arrays of these names, stacked where there are several."""
    return xp.stack([arrays[prefix + name] for name in names]) if len(names) > 1 else arrays[prefix + names[0]]


def _apart(names: list[str], array: Array) -> Arrays:
    return dict(zip(names, array, strict=True)) if len(names) > 1 else {names[0]: array}


def _is_matrix(name: str, weight: Array) -> bool:
    """Whether a weight is one matrix or a stack of them: no norm, and no bias, which experts have in a table."""
    return weight.ndim > 1 and not name.endswith(".bias")


def _rule(train: TrainRecipe, name: str, weight: Array) -> Rule:
    if train.optimizer == "muon" and (NO_HIDDEN_MATRIX.search(name) or not _is_matrix(name, weight)):
        return RULES["adamw"]
    return RULES[train.optimizer]


# ---- the rules ------------------------------------------------------------------------------------------------------


def adamw(xp: Any, weight: Array, gradient: Array, state: Arrays, at: Settings) -> tuple[Array, Arrays]:
    """AdamW, https://arxiv.org/abs/1711.05101, with bias correction, as torch.optim.AdamW has it."""
    first = at.beta1 * state["first"] + (1 - at.beta1) * gradient
    second = at.beta2 * state["second"] + (1 - at.beta2) * gradient.square()
    size = first / (xp.sqrt(second) / at.numbers["unbias2"] + EPSILON)
    return _decayed(weight, at) - (at.rate / at.numbers["unbias1"]) * size, {"first": first, "second": second}


def adam(xp: Any, weight: Array, gradient: Array, state: Arrays, at: Settings) -> tuple[Array, Arrays]:
    """Adam, https://arxiv.org/abs/1412.6980, its decay a part of the gradient, as torch.optim.Adam has it."""
    return adamw(xp, weight, _with_penalty(weight, gradient, at), state, _without_decay(at))


def lion(xp: Any, weight: Array, gradient: Array, state: Arrays, at: Settings) -> tuple[Array, Arrays]:
    """Lion, https://arxiv.org/abs/2302.06675."""
    direction = xp.sign(at.beta1 * state["first"] + (1 - at.beta1) * gradient)
    first = at.beta2 * state["first"] + (1 - at.beta2) * gradient
    return _decayed(weight, at) - at.rate * direction, {"first": first}


def sgd(xp: Any, weight: Array, gradient: Array, state: Arrays, at: Settings) -> tuple[Array, Arrays]:
    """Gradient descent with momentum, as torch.optim.SGD has it."""
    velocity = at.momentum * state["velocity"] + _with_penalty(weight, gradient, at)
    return weight - at.rate * velocity, {"velocity": velocity}


def adafactor(xp: Any, weight: Array, gradient: Array, state: Arrays, at: Settings) -> tuple[Array, Arrays]:
    """Adafactor, https://arxiv.org/abs/1804.04235, at the given rate, neither relative to the weight nor to the step.

    So do transformers' trainers use it: a rate relative to LoRA's B, which starts at zero, would not train it.
    """
    newest = at.numbers["newest"]
    squares = gradient.square() + SQUARE_EPSILON

    def mean(slot: str, values: Array) -> Array:
        return (1 - newest) * state[slot] + newest * values

    if weight.ndim < 2:
        after = {"second": mean("second", squares)}
        size = gradient / xp.sqrt(after["second"])
    else:
        rows, columns = mean("second_rows", squares.mean(axis=-1)), mean("second_columns", squares.mean(axis=-2))
        after = {"second_rows": rows, "second_columns": columns}
        by_row = xp.sqrt(rows / rows.mean(axis=-1, keepdims=True))
        size = gradient / (by_row[..., None] * xp.sqrt(columns)[..., None, :])
    rms = xp.sqrt(size.square().mean()) / CLIP_RMS
    return _decayed(weight, at) - at.rate * size / xp.clip(rms, 1.0, None), after


def muon(xp: Any, weight: Array, gradient: Array, state: Arrays, at: Settings) -> tuple[Array, Arrays]:
    """Muon, https://kellerjordan.github.io/posts/muon/, with Nesterov's momentum, as torch.optim.Muon has it.

    An update has the root mean square 0.2 of AdamW's, https://arxiv.org/abs/2502.16982, so that one learning rate
    serves both. A stack of matrices, one an expert, is updated a matrix at a time.
    """
    first = at.momentum * state["first"] + (1 - at.momentum) * gradient
    direction = _orthogonal(xp, at.momentum * first + (1 - at.momentum) * gradient)
    size = 0.2 * math.sqrt(max(weight.shape[-2:]))
    return _decayed(weight, at) - (at.rate * size) * direction, {"first": first}


def _orthogonal(xp: Any, matrices: Array) -> Array:
    """[..., m, n] with its singular values taken to about 1, by Newton-Schulz iterations."""
    a, b, c = QUINTIC
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.swapaxes(-1, -2) if tall else matrices
    norm = xp.sqrt(x.square().sum(axis=-1, keepdims=True).sum(axis=-2, keepdims=True))
    x = x / xp.clip(norm, NORM_EPSILON, None)
    for _ in range(ITERATIONS):
        gram = x @ x.swapaxes(-1, -2)
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.swapaxes(-1, -2) if tall else x


def _decayed(weight: Array, at: Settings) -> Array:
    """Decay beside the gradient."""
    return weight * (1 - at.rate * at.decay) if at.decay else weight


def _with_penalty(weight: Array, gradient: Array, at: Settings) -> Array:
    """Decay in the gradient."""
    return gradient + at.decay * weight if at.decay else gradient


def _without_decay(at: Settings) -> Settings:
    return Settings(at.train, at.rate, 0.0, at.numbers)


def _both_moments(shape: Shape) -> dict[str, Shape]:
    return {"first": shape, "second": shape}


def _factored(shape: Shape) -> dict[str, Shape]:
    if len(shape) < 2:
        return {"second": shape}
    return {"second_rows": shape[:-1], "second_columns": (*shape[:-2], shape[-1])}


RULES = {
    "adamw": Rule(_both_moments, adamw),
    "adam": Rule(_both_moments, adam),
    "lion": Rule(lambda shape: {"first": shape}, lion),
    "adafactor": Rule(_factored, adafactor, elementwise=False),
    "muon": Rule(lambda shape: {"first": shape}, muon, elementwise=False),
    "sgd": Rule(lambda shape: {"velocity": shape}, sgd),
}

"""Every update rule: on MLX and on PyTorch the same, and that of the library that people know it from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers.optimization import Adafactor

from mlxsft.backends import optimizers
from mlxsft.backends.mlx import mx
from mlxsft.backends.optimizers import RULES, Arrays, state_shapes, step_numbers, updated
from mlxsft.recipe_training import OPTIMIZERS, TrainRecipe

STEPS = 20
RATES = [1e-3 * (1 + step % 3) for step in range(STEPS)]
SHAPES = {"a.lora_a": (12, 4), "a.lora_b": (4, 20), "experts.weight": (3, 8, 6), "norm.weight": (12,)}


def arrays(seed: int, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def trained(train: TrainRecipe, shapes: dict[str, tuple[int, ...]], xp: Any = mx, b_ratio: float = 1.0) -> Arrays:
    """Weights after STEPS updates with gradients that begin at seed 1."""
    make = mx.array if xp is mx else torch.from_numpy
    weights = {name: make(array) for name, array in arrays(0, shapes).items()}
    state = {name: make(np.zeros(shape, np.float32)) for name, shape in state_shapes(train, weights).items()}
    for step in range(STEPS):
        gradient = {name: make(array) for name, array in arrays(step + 1, shapes).items()}
        weights, state = updated(
            xp, train, b_ratio, weights, gradient, state, step_numbers(train, step + 1, RATES[step])
        )
    return {name: np.array(array) if xp is mx else array.numpy() for name, array in weights.items()}


def by_torch(make: Callable[[list[Any]], Any], shapes: dict[str, tuple[int, ...]]) -> Arrays:
    parameters = {name: torch.nn.Parameter(torch.from_numpy(array)) for name, array in arrays(0, shapes).items()}
    optimizer = make(list(parameters.values()))
    for step, rate in enumerate(RATES):
        for name, array in arrays(step + 1, shapes).items():
            parameters[name].grad = torch.from_numpy(array)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    return {name: parameter.detach().numpy() for name, parameter in parameters.items()}


def by_mlx(name: str, shapes: dict[str, tuple[int, ...]], **settings: Any) -> Arrays:
    from mlx import optimizers

    optimizer = getattr(optimizers, name)(1e-3, **settings)
    weights = {name: mx.array(array) for name, array in arrays(0, shapes).items()}
    for step, rate in enumerate(RATES):
        optimizer.learning_rate = rate
        gradient = {name: mx.array(array) for name, array in arrays(step + 1, shapes).items()}
        weights = optimizer.apply_gradients(gradient, weights)
    return {name: np.array(array) for name, array in weights.items()}


def assert_same(one: Arrays, other: Arrays) -> None:
    for name, array in one.items():
        np.testing.assert_allclose(array, other[name], rtol=1e-5, atol=1e-6, err_msg=name)


def recipe(optimizer: str, **settings: object) -> TrainRecipe:
    return TrainRecipe.model_validate({"optimizer": optimizer, **settings})


def adamw(**settings: Any) -> Callable[[list[Any]], Any]:
    return lambda parameters: torch.optim.AdamW(parameters, eps=1e-8, **settings)


MATRICES = {name: shape for name, shape in SHAPES.items() if len(shape) == 2}
STACKED = {name: shape for name, shape in SHAPES.items() if len(shape) > 1}


@pytest.mark.parametrize(
    ("train", "make"),
    [
        (recipe("adamw"), adamw(weight_decay=0)),
        (recipe("adamw", weight_decay=0.1, beta1=0.8, beta2=0.95), adamw(weight_decay=0.1, betas=(0.8, 0.95))),
        (recipe("adam", weight_decay=0.1), lambda p: torch.optim.Adam(p, weight_decay=0.1)),
        (recipe("sgd"), lambda p: torch.optim.SGD(p)),
        (recipe("sgd", momentum=0.9, weight_decay=0.1), lambda p: torch.optim.SGD(p, momentum=0.9, weight_decay=0.1)),
        (
            recipe("adafactor", weight_decay=0.1),
            lambda p: Adafactor(p, 1e-3, weight_decay=0.1, scale_parameter=False, relative_step=False),
        ),
    ],
)
def test_updates_are_those_of_torch(train: TrainRecipe, make: Callable[[list[Any]], Any]) -> None:
    shapes = STACKED if train.weight_decay else SHAPES  # theirs decays vectors too
    assert_same(trained(train, shapes), by_torch(make, shapes))


def test_muon_is_that_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch multiplies in bfloat16; here it is made to stay in float32."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    muon = torch.optim.Muon
    expected = by_torch(lambda p: muon(p, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"), MATRICES)
    found = trained(recipe("muon", weight_decay=0.1), STACKED)
    assert_same({name: found[name] for name in MATRICES}, expected)
    one = {"expert.weight": (8, 6)}
    stacked = {"expert.weight": (1, 8, 6)}
    np.testing.assert_array_equal(
        trained(recipe("muon"), stacked)["expert.weight"][0], trained(recipe("muon"), one)["expert.weight"]
    )


def test_muon_leaves_vectors_and_tables_to_adamw() -> None:
    shapes = {
        "norm.weight": (6,),
        "model.embed_tokens.weight": (9, 4),
        "lm_head.weight": (9, 4),
        "conv1d.weight": (4, 3, 1),
    }
    assert_same(trained(recipe("muon"), shapes), trained(recipe("adamw"), shapes))
    low_rank = {"model.embed_tokens.lora_a": (9, 4)}
    assert_same(trained(recipe("muon"), low_rank), trained(recipe("adamw"), low_rank))


def test_lion_is_that_of_mlx() -> None:
    expected = by_mlx("Lion", STACKED, betas=[0.9, 0.99], weight_decay=0.1)
    assert_same(trained(recipe("lion", weight_decay=0.1), STACKED), expected)


def test_adafactor_is_that_of_mlx() -> None:
    expected = by_mlx("Adafactor", SHAPES, scale_parameter=False, relative_step=False)
    assert_same(trained(recipe("adafactor"), SHAPES), expected)


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_both_array_libraries_make_the_same_updates(optimizer: str) -> None:
    train = recipe(optimizer, weight_decay=0.1)
    assert_same(trained(train, SHAPES, b_ratio=4.0), trained(train, SHAPES, torch, b_ratio=4.0))


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_a_transposed_matrix_gets_the_transposed_update(optimizer: str) -> None:
    """PEFT's matrices are mlx-lm's, transposed."""
    train = recipe(optimizer, weight_decay=0.1)
    weight, other = (mx.array(arrays(0, {"a": (12, 4)})["a"].copy()) for _ in range(2))
    other = other.T
    state, other_state = ({n: mx.zeros(s) for n, s in state_shapes(train, {"a": w}).items()} for w in (weight, other))
    for step in range(STEPS):
        gradient = mx.array(arrays(step + 1, {"a": (12, 4)})["a"])
        numbers = step_numbers(train, step + 1, RATES[step])
        (after, state) = updated(mx, train, 1.0, {"a": weight}, {"a": gradient}, state, numbers)
        (turned, other_state) = updated(mx, train, 1.0, {"a": other}, {"a": gradient.T}, other_state, numbers)
        weight, other = after["a"], turned["a"]
    assert_same({"a": np.array(other.T)}, {"a": np.array(weight)})


def test_a_recipe_names_the_rules_that_there_are() -> None:
    assert set(RULES) == set(OPTIMIZERS)


def test_vectors_do_not_decay() -> None:
    vectors = {"q_proj.bias": (4,), "norm.weight": (12,), "experts.up_proj.bias": (3, 8)}
    for optimizer in OPTIMIZERS:
        assert_same(trained(recipe(optimizer, weight_decay=0.5), vectors), trained(recipe(optimizer), vectors))


def test_b_learns_as_many_times_faster_as_loraplus_says() -> None:
    plain, plus = trained(recipe("sgd"), SHAPES), trained(recipe("sgd"), SHAPES, b_ratio=4.0)
    start = arrays(0, SHAPES)
    for name in SHAPES:
        ratio = 4.0 if name == "a.lora_b" else 1.0
        np.testing.assert_allclose(plus[name] - start[name], ratio * (plain[name] - start[name]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("xp", [mx, torch], ids=["mlx", "torch"])
@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_weights_of_one_shape_are_updated_together_as_they_are_alone(
    optimizer: str, xp: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = {f"{layer}.{name}": shape for layer in range(5) for name, shape in SHAPES.items()}
    train = recipe(optimizer, weight_decay=0.1)
    monkeypatch.setattr(optimizers, "TOGETHER", 100)  # two of `a.lora_a` and one of `a.lora_b`
    together = trained(train, shapes, xp, b_ratio=4.0)
    monkeypatch.setattr(optimizers, "TOGETHER", 0)
    assert list(together) == list(shapes)
    for name, array in trained(train, shapes, xp, b_ratio=4.0).items():
        np.testing.assert_array_equal(together[name], array)

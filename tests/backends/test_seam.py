"""What both backends share: initial values, and who may open them."""

from __future__ import annotations

import numpy as np
import pytest

from mlxsft.backends import load_backend
from mlxsft.backends.initial_values import initial_lora_a
from mlxsft.errors import UsageError

NAME = "model.layers.0.self_attn.q_proj.lora_a"


def test_initial_values_depend_on_seed_and_name_alone() -> None:
    first = initial_lora_a(NAME, 0, (64, 8))
    assert first.dtype == np.float32
    assert np.array_equal(first, initial_lora_a(NAME, 0, (64, 8)))
    assert not np.array_equal(first, initial_lora_a(NAME, 1, (64, 8)))
    assert not np.array_equal(first, initial_lora_a(NAME.replace("q_proj", "k_proj"), 0, (64, 8)))


def test_initial_values_of_another_day() -> None:
    """The numbers themselves: a checkpoint of today resumes, and the other backend begins, with the same ones."""
    expected = [-0.0378537, 0.4426506, -0.2843721, 0.2738045, -0.0839273, -0.0921713, -0.4844988, 0.4383206]
    assert initial_lora_a(NAME, 7, (4, 2)).ravel().tolist() == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(("shape", "inputs"), [((400, 8), 400), ((4, 8, 100), 100)])
def test_initial_values_fill_the_range(shape: tuple[int, ...], inputs: int) -> None:
    values = np.abs(initial_lora_a(NAME, 0, shape))
    assert 0.98 < values.max() * np.sqrt(inputs) <= 1


def test_unknown_backend_is_refused(llama: object) -> None:
    with pytest.raises(UsageError, match="'tpu'"):
        load_backend("tpu", llama)  # type: ignore[arg-type]  # never looked at

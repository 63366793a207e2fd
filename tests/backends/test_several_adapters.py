"""Several saved adapters on one base in memory: each answers as it does alone, and the base as if there were none."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from mlxsft.backends import Backend
from mlxsft.backends.mlx import MlxBackend
from mlxsft.backends.torch import TorchBackend
from mlxsft.errors import InputRefused
from mlxsft.models.source import ModelSource
from mlxsft.recipe_training import AdapterRecipe
from tests.backends.conftest import learned_adapter, make_batch

EMBEDDED = ("q_proj", "model.embed_tokens")  # which is the head as well
KINDS = {
    "lora": AdapterRecipe(rank=4, alpha=8.0),
    "wide": AdapterRecipe(rank=8, alpha=8.0, layers=1, targets=EMBEDDED),
    "dora": AdapterRecipe(kind="dora", rank=2, alpha=8.0, targets=("up_proj", "k_proj")),
    "full": AdapterRecipe(kind="full", layers=1),
    "other": AdapterRecipe(kind="full", targets=("down_proj", "model.embed_tokens")),
}
Saved = tuple[dict[str, object], dict[str, np.ndarray]]


@pytest.fixture(scope="module")
def saved(llama: ModelSource) -> dict[str, Saved]:
    """Learned adapters of every kind, with config and tensors."""
    made = {}
    for seed, (name, recipe) in enumerate(KINDS.items()):
        backend = MlxBackend(llama)
        backend.attach(recipe, seed=0)
        made[name] = backend.adapter_config(), learned_adapter(backend, seed)
    return made


@pytest.fixture(scope="module", params=[MlxBackend, TorchBackend])
def kind(request: pytest.FixtureRequest) -> type[Backend]:
    return request.param


@pytest.fixture
def backend(kind: type[Backend], llama: ModelSource, saved: dict[str, Saved]) -> Backend:
    """The base with all adapters in memory."""
    backend = kind(llama)  # type: ignore[call-arg]  # the protocol has no constructor
    for name, (config, tensors) in saved.items():
        backend.add_adapter(name, config, tensors)
    return backend


def test_each_answers_as_alone_in_any_order(
    kind: type[Backend], backend: Backend, llama: ModelSource, saved: dict[str, Saved]
) -> None:
    batch = make_batch()
    alone: dict[str | None, np.ndarray] = {None: kind(llama).losses(batch)}  # type: ignore[call-arg]
    for name, (config, tensors) in saved.items():
        one = kind(llama)  # type: ignore[call-arg]
        one.attach_saved(config, tensors)
        alone[name] = one.losses(batch)
    assert backend.in_use is None
    assert len({losses.tobytes() for losses in alone.values()}) == len(saved) + 1
    orders: list[tuple[str | None, ...]] = [
        *permutations([None, "wide", "full"]),
        ("dora", "other", "lora"),
        ("full", "other", None),
    ]
    for order in orders:
        for name in order:
            backend.use(name)
            assert backend.in_use == name
            assert np.array_equal(backend.losses(batch), alone[name])


def test_the_adapter_in_use_is_the_one_that_is_described(backend: Backend, saved: dict[str, Saved]) -> None:
    base = backend.parameters()
    for name, (config, tensors) in saved.items():
        backend.use(name)
        assert backend.adapter_config() == config
        assert all(np.array_equal(array, tensors[name]) for name, array in backend.adapter_state().items())
    backend.use(None)
    assert backend.parameters() == base
    assert backend.adapter_state() == {}


@pytest.mark.parametrize("before", [None, "wide", "full"])
def test_an_adapter_that_does_not_fit_changes_nothing(
    backend: Backend, saved: dict[str, Saved], before: str | None
) -> None:
    backend.use(before)
    expected = backend.losses(batch := make_batch())
    config, tensors = saved["lora"]
    wrong = {name: array[:, :1] for name, array in tensors.items()}
    for bad in ((config, wrong), ({"fine_tune_type": "ia3", "num_layers": 1}, {}), (saved["full"][0], wrong)):
        with pytest.raises(InputRefused):
            backend.add_adapter("bad", *bad)
        assert backend.in_use == before
        assert np.array_equal(backend.losses(batch), expected)
    with pytest.raises(KeyError):
        backend.use("bad")
    assert np.array_equal(backend.losses(batch), expected)


def test_an_adapter_of_the_same_name_takes_the_place_of_the_other(backend: Backend, saved: dict[str, Saved]) -> None:
    backend.use("dora")
    dora = backend.losses(batch := make_batch())
    backend.add_adapter("dora", *saved["wide"])  # while it is in use
    backend.use("wide")
    wide = backend.losses(batch)
    backend.use("dora")
    assert np.array_equal(backend.losses(batch), wide)
    assert not np.array_equal(wide, dora)

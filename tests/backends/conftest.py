"""What the tests of the backends share: tiny checkpoints and batches, on the CPU device."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from mlxsft.backends.mlx import MlxBackend, mx
from mlxsft.data.batches import Batch
from mlxsft.models.source import ModelSource, open_model
from mlxsft.recipe_training import AdapterRecipe, TrainRecipe
from tests.tiny import write_llama

ADAPTER = AdapterRecipe(rank=4, alpha=8.0)


@pytest.fixture(scope="session", autouse=True)
def _on_the_cpu() -> Iterator[None]:
    """Exact numbers are promised for the CPU device only."""
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    """A random Llama of two layers, with tied embeddings."""
    return open_model(str(write_llama(tmp_path_factory.mktemp("llama"))))


@pytest.fixture
def trainer(llama: ModelSource) -> Callable[..., MlxBackend]:
    """A backend that trains: `trainer(adapter, learned=True, source=…, targets=…, **fields of TrainRecipe)`."""

    def make(
        adapter: AdapterRecipe = ADAPTER,
        *,
        learned: bool = True,
        source: ModelSource = llama,
        targets: tuple[str, ...] | None = None,
        **train: object,
    ) -> MlxBackend:
        backend = MlxBackend(source)
        backend.attach(adapter.model_copy(update={"targets": targets}) if targets else adapter, seed=0)
        if learned:
            backend.load_adapter_state(learned_adapter(backend))
        backend.optimize(TrainRecipe.model_validate({"steps": 1, **train}))
        return backend

    return make


@pytest.fixture
def peak_of() -> Callable[[Callable[[], object]], int]:
    """The bytes that arrays take at most while something is computed, beyond those that are there before."""

    def measured(compute: Callable[[], object]) -> int:
        compute()  # what is made once stays
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        compute()
        return mx.get_peak_memory() - before

    return measured


def learned_adapter(backend: MlxBackend, seed: int = 1) -> dict[str, np.ndarray]:
    """Adapter tensors as they may be after some training: a B of zeros would hide half of the gradient."""
    rng = np.random.default_rng(seed)
    return {n: (0.05 * rng.standard_normal(t.shape)).astype(np.float32) for n, t in backend.adapter_state().items()}


def make_batch(rows: int = 8, width: int = 12, *, vocabulary: int = 256, seed: int = 0) -> Batch:
    """Random rows of different lengths, about half of their tokens trained."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(4, vocabulary, (rows, width), dtype=np.int32)
    lengths = rng.integers(width // 2, width + 1, rows)
    inside = np.arange(width) < lengths[:, None]
    mask = inside & (rng.random((rows, width)) < 0.5)
    mask[:, 0], mask[:, 3] = False, True
    return Batch(np.where(inside, tokens, 0).astype(np.int32), mask)


def rows_of(batch: Batch, size: int) -> list[Batch]:
    """The batch in groups of `size` rows."""
    return [Batch(batch.tokens[i : i + size], batch.mask[i : i + size]) for i in range(0, len(batch.tokens), size)]

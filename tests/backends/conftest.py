"""What the tests of the backends share: tiny checkpoints and batches, on the CPU device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest

from mlxsft.backends.mlx import MlxBackend, mx
from mlxsft.backends.mlx_models import mlx_lm
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


def training(
    source: ModelSource, adapter: AdapterRecipe = ADAPTER, *, learned: bool = True, **train: object
) -> MlxBackend:
    """A backend that trains, with fields of TrainRecipe."""
    backend = MlxBackend(source)
    backend.attach(adapter, seed=0)
    if learned:
        backend.load_adapter_state(learned_adapter(backend))
    backend.optimize(TrainRecipe.model_validate({"steps": 1, **train}))
    return backend


@pytest.fixture
def trainer(llama: ModelSource) -> Callable[..., MlxBackend]:
    """`training` of the llama: `trainer(adapter, learned=True, **fields of TrainRecipe)`."""
    return partial(training, llama)


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
    learned = {}
    for name, tensor in backend.adapter_state().items():
        noise = (0.05 * rng.standard_normal(tensor.shape)).astype(np.float32)
        learned[name] = noise if ".lora_" in name else tensor + noise
    return learned


def losses_of(backend: MlxBackend, steps: int = 8, rate: float = 1e-2, vocabulary: int = 256) -> list[float]:
    """The summed loss before each of some updates on the same batch."""
    batch, found = make_batch(vocabulary=vocabulary), []
    for _ in range(steps):
        found.append(backend.accumulate(batch)[0])
        backend.apply(rate, 1.0)
    return found


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
    numbers = np.indices(batch.tokens.shape)[0]
    parts = [slice(i, i + size) for i in range(0, len(batch.tokens), size)]
    return [Batch(batch.tokens[part], batch.mask[part], numbers=numbers[part]) for part in parts]


def quantized_llama(
    folder: Path, bits: int = 4, mode: str = "affine", dtype: str = "bfloat16", mixed: str | None = None
) -> ModelSource:
    """A llama that mlx-lm has quantized; `mixed` is its name for another number of bits in some modules."""
    source = write_llama(folder / "base")
    mlx_lm("utils")
    from mlx_lm.convert import convert

    out = str(folder / "mlx")
    convert(
        str(source),
        out,
        quantize=True,
        q_bits=bits,
        q_group_size=16 if mode == "nvfp4" else 32,
        q_mode=mode,
        dtype=dtype,
        quant_predicate=mixed,
    )
    return open_model(out)


def leave_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models stay in their own number format, as they do on a GPU."""
    little = psutil.virtual_memory()._replace(available=100_000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: little)

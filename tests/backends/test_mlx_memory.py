"""How much memory MLX may take and keep, by what the device says of itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mlxsft.backends import mlx_memory
from mlxsft.backends.mlx import MlxBackend, mx
from mlxsft.backends.mlx_memory import CPU_CACHE_BYTES, Limits, limit_memory, limits
from tests.backends.conftest import make_batch

Trainer = Callable[..., MlxBackend]
MAC = {"max_recommended_working_set_size": 11 << 30, "memory_size": 16 << 30, "device_name": "Apple M1"}


@pytest.mark.parametrize(
    ("device", "facts", "cache_gib", "expected"),
    [
        ("gpu", MAC, None, Limits(11 << 30, 11 << 30)),
        ("gpu", MAC, 0.5, Limits(11 << 30, 1 << 29)),
        ("gpu", MAC, 0.0, Limits(11 << 30, 0)),
        ("gpu", {"total_memory": 80 << 30}, None, Limits(None, None)),  # CUDA recommends nothing
        ("cpu", {"device_name": "EPYC"}, None, Limits(None, CPU_CACHE_BYTES)),
        ("cpu", {"device_name": "EPYC"}, 2.0, Limits(None, 2 << 30)),
    ],
)
def test_limits(device: str, facts: dict[str, object], cache_gib: float | None, expected: Limits) -> None:
    assert limits(device, facts, cache_gib) == expected


def test_a_macs_limits_are_set_and_nothing_is_wired(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, int]] = []
    monkeypatch.setattr(mlx_memory.mx, "device_info", lambda device: MAC)
    for name in ("memory", "cache", "wired"):
        monkeypatch.setattr(mlx_memory.mx, f"set_{name}_limit", lambda size, name=name: told.append((name, size)))
    limit_memory("gpu", 1.0)
    assert told == [("memory", 11 << 30), ("cache", 1 << 30)]


def test_the_recipes_limit_is_what_is_kept(trainer: Trainer) -> None:
    for gib, kept in ((0.0, False), (1.0, True)):
        backend = trainer(cache_limit=gib)
        mx.clear_cache()
        backend.accumulate(make_batch())
        backend.apply(1e-3, 1.0)
        assert (mx.get_cache_memory() > 0) == kept

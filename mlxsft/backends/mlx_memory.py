"""How much memory MLX takes on this device, and how much of what is free again it keeps for the next arrays.

No memory is wired: a Mac's other programs need theirs while one trains.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from mlxsft.backends.blas import load_blas

load_blas()  # before MLX is imported, which would take its own

import mlx.core as mx  # noqa: E402

# Freed memory that is kept on the CPU device. MLX keeps 32 MiB, and each step then asks the system for a gigabyte anew:
# 50,000 page faults (SmolLM2-135M, 4 rows of 160 tokens).
CPU_CACHE_BYTES = 2**30


class Limits(NamedTuple):
    """Bytes; None: MLX's own limit."""

    memory: int | None  # of arrays, from which on MLX waits for what is computed before it takes more
    cache: int | None  # of freed memory that is kept for the next arrays


def limits(device: str, facts: Mapping[str, Any], cache_gib: float | None) -> Limits:
    """The limits of a device, cpu or gpu, of which `mx.device_info` says these facts.

    On Apple's GPU arrays may take the working set that the device recommends, since macOS swaps beyond it; MLX's own
    limit is half as much again. `cache_gib` is the recipe's `train.cache_limit`.
    """
    memory = facts.get("max_recommended_working_set_size")
    cache = CPU_CACHE_BYTES if device == "cpu" else memory
    return Limits(memory, cache if cache_gib is None else int(cache_gib * 2**30))


def limit_memory(device: str, cache_gib: float | None = None) -> None:
    """Set the limits of the default device, which is cpu or gpu."""
    memory, cache = limits(device, mx.device_info(mx.default_device()), cache_gib)
    if memory is not None:
        mx.set_memory_limit(memory)
    if cache is not None:
        mx.set_cache_limit(cache)

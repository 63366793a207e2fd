"""How much memory MLX takes on this device, and how much of what is free again it keeps for the next arrays.

No memory is wired: a Mac's other programs need theirs while one trains.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Mapping
from typing import Any, NamedTuple

import psutil

from mlxsft.backends.blas import load_blas

load_blas()  # before MLX is imported, which would take its own

import mlx.core as mx  # noqa: E402

# MLX's CPU device takes its arrays from the C library, which asks the system anew for each large one and gives it back
# at once: page faults for as much memory as a step computes. glibc can be told to keep what is freed, and then finds
# room for any size in it, where MLX's own cache keeps whole arrays for equal ones. An update of SmolLM2-135M (4 rows,
# two cores) takes 0.75 of the time so, with a third of the page faults.
_GLIBC = ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
CPU_CACHE_BYTES = 0 if _GLIBC else 2**30  # MLX keeps 32 MiB by itself
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h
_LARGEST = 2**31 - 1


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
    if device == "cpu" and _GLIBC:
        _GLIBC.mallopt(_M_MMAP_THRESHOLD, 2**30)  # bytes from which on an array is asked of the system
        _GLIBC.mallopt(_M_TRIM_THRESHOLD, _LARGEST)  # freed bytes that are kept
        _GLIBC.mallopt(_M_ARENA_MAX, 1)  # others hold no more than 64 MiB, and each thread would have one


def memory_bytes() -> int:
    """Bytes that this process may take: Apple's recommended working set, else what it has and what is free."""
    recommended = limits("gpu", mx.device_info(mx.default_device()), None).memory
    if recommended is not None and mx.default_device().type == mx.gpu:
        return recommended
    return psutil.virtual_memory().available + psutil.Process().memory_info().rss


def give_back() -> None:
    """Return what MLX and the C library keep of freed memory to the system."""
    mx.clear_cache()
    if _GLIBC:
        _GLIBC.malloc_trim(0)

"""Several processes on MLX's own distributed engine: its ring over TCP, or MPI where mpirun started them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlxsft.backends import Alone, Ranks
from mlxsft.errors import UsageError

if TYPE_CHECKING:
    from mlxsft.backends.mlx import Sums

_DTYPES = {np.dtype(np.float32): mx.float32, np.dtype(np.float64): mx.float64}


class MlxRanks:
    """The ranks of one of MLX's groups; see `mlxsft.backends.Ranks`."""

    def __init__(self, group: mx.distributed.Group) -> None:
        self.group = group
        self.rank: int = group.rank()
        self.count: int = group.size()

    def sum(self, values: NDArray[Any]) -> NDArray[Any]:
        total = mx.distributed.all_sum(
            mx.array(values, dtype=_DTYPES[values.dtype]),
            group=self.group,
            stream=mx.cpu,
        )
        return np.array(total)


def join() -> Ranks:
    """The group that the launcher's variables describe. Raises UsageError where it does not come about."""
    hosts = os.environ.get("MLX_HOSTFILE")
    if hosts is not None and not Path(hosts).read_text(encoding="utf-8").strip():
        return Alone()  # so mlx.launch describes a single process
    try:
        group = mx.distributed.init(strict=True)
    except RuntimeError as error:
        raise UsageError(f"the ranks cannot work together: {error}", "Start them with --ranks or --hosts.") from error
    return MlxRanks(group)


def sum_of_ranks(ranks: Ranks, sums: Sums, trainable: Mapping[str, mx.array]) -> Sums:
    """What all ranks have accumulated for one update; a rank without rows adds zeros of the `trainable` shapes.

    The gradient travels as one float32 array, so that an update waits for the others once.
    """
    if ranks.count == 1:
        return sums
    parts = [sums.gradient.get(name, mx.zeros_like(array)) for name, array in trainable.items()]
    flat = mx.array(ranks.sum(np.concatenate([np.array(part.astype(mx.float32)).ravel() for part in parts])))
    pieces = mx.split(flat, np.cumsum([part.size for part in parts])[:-1].tolist())
    gradient = {
        name: piece.reshape(array.shape).astype(array.dtype)
        for (name, array), piece in zip(trainable.items(), pieces, strict=True)
    }
    loss, tokens = ranks.sum(np.array([sums.loss, sums.tokens], dtype=np.float64)).tolist()
    return replace(sums, gradient=gradient, loss=loss, tokens=int(tokens))

"""Calls of single modules of a model, taken over for a while: no class of mlx-lm is changed, no other model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from mlxsft.backends.blas import load_blas

load_blas()  # before MLX is imported, which would take its own

import mlx.nn as nn  # noqa: E402

Call = Callable[..., Any]


@contextmanager
def intercepted(modules: Iterable[nn.Module], instead: Callable[..., Any]) -> Iterator[None]:
    """Within it, calling one of the modules is `instead(plain, *arguments)`; `plain` is what the call did before."""
    kinds = [(module, type(module)) for module in modules]
    for module, kind in kinds:
        module.__class__ = type(kind.__name__, (kind,), {"__call__": _calling(kind, instead)})
    try:
        yield
    finally:
        for module, kind in reversed(kinds):
            module.__class__ = kind


def _calling(kind: type, instead: Callable[..., Any]) -> Call:
    def call(module: Any, *args: Any, **kwargs: Any) -> Any:
        return instead(kind.__call__.__get__(module), *args, **kwargs)

    return call

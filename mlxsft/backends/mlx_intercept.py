"""Calls of single modules of a model, taken over for a while: no class of mlx-lm is changed, no other model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from mlxsft.backends.blas import load_blas

load_blas()  # before MLX is imported, which would take its own

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
from mlx.utils import tree_flatten, tree_unflatten  # noqa: E402

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


@contextmanager
def computed_again(layers: list[nn.Module]) -> Iterator[None]:
    """Within it, the layers keep none of their activations for the backward pass, which computes them again.

    `mx.checkpoint` lets that happen as soon as the forward pass is over. Here a layer waits for the gradient of what it
    gives, and the layer below it for the gradients of its own numbers, for which its activations are kept until then:
    a further layer of SmolLM2-135M adds 2.7 MB to the peak at 2,048 tokens.
    """

    def again(plain: Any, x: mx.array, *args: Any, **kwargs: Any) -> Any:
        layer = plain.__self__
        names, values = zip(*flat, strict=True) if (flat := tree_flatten(layer.trainable_parameters())) else ((), ())

        def run(x: mx.array, *values: mx.array) -> Any:
            layer.update(tree_unflatten(list(zip(names, values, strict=True))))
            return plain(x, *args, **kwargs)

        once = mx.custom_function(run)

        @once.vjp
        def slopes(inputs: Any, slope: Any, _: Any) -> Any:
            waiting = mx.depends(list(inputs), [slope])
            first, *others = mx.vjp(run, waiting, [slope])[1]
            return *mx.depends([first], others), *others

        return once(x, *values)

    with intercepted(layers, again):
        yield

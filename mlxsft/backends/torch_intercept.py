"""Calls of single modules of a model, taken over for a while: no class of transformers is changed, no other model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


@contextmanager
def intercepted(modules: Iterable[nn.Module], instead: Callable[..., Any]) -> Iterator[None]:
    """Within it, calling one of the modules is `instead(plain, *arguments)`; `plain` is what the call did before."""
    plain = [(module, module.__dict__.get("forward")) for module in modules]
    for module, _ in plain:
        module.forward = _calling(module.forward, instead)
    try:
        yield
    finally:
        for module, forward in reversed(plain):
            if forward is None:
                del module.forward  # that of its class again
            else:
                module.forward = forward


def _calling(plain: Callable[..., Any], instead: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return instead(plain, *args, **kwargs)

    return call


@contextmanager
def computed_again(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Within it, the layers keep none of their activations for the backward pass, which computes them again."""

    def again(plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return checkpoint(plain, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    with intercepted(layers, again):
        yield

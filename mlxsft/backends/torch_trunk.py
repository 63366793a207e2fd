"""The frozen layers below the first trained one: what they give is the same in every epoch.

Layers are found and skipped by intercepting their calls, so that nothing here knows an architecture. A model whose
layers hand on more than their first argument is found out by the trunk cache, which compares losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn

from mlxsft.backends.torch_intercept import intercepted
from mlxsft.backends.torch_models import decoder_layers


class _TakenError(Exception):
    """What the layer above the trunk was to get is there; nothing after it needs to be computed."""


class Trunk:
    """The lowest `count` layers of a model, with everything below them."""

    def __init__(self, model: nn.Module, count: int) -> None:
        layers = list(decoder_layers(model))
        self._trunk, self.count = model.base_model, count
        self._below, self._first = layers[:count], layers[count]

    def outputs(self, tokens: torch.Tensor, **inputs: Any) -> torch.Tensor:
        """What the layer above the trunk gets [B, T, D], for tokens [B, T]."""
        taken: list[torch.Tensor] = []

        def take(plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            taken.append(args[0] if args else kwargs["hidden_states"])
            raise _TakenError

        with suppress(_TakenError), intercepted([self._first], take):
            self._trunk(input_ids=tokens, **inputs)
        return taken[0]

    @contextmanager
    def given(self, outputs: torch.Tensor) -> Iterator[None]:
        """Within it, the model uses these outputs [B, T, D] instead of computing them."""

        def skip(plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return args[0] if args else kwargs["hidden_states"]

        def put(plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if args:
                return plain(outputs, *args[1:], **kwargs)
            return plain(**{**kwargs, "hidden_states": outputs})

        with intercepted(self._below, skip), intercepted([self._first], put):
            yield

"""Activation checkpointing on MLX: the gradient layer by layer, so that the activations of one layer exist at a time.

Forward, the input of each trained layer is kept; backward, each is computed again from it. Every layer is evaluated
before the next one is asked for: in one graph MLX runs up to a hundred operations ahead of what is computed, and
allocates their results (on its CPU device 600 MB at 2,048 tokens of SmolLM2-135M, where a layer needs 240 MB).

Layers are taken out of the model by intercepting their calls, so that nothing here knows an architecture. A model that
does more between two layers than to hand on one array is found out by `ByLayer.why_not`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from mlxsft.backends.blas import load_blas
from mlxsft.backends.pieces import pieces

load_blas()  # before MLX is imported, which would take its own

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402

from mlxsft.backends.mlx_head import Arrays, Head, chunk_gradient, said_by  # noqa: E402
from mlxsft.backends.mlx_intercept import intercepted  # noqa: E402
from mlxsft.backends.mlx_models import LOADING_ERRORS  # noqa: E402

Within = Callable[[], AbstractContextManager[Any]]
Gradient = dict[str, mx.array]
# Yields what is to be evaluated before it goes on.
Steps = Generator[list[mx.array], None, tuple[mx.array, Gradient]]

TOLERANCE = 1e-4  # of the head's inputs in float32; other types round
TRIED = (2, 8)  # rows and tokens of the trial
HANDS_ON_MORE = "its layers hand on more than one array"


@dataclass(frozen=True)
class Call:
    """How a model calls one of its layers, but for the array that it hands on."""

    layer: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, x: mx.array) -> mx.array:
        result: mx.array = self.layer(x, *self.args, **self.kwargs)
        return result

    def of_tokens(self, shape: tuple[int, int]) -> bool:
        """Whether the layer gets numbers of each of the tokens [B, T] beside that array: no mask, no position."""
        given = [a for a in (*self.args, *self.kwargs.values()) if isinstance(a, mx.array)]
        return any(a.shape[:2] == shape and mx.issubdtype(a.dtype, mx.floating) for a in given)


class ByLayer:
    """A model taken apart into what stands before its layers, the layers, and what follows them."""

    def __init__(self, model: nn.Module, head: Head) -> None:
        self._model, self._head = model, head
        paths = {id(module): f"{path}." for path, module in model.named_modules()}
        self._prefixes = {id(layer): paths[id(layer)] for layer in model.layers}

    def why_not(self) -> str | None:
        """Why this model cannot be computed so, as a clause; None where the head then gets the same input."""
        tokens = mx.arange(TRIED[0] * TRIED[1], dtype=mx.int32).reshape(TRIED)
        results: list[Any] = []

        def note(plain: Any, *args: Any, **kwargs: Any) -> Any:
            results.append(plain(*args, **kwargs))
            return results[-1]

        try:
            with intercepted(self._model.layers, note):
                expected = self._head.hidden(tokens)
            if not all(isinstance(result, mx.array) for result in results):
                return HANDS_ON_MORE
            x, calls = self._start(tokens)
            if self._trains_outside() and any(call.of_tokens(TRIED) for call in calls):
                return "its layers are given more than one array, and what makes those is trained"
            for call in calls:
                x = call(x)
            given = self._end(x, tokens)
        except LOADING_ERRORS as error:
            return said_by(error)
        tolerance = TOLERANCE if expected.dtype == mx.float32 else 0.02
        equal = mx.allclose(given, expected, rtol=tolerance, atol=tolerance).item()
        return None if equal else HANDS_ON_MORE

    def gradient(
        self,
        weights: Arrays,
        tokens: mx.array,
        chosen: mx.array,
        targets: mx.array,
        counted: mx.array,
        *,
        smoothing: float,
        within: Within,
        trunk: mx.array | None = None,
        below: int = 0,
        **inputs: Any,
    ) -> Steps:
        """Σ `counted` × loss over the `chosen` places of tokens [B, T], and its gradient by the trained weights.

        Nothing is computed outside of `within`. `below` layers from the lowest up are frozen, and so is all before
        them; with `trunk` [B, T, D] that is what they give.
        """
        own = {key: self._of_layer(weights, prefix) for key, prefix in self._prefixes.items()}
        outer = [name for name in weights if not any(name in names for names in own.values())]
        with within():
            x, calls = self._start(tokens, **inputs)
        if trunk is not None:
            x, calls, below = trunk, calls[below:], 0
        kept: list[mx.array] = []
        for number, call in enumerate(calls):
            if number >= below:
                kept.append(x)
            with within():
                x = call(x)
            yield [x]

        def end(x: mx.array, values: list[mx.array]) -> mx.array:
            self._place(outer, values)
            hidden = self._end(x, tokens, **inputs)
            return hidden.reshape(-1, hidden.shape[-1])[chosen]

        outer_values = [weights[name] for name in outer]
        with within():
            hidden = end(x, outer_values)
        yield [hidden]
        total, slope, found = yield from self._through_head(
            weights, hidden, targets, counted, smoothing=smoothing, within=within
        )
        x, more = yield from _back(end, x, outer_values, slope, within)
        _add(found, outer, more)
        goes_on = bool(outer) and trunk is None and not below  # to what stands before the layers
        for number, call in reversed(list(enumerate(calls))[below:]):
            names = own[id(call.layer)]

            def run(x: mx.array, values: list[mx.array], call: Call = call, names: list[str] = names) -> mx.array:
                self._place(names, values)
                return call(x)

            values, passes_on = [weights[name] for name in names], goes_on or number > below
            x, more = yield from _back(run, kept.pop(), values, x, within, passes_on=passes_on)
            _add(found, names, more)
        if goes_on:

            def start(_: mx.array, values: list[mx.array]) -> mx.array:
                self._place(outer, values)
                return self._start(tokens, **inputs)[0]

            _, more = yield from _back(start, mx.array(0.0), outer_values, x, within, passes_on=False)
            _add(found, outer, more)
        self._head.place(weights)
        return total, found

    def _through_head(
        self,
        weights: Arrays,
        hidden: mx.array,
        targets: mx.array,
        counted: mx.array,
        *,
        smoothing: float,
        within: Within,
    ) -> Generator[list[mx.array], None, tuple[mx.array, mx.array, Gradient]]:
        """The loss, its gradient by the input of the head [N, D], and that by the head's trained weights."""
        names = [name for name in weights if name.startswith(self._head.prefixes)]
        values = [weights[name] for name in names]
        gradient = chunk_gradient(self._head, names, smoothing)
        total, slopes, found = mx.array(0.0), [], {name: mx.zeros_like(weights[name]) for name in names}
        with within():
            chunks = pieces(hidden.shape[0], self._head.chunk_rows)
        for part in chunks:
            with within():
                loss, (slope, more) = gradient(hidden[part], values, targets[part], counted[part])
                total = total + loss
                _add(found, names, more)
            yield [total, slope, *found.values()]
            slopes.append(slope)
        with within():
            return total, mx.concatenate(slopes), found

    def _start(self, tokens: mx.array, **inputs: Any) -> tuple[mx.array, list[Call]]:
        """What the first layer gets [B, T, D], and how the layers are called. Raises ValueError where that depends."""
        given: list[mx.array] = []
        calls: list[Call] = []

        def note(plain: Any, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
            given.append(x)
            calls.append(Call(plain.__self__, args, kwargs))
            return x

        with intercepted(self._model.layers, note):
            self._head.hidden(tokens, **inputs)
        if not calls or any(x is not given[0] for x in given):
            raise ValueError("it does more between its layers than to hand on what they give")
        plain = [Call(call.layer, call.args, call.kwargs) for call in calls]
        return given[0], plain

    def _end(self, x: mx.array, tokens: mx.array, **inputs: Any) -> mx.array:
        """The input of the head [B, T, D] for what the last layer gives."""

        def put(plain: Any, _: mx.array, *args: Any, **kwargs: Any) -> mx.array:
            return x

        with intercepted(self._model.layers, put):
            return self._head.hidden(tokens, **inputs)

    def _place(self, names: list[str], values: list[mx.array]) -> None:
        self._head.place(dict(zip(names, values, strict=True)))

    def _trains_outside(self) -> bool:
        """Whether anything that no layer has is trained."""
        trained = tree_flatten(self._model.trainable_parameters())
        return any(not name.startswith(tuple(self._prefixes.values())) for name, _ in trained)

    @staticmethod
    def _of_layer(weights: Mapping[str, Any], prefix: str) -> list[str]:
        return [name for name in weights if name.startswith(prefix)]


def _back(
    function: Callable[[mx.array, list[mx.array]], mx.array],
    x: mx.array,
    values: list[mx.array],
    slope: mx.array,
    within: Within,
    *,
    passes_on: bool = True,
) -> Generator[list[mx.array], None, tuple[mx.array, list[mx.array]]]:
    """The gradients by x, where it `passes_on`, and by the values of a function whose result has this gradient."""
    with within():
        _, slopes = mx.vjp(lambda x, *values: function(x, list(values)), [x, *values], [slope])
    yield slopes if passes_on else slopes[1:]
    return slopes[0], slopes[1:]


def together(parts: list[Steps]) -> list[tuple[mx.array, Gradient]]:
    """What each of the parts of a batch gives, computed side by side."""
    given: dict[int, tuple[mx.array, Gradient]] = {}
    while len(given) < len(parts):
        wanted: list[mx.array] = []
        for number, part in enumerate(parts):
            try:
                wanted += next(part) if number not in given else []
            except StopIteration as end:
                given[number] = end.value
        mx.eval(wanted)
    return [given[number] for number in range(len(parts))]


def _add(found: Gradient, names: Iterable[str], more: list[mx.array]) -> None:
    for name, array in zip(names, more, strict=True):
        found[name] = found[name] + array if name in found else array

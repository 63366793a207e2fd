"""The output head on trained positions only, in chunks: logits of a whole batch never exist.

mlx-lm's models apply their head to every position, and some cap or scale the logits afterwards. Here the head's input
is taken on its way (`Head.hidden`), the trained positions are chosen from it, and the end of the model is called on
those (`Head.logits`): the whole model is called again, with the chosen positions put in at the head. MLX computes
nothing before it is needed, so of that second call nothing runs but the head and what follows it, whatever that is.
Layers that hand on one array need not even be called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from mlxsft.backends.blas import load_blas
from mlxsft.backends.pieces import pieces

load_blas()  # before MLX is imported, which would take its own

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402

from mlxsft.backends.mlx_exp import is_faster, softmax  # noqa: E402
from mlxsft.backends.mlx_intercept import intercepted  # noqa: E402
from mlxsft.backends.mlx_models import LOADING_ERRORS  # noqa: E402

Arrays = Mapping[str, mx.array]

NAMES = ("lm_head", "output", "embed_out", "head")  # of a head that is no embedding
CHUNK_BYTES = 64 * 2**20  # of float32 logits, about; a few times as much is needed around them
TOLERANCE = 1e-4  # of logits in float32, absolute and relative; other types round
TRIED = (2, 8)  # rows and tokens of the trial


class Head:
    """The end of a model, from the input of its output matrix to the logits."""

    def __init__(self, model: nn.Module, place: Callable[[Arrays], None]) -> None:
        """`place` puts trained numbers into the model."""
        self._model, self.place = model, place
        self._left_out: list[nn.Module] = []  # layers that are not called for logits
        in_layers = {id(module) for layer in model.layers for module in layer.modules()}
        heads = {p: m for p, m in model.named_modules() if id(m) not in in_layers and _may_be_head(p, m)}
        self.prefixes = tuple(f"{path}." for path in heads)
        outermost = {p: m for p, m in heads.items() if not p.startswith(self.prefixes)}  # not what an adapter wraps
        self._embeddings = [module for module in outermost.values() if hasattr(module, "as_linear")]
        self._outputs = [module for module in outermost.values() if not hasattr(module, "as_linear")]
        self.above_layers = tuple(f"{path}." for path, m in outermost.items() if not hasattr(m, "as_linear"))

    def hidden(self, tokens: mx.array, **inputs: Any) -> mx.array:
        """The input of the head [B, T, D] for tokens [B, T]. Raises ValueError where no head was called."""
        taken: list[mx.array] = []

        def take(plain: Callable[[mx.array], mx.array], x: mx.array) -> mx.array:
            taken.append(x)
            return plain(x)  # for what follows, which is never computed

        with self._called(take):
            self._model(tokens, **inputs)
        if len(taken) != 1:
            raise ValueError(f"its head is called {len(taken)} times")
        return taken[0]

    def logits(self, hidden: mx.array) -> mx.array:
        """Logits [N, V] for inputs of the head [N, D]."""

        def put(plain: Callable[[mx.array], mx.array], _: mx.array) -> mx.array:
            return plain(hidden[None])

        with intercepted(self._left_out, _hand_on), self._called(put):
            logits: mx.array = self._model(mx.zeros((1, hidden.shape[0]), dtype=mx.int32))
        return logits[0]

    def why_not(self) -> str | None:
        """Why this model's head cannot be called on chosen positions, as a clause; None where it gives equal logits.

        It is asked before anything else.
        """
        tokens = mx.arange(TRIED[0] * TRIED[1], dtype=mx.int32).reshape(TRIED)
        try:
            expected = self._model(tokens).astype(mx.float32)
            hidden = self.hidden(tokens)
        except LOADING_ERRORS as error:
            return said_by(error)
        # At least 16: chunks are about as large, and their products are to stay products of matrices.
        self.chunk_rows = max(16, CHUNK_BYTES // (4 * expected.shape[-1]))
        self._left_out = list(self._model.layers)
        if self._why_not_from(hidden, expected) is None:
            return None
        self._left_out = []
        return self._why_not_from(hidden, expected)

    def trust(self, other: Head) -> None:
        """Take over what `why_not` found of the same model with other numbers."""
        self.chunk_rows = other.chunk_rows
        self._left_out = list(self._model.layers) if other._left_out else []

    def _why_not_from(self, hidden: mx.array, expected: mx.array) -> str | None:
        """Why inputs of the head [B, T, D] do not give these logits [B, T, V]."""
        try:
            given = self.logits(hidden.reshape(-1, hidden.shape[-1])).reshape(expected.shape).astype(mx.float32)
        except LOADING_ERRORS as error:
            return said_by(error)
        tolerance = TOLERANCE if hidden.dtype == mx.float32 else 0.02
        if mx.allclose(given, expected, rtol=tolerance, atol=tolerance).item():
            return None
        return f"its logits then differ by up to {mx.abs(given - expected).max().item():.2g}"

    @contextmanager
    def _called(self, instead: Callable[[Callable[[mx.array], mx.array], mx.array], mx.array]) -> Iterator[None]:
        """Within it, the head's matrix product is `instead(product, input)`."""
        for embedding in self._embeddings:
            plain = embedding.as_linear
            embedding.as_linear = lambda x, plain=plain: instead(plain, x)
        try:
            with intercepted(self._outputs, instead):
                yield
        finally:
            for embedding in self._embeddings:
                del embedding.as_linear


def _hand_on(_: Any, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
    return x


def said_by(error: BaseException) -> str:
    """What went wrong in a trial, as a clause."""
    return str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"


def _may_be_head(path: str, module: nn.Module) -> bool:
    return hasattr(module, "as_linear") or path.rpartition(".")[2] in NAMES


def chunked_losses(head: Head, hidden: mx.array, targets: mx.array) -> mx.array:
    """Cross-entropy in nats, float32 [N], for inputs of the head [N, D], a chunk at a time."""
    losses: list[mx.array] = []
    for part in pieces(hidden.shape[0], head.chunk_rows):
        chunk = hidden[part]
        if losses:
            chunk = mx.depends([chunk], [losses[-1]])[0]  # one chunk after another, not all in memory
        losses.append(cross_entropy(head.logits(chunk), targets[part]))
    return mx.concatenate(losses)


def summed_loss(
    head: Head,
    hidden: mx.array,
    targets: mx.array,
    weights: mx.array,
    parameters: Arrays,
    *,
    smoothing: float,
) -> mx.array:
    """Σ weight × loss over inputs of the head [N, D]; its gradient is made chunk by chunk together with it.

    `parameters` are those trained ones that the head uses. The loss is the cross-entropy in nats; with label
    `smoothing` s it is (1 − s) of that and s of the mean over the vocabulary (https://arxiv.org/abs/1512.00567).
    """
    names = list(parameters)
    gradient = chunk_gradient(head, names, smoothing)

    @mx.custom_function
    def chunked(
        hidden: mx.array, values: list[mx.array], targets: mx.array, weights: mx.array
    ) -> tuple[mx.array, mx.array, list[mx.array]]:
        total, slopes = mx.array(0.0), [mx.zeros_like(value) for value in values]
        hidden_slopes: list[mx.array] = []
        for part in pieces(hidden.shape[0], head.chunk_rows):
            chunk = mx.depends([hidden[part]], [total, *slopes, *hidden_slopes[-1:]])[0]
            loss, (slope, more) = gradient(chunk, values, targets[part], weights[part])
            total, slopes = total + loss, [a + b for a, b in zip(slopes, more, strict=True)]
            hidden_slopes.append(slope)
        return total, mx.concatenate(hidden_slopes), slopes

    @chunked.vjp
    def chunked_vjp(primals: Any, cotangents: Any, outputs: Any) -> Any:
        _, _, targets, weights = primals
        scale, (_, hidden_slope, slopes) = cotangents[0], outputs
        return (
            scale * hidden_slope,
            [scale * slope for slope in slopes],
            mx.zeros_like(targets),
            mx.zeros_like(weights),
        )

    values = [parameters[name] for name in names]
    outputs: Any = chunked(hidden, values, targets, weights)
    total: mx.array = outputs[0]
    head.place(parameters)
    return total


def chunk_gradient(head: Head, names: list[str], smoothing: float) -> Callable[..., Any]:
    """Σ weight × loss of inputs of the head, and its gradients by those and by the weights of the head of these names.

    Takes inputs [N, D], the weights, targets [N] and how much each counts [N].
    """

    def loss_of(hidden: mx.array, values: list[mx.array], targets: mx.array, weights: mx.array) -> mx.array:
        head.place(dict(zip(names, values, strict=True)))
        losses = cross_entropy(head.logits(hidden), targets, smoothing)
        return (losses * weights).sum()

    found: Callable[..., Any] = mx.value_and_grad(loss_of, argnums=(0, 1))
    return found


def cross_entropy(logits: mx.array, targets: mx.array, smoothing: float = 0.0) -> mx.array:
    """Cross-entropy in nats, float32 [N], of logits [N, V] and token ids [N].

    On MLX's CPU device exponentials take longer than the products around them, so that one softmax serves loss and
    gradient: log Σ exp(x) is the largest logit less the logarithm of its probability, which cannot underflow.
    """

    @mx.custom_function
    def losses(logits: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
        logits = logits.astype(mx.float32)
        probabilities = softmax(logits) if is_faster(logits) else mx.softmax(logits, axis=-1)
        normal = logits.max(axis=-1) - mx.log(probabilities.max(axis=-1))
        losses = normal - mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        if smoothing:
            losses = (1 - smoothing) * losses + smoothing * (normal - logits.mean(axis=-1))
        return losses, probabilities

    @losses.vjp
    def losses_vjp(primals: Any, cotangents: Any, outputs: Any) -> Any:
        logits, targets = primals
        weights, slope = cotangents[0], outputs[1] * cotangents[0][:, None]
        if smoothing:
            slope = slope - (smoothing / logits.shape[-1]) * weights[:, None]
        slope = slope.at[mx.arange(targets.size), targets].add((smoothing - 1) * weights)
        return slope.astype(logits.dtype), mx.zeros_like(targets)

    outputs: Any = losses(logits, targets)
    result: mx.array = outputs[0]
    return result

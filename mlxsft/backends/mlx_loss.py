"""The loss of a batch, and all that keeps its memory and time small: head, attention, activations, trunk.

Here alone inputs are shifted: the loss of `tokens[b, t]` comes from what the model says at `tokens[b, t - 1]`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mlxsft.backends.blas import load_blas
from mlxsft.data.batches import width

load_blas()  # before MLX is imported, which would take its own

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402

from mlxsft.backends.mlx_attention import economical_functions  # noqa: E402
from mlxsft.backends.mlx_head import Arrays, Head, chunked_losses, cross_entropy, summed_loss  # noqa: E402
from mlxsft.backends.mlx_layers import ByLayer, Steps, Within  # noqa: E402
from mlxsft.backends.mlx_packing import isolation  # noqa: E402
from mlxsft.backends.mlx_trunk import Trunk, from_numpy  # noqa: E402

if TYPE_CHECKING:
    from mlxsft.data.batches import Batch
    from mlxsft.recipe_training import TrainRecipe


class Inputs(NamedTuple):
    """What a loss is computed from. Without the last column, the last token of each row predicts nothing."""

    tokens: mx.array  # [B, T]
    segments: mx.array | None  # [B, T]
    chosen: mx.array  # [N], places in the flattened tokens[:, 1:] that get a loss
    weights: mx.array  # [N], 1, or 0 for a place that is there for the shape alone
    trunk: mx.array | None  # [B, T, D], what the frozen layers give


class Loss:
    """The loss of a model's batches. `notes` say what this model cannot have, in sentences."""

    def __init__(self, model: nn.Module, place: Callable[[Arrays], None], *, by_layer: bool = False) -> None:
        """`place` puts trained numbers into the model; `by_layer`: the gradient is made layer by layer."""
        self._model = model
        self._head: Head | None = Head(model, place)
        self._by_layer: ByLayer | None = None
        self.notes: list[str] = []
        if (why := self._head.why_not()) is not None:
            self._head = None
            self.notes += [f"the output head is applied to every position, which takes memory and time: {why}"]
        if by_layer and self._head is not None:
            self._by_layer = ByLayer(model, self._head)
            why = self._by_layer.why_not()
        if by_layer and why is not None:
            self._by_layer = None
            self.notes += [f"activations are kept, since this model cannot be computed layer by layer: {why}"]

    @property
    def is_by_layer(self) -> bool:
        return self._by_layer is not None

    @property
    def above_layers(self) -> tuple[str, ...]:
        """Beginnings of the names of tensors that no layer depends on."""
        return self._head.above_layers if self._head else ()

    def inputs(self, batch: Batch, *, few_shapes: bool) -> Inputs:
        """The arrays of a batch; with `few_shapes` the number of chosen places is rounded up."""
        chosen = np.flatnonzero(batch.mask[:, 1:])
        idle = width(chosen.size) - chosen.size if few_shapes else 0
        return Inputs(
            mx.array(batch.tokens),
            None if batch.segments is None else mx.array(batch.segments),
            mx.array(np.pad(chosen, (0, idle)).astype(np.int32)),
            mx.array(np.pad(np.ones(chosen.size, dtype=np.float32), (0, idle))),
            None if batch.trunk is None else from_numpy(batch.trunk),
        )

    def each(self, batch: Batch, trunk: Trunk | None) -> mx.array:
        """The cross-entropy in nats of every place of the batch that is trained, float32 [N]."""
        inputs = self.inputs(batch, few_shapes=False)
        targets = _targets(inputs)
        with self._economical(inputs, trunk):
            if self._head is None:
                return cross_entropy(self._all_logits(inputs), targets)
            return chunked_losses(self._head, self._chosen_hidden(self._head, inputs), targets)

    def summed(self, parameters: Arrays, inputs: Inputs, trunk: Trunk | None, train: TrainRecipe) -> mx.array:
        """Σ loss over the chosen places, differentiable by `parameters`, which are in the model."""
        smoothing, targets = train.label_smoothing, _targets(inputs)
        with self._economical(inputs, trunk):
            if self._head is None:
                losses = cross_entropy(self._all_logits(inputs), targets, smoothing)
                total: mx.array = (losses * inputs.weights).sum()
                return total
            used = {name: array for name, array in parameters.items() if name.startswith(self._head.prefixes)}
            hidden = self._chosen_hidden(self._head, inputs)
            return summed_loss(self._head, hidden, targets, inputs.weights, used, smoothing=smoothing)

    def by_layer(self, parameters: Arrays, inputs: Inputs, trunk: Trunk, train: TrainRecipe, within: Within) -> Steps:
        """The same and its gradient, each layer's activations computed again when they are needed."""
        assert self._by_layer is not None

        @contextmanager
        def economical() -> Iterator[None]:
            with within(), economical_functions():
                yield

        return self._by_layer.gradient(
            parameters,
            inputs.tokens[:, :-1],
            inputs.chosen,
            _targets(inputs),
            inputs.weights,
            smoothing=train.label_smoothing,
            within=economical,
            trunk=None if inputs.trunk is None else inputs.trunk[:, :-1],
            below=trunk.count,
            **self._cache(inputs),
        )

    def trunk_outputs(self, batch: Batch, trunk: Trunk) -> mx.array:
        """What the layer above the trunk gets, [B, T, D]."""
        inputs = self.inputs(batch, few_shapes=False)
        cache = {} if inputs.segments is None else {"cache": isolation(self._model, inputs.segments)}
        with economical_functions():
            return trunk.outputs(inputs.tokens, **cache)

    @contextmanager
    def _economical(self, inputs: Inputs, trunk: Trunk | None) -> Iterator[None]:
        """Within it, the model is called in the way that costs least."""
        with ExitStack() as stack:
            stack.enter_context(economical_functions())
            if inputs.trunk is not None and trunk is not None:
                stack.enter_context(trunk.given(inputs.trunk[:, :-1]))
            yield

    def _chosen_hidden(self, head: Head, inputs: Inputs) -> mx.array:
        hidden = head.hidden(inputs.tokens[:, :-1], **self._cache(inputs))
        return hidden.reshape(-1, hidden.shape[-1])[inputs.chosen]

    def _all_logits(self, inputs: Inputs) -> mx.array:
        logits: mx.array = self._model(inputs.tokens[:, :-1], **self._cache(inputs))
        return logits.reshape(-1, logits.shape[-1])[inputs.chosen]

    def _cache(self, inputs: Inputs) -> dict[str, Any]:
        return {} if inputs.segments is None else {"cache": isolation(self._model, inputs.segments[:, :-1])}


def _targets(inputs: Inputs) -> mx.array:
    return inputs.tokens[:, 1:].reshape(-1)[inputs.chosen]

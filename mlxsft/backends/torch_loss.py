"""The loss of a batch, and all that keeps its memory and time small: head, activations, trunk.

Here alone inputs are shifted: the loss of `tokens[b, t]` comes from what the model says at `tokens[b, t - 1]`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.functional import cross_entropy

from mlxsft.backends.torch_head import Head
from mlxsft.backends.torch_intercept import computed_again
from mlxsft.backends.torch_models import decoder_layers
from mlxsft.backends.torch_trunk import Trunk

if TYPE_CHECKING:
    from mlxsft.data.batches import Batch
    from mlxsft.recipe_training import TrainRecipe


class Inputs(NamedTuple):
    """What a loss is computed from. The last token of each row predicts nothing, so that the model never sees it."""

    tokens: torch.Tensor  # [B, T]
    positions: torch.Tensor | None  # [B, T - 1], beginning anew in every packed row
    chosen: torch.Tensor  # [N], places in the flattened tokens[:, 1:] that get a loss
    trunk: torch.Tensor | None  # [B, T - 1, D], what the frozen layers give


class Loss:
    """The loss of a model's batches. `note` says what this model cannot have, as a sentence."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.head: Head | None = Head(model)
        self.note = ""
        if (why := self.head.why_not()) is not None:
            self.head = None
            self.note = f"the output head is applied to every position, which takes memory and time: {why}"

    @property
    def above_layers(self) -> tuple[str, ...]:
        """Beginnings of the names of tensors that no layer depends on."""
        return self.head.above_layers if self.head else ()

    @torch.no_grad()  # type: ignore[untyped-decorator]  # torch is taken without its types
    def each(self, batch: Batch, trunk: Trunk | None) -> NDArray[np.float32]:
        """The cross-entropy in nats of every trained token of a batch, float32 [N]."""
        inputs = inputs_of(batch)
        targets = _targets(inputs)
        with self._economical(inputs, trunk):
            if self.head is None:
                return _numpy(cross_entropy(self._all_logits(inputs), targets, reduction="none"))
            hidden, parts = self._chosen_hidden(self.head, inputs), self.head.chunks(len(targets))
            losses = [cross_entropy(self.head.logits(hidden[p]), targets[p], reduction="none") for p in parts]
        return _numpy(torch.cat(losses)) if losses else np.zeros(0, np.float32)

    def backward(self, batch: Batch, trunk: Trunk | None, train: TrainRecipe) -> float:
        """Σ loss over the trained tokens of a batch; its gradient is added up in the model's parameters.

        The loss is the cross-entropy in nats; with label smoothing s it is (1 − s) of that and s of the mean over the
        vocabulary (https://arxiv.org/abs/1512.00567). The head's gradient is made chunk by chunk together with it.
        """
        inputs = inputs_of(batch)
        targets, smoothing = _targets(inputs), train.label_smoothing
        with self._economical(inputs, trunk, again=train.checkpoint_activations):
            if self.head is None:
                total = cross_entropy(self._all_logits(inputs), targets, reduction="sum", label_smoothing=smoothing)
                total.backward()
                return float(total.item())
            hidden = self._chosen_hidden(self.head, inputs)
            summed, slopes = 0.0, []
            for part in self.head.chunks(len(targets)):
                chunk = hidden[part].detach().requires_grad_()
                logits = self.head.logits(chunk)
                loss, slope = loss_and_slope(logits.detach(), targets[part], smoothing)
                logits.backward(slope)
                summed += loss
                slopes.append(chunk.grad)
                del logits, slope  # before the next ones are made
            if slopes and hidden.requires_grad:  # not where the head alone is trained
                hidden.backward(torch.cat(slopes))
        return summed

    @torch.no_grad()  # type: ignore[untyped-decorator]  # torch is taken without its types
    def trunk_outputs(self, batch: Batch, trunk: Trunk) -> NDArray[np.float32]:
        """What the layer above the trunk gets, [B, T, D]."""
        tokens = torch.from_numpy(batch.tokens.astype(np.int64))
        places = None if batch.segments is None else positions(batch.segments)
        return _numpy(trunk.outputs(tokens, **_positions(places)))

    @contextmanager
    def _economical(self, inputs: Inputs, trunk: Trunk | None, *, again: bool = False) -> Iterator[None]:
        """Within it, the model is called in the way that costs least."""
        with ExitStack() as stack:
            if again:
                stack.enter_context(computed_again(decoder_layers(self._model)))
            if inputs.trunk is not None and trunk is not None:
                stack.enter_context(trunk.given(inputs.trunk))
            yield

    def _chosen_hidden(self, head: Head, inputs: Inputs) -> torch.Tensor:
        return head.hidden(inputs.tokens[:, :-1], **_positions(inputs.positions)).flatten(0, 1)[inputs.chosen]

    def _all_logits(self, inputs: Inputs) -> torch.Tensor:
        logits: torch.Tensor = self._model(input_ids=inputs.tokens[:, :-1], **_positions(inputs.positions)).logits
        return logits.flatten(0, 1)[inputs.chosen]


def pieces(batch: Batch, tokens: int) -> Iterator[tuple[slice, slice]]:
    """The lines of a batch in equal groups of at most so many tokens, or of one line, and the columns that each needs.

    Each ends with its last trained token: what follows has no part in any loss. A group without one is left out.
    """
    count, width = batch.tokens.shape
    groups = -(-count // max(1, tokens // width))
    lines = -(-count // groups)
    for start in range(0, count, lines):
        trained = np.flatnonzero(batch.mask[start : start + lines].any(axis=0))
        if len(trained):
            yield slice(start, start + lines), slice(trained[-1] + 1)


def loss_and_slope(logits: torch.Tensor, targets: torch.Tensor, smoothing: float) -> tuple[float, torch.Tensor]:
    """Σ loss of logits [N, V] in nats, and its gradient in them [N, V], in one array where autograd would keep four."""
    places, spread = targets[:, None], smoothing / logits.shape[1]
    wanted = (1 - smoothing) * logits.gather(1, places)
    if smoothing:
        wanted += smoothing * logits.mean(dim=1, keepdim=True)
    largest = logits.amax(dim=1, keepdim=True)
    slope = (logits - largest).exp_()
    total = slope.sum(dim=1, keepdim=True)
    loss = float((total.log() + largest - wanted).sum())
    slope.mul_(1 / total)
    if smoothing:
        slope -= spread
    slope.scatter_add_(1, places, (smoothing - 1) * torch.ones_like(total))
    return loss, slope


def inputs_of(batch: Batch) -> Inputs:
    """The tensors of a batch, shifted."""
    places = None if batch.segments is None else positions(batch.segments)[:, :-1]
    return Inputs(
        torch.from_numpy(batch.tokens.astype(np.int64)),
        places,
        torch.from_numpy(np.flatnonzero(batch.mask[:, 1:])),
        None if batch.trunk is None else torch.from_numpy(np.ascontiguousarray(batch.trunk[:, :-1])),
    )


def positions(segments: NDArray[np.int32]) -> torch.Tensor:
    """[B, T]: the position of each token in its own row; where they begin anew, transformers isolates what follows."""
    places = np.broadcast_to(np.arange(segments.shape[1]), segments.shape)
    begins = np.diff(segments, axis=1, prepend=segments[:, :1]) != 0
    first = np.maximum.accumulate(np.where(begins, places, 0), axis=1)
    return torch.from_numpy(places - first)


def _positions(places: torch.Tensor | None) -> dict[str, Any]:
    """The arguments of a model that keeps nothing of what it reads."""
    return {"use_cache": False} if places is None else {"use_cache": False, "position_ids": places}


def _targets(inputs: Inputs) -> torch.Tensor:
    return inputs.tokens[:, 1:].flatten()[inputs.chosen]


def _numpy(array: torch.Tensor) -> NDArray[np.float32]:
    found: NDArray[np.float32] = array.detach().numpy()
    return found

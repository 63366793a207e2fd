"""A model with its adapter beside another one on PyTorch: how far what it says of the next token moves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from mlxsft.backends import Divergence
from mlxsft.backends.torch import TorchBackend
from mlxsft.backends.torch_head import CHUNK_ROWS, Head
from mlxsft.backends.torch_loss import inputs_of

if TYPE_CHECKING:
    from mlxsft.data.batches import Batch
    from mlxsft.models.adapter import Adapter
    from mlxsft.models.source import ModelSource


class TorchReference:
    """See `backends.Reference`."""

    def __init__(self, source: ModelSource, batches: Sequence[Batch], adapter: Adapter) -> None:
        self._backend, self._batches = TorchBackend(source), batches
        self._backend.attach_saved(adapter.config, adapter.tensors)
        self._model = _Judged(self._backend)
        self.notes = self._backend.notes

    @torch.no_grad()  # type: ignore[untyped-decorator]  # torch is taken without its types
    def stored(self, source: ModelSource, which: Iterable[int]) -> Divergence:
        other = _Judged(TorchBackend(source))
        sums, tokens = torch.zeros(4, dtype=torch.float64), 0
        for i in which:
            inputs = inputs_of(self._batches[i])
            targets = inputs.tokens[:, 1:].flatten()[inputs.chosen]
            parts = zip(self._model.logits(self._batches[i]), other.logits(self._batches[i]), strict=True)
            for (rows, logits), (_, moved) in parts:
                sums += _sums(logits, moved, targets[rows])
            tokens += len(targets)
        base_loss, loss, kl, changed = sums.tolist()
        return Divergence(tokens, base_loss, loss, kl, round(changed))

    def peak_bytes(self) -> int:
        return self._backend.peak_bytes()


class _Judged:
    """A model whose head is called on judged positions only; where that cannot be, on all, and the logits chosen."""

    def __init__(self, backend: TorchBackend) -> None:
        self._model, head = backend.model, Head(backend.model)
        self._head = head if head.why_not() is None else None

    def logits(self, batch: Batch) -> Iterator[tuple[slice, torch.Tensor]]:
        """(which, logits [N, V]) of the judged positions of a batch, some at a time."""
        inputs = inputs_of(batch)
        tokens = inputs.tokens[:, :-1]
        if self._head:
            ends = self._head.hidden(tokens, use_cache=False)
        else:
            ends = self._model(input_ids=tokens, use_cache=False).logits
        ends = ends.flatten(0, 1)[inputs.chosen]
        for start in range(0, len(ends), CHUNK_ROWS):  # of both models alike
            rows = slice(start, start + CHUNK_ROWS)
            yield rows, self._head.logits(ends[rows]) if self._head else ends[rows]


def _sums(base: torch.Tensor, other: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Over positions: both cross-entropies in nats, KL(base ‖ other) in nats, and how often the top choice differs."""
    p, q = base.log_softmax(dim=-1), other.log_softmax(dim=-1)
    losses = [-x.gather(-1, targets[:, None]).sum() for x in (p, q)]
    kl = (p.exp() * (p - q)).sum(dim=-1).clamp(min=0).sum()
    changed = (p.argmax(dim=-1) != q.argmax(dim=-1)).sum()
    return torch.stack([*losses, kl, changed]).double()

"""The output head on trained positions only, in chunks: logits of a whole batch never exist.

The trunk of a transformers model, its `base_model`, gives what the head gets. Here the trained positions are chosen
from that (`Head.hidden`), and the whole model is called on those alone with its trunk taken over (`Head.logits`): so
soft-caps and scales after the head are the model's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from mlxsft.backends.torch_intercept import intercepted
from mlxsft.backends.torch_models import LOADING_ERRORS, is_tied
from mlxsft.models.names import mlx_name

# Of float32 logits, of which a chunk has two. From 32 MiB on, glibc takes every array from the system anew, its pages
# not there yet; smaller ones it uses again.
CHUNK_BYTES = 24 * 2**20
CHUNK_ROWS = 128  # at least: for fewer, reading the matrix takes longer than multiplying
TOLERANCE = 1e-4  # of logits, absolute and relative
TRIED = (2, 8)  # rows and tokens of the trial


class Head:
    """The end of a model, from the input of its output matrix to the logits."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._trunk = model, model.base_model
        head = model.get_output_embeddings()
        paths = [path for path, module in model.named_modules() if module is head and not is_tied(model)]
        self.above_layers = tuple(f"{mlx_name(model.config.model_type, path)}." for path in paths)

    def hidden(self, tokens: torch.Tensor, **inputs: Any) -> torch.Tensor:
        """The input of the head [B, T, D] for tokens [B, T]."""
        output = self._trunk(input_ids=tokens, **inputs)
        self._output = type(output)
        hidden: torch.Tensor = output[0]
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [N, V] for inputs of the head [N, D]."""

        def put(plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return self._output(last_hidden_state=hidden[None])

        with intercepted([self._trunk], put):
            logits: torch.Tensor = self._model(input_ids=hidden.new_zeros((1, len(hidden)), dtype=torch.long)).logits
        return logits[0]

    def chunks(self, count: int) -> Iterator[slice]:
        """`count` positions, in parts whose logits have a bounded size."""
        return (slice(start, start + self._chunk_rows) for start in range(0, count, self._chunk_rows))

    @torch.no_grad()  # type: ignore[untyped-decorator]  # torch is taken without its types
    def why_not(self) -> str | None:
        """Why this model's head cannot be called on chosen positions, as a clause; None where it gives equal logits.

        It is asked before anything else.
        """
        tokens = torch.arange(TRIED[0] * TRIED[1]).reshape(TRIED)
        try:
            expected = self._model(input_ids=tokens, use_cache=False).logits
            given = self.logits(self.hidden(tokens, use_cache=False).flatten(0, 1)).reshape(expected.shape)
        except LOADING_ERRORS as error:
            return f"{type(error).__name__}: {error}"
        self._chunk_rows = max(CHUNK_ROWS, CHUNK_BYTES // (4 * expected.shape[-1]))
        if torch.allclose(given, expected, rtol=TOLERANCE, atol=TOLERANCE):
            return None
        return f"its logits then differ by up to {float((given - expected).abs().max()):.2g}"

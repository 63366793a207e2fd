"""Choosing the next token on PyTorch, as mlx-lm chooses it."""

from __future__ import annotations

import torch

from mlxsft.backends import Constraint, Sampling, may_follow

PENALIZED = 20  # tokens, the last of prompt and answer


class Sampler:
    """Penalized and constrained logits [V] to a token id, with random numbers of its own."""

    def __init__(self, sampling: Sampling, prompt: list[int], constraint: Constraint | None = None) -> None:
        self._sampling, self._said = sampling, list(prompt)
        self._constraint = constraint
        self._last: int | None = None
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    def __call__(self, logits: torch.Tensor) -> int:
        greedy = self._sampling.temperature == 0
        token = int(logits.argmax()) if greedy else self._drawn(torch.log_softmax(logits, dim=-1))
        self._said.append(token)
        self._last = token
        return token

    def constrained(self, logits: torch.Tensor) -> torch.Tensor:
        """Minus infinity for what may not follow."""
        if self._constraint is None:
            return logits
        allowed = torch.from_numpy(may_follow(self._constraint, self._last, len(logits)))
        return torch.where(allowed, logits, float("-inf"))

    def penalized(self, logits: torch.Tensor) -> torch.Tensor:
        """Positive logits of what was said divided, negative ones multiplied: https://arxiv.org/abs/1909.05858."""
        if (penalty := self._sampling.repetition_penalty) is None:
            return logits
        said = torch.tensor(self._said[-PENALIZED:])
        values = logits[said]
        return logits.index_put((said,), torch.where(values < 0, values * penalty, values / penalty))

    def _drawn(self, logprobs: torch.Tensor) -> int:
        sampling, never = self._sampling, float("-inf")
        if 0 < sampling.top_p < 1:
            order = logprobs.argsort()
            kept = logprobs[order].exp().cumsum(dim=-1) > 1 - sampling.top_p
            kept[-1] = True
            logprobs = logprobs.index_put((order[~kept],), torch.tensor(never))
        if sampling.min_p > 0:
            logprobs = torch.where(logprobs.exp() < sampling.min_p * logprobs.max().exp(), never, logprobs)
        if 0 < sampling.top_k < len(logprobs):
            likeliest, places = logprobs.topk(sampling.top_k)
            logprobs = torch.full_like(logprobs, never).index_put((places,), likeliest)
        probabilities = torch.softmax(logprobs / sampling.temperature, dim=-1)
        return int(torch.multinomial(probabilities, 1, generator=self._generator))

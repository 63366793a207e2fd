"""A backend as EleutherAI's lm-eval asks for models, so that the benchmarks of the field run on it, adapter and all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import closing
from typing import Any

import numpy as np
from lm_eval.api.model import LM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from mlxsft.backends import Backend, Sampling
from mlxsft.chat.generate import Answer, Memory, continue_prompt
from mlxsft.data.places import Origin
from mlxsft.data.render import Example, Renderer
from mlxsft.evaluation.measure import Watch, row_losses, unwatched

MICRO_BATCH_TOKENS = 2048
LONGEST = 2048  # tokens of a prompt, where the model does not say how many it takes
ANSWER_TOKENS = 256  # where a task does not say


class BackendModel(LM):  # type: ignore[misc]  # which has no types
    """The adapter in use is what is judged. Prompts are plain text, as lm-eval's own models take them."""

    def __init__(self, backend: Backend, renderer: Renderer, watch: Watch = unwatched) -> None:
        super().__init__()
        self._backend, self._renderer, self._watch = backend, renderer, watch
        self._longest = min(renderer.positions or LONGEST, LONGEST)
        hf = renderer.tokenizer.hf
        first = hf.bos_token_id if hf.bos_token_id is not None else hf.eos_token_id
        self._first = int(first) if first is not None else min(renderer.end_tokens)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """(log-probability in nats, whether greedy decoding gives it) of each continuation of its context."""
        pairs = [self._pair(*request.args) for request in requests]
        found = self._logprobs(pairs, "benchmark: choices")
        return [(total, self._is_greedy(*pair, total)) for pair, total in zip(pairs, found, strict=True)]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """The log-probability in nats of each text, every token with as much before it as the model takes."""
        pairs, text_of = list[tuple[list[int], list[int]]](), list[int]()
        for i, request in enumerate(requests):
            tokens = self._renderer.tokenizer.encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self._first, self._longest - 1, 1):
                pairs.append(make_disjoint_window(window))
                text_of.append(i)
        sums = np.zeros(len(requests))
        np.add.at(sums, text_of, self._logprobs(pairs, "benchmark: texts"))
        return [float(total) for total in sums]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answer to each prompt, up to a string of the task, an end token or the tokens that it allows."""
        return [self._answer(*r.args) for r in self._watch(list(requests), "benchmark: answers", len(requests))]

    def _answer(self, prompt: str, given: dict[str, Any]) -> str:
        until = given.get("until") or []
        stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
        most = min(int(given.get("max_gen_toks", ANSWER_TOKENS)), self._longest // 2)
        sampling = Sampling(temperature=float(given.get("temperature", 0)) if given.get("do_sample") else 0.0, seed=0)
        answer, memory = Answer(), Memory(self._backend)
        tokens = self._begun(self._renderer.tokenizer.encode(prompt))[-(self._longest - most) :]
        steps = continue_prompt(
            self._backend, self._renderer, tokens, sampling, most, memory=memory, answer=answer, stops=stops
        )  # fmt: skip
        with closing(steps):
            return "".join(steps)

    def _begun(self, tokens: list[int]) -> list[int]:
        return [self._first, *tokens] if self._renderer.tokenizer.begins_with_bos or not tokens else tokens

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of both, cut where the context's own end: white space between them belongs to the continuation."""
        encode = self._renderer.tokenizer.encode
        kept = context.rstrip()
        whole, before = encode(context + continuation), encode(kept) if kept else []
        return self._begun(before), whole[len(before) :] or encode(continuation)

    def _logprobs(self, pairs: Sequence[tuple[list[int], list[int]]], what: str) -> list[float]:
        examples = []
        for context, continuation in pairs:
            tokens = np.array([*context, *continuation][-self._longest :], np.int32)
            mask = np.arange(len(tokens)) >= max(1, len(tokens) - len(continuation))
            examples.append([Example(tokens, mask, Origin("", 0))])
        losses = row_losses(
            self._backend, examples, MICRO_BATCH_TOKENS, self._renderer.positions,
            lambda groups: self._watch(groups, what, len(groups)),
        )  # fmt: skip
        return [-float(nats) for nats in losses.nats]

    def _is_greedy(self, context: list[int], continuation: list[int], logprob: float) -> bool:
        if logprob > math.log(0.5):  # then each of its tokens is likelier than all others together
            return True
        with closing(self._backend.stream(context[-self._longest :], Sampling(), self._backend.new_cache())) as stream:
            return all(token == wanted for token, wanted in zip(stream, continuation, strict=False))

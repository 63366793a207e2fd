"""Answers: turns in, text out as it comes, on any backend."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from mlxsft.backends import Backend, Sampling
from mlxsft.data.formats import Turn
from mlxsft.data.render import Renderer
from mlxsft.errors import InputRefused

__all__ = ["Answer", "Memory", "Sampling", "answer_text", "stream_answer"]


@dataclass
class Answer:
    """What is known of an answer once its stream has ended: `finish` is stop (an end token), length, or stopped."""

    text: str = ""
    finish: Literal["stop", "length", "stopped"] = "length"
    prompt_tokens: int = 0
    reused_tokens: int = 0
    tokens: int = 0
    prompt_seconds: float = 0.0
    seconds: float = 0.0


@dataclass
class Memory:
    """The key-value cache of one conversation, and the tokens that it stands for."""

    backend: Backend

    def __post_init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin with an empty cache, of the adapter in use."""
        self.cache, self._adapter = self.backend.new_cache(), self.backend.in_use
        self.tokens: list[int] = []

    def rest_of(self, prompt: Sequence[int]) -> list[int]:
        """The tokens of a prompt that must still be computed; what the cache holds beyond the prompt is forgotten."""
        if self._adapter != self.backend.in_use:
            self.forget()  # another adapter computes other keys and values
        shared = 0
        # At least one token is computed, because the next one is predicted from it.
        while shared < min(len(self.tokens), len(prompt) - 1) and self.tokens[shared] == prompt[shared]:
            shared += 1
        if shared < len(self.tokens) and not self.backend.trim(self.cache, len(self.tokens) - shared):
            self.forget()
            shared = 0
        self.tokens = list(prompt[:shared])
        return list(prompt[shared:])


def stream_answer(
    backend: Backend,
    renderer: Renderer,
    turns: Sequence[Turn],
    sampling: Sampling,
    max_tokens: int,
    *,
    memory: Memory | None = None,
    answer: Answer | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[str]:
    """The text of the next answer as it comes; `answer`, where given, is filled in.

    Stops at every end token of tokenizer, generation config and template, after `max_tokens`, at the model's last
    position, or between two tokens when `stop()` says so. With a `memory`,
    only what differs from the conversation so far is computed. Raises InputRefused where the
    template refuses, or when the prompt leaves no position for an answer.
    """
    memory = memory or Memory(backend)
    answer = answer or Answer()
    began = time.perf_counter()
    prompt = renderer.prompt(turns)
    max_tokens = min(max_tokens, _room(prompt, renderer.positions, max_tokens))
    rest = memory.rest_of(prompt)
    answer.prompt_tokens, answer.reused_tokens = len(prompt), len(prompt) - len(rest)
    text = renderer.tokenizer.stream()
    opening = renderer.opening  # what stands before the text of an answer, as for instance a space
    stream = backend.stream(rest, sampling, memory.cache)
    try:
        for token in stream:
            memory.tokens += [*rest, token]
            rest = []
            if answer.tokens == 0:
                answer.prompt_seconds = time.perf_counter() - began
            if token in renderer.end_tokens:
                answer.finish = "stop"
                break
            answer.tokens += 1
            new = text.push(token)
            if not answer.text:
                new, opening = _without(opening, new)
            if new:
                answer.text += new
                yield new
            if answer.tokens >= max_tokens:
                break
            if stop():
                answer.finish = "stopped"
                break
        if new := _without(opening, text.finish())[0] if not answer.text else text.finish():
            answer.text += new
            yield new
    except GeneratorExit:
        raise  # the reader has had enough: what was computed is in the cache
    except BaseException:
        memory.forget()  # interrupted in the middle of a layer, nobody knows what is in the cache
        raise
    finally:
        stream.close()
        answer.seconds = time.perf_counter() - began


def _room(prompt: Sequence[int], positions: int | None, wanted: int) -> int:
    """How many tokens an answer may have."""
    if positions is None:
        return wanted
    if len(prompt) >= positions:
        raise InputRefused(
            f"the prompt has {len(prompt)} tokens, and the model takes {positions} with the answer",
            "Shorten it; in a chat, /clear begins anew.",
        )
    return positions - len(prompt)


def _without(opening: str, text: str) -> tuple[str, str]:
    """`text` without what it shares with `opening` at the beginning, and what is left of `opening`."""
    n = 0
    while n < min(len(opening), len(text)) and opening[n] == text[n]:
        n += 1
    return text[n:], opening[n:] if n == len(text) else ""


def answer_text(
    backend: Backend,
    renderer: Renderer,
    turns: Sequence[Turn],
    sampling: Sampling,
    max_tokens: int,
    *,
    stop: Callable[[], bool] = lambda: False,
) -> str:
    """The whole next answer, or what there is of it when `stop()` says so."""
    return "".join(stream_answer(backend, renderer, turns, sampling, max_tokens, stop=stop))

"""Answers: turns in, text out as it comes, on any backend."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Literal

from mlxsft.backends import Backend, Constraint, Sampling, Watch
from mlxsft.data.formats import Turn
from mlxsft.data.render import Renderer
from mlxsft.errors import InputRefused

__all__ = [
    "Answer",
    "Ending",
    "Memory",
    "Sampling",
    "Writer",
    "answer_text",
    "continue_prompt",
    "room_for_answer",
    "stream_answer",
]

READ = 512  # tokens of a prompt that are computed at once; between two such parts an answer can be stopped


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

    @property
    def tokens_per_second(self) -> float:
        """How fast tokens came once the prompt was computed; 0 for an answer without any."""
        return self.tokens / max(self.seconds - self.prompt_seconds, 1e-9)


@dataclass
class Memory:
    """The key-value cache of one conversation, and the tokens that it stands for.

    `said` has the tokens of the answers by their text: its own tokenization is not always what the model chose.
    """

    backend: Backend

    def __post_init__(self) -> None:
        self.said: dict[str, list[int]] = {}
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
    stops: Sequence[str] = (),
    constraint: Constraint | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[str]:
    """The text of the next answer as it comes; `answer`, where given, is filled in.

    Stops at every end token of tokenizer, generation config and template, before the first of the strings `stops`,
    after `max_tokens`, at the model's last position, or between two tokens when `stop()` says so. With a `memory`, only
    what differs from the conversation so far is computed; with a `constraint`, only what it allows is said. Raises
    InputRefused where the template refuses, or when the prompt leaves no position for an answer.
    """
    memory = memory or Memory(backend)
    prompt = renderer.prompt(turns, said=memory.said)
    steps = continue_prompt(
        backend,
        renderer,
        prompt,
        sampling,
        min(max_tokens, room_for_answer(prompt, renderer.positions, max_tokens)),
        memory=memory,
        answer=answer or Answer(),
        opening=renderer.opening,
        stops=stops,
        constraint=constraint,
        stop=stop,
    )
    with closing(steps):
        yield from filter(None, steps)


def continue_prompt(
    backend: Backend,
    renderer: Renderer,
    prompt: Sequence[int],
    sampling: Sampling,
    max_tokens: int,
    *,
    memory: Memory,
    answer: Answer,
    opening: str = "",
    stops: Sequence[str] = (),
    special: bool = False,
    watch: Watch | None = None,
    constraint: Constraint | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Generator[str, None, None]:
    """What follows the tokens of a prompt, step by step: a step is at most READ tokens of the prompt, or a token.

    A step that completes no text yields an empty one. `opening` is left out at the beginning; `stops` end the answer
    before the first of them; `special` spells special tokens out; `watch` and `constraint` are for `Backend.stream`.
    """
    began = time.perf_counter()
    rest = memory.rest_of(prompt)
    answer.prompt_tokens, answer.reused_tokens = len(prompt), len(prompt) - len(rest)
    stream: Generator[int, None, None] | None = None
    writer = Writer(renderer, answer, max_tokens, opening=opening, stops=stops, special=special)
    try:
        while len(rest) >= 2 * READ:  # the rest of it is enough for a repetition penalty to look back on
            backend.read(rest[:READ], memory.cache)
            memory.tokens += rest[:READ]
            rest = rest[READ:]
            yield ""
            if stop():
                answer.finish = "stopped"
                return
        stream = backend.stream(rest, sampling, memory.cache, watch, constraint)
        for token in stream:
            memory.tokens += [*rest, token]
            rest = []
            if answer.tokens == 0:
                answer.prompt_seconds = time.perf_counter() - began
            yield writer.push(token)
            if writer.ended:
                break
            if stop():
                answer.finish = "stopped"
                break
        yield writer.finish()
        said = memory.tokens[len(prompt) :][: answer.tokens]
        # Not where a stop string cut the text, or where it leaves out a control token.
        if renderer.tokenizer.decode(said, special=True) in (answer.text, opening + answer.text):
            memory.said[opening + answer.text] = said
    except GeneratorExit:
        raise  # the reader has had enough: what was computed is in the cache
    except BaseException:
        memory.forget()  # interrupted in the middle of a layer, nobody knows what is in the cache
        raise
    finally:
        if stream is not None:
            stream.close()
        answer.seconds = time.perf_counter() - began


class Writer:
    """Makes the text of an answer out of its tokens, and tells when it ends; `answer` is filled in."""

    def __init__(
        self,
        renderer: Renderer,
        answer: Answer,
        max_tokens: int,
        *,
        opening: str = "",
        stops: Sequence[str] = (),
        special: bool = False,
    ) -> None:
        self._answer, self._max_tokens, self._end_tokens = answer, max_tokens, renderer.end_tokens
        self._opening, self._end = opening, Ending(stops)
        self._text = renderer.tokenizer.stream(special=special)
        self.ended = False

    def push(self, token: int) -> str:
        """The text that is certain with this token, perhaps empty."""
        if token in self._end_tokens:
            self._answer.finish, self.ended = "stop", True
            return ""
        self._answer.tokens += 1
        new = self._certain(self._text.push(token))
        self.ended = bool(self._end.found) or self._answer.tokens >= self._max_tokens
        return new

    def finish(self) -> str:
        """What still waited, when no token follows."""
        new = self._certain(self._text.finish())
        rest = self._end.finish()
        self._answer.text += rest
        return new + rest

    def _certain(self, new: str) -> str:
        if not self._answer.text:
            new, self._opening = _without(self._opening, new)
        new = self._end.push(new)
        self._answer.text += new
        if self._end.found:
            self._answer.finish = "stop"
        return new


class Ending:
    """Text that ends before the first of some strings; what may be the beginning of one waits for what follows."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings, self._waiting = tuple(strings), ""
        self.found = ""  # the string that ended it
        self.after = ""  # what was pushed behind the place where it ended, the string included

    def push(self, text: str) -> str:
        """The text that is known to stand before the end."""
        if self.found:
            self.after += text
            return ""
        known = self._waiting + text
        places = [(place, -len(s), s) for s in self._strings if (place := known.find(s)) >= 0]
        if places:
            place, _, self.found = min(places)
            self._waiting, self.after = "", known[place:]
            return known[:place]
        kept = max((_overlap(known, s) for s in self._strings), default=0)
        self._waiting = known[len(known) - kept :]
        return known[: len(known) - kept]

    def finish(self) -> str:
        """What still waited when nothing more comes."""
        waiting, self._waiting = self._waiting, ""
        return waiting


def _overlap(text: str, string: str) -> int:
    """How many characters at the end of a text are the beginning of a string, but not all of it."""
    return next((n for n in range(min(len(text), len(string) - 1), 0, -1) if text.endswith(string[:n])), 0)


def room_for_answer(prompt: Sequence[int], positions: int | None, wanted: int) -> int:
    """How many tokens an answer may have. Raises InputRefused where there is no room for any."""
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

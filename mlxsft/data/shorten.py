"""Shorter forms of a conversation, for rows that have too many tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from mlxsft.data.formats import Turn
from mlxsft.data.tokenizer import Tokenizer

Turns = tuple[Turn, ...]
_CUT_FIRST = ("user", "tool", "system")  # a question loses of its beginning before what it is about does


def exchanges(turns: Turns) -> list[Turns]:
    """The turns without the system prompt, cut before every question and what the system says right before it."""
    rest = turns[turns[0].role == "system" :]
    starts = [i for i in range(len(rest)) if i == 0 or _begins(rest, i)]
    return [rest[a:b] for a, b in zip(starts, [*starts[1:], len(rest)], strict=True)]


def _begins(turns: Turns, i: int) -> bool:
    """Whether the user's next question begins here, system turns before it included."""
    asks = next((turn.role for turn in turns[i:] if turn.role != "system"), "")
    return asks == "user" and turns[i - 1].role != "system"


def answered(turns: Turns) -> Turns:
    """The turns up to the last answer that is trained; what stands behind it is never part of an example."""
    last = max((i for i, turn in enumerate(turns) if turn.role == "assistant" and turn.trained), default=len(turns) - 1)
    return turns[: last + 1]


def later(turns: Turns) -> Iterator[Turns]:
    """The conversation from every exchange on, with its system turn: the whole of it, then ever less, to the last."""
    system, parts = turns[: turns[0].role == "system"], exchanges(turns)
    for first in range(len(parts)):
        yield (*system, *(turn for part in parts[first:] for turn in part))


def cut(turns: Turns, excess: int, tokenizer: Tokenizer) -> Iterator[Turns]:
    """Ever shorter forms of one exchange, from `excess` tokens shorter on: one turn loses its beginning.

    That is the question where it has so many tokens, otherwise the result of a tool, otherwise the system turn. Answers
    stay whole.
    """
    for role in _CUT_FIRST:
        for i, turn in enumerate(turns):
            if turn.role == role:
                ids = tokenizer.encode(tokenizer.fence(turn.content))
                start = max(1, excess)
                while start < len(ids):
                    text = tokenizer.decode(ids[start:]).lstrip("\ufffd ")
                    yield (*turns[:i], replace(turn, content=text), *turns[i + 1 :])
                    start += max(1, start // 8)

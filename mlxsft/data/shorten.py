"""Shorter forms of a conversation, for rows that have too many tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from mlxsft.data.formats import Turn
from mlxsft.data.tokenizer import Tokenizer

Turns = tuple[Turn, ...]


def exchanges(turns: Turns) -> list[Turns]:
    """The turns without the system prompt, cut before every question."""
    rest = turns[turns[0].role == "system" :]
    starts = [i for i, turn in enumerate(rest) if turn.role == "user" or i == 0]
    return [rest[a:b] for a, b in zip(starts, [*starts[1:], len(rest)], strict=True)]


def shorter(turns: Turns, excess: int, tokenizer: Tokenizer) -> Iterator[Turns]:
    """Ever shorter forms of a conversation, each at least `excess` tokens shorter in the end.

    Whole exchanges go first, the oldest first; then, in the exchange that is left, the beginning of the question.
    System turn and last answer stay whole.
    """
    system, parts = turns[: turns[0].role == "system"], exchanges(turns)
    for first in range(1, len(parts)):
        yield (*system, *(turn for part in parts[first:] for turn in part))
    last = parts[-1]
    if last[0].role != "user":
        return
    ids = tokenizer.encode(tokenizer.fence(last[0].content))
    cut = excess
    while cut < len(ids):
        text = tokenizer.decode(ids[cut:]).lstrip("\ufffd ")
        yield (*system, replace(last[0], content=text), *last[1:])
        cut += max(1, cut // 8)

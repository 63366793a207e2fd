"""JSON values → Conversation: every known layout of a row.

No row is dropped: what is not a Conversation is a LeftOut that says why.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from mlxsft.data import chats, pairs
from mlxsft.data.conversation import Conversation, Role, Task, ToolCall, Turn
from mlxsft.data.fields import Draft, Row, Unusable, category, kind, shown
from mlxsft.data.places import LeftOut, Origin
from mlxsft.data.sources import RowSource, rows_of
from mlxsft.errors import InputRefused, UsageError

__all__ = [
    "COLUMNS",
    "FORMATS",
    "Conversation",
    "LeftOut",
    "Origin",
    "Role",
    "Task",
    "ToolCall",
    "Turn",
    "conversations_of",
    "raise_for_broken",
    "read_conversations",
]

_NOTHING: Mapping[str, str] = MappingProxyType({})


def read_conversations(
    sources: Sequence[RowSource],
    *,
    format: str = "auto",
    columns: Mapping[str, str] = _NOTHING,
    fill: Mapping[str, str] = _NOTHING,
    split: str = "train",
    unanswered: bool = False,
) -> Iterator[Conversation | LeftOut]:
    """Every row of the sources as a Conversation, or as the LeftOut that says why not, in the order of the files.

    A row that holds several tasks (Self-Instruct instances, P3's several targets) gives several, each with the row's
    origin, and each counts as one read. Missing files, unknown formats and unknown columns are refused before the
    first row is read. `columns` says what our names are called in the rows; `fill` gives the values of `{{name}}`
    placeholders; `split` is the file that is meant where a source is a folder. With `unanswered`, conversations in
    which nothing is trained come through as well, to be asked rather than trained.
    """
    if format != "auto" and format not in FORMATS:
        raise UsageError(f"data.format: got {shown(format)}", f"Formats: auto, {', '.join(FORMATS)}.")
    if unknown := [name for name in columns if name not in COLUMNS]:
        raise UsageError(f"data.columns: got {shown(unknown[0])}", f"Names: {', '.join(COLUMNS)}.")
    rows = rows_of(sources, split)
    return (
        made
        for row in rows
        for made in (
            [row]
            if isinstance(row, LeftOut)
            else conversations_of(row[1], row[0], format, fill, columns=columns, unanswered=unanswered)
        )
    )


def conversations_of(
    row: object,
    origin: Origin,
    format: str = "auto",
    fill: Mapping[str, str] = _NOTHING,
    *,
    columns: Mapping[str, str] = _NOTHING,
    unanswered: bool = False,
) -> list[Conversation | LeftOut]:
    """What one JSON value stands for: one Conversation or several, or the LeftOut that says why it is none."""
    try:
        if not isinstance(row, dict):
            raise Unusable("not an object", f"got {kind(row)}, expected an object with named fields")
        named = _renamed(row, columns) if columns else row
        group = category(named)
        drafts = _format_of(named, format).read(named)
    except Unusable as problem:
        return [LeftOut(origin, problem.reason, problem.detail, problem.broken)]
    return [_judged(_filled_draft(draft, fill), origin, group, unanswered) for draft in drafts]


def raise_for_broken(rows: Sequence[LeftOut]) -> None:
    """Nothing when no row is broken; otherwise one InputRefused with their number and the first 20."""
    broken = [row for row in rows if row.broken]
    if not broken:
        return
    lines = [f"{len(broken)} broken {'row' if len(broken) == 1 else 'rows'}", *map(str, broken[:20])]
    if len(broken) > 20:
        lines.append(f"and {len(broken) - 20} more")
    raise InputRefused("\n  ".join(lines), "Correct these rows or take them out of the file.")


def _renamed(row: Row, columns: Mapping[str, str]) -> Row:
    """The row under our names: the columns that were named, and nothing else of it."""
    named = {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}
    for ours, theirs in columns.items():
        if ours not in named and ours not in OPTIONAL:
            keys = ", ".join(shown(key)[1:-1] for key in list(row)[:10])
            raise Unusable("missing column", f"{shown(theirs)} ({ours}) is not among {keys or '(none)'}")
    return named


def _filled_draft(draft: Draft, fill: Mapping[str, str]) -> Draft:
    if not fill:
        return draft
    task = draft.task and Task(_filled(draft.task.instruction, fill), _filled(draft.task.input, fill))
    return Draft([_filled_turn(turn, fill) for turn in draft.turns], draft.tools, task)


def _filled_turn(turn: Turn, fill: Mapping[str, str]) -> Turn:
    if "{{" not in turn.content and "{{" not in turn.reasoning:
        return turn
    content, reasoning = _filled(turn.content, fill), _filled(turn.reasoning, fill)
    return Turn(turn.role, content, turn.trained, reasoning, turn.tool_calls, turn.name, turn.call_id)


def _filled(text: str, fill: Mapping[str, str]) -> str:
    """The text with the placeholders that `fill` names replaced, once; everything else stays as it is."""
    return _PLACEHOLDER.sub(lambda found: fill.get(found[1], found[0]), text)


_PLACEHOLDER = re.compile(r"\{\{[ \t]*([\w.-]+)[ \t]*\}\}")


def _judged(draft: Draft, origin: Origin, group: str, unanswered: bool) -> Conversation | LeftOut:
    try:
        _check_turns(draft.turns, unanswered)
    except Unusable as problem:
        return LeftOut(origin, problem.reason, problem.detail, problem.broken)
    return Conversation(tuple(draft.turns), origin, draft.tools, group, draft.task)


def _check_turns(turns: Sequence[Turn], unanswered: bool) -> None:
    """Refuses what cannot be trained on, whatever its format was."""
    answers = [turn for turn in turns if turn.role in ("assistant", "text")]
    if not answers and not unanswered:
        raise Unusable("no assistant turn", "nothing here could be trained", broken=False)
    if not any(turn.trained for turn in answers) and not unanswered:
        raise Unusable("no trained turn", "every answer is marked as not trained", broken=False)
    for i, turn in enumerate(turns):
        if turn.role in _EMPTY and not turn.content.strip() and not turn.tool_calls:
            raise Unusable(_EMPTY[turn.role], f"turn {i + 1} of {len(turns)} has no text", broken=False)


_EMPTY: Mapping[str, str] = {"user": "empty prompt", "assistant": "empty answer", "text": "empty text"}


@dataclass(frozen=True, slots=True)
class _Format:
    needs: tuple[tuple[str, ...], ...]  # of each group one key is there
    looks: str
    read: Callable[[Row], list[Draft]]
    alone: tuple[str, ...] | None = None  # other keys that may hold text, where not all may

    def fits(self, row: Row) -> bool:
        if not all(any(key in row for key in group) for group in self.needs):
            return False
        if self.alone is None:
            return True
        mine = {*self.alone, *(key for group in self.needs for key in group)}
        return not any(isinstance(value, str | list) and _says(value) for key, value in row.items() if key not in mine)

    def says_something(self, row: Row) -> bool:
        """Whether not all that the format needs is empty, as where one table holds rows of several formats."""
        return any(row.get(key) not in (None, "") for group in self.needs for key in group)


def _says(value: str | list[object]) -> bool:
    """Whether this is text, or a conversation, that a row without an answer would lose."""
    return bool(value.strip()) if isinstance(value, str) else any(isinstance(v, dict) and "role" in v for v in value)


# In the order in which a row is tried: the more particular first, since published sets carry a rendered `text` along.
FORMATS: Mapping[str, _Format] = {
    "messages": _Format((("messages",),), "messages: [{role, content}], maybe tools", chats.messages),
    "sharegpt": _Format(
        (("conversations", "conversation"),), "conversations: [{from, value}], maybe tools", chats.sharegpt
    ),
    "self_instruct": _Format(
        (("instruction",), ("instances",)), "instruction, instances: [{input, output}]", pairs.self_instruct
    ),
    "dolly": _Format((("instruction",), ("response",)), "instruction, response, maybe context", pairs.dolly),
    "alpaca": _Format(
        (("instruction",), ("output",)), "instruction, output, maybe input, system, history", pairs.alpaca
    ),
    "flan": _Format(
        (("inputs", "inputs_pretokenized"), ("targets", "targets_pretokenized")), "inputs, targets", pairs.flan
    ),
    "prompt_completion": _Format(
        (pairs.QUESTIONS, pairs.ANSWERS),
        f"{' or '.join(pairs.QUESTIONS)} with {' or '.join(pairs.ANSWERS)}, maybe system",
        pairs.prompt_completion,
    ),
    "text": _Format((("text",),), "text", pairs.plain_text),
    "prompt": _Format(
        (("prompt",),), "prompt alone, nothing to train", pairs.prompt_only, alone=("system", "category", "id", "key")
    ),
}

OPTIONAL = ("system", "category", "input", "context", "history", "tools")
COLUMNS = ("prompt", "response", "instruction", "output", "messages", "conversations", "text", *OPTIONAL)


def _format_of(row: Row, name: str) -> _Format:
    """The named format, or for `auto` the first that the keys of the row fit."""
    candidates = list(FORMATS) if name == "auto" else [name]
    silent = None
    for format in map(FORMATS.__getitem__, candidates):
        if format.fits(row):
            if format.says_something(row):
                return format
            silent = silent or format
    if silent is not None:
        return silent
    keys = ", ".join(shown(key)[1:-1] for key in list(row)[:10]) + (", ..." if len(row) > 10 else "")
    if name != "auto":
        raise Unusable("unknown format", f"keys {keys or '(none)'}, expected {name} ({FORMATS[name].looks})")
    known = ", ".join(FORMATS)
    raise Unusable("unknown format", f"keys {keys or '(none)'}; name them with columns, or write one of {known}")

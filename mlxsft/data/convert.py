"""Conversation → a row of OpenAI's messages, which reads as the same Conversation."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from mlxsft.data.formats import Conversation, LeftOut, ToolCall, Turn, raise_for_broken, read_conversations
from mlxsft.data.sources import RowSource, files_of
from mlxsft.outputs import refuse_existing


def convert_files(
    sources: Sequence[RowSource],
    out: Path,
    *,
    format: str = "auto",
    columns: Mapping[str, str],
    force: bool = False,
    skip_broken: bool = False,
) -> tuple[dict[str, int], list[LeftOut]]:
    """The ledger (read = written + each reason) and the rows left out, after all others are written to `out`.

    Rows are written one at a time to a file beside `out`, which takes its place at the end; with a broken row that is
    not skipped, `out` stays as it was. Prompts without an answer are written as well.
    """
    refuse_existing(out, force=force, reads=files_of(sources))
    rows = read_conversations(sources, format=format, columns=columns, unanswered=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f".{out.name}.{os.getpid()}.part")
    left_out: list[LeftOut] = []
    written = 0
    try:
        with aside.open("w", encoding="utf-8", newline="\n") as file:
            for row in rows:
                line = row if isinstance(row, LeftOut) else _line(row)
                if isinstance(line, LeftOut):
                    left_out.append(line)
                    continue
                file.write(line)
                written += 1
        if not skip_broken:
            raise_for_broken(left_out)
        aside.replace(out)
    finally:
        aside.unlink(missing_ok=True)
    ledger = {"read": written + len(left_out), "written": written}
    return ledger | Counter(row.reason for row in left_out), left_out


def _line(row: Conversation) -> str | LeftOut:
    """The row as a line of JSON; a table may hold what JSON cannot, such as dates in the arguments of a call."""
    try:
        return json.dumps(messages_row(row), ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        return LeftOut(row.origin, "not JSON", str(error), broken=True)


def messages_row(row: Conversation) -> dict[str, object]:
    """The row in OpenAI's layout; plain text, which is no conversation, stays `text`."""
    made: dict[str, object]
    if row.turns[0].role == "text":
        made = {"text": row.turns[0].content}
    else:
        made = {"messages": [_message(turn) for turn in row.turns]}
    if row.tools:
        made["tools"] = list(row.tools)
    if row.category:
        made["category"] = row.category
    return made


def _message(turn: Turn) -> dict[str, object]:
    message: dict[str, object] = {"role": turn.role, "content": turn.content}
    if turn.reasoning:
        message["reasoning_content"] = turn.reasoning
    if turn.tool_calls:
        message["tool_calls"] = [_call(call) for call in turn.tool_calls]
    if turn.call_id:
        message["tool_call_id"] = turn.call_id
    if turn.name:
        message["name"] = turn.name
    if not turn.trained:
        message["weight"] = 0
    return message


def _call(call: ToolCall) -> dict[str, object]:
    arguments = json.dumps(call.arguments, ensure_ascii=False, allow_nan=False)
    made: dict[str, object] = {"type": "function", "function": {"name": call.name, "arguments": arguments}}
    return {"id": call.id, **made} if call.id else made

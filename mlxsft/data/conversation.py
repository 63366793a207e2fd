"""What every row becomes: turns in order, and what belongs to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from mlxsft.data.places import Origin

Role = Literal["system", "user", "assistant", "tool", "text"]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool: its name and its arguments, a JSON value (mostly an object)."""

    name: str
    arguments: object
    id: str = ""


@dataclass(frozen=True, slots=True)
class Turn:
    """What one role says. The role `text` stands alone in a conversation: plain text, no template, all trained.

    `trained` False takes an answer out of training; `reasoning` is what the assistant thought before `content`;
    `name` and `call_id` say which tool a `tool` turn answers for.
    """

    role: Role
    content: str
    trained: bool = True
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    name: str = ""
    call_id: str = ""


@dataclass(frozen=True, slots=True)
class Task:
    """A question in its two parts, as the row gave them: `input` is what the instruction is about, mostly empty."""

    instruction: str
    input: str = ""

    def __str__(self) -> str:
        return "\n\n".join(part for part in (self.instruction, self.input) if part.strip())


@dataclass(frozen=True, slots=True)
class Conversation:
    """One row: its turns in order, the tools that it offers (JSON Schema objects, as OpenAI's API takes them), and
    the category it belongs to, where it names one.

    `task` says where the only user turn came from in a row of one question; two equal conversations may differ in it.
    """

    turns: tuple[Turn, ...]
    origin: Origin
    tools: tuple[Mapping[str, object], ...] = ()
    category: str = ""
    task: Task | None = field(default=None, compare=False)

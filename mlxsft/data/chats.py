"""Rows of many turns → turns: OpenAI's messages and ShareGPT's conversations, with tools, reasoning and weights."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from mlxsft.data.conversation import Role, ToolCall, Turn
from mlxsft.data.fields import Draft, Row, Unusable, array, kind, optional_text, parsed, shown, system_turn, text

_ROLES: Mapping[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "function_response": "tool",
}
_CALLING = ("function_call", "tool_call")  # roles whose content is the call itself
_REASONING = ("reasoning_content", "reasoning", "thinking")
_WEIGHTS = ("weight", "loss_weight", "train")
# In the order in which an answer is rendered; another order cannot be kept.
_PARTS = {"reasoning": 0, "thinking": 0, "text": 1, "tool_call": 2, "function_call": 2}


def messages(row: Row) -> list[Draft]:
    """A conversation in OpenAI's layout: `messages: [{role, content}]`."""
    return [_conversation(row, "messages")]


def sharegpt(row: Row) -> list[Draft]:
    """A conversation in ShareGPT's layout: `conversations: [{from, value}]`; role and content are taken as well."""
    return [_conversation(row, "conversations" if "conversations" in row else "conversation")]


def _conversation(row: Row, key: str) -> Draft:
    found = array(row, key)
    if not found:
        got = "null" if row.get(key) is None else "an empty array"
        raise Unusable("no messages", f"{key}: got {got}")
    return Draft([*system_turn(row), *turns_of_messages(found, key)], tools_of(row))


def turns_of_messages(found: Sequence[object], key: str) -> list[Turn]:
    """The turns that messages stand for; `key` is what they are called in the row.

    Where a call is a message of its own, as in ShareGPT, it belongs to the answer, or to the calls, right before it:
    one turn says something and calls tools, as a template writes it and a model says it.
    """
    turns: list[Turn] = []
    for i, message in enumerate(found):
        turn = _turn(message, f"{key}[{i}]")
        before = turns[-1] if turns and _is_call(message) else None
        if before is not None and before.role == "assistant" and before.trained == turn.trained and not turn.reasoning:
            turns[-1] = replace(before, tool_calls=before.tool_calls + turn.tool_calls)
        else:
            turns.append(turn)
    return turns


def _is_call(message: object) -> bool:
    return isinstance(message, dict) and message.get("role", message.get("from")) in _CALLING


@dataclass
class _Said:
    """What a message says, gathered from its content and its other keys."""

    content: str = ""
    reasoning: str = ""
    calls: list[ToolCall] = field(default_factory=list)


def _turn(message: object, where: str) -> Turn:
    """One turn; what would be lost or trained differently than it says is refused."""
    if not isinstance(message, dict):
        raise Unusable("wrong type", f"{where}: got {kind(message)}, expected an object")
    named = text(message, "from" if "role" not in message and "from" in message else "role", f"{where}.")
    role = _ROLES.get(named)
    if role is None:
        expected = "system, user, assistant or tool"
        raise Unusable("unknown role", f"{where}.role: got {shown(named)}, expected {expected}")
    said = _said(message, named, role, where)
    if role != "assistant":
        for what, value in (("reasoning", said.reasoning), ("a tool call", said.calls)):
            if value:
                raise Unusable("not the assistant's", f"{where}: {what} in a turn of the {role}")
    return Turn(
        role,
        said.content,
        trained=_trained(message, role, where),
        reasoning=said.reasoning,
        tool_calls=tuple(said.calls),
        name=optional_text(message, "name", f"{where}.") if role == "tool" else "",
        call_id=optional_text(message, "tool_call_id", f"{where}.") if role == "tool" else "",
    )


def _said(message: Row, named: str, role: Role, where: str) -> _Said:
    key = "value" if "content" not in message and "value" in message else "content"
    content = message.get(key)
    said = _Said()
    if named in _CALLING:
        said.calls = list(_calls(content, f"{where}.{key}"))
        if not said.calls:
            raise Unusable("bad tool call", f"{where}.{key}: got no call")
    elif role == "tool" and not _is_text_or_parts(content):
        said.content = json.dumps(content, ensure_ascii=False, default=str)
    elif isinstance(content, list):
        _read_parts(content, said, f"{where}.{key}")
    elif content is not None or not (message.get("tool_calls") or message.get("function_call")):
        said.content = text(message, key, f"{where}.")
    said.reasoning = _one_reasoning(message, said.reasoning, where)
    said.calls += _calls(message.get("tool_calls"), f"{where}.tool_calls")
    said.calls += _calls(message.get("function_call"), f"{where}.function_call")
    return said


def _is_text_or_parts(content: object) -> bool:
    if isinstance(content, list):
        return all(isinstance(part, dict) and "type" in part for part in content)
    return isinstance(content, str) or content is None


def _one_reasoning(message: Row, in_parts: str, where: str) -> str:
    found = {in_parts, *(optional_text(message, key, f"{where}.") for key in _REASONING)} - {""}
    if len(found) > 1:
        raise Unusable("two reasonings", f"{where}: keep one of {', '.join(_REASONING)} and the parts")
    return found.pop() if found else ""


def _read_parts(parts: Sequence[object], said: _Said, where: str) -> None:
    """Adds typed parts to what is said: text, reasoning before it, tool calls after it."""
    rank = 0
    for i, part in enumerate(parts):
        here = f"{where}[{i}]"
        if not isinstance(part, dict):
            raise Unusable("wrong type", f"{here}: got {kind(part)}, expected an object with type and text")
        type_ = part.get("type")
        if not isinstance(type_, str) or type_ not in _PARTS:
            raise Unusable("not supported", f"{here}: parts of type {shown(type_)} cannot be trained")
        if _PARTS[type_] < rank:
            raise Unusable("parts out of order", f"{here}: {type_} must stand before what is there")
        rank = _PARTS[type_]
        if rank == 2:
            said.calls += _calls(_call_part(part), here)
        else:
            key = next((key for key in ("text", type_, "content") if key in part), "value")
            said.content += text(part, key, f"{here}.") if rank == 1 else ""
            said.reasoning += text(part, key, f"{here}.") if rank == 0 else ""


def _call_part(part: Row) -> object:
    inner = next((part[key] for key in ("value", "tool_call", "function_call") if part.get(key) is not None), None)
    return part if inner is None else inner


def _calls(value: object, where: str) -> Iterator[ToolCall]:
    """The calls under a key: an object, an array of them, or either written as JSON text."""
    if isinstance(value, str) and value.strip():
        value = parsed(value, where)
    for call in value if isinstance(value, list) else [value]:
        if call is not None and call != "":
            yield _call(call, where)


def _call(call: object, where: str) -> ToolCall:
    if not isinstance(call, dict):
        raise Unusable("bad tool call", f"{where}: got {kind(call)}, expected an object with name and arguments")
    function = call.get("function")
    inner = function if isinstance(function, dict) else call
    name = text(inner, "name", f"{where}: ")
    if not name:
        raise Unusable("bad tool call", f"{where}: the name is empty")
    arguments = inner.get("arguments", inner.get("parameters"))
    if isinstance(arguments, str):
        arguments = parsed(arguments, f"{where}: arguments") if arguments.strip() else {}
    return ToolCall(name, {} if arguments is None else arguments, optional_text(call, "id", f"{where}: "))


def _trained(message: Row, role: Role, where: str) -> bool:
    """Whether a turn is trained, from weights of 0 or 1; what stands between them is not a thing that is done."""
    given = {key: message[key] for key in _WEIGHTS if message.get(key) is not None}
    for key, weight in given.items():
        if not isinstance(weight, int | float) or weight not in (0, 1):
            detail = f"{where}.{key}: got {shown(weight)}; an answer is trained (1) or not (0)"
            raise Unusable("fractional weight", detail)
        if weight and role != "assistant":
            raise Unusable("not the assistant's", f"{where}.{key}: got {shown(weight)}; a turn of the {role} is given")
    if len(set(given.values())) > 1:
        raise Unusable("two weights", f"{where}: {' and '.join(given)} say different things")
    return bool(next(iter(given.values()), True)) or role != "assistant"


def tools_of(row: Row, keys: Sequence[str] = ("tools", "functions")) -> tuple[Mapping[str, object], ...]:
    """What the row offers under `tools` (or `functions`, as OpenAI once called it), as OpenAI's API takes it today."""
    for key in keys:
        value = row.get(key)
        if isinstance(value, str) and value.strip():
            value = parsed(value, key)
        if isinstance(value, dict):
            value = [value]
        if value:
            if not isinstance(value, list):
                raise Unusable("wrong type", f"{key}: got {kind(value)}, expected an array")
            return tuple(_tool(tool, f"{key}[{i}]") for i, tool in enumerate(value))
    return ()


def _tool(tool: object, where: str) -> Mapping[str, object]:
    if isinstance(tool, str) and tool.lstrip().startswith("{"):
        tool = parsed(tool, where)
    if not isinstance(tool, dict):
        raise Unusable("wrong type", f"{where}: got {kind(tool)}, expected an object")
    if not isinstance(tool.get("function"), dict):
        text(tool, "name", f"{where}.")
        return {"type": "function", "function": tool}
    return {"type": "function"} | tool

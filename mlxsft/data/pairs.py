"""Rows of a question and its answer → turns: Alpaca, Dolly, FLAN and P3, Self-Instruct, prompt and completion, text."""

from __future__ import annotations

from collections.abc import Sequence

from mlxsft.data.chats import tools_of, turns_of_messages
from mlxsft.data.conversation import Task, Turn
from mlxsft.data.fields import Draft, Row, Unusable, array, kind, optional_text, system_turn, text

QUESTIONS = ("prompt", "question", "query", "instruction", "input")
ANSWERS = ("completion", "response", "answer", "output", "target")


def alpaca(row: Row) -> list[Draft]:
    """The instruction, with the input after it; `history` holds earlier [question, answer] pairs, trained as well."""
    task = Task(text(row, "instruction"), optional_text(row, "input"))
    earlier = [turn for i, pair in enumerate(array(row, "history")) for turn in _exchange(pair, f"history[{i}]")]
    return [_answered(row, task, text(row, "output"), earlier)]


def _exchange(pair: object, where: str) -> list[Turn]:
    if isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair):
        return [Turn("user", pair[0]), Turn("assistant", pair[1])]
    found = f"{kind(pair)} of {len(pair)}" if isinstance(pair, list) else kind(pair)
    raise Unusable("wrong type", f"{where}: got {found}, expected a question and its answer, both text")


def dolly(row: Row) -> list[Draft]:
    """The instruction, with the context (or input) that it is about after it."""
    about = "context" if row.get("context") else "input"
    return [_answered(row, Task(text(row, "instruction"), optional_text(row, about)), text(row, "response"))]


def self_instruct(row: Row) -> list[Draft]:
    """One conversation for each instance: an instruction is taught by all of its examples."""
    instances = array(row, "instances")
    if not instances:
        raise Unusable("no instances", "instances: got an empty array")
    instruction, drafts = text(row, "instruction"), []
    for i, instance in enumerate(instances):
        if not isinstance(instance, dict):
            raise Unusable("wrong type", f"instances[{i}]: got {kind(instance)}, expected an object")
        where = f"instances[{i}]."
        task = Task(instruction, optional_text(instance, "input", where))
        drafts.append(_answered(row, task, text(instance, "output", where)))
    return drafts


def flan(row: Row) -> list[Draft]:
    """The input and its target; P3's `_pretokenized` texts are taken where its `inputs` are token ids."""
    return _paired(row, *(f"{key}_pretokenized" if f"{key}_pretokenized" in row else key for key in _FLAN))


_FLAN = ("inputs", "targets")


def prompt_completion(row: Row) -> list[Draft]:
    """A question and its answer under the names that they mostly have; `instruction` may have an `input` beside it.

    Where both are arrays of messages, as TRL writes them, they are one conversation.
    """
    asked, answered = _given(row, QUESTIONS), _given(row, ANSWERS)
    if asked == ["instruction", "input"]:
        task = Task(text(row, "instruction"), text(row, "input"))
        return [_answered(row, task, text(row, _only(answered, "answer")))]
    return _paired(row, _only(asked, "question"), _only(answered, "answer"))


def _given(row: Row, keys: Sequence[str]) -> list[str]:
    """The keys that say something; those that are there at all where none does."""
    there = [key for key in keys if key in row]
    return [key for key in there if row[key] not in (None, "")] or there


def _only(keys: Sequence[str], what: str) -> str:
    if len(keys) > 1:
        detail = f"{' and '.join(keys)} are there; keep the one that is meant, or name it in data.columns"
        raise Unusable(f"two {what}s", detail)
    return keys[0]


def _paired(row: Row, asked: str, answered: str) -> list[Draft]:
    """The conversations of a question and an answer that may be lists of texts.

    Several answers are several right ones, as in P3: one conversation each. Several questions are phrasings of one
    task: one conversation each. As many answers as questions belong together one by one.
    """
    questions, answers = _texts(row, asked), _texts(row, answered)
    if questions is None and answers is None:
        turns = [turn for key in (asked, answered) for turn in turns_of_messages(array(row, key), key)]
        return [Draft([*system_turn(row), *turns], tools_of(row))]
    if questions is None or answers is None:
        found, other = (asked, answered) if questions is None else (answered, asked)
        raise Unusable("wrong type", f"{found}: got messages, but {other} is text")
    count = max(len(questions), len(answers))
    if not {len(questions), len(answers)} <= {1, count}:
        raise Unusable("lists of unequal length", f"{asked}: {len(questions)}, {answered}: {len(answers)}")
    questions, answers = (texts * count if len(texts) == 1 else texts for texts in (questions, answers))
    pairs = dict.fromkeys(zip(questions, answers, strict=True))  # an answer given twice is one answer
    return [_answered(row, Task(question), answer) for question, answer in pairs]


def _texts(row: Row, key: str) -> list[str] | None:
    """The texts under a key, one or several; None where messages stand there."""
    value = row.get(key)
    if not isinstance(value, list):
        return [text(row, key)]
    if value and all(isinstance(part, str) for part in value):
        return value
    if value and all(isinstance(part, dict) for part in value):
        return None
    found = "an empty array" if not value else "an array of something else"
    raise Unusable("wrong type", f"{key}: got {found}, expected text, texts or messages")


def prompt_only(row: Row) -> list[Draft]:
    """A question without an answer: nothing to train on, but something to ask."""
    task = Task(text(row, "prompt"))
    return [Draft([*system_turn(row), Turn("user", str(task))], tools_of(row, ("tools",)), task)]


def plain_text(row: Row) -> list[Draft]:
    """Text as it stands, all of it trained; tools beside it are in it already, or were never shown."""
    return [Draft([Turn("text", text(row, "text"))])]


def _answered(row: Row, task: Task, answer: str, earlier: Sequence[Turn] = ()) -> Draft:
    """The conversation that ends with this exchange; it offers the row's tools, as LLaMA-Factory has them there too."""
    turns = [*system_turn(row), *earlier, Turn("user", str(task)), Turn("assistant", answer)]
    return Draft(turns, tools_of(row, ("tools",)), None if earlier else task)

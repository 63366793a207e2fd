"""Turns → text, in pieces: the only place that knows how chat templates behave.

What is trained is found by rendering, never by looking for markers. The text that the template makes of the turns
before an answer, generation prompt included, is the prompt; what it adds to that for the answer, up to and including
the end token, is trained.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from importlib import resources
from os.path import commonprefix
from pathlib import Path

from mlxsft.data.formats import ToolCall, Turn
from mlxsft.data.time_limit import MemoryLimitExceeded, TimeLimitExceeded, time_limit
from mlxsft.data.tokenizer import Tokenizer
from mlxsft.errors import InputRefused, UsageError
from mlxsft.terminal import one_line

BUILT_IN_TEMPLATES = ("plain", "alpaca")
RENDER_SECONDS = 5.0  # a template that takes longer for one row is an attack or a mistake
TEMPLATE_LENGTH = 1_000_000  # the longest published ones have 30,000
_PROBE = "mlxsftprobe"  # stands for an answer while the shape of a template is found out
# Templates that can think are asked not to: then the prompt ends where the answer of the data begins.
_NOT_THINKING: tuple[dict[str, bool], ...] = ({}, {"enable_thinking": False}, {"thinking": False})
# The date for templates that ask for today's, in training and in chat alike: the one that Llama's name by themselves.
_DATE = datetime(2024, 7, 26)
# The sandbox takes no function from outside. `+` keeps a line break with which the template begins.
_DATE_MACRO = (
    "{%- macro strftime_now(format) -%}{{ format"
    + "".join(f".replace('%{letter}', '{_DATE.strftime('%' + letter)}')" for letter in "aAbBdmyYjHMS")
    + " }}{%- endmacro +%}"
)

Tools = Sequence[Mapping[str, object]]


@dataclass(frozen=True, slots=True)
class Template:
    """A chat template and what it is called: `model` for the checkpoint's own, a built-in name, or a file."""

    name: str
    text: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of text that is tokenized by itself: an answer with its end, or what stands between answers."""

    text: str
    answer: bool = False
    trained: bool = False


Script = list[Piece]  # the text of one example


class TemplateRefused(Exception):
    """The template raised an error for these turns, or has no room for what is in them."""


def choose_template(tokenizer: Tokenizer, name: str | None, model: str) -> Template:
    """The template called `name`; None stands for the model's own or, for a base model without one, `plain`."""
    own = tokenizer.chat_template
    if name in BUILT_IN_TEMPLATES or (name is None and own is None):
        return _built_in(tokenizer, name or "plain")
    if own is not None and name in (None, "model"):
        return Template("model", own)
    path = Path(str(name)).expanduser()
    if name != "model" and path.is_file():
        return Template(path.name, path.read_text(encoding="utf-8"))
    missing = f"{model} has no chat template of its own"
    raise UsageError(
        f"data.template: {missing if name == 'model' else f'{name!r} is neither built in nor a file'}",
        f"Built in are {', '.join(BUILT_IN_TEMPLATES)}; a file holds a Jinja chat template.",
    )


def _built_in(tokenizer: Tokenizer, name: str) -> Template:
    file = resources.files("mlxsft.data") / "chat_templates" / f"{name}.jinja"
    text = file.read_text(encoding="utf-8").removesuffix("\n")
    if not tokenizer.begins_with_bos:  # its model has never seen the token there
        text = text.replace("{{ bos_token }}", "")
    return Template(name, text)


class ChatTemplate:
    """A template at work: prompts and scripts of conversations as pieces of text.

    `end_text` ends an answer. `opening` is what the template puts between the generation prompt and the text of an
    answer (a space, mostly nothing). `notes` say what a person should know about it.
    """

    def __init__(self, tokenizer: Tokenizer, template: Template) -> None:
        if len(template.text) > TEMPLATE_LENGTH:
            raise InputRefused(f"chat template {template.name}: has {len(template.text):,} characters, too many")
        self.tokenizer = tokenizer
        self.template = template
        self.notes: list[str] = []
        self._dated = "strftime_now" in template.text
        self._options: dict[str, bool] = {}
        self._own_generation_prompt = True
        self._takes_reasoning = True
        try:
            self._probe_answer()
        except TemplateRefused as error:
            raise InputRefused(
                one_line(f"chat template {template.name}: it cannot render a question and its answer: {error}"),
                "Name another one with data.template.",
            ) from error
        if self._dated:
            self.notes.append(f"the template asks for today's date; it always gets {_DATE:%d %b %Y}")
        user = Turn("user", "hi")
        self._takes_system = self._shows(Turn("system", _PROBE), user)
        self._takes_calls = self._shows(user, Turn("assistant", "", tool_calls=(ToolCall(_PROBE, {}, "0" * 9),)))
        self._takes_results = any(self._shows_result(user, call_id) for call_id in ("call_1", "0" * 9))
        self._keeps_ids = self._shows_result(user, "call_1")
        tool = {"type": "function", "function": {"name": _PROBE, "description": "", "parameters": {}}}
        self._takes_tools = self._shows(user, tools=[tool])
        self._takes_reasoning = self._shows(user, Turn("assistant", "yes", reasoning=_PROBE), thinking=True)
        if not self._takes_system:
            self.notes.append("the template takes no system turn; it is put before the first user turn")

    # --- the shape of the template -----------------------------------------------------------------------------

    def _probe_answer(self) -> None:
        """Find out how the template opens and ends an answer."""
        turns = (Turn("user", "hi"), Turn("assistant", _PROBE))
        for self._options in (*_NOT_THINKING, {}):
            whole, before = self._render(turns), self._render(turns[:1], generation=True)
            if whole.startswith(before) and whole[len(before) :].lstrip().startswith(_PROBE):
                break
        else:
            # Its generation prompt is not how it opens an answer: what stands before an answer is the prompt then.
            self._own_generation_prompt = False
            self.notes.append(
                "the template's generation prompt differs from how it opens an answer; the latter is used"
            )
        if _PROBE not in whole:
            raise TemplateRefused("the answer is missing in what it renders")
        start = whole.rindex(_PROBE)
        self.opening = whole[len(self._prompt_text(turns[:1])) : start]
        self._tail = whole[start + len(_PROBE) :]
        found = self.tokenizer.special_pattern.search(self._tail)
        if found:
            self.end_text = self._tail[: found.end()]
        elif self.tokenizer.eos_token:
            self.end_text = self.tokenizer.eos_token
            self.notes.append(f"the template writes no end token; {self.end_text} ends every answer")
        else:
            raise TemplateRefused("neither it nor the tokenizer has a token that ends an answer")

    def _shows(self, *turns: Turn, tools: Tools = (), thinking: bool = False) -> bool:
        """Whether the probe that stands somewhere in these turns comes out in the text."""
        try:
            return _PROBE in self._render(turns, tools, thinking=thinking)
        except TemplateRefused:
            return False

    def _shows_result(self, user: Turn, call_id: str) -> bool:
        call = Turn("assistant", "", tool_calls=(ToolCall("tool", {}, call_id),))
        return self._shows(user, call, Turn("tool", _PROBE, name="tool", call_id=call_id))

    # --- text --------------------------------------------------------------------------------------------------

    def _render(
        self, turns: Sequence[Turn], tools: Tools = (), *, generation: bool = False, thinking: bool = False
    ) -> str:
        """The template's text for these turns, made in the sandbox."""
        options = dict.fromkeys(self._options, True) if thinking else self._options
        try:
            with time_limit(RENDER_SECONDS):
                return self.tokenizer.apply_template(
                    _DATE_MACRO * self._dated + self.template.text,
                    [self._message(turn) for turn in turns],
                    add_generation_prompt=generation,
                    **({"tools": list(tools)} if tools else {}),
                    **options,
                )
        except MemoryLimitExceeded:
            raise TemplateRefused("it takes too much memory") from None
        except TimeLimitExceeded:
            raise TemplateRefused(f"it takes longer than {RENDER_SECONDS:g} s") from None
        except Exception as error:  # a template can raise anything: Jinja's errors, and Python's for its mistakes
            raise TemplateRefused(one_line(f"{str(error) or type(error).__name__:.300}")) from error

    def _message(self, turn: Turn) -> dict[str, object]:
        """A turn as templates take it, in the manner of OpenAI's API."""
        message: dict[str, object] = {"role": turn.role, "content": turn.content}
        if turn.reasoning and self._takes_reasoning:
            message["reasoning_content"] = message["thinking"] = turn.reasoning  # gpt-oss reads the latter
        elif turn.reasoning:  # then it is written as models that think write it
            message["content"] = f"<think>\n{turn.reasoning}\n</think>\n\n{turn.content}"
        if turn.tool_calls:
            message["tool_calls"] = [
                {"type": "function", "id": call.id, "function": {"name": call.name, "arguments": call.arguments}}
                for call in turn.tool_calls
            ]
        if turn.name:
            message["name"] = turn.name
        if turn.call_id:
            message["tool_call_id"] = turn.call_id
        return message

    def _prompt_text(self, turns: Sequence[Turn], tools: Tools = (), *, thinking: bool = False) -> str:
        """Everything before the answer to these turns."""
        if self._own_generation_prompt:
            return self._render(turns, tools, generation=True, thinking=thinking)
        whole = self._render((*turns, Turn("assistant", _PROBE)), tools, thinking=thinking)
        return whole[: whole.rindex(_PROBE)]

    def _answers(self, turns: Sequence[Turn], tools: Tools) -> list[tuple[str, Piece]]:
        """The prompt before each answer, and the answer itself up to and including its end token."""
        found = []
        for i in answers_of(turns):
            thinking = bool(turns[i].reasoning)
            before = self._prompt_text(turns[:i], tools, thinking=thinking)
            whole = self._render(turns[: i + 1], tools, thinking=thinking)
            start = before
            if not whole.startswith(before):
                start = self._rewritten(turns[:i], before, tools, thinking=thinking)
            found.append((before, Piece(self._answer(whole, start), True, turns[i].trained)))
        return found

    def _rewritten(self, turns: Sequence[Turn], before: str, tools: Tools, *, thinking: bool) -> str:
        """What stands before the answer to these turns once it is given, where the prompt `before` was another.

        Mistral's templates, say, put the system turn into the last user turn only as long as that waits for its answer.
        """
        answered = self._render((*turns, Turn("assistant", _PROBE)), tools, thinking=thinking)
        waiting = self._render(turns, tools, thinking=thinking)
        start = answered[: answered.rindex(_PROBE)] if _PROBE in answered else ""
        start = start.removesuffix(self.opening)
        shared = len(commonprefix([waiting, before]))  # noqa: RUF071  # characters are meant, not folders
        if not start.endswith(before[shared:]):
            raise TemplateRefused("it opens this answer differently from its generation prompt")
        return start

    def _answer(self, whole: str, before: str) -> str:
        """What the template adds to `before` for an answer, up to and including the end token."""
        if not (before and whole.startswith(before)):
            raise TemplateRefused("it opens this answer differently from its generation prompt")
        added = whole[len(before) :]
        if self._tail and added.endswith(self._tail):
            return added[: len(added) - len(self._tail)] + self.end_text
        end = added.rfind(self.end_text)
        return added[:end] + self.end_text if end >= 0 else added + self.end_text

    # --- pieces ------------------------------------------------------------------------------------------------

    def prompt(self, turns: Iterable[Turn], tools: Tools = ()) -> Script:
        """The pieces before the next answer. Raises TemplateRefused."""
        turns = self._adapt(turns, tools)
        text = self._prompt_text(turns, tools)
        _check_system(turns, text)
        return _pieces(text, self._answers(turns, tools))

    def scripts(self, turns: Iterable[Turn], tools: Tools = ()) -> list[Script]:
        """The pieces of each example: one for the conversation, or more where the template rewrites earlier turns.

        Raises TemplateRefused.
        """
        turns = self._adapt(turns, tools)
        answers = self._answers(turns, tools)
        if answers:
            _check_system(turns[: answers_of(turns)[-1]], answers[-1][0])
        scripts: list[Script] = []
        for i, (before, answer) in enumerate(answers):
            prompt = _pieces(before, answers[:i])
            if scripts and prompt[: len(scripts[-1])] == scripts[-1]:
                scripts[-1] = [*prompt, answer]
            else:  # the answers before this one are trained in the examples before this one
                scripts.append([*(replace(p, trained=False) for p in prompt), answer])
        return scripts

    def _adapt(self, turns: Iterable[Turn], tools: Tools) -> tuple[Turn, ...]:
        """The turns as this template takes them: a system turn that it refuses goes before the first user turn."""
        turns = _with_ids(turns, keep=self._keeps_ids)
        calls, results = any(t.tool_calls for t in turns), any(t.role == "tool" for t in turns)
        if (tools and not self._takes_tools) or (calls and not self._takes_calls):
            raise TemplateRefused("it has no room for tools")
        if results and not self._takes_results:
            raise TemplateRefused("it has no room for the results of tools")
        if not self._takes_system and len(turns) > 1 and (turns[0].role, turns[1].role) == ("system", "user"):
            return (replace(turns[1], content=f"{turns[0].content}\n\n{turns[1].content}"), *turns[2:])
        return turns


def answers_of(turns: Sequence[Turn]) -> list[int]:
    """Where the answers stand. A greeting before anything was asked is part of what is read, not an answer."""
    asked = next((i for i, turn in enumerate(turns) if turn.role not in ("system", "assistant")), len(turns))
    return [i for i, turn in enumerate(turns) if turn.role == "assistant" and i > asked]


def _check_system(turns: Sequence[Turn], text: str) -> None:
    """Raises TemplateRefused where the text lacks what a system turn says that is not the first: some pass over it."""
    if any(turn.role == "system" and turn.content.strip() not in text for turn in turns[1:]):
        raise TemplateRefused("it leaves out a system turn that is not the first")


def _with_ids(turns: Iterable[Turn], *, keep: bool) -> tuple[Turn, ...]:
    """The turns with an id for every call, and that of its call for every result.

    Ids that are missing, or all where `keep` is False, are numbers of nine digits: some templates insist on nine
    letters or digits. A result that names no known call belongs to the oldest one that waits for a result.
    """
    given: dict[str, str] = {}
    waiting: deque[str] = deque()
    made = []
    for turn in turns:
        if turn.role != "tool" and not turn.tool_calls:
            made.append(turn)
            continue
        calls = []
        for call in turn.tool_calls:
            new = call.id if keep and call.id else f"{len(given):09d}"
            given[call.id or new] = new
            waiting.append(new)
            calls.append(replace(call, id=new))
        call_id = turn.call_id
        if turn.role == "tool" and (not keep or not call_id):
            call_id = given.get(call_id) or (waiting[0] if waiting else "0" * 9)
        if call_id in waiting:
            waiting.remove(call_id)
        made.append(replace(turn, tool_calls=tuple(calls), call_id=call_id))
    return tuple(made)


def _pieces(prompt: str, answered: Iterable[tuple[str, Piece]]) -> Script:
    """The pieces of a prompt: answers given before that stand in it unchanged, and what lies between them."""
    pieces: Script = []
    position = 0
    for before, answer in answered:
        if len(before) >= position and prompt.startswith(before + answer.text):
            pieces += [Piece(prompt[position : len(before)]), answer]
            position = len(before) + len(answer.text)
    return [*pieces, Piece(prompt[position:])]

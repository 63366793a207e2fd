"""Conversation → Example: the only place that knows chat templates, roles and masks.

What is trained is found by rendering, never by looking for markers. The text that the template makes of the turns
before an answer, generation prompt included, is the prompt; what it adds to that for the answer, up to and including
the end token, is trained. Each prompt and each answer is tokenized by itself, in training and in chat alike, so that
the tokens before an answer are the same in both.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mlxsft.data.formats import Conversation, Turn
from mlxsft.data.rows import LeftOut, Origin
from mlxsft.data.time_limit import TimeLimitExceeded, time_limit
from mlxsft.data.tokenizer import Tokenizer
from mlxsft.errors import InputRefused, UsageError

if TYPE_CHECKING:
    from mlxsft.models.source import ModelSource
    from mlxsft.recipe import DataRecipe

BUILT_IN_TEMPLATES = ("plain", "alpaca")
RENDER_SECONDS = 5.0  # a template that takes longer for one row is an attack or a mistake
_PROBE = "mlxsftprobe"  # stands for an answer while the shape of a template is found out
# Templates that can think are asked not to: then the prompt ends where the answer of the data begins.
_TEMPLATE_OPTIONS: tuple[dict[str, bool], ...] = ({}, {"enable_thinking": False}, {"thinking": False})


# What a template's own mistakes raise, beside Jinja's errors.
_PYTHON_ERRORS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)


@dataclass(frozen=True, slots=True)
class Example:
    """A row, or a part of one, ready for training.

    `tokens` int32[T]; `mask` bool[T], where `mask[t]` says that predicting `tokens[t]` is trained (`mask[0]` is
    False); `answers` the index of the first token of each answer; `note` what was done to make the row fit, or empty.
    """

    tokens: np.ndarray
    mask: np.ndarray
    origin: Origin
    answers: tuple[int, ...] = ()
    note: str = ""


@dataclass(frozen=True, slots=True)
class Template:
    """A chat template and what it is called: `model` for the checkpoint's own, a built-in name, or a file."""

    name: str
    text: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class _Piece:
    """A stretch of rendered text that is tokenized by itself; `trained` where it is an answer with its end."""

    text: str
    trained: bool


class _Refused(Exception):
    """The template raised an error for these turns."""


def load_renderer(source: ModelSource, template: str | Template | None = None) -> Renderer:
    """The renderer of a verified checkpoint: with its own template, one by name, one from a file, or one given.

    Raises InputRefused for a tokenizer or template that does not work, UsageError for a template that is not there.
    """
    tokenizer = Tokenizer.load(source)
    chosen = template if isinstance(template, Template) else choose_template(tokenizer, template, source.name)
    return Renderer(tokenizer, chosen, source.end_token_ids(), source.embedding_rows, source.positions)


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


class Renderer:
    """Turns conversations into tokens and masks for one tokenizer and one template.

    `end_tokens` are the ids at which an answer ends: those of the tokenizer, of the model's configurations, and the
    end-of-turn token that the template writes. `opening` is what the template puts between the generation prompt and
    the text of an answer (a space, mostly nothing). `positions` is how many tokens the model takes, prompt and answer
    together, None where it does not say. `notes` say what a person should know.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: Template,
        end_tokens: Iterable[int],
        embedding_rows: int | None = None,
        positions: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.notes: list[str] = []
        self.positions = positions
        self._embedding_rows = embedding_rows
        self._options: dict[str, bool] = {}
        self._own_generation_prompt = True
        self._merges_system = False
        try:
            self._probe_answer()
        except _Refused as error:
            raise InputRefused(
                f"chat template {template.name}: it cannot render a question and its answer: {error}",
                "Name another one with data.template.",
            ) from error
        self._probe_system()
        last = tokenizer.encode(self.end_text)[-1:]
        self.end_tokens = frozenset(end_tokens) | tokenizer.eos_token_ids | frozenset(last)

    # --- the shape of the template -----------------------------------------------------------------------------

    def _probe_answer(self) -> None:
        """Find out how the template opens and ends an answer."""
        turns = (Turn("user", "hi"), Turn("assistant", _PROBE))
        for self._options in (*_TEMPLATE_OPTIONS, {}):
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
            raise _Refused("the answer is missing in what it renders")
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
            raise _Refused("neither it nor the tokenizer has a token that ends an answer")

    def _probe_system(self) -> None:
        try:
            taken = _PROBE in self._render((Turn("system", _PROBE), Turn("user", "hi")), generation=True)
        except _Refused:
            taken = False
        if not taken:
            self._merges_system = True
            self.notes.append("the template takes no system turn; it is put before the first user turn")

    # --- rendering ---------------------------------------------------------------------------------------------

    def _render(self, turns: Sequence[Turn], *, generation: bool = False) -> str:
        """The template's text for these turns, made in transformers' sandbox."""
        from jinja2 import TemplateError

        messages = [{"role": t.role, "content": t.content} for t in turns]
        try:
            with time_limit(RENDER_SECONDS):
                return self.tokenizer.apply_template(
                    self.template.text, messages, add_generation_prompt=generation, **self._options
                )
        except TimeLimitExceeded:
            raise _Refused(f"it takes longer than {RENDER_SECONDS:g} s") from None
        except (TemplateError, *_PYTHON_ERRORS) as error:
            raise _Refused(str(error) or type(error).__name__) from error

    def _prompt_text(self, turns: Sequence[Turn]) -> str:
        """Everything before the answer to these turns."""
        if self._own_generation_prompt:
            return self._render(turns, generation=True)
        whole = self._render((*turns, Turn("assistant", _PROBE)))
        return whole[: whole.rindex(_PROBE)]

    def _answer_text(self, turns: Sequence[Turn], before: str) -> str:
        """What the template adds to `before` for the last of these turns, up to and including the end token."""
        whole = self._render(turns)
        if not whole.startswith(before):
            raise _Refused("it opens this answer differently from its generation prompt")
        added = whole[len(before) :]
        if self._tail and added.endswith(self._tail):
            return added[: len(added) - len(self._tail)] + self.end_text
        end = added.rfind(self.end_text)
        return added[:end] + self.end_text if end >= 0 else added + self.end_text

    def _answers(self, turns: Sequence[Turn]) -> list[tuple[str, str]]:
        """Prompt and answer, as text, for each answer in order."""
        found = []
        for i, turn in enumerate(turns):
            if turn.role == "assistant":
                before = self._prompt_text(turns[:i])
                found.append((before, self._answer_text(turns[: i + 1], before)))
        return found

    @staticmethod
    def _pieces(prompt: str, answered: Iterable[tuple[str, str]]) -> list[_Piece]:
        """The pieces of a prompt: answers given before that stand in it unchanged, and what lies between them."""
        pieces, position = [], 0
        for before, answer in answered:
            if len(before) >= position and prompt.startswith(before + answer):
                pieces += [_Piece(prompt[position : len(before)], False), _Piece(answer, True)]
                position = len(before) + len(answer)
        return [*pieces, _Piece(prompt[position:], False)]

    def _scripts(self, turns: Sequence[Turn]) -> list[list[_Piece]]:
        """The pieces of each example: one for the conversation, or more where the template rewrites earlier turns."""
        answers = self._answers(turns)
        scripts: list[list[_Piece]] = []
        for i, (before, answer) in enumerate(answers):
            prompt = self._pieces(before, answers[:i])
            if scripts and prompt[: len(scripts[-1])] == scripts[-1]:
                scripts[-1] = [*prompt, _Piece(answer, True)]
            else:  # the answers before this one are trained in the examples before this one
                scripts.append([*(replace(p, trained=False) for p in prompt), _Piece(answer, True)])
        return scripts

    def _adapt(self, turns: Iterable[Turn]) -> tuple[Turn, ...]:
        """The turns as this template takes them: a system turn that it refuses goes before the first user turn."""
        turns = tuple(turns)
        if self._merges_system and len(turns) > 1 and (turns[0].role, turns[1].role) == ("system", "user"):
            return (Turn("user", f"{turns[0].content}\n\n{turns[1].content}"), *turns[2:])
        return turns

    # --- examples ----------------------------------------------------------------------------------------------

    def prompt(self, turns: Sequence[Turn]) -> list[int]:
        """The tokens before the next answer: what chat feeds the model is what training put before the answer.

        Special tokens that the turns spell out are tokenized as ordinary text. Raises InputRefused where the template
        refuses the turns.
        """
        turns = self._adapt(self._fenced(turns))
        try:
            pieces = self._pieces(self._prompt_text(turns), self._answers(turns))
        except _Refused as error:
            raise InputRefused(f"chat template {self.template.name}: it refuses this conversation: {error}") from error
        return [int(i) for i in self._assemble(pieces, Origin("prompt", 1)).tokens]

    def examples(self, row: Conversation, data: DataRecipe) -> Iterator[Example | LeftOut]:
        """What a row gives under the recipe's `data` section: its examples, or why it is left out."""
        if data.special_tokens in ("refuse", "drop"):
            found = next((m[0] for t in row.turns if (m := self.tokenizer.special_pattern.search(t.content))), None)
            if found is not None:
                detail = f"the text contains {found!r}, which this tokenizer takes for a control token"
                yield LeftOut(row.origin, "special token", detail, broken=data.special_tokens == "refuse")
                return
        try:
            made = self._make(row, data)
            if any(len(e.tokens) > data.max_tokens for e in made):
                yield from self._shorten(row, data, max(len(e.tokens) for e in made))
            else:
                yield from map(self._verified, made)
        except _Refused as error:
            yield LeftOut(row.origin, "refused by the template", str(error), broken=True)

    def _make(self, row: Conversation, data: DataRecipe) -> list[Example]:
        turns = self._fenced(row.turns) if data.special_tokens == "escape" else row.turns
        if turns[0].role == "text":
            ids = self.tokenizer.encode_document(turns[0].content)
            return [Example(np.array(ids, dtype=np.int32), np.arange(len(ids)) > 0, row.origin)]
        scripts = self._scripts(self._adapt(turns))
        note = "one example a turn" if len(scripts) > 1 else ""
        return [replace(self._assemble(s, row.origin, data.train_on), note=note) for s in scripts]

    def _fenced(self, turns: Iterable[Turn]) -> tuple[Turn, ...]:
        return tuple(Turn(t.role, self.tokenizer.fence(t.content)) for t in turns)

    def _assemble(self, pieces: Sequence[_Piece], origin: Origin, train_on: str = "responses") -> Example:
        ids: list[int] = []
        mask: list[bool] = []
        answers = []
        for i, piece in enumerate(pieces):
            new = self.tokenizer.encode_continuation(piece.text) if i else self.tokenizer.encode(piece.text)
            if piece.trained:
                answers.append(len(ids))
            ids += new
            mask += [piece.trained or train_on == "all"] * len(new)
        trained = np.array(mask, dtype=np.bool_)
        trained[:1] = False  # nothing stands before the first token that could predict it
        return Example(np.array(ids, dtype=np.int32), trained, origin, tuple(answers))

    def _verified(self, example: Example) -> Example | LeftOut:
        """The example, unless it trains nothing or holds an id that the embedding has no row for."""
        if not example.mask.any():
            return LeftOut(example.origin, "no trained token")
        if self._embedding_rows is not None and int(example.tokens.max()) >= self._embedding_rows:
            # MLX would read foreign memory there.
            detail = f"id {int(example.tokens.max())}, where the embedding has {self._embedding_rows} rows"
            return LeftOut(example.origin, "token without embedding", detail, broken=True)
        return example

    # --- rows that are too long ------------------------------------------------------------------------------------

    def _shorten(self, row: Conversation, data: DataRecipe, length: int) -> Iterator[Example | LeftOut]:
        """What a row of too many tokens gives: the policy is the recipe's `data.too_long`."""
        detail = f"{length} tokens, where data.max_tokens and the model allow {data.max_tokens}"
        if data.too_long != "keep-response":
            yield LeftOut(row.origin, "too long", detail, broken=data.too_long == "error")
        elif row.turns[0].role == "text":
            yield from self._windows(self._make(row, data)[0], data.max_tokens)
        else:
            for turns in self._shorter(row.turns, length - data.max_tokens):
                made = self._make(replace(row, turns=turns), data)
                if all(len(e.tokens) <= data.max_tokens for e in made):
                    yield from (self._verified(replace(e, note="prompt shortened")) for e in made)
                    return
            yield LeftOut(row.origin, "answer too long", detail)

    @staticmethod
    def _windows(example: Example, max_tokens: int) -> Iterator[Example]:
        """A long plain text in stretches that overlap by the one token that the next stretch is predicted from."""
        for start in range(0, len(example.tokens) - 1, max_tokens - 1):
            tokens = example.tokens[start : start + max_tokens]
            yield replace(example, tokens=tokens, mask=np.arange(len(tokens)) > 0, note="text split")

    def _shorter(self, turns: tuple[Turn, ...], excess: int) -> Iterator[tuple[Turn, ...]]:
        """Ever shorter forms of a conversation: whole exchanges go first, the oldest first; then, in the exchange that
        is left, the beginning of the question. System turn and last answer stay whole."""
        system, rest = turns[: turns[0].role == "system"], turns[turns[0].role == "system" :]
        while (later := next((i for i in range(1, len(rest)) if rest[i].role == "user"), None)) is not None:
            rest = rest[later:]
            yield (*system, *rest)
        question = next((i for i, t in enumerate(rest) if t.role == "user"), None)
        if question is None:
            return
        ids = self.tokenizer.encode(self.tokenizer.fence(rest[question].content))
        cut = excess
        while cut < len(ids):
            text = self.tokenizer.decode(ids[cut:]).lstrip("\ufffd ")
            yield (*system, *rest[:question], replace(rest[question], content=text), *rest[question + 1 :])
            cut += max(1, cut // 8)

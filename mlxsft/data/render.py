"""Conversation → Example: tokens and masks.

Each prompt and each answer is tokenized by itself, in training and in chat alike, so that the tokens before an answer
are the same in both.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from mlxsft.data.formats import Conversation, ToolCall, Turn
from mlxsft.data.rows import LeftOut, Origin
from mlxsft.data.shorten import answered, cut, exchanges, later
from mlxsft.data.template import ChatTemplate, Piece, Script, Template, TemplateRefused, Tools, choose_template
from mlxsft.data.tokenizer import Tokenizer
from mlxsft.errors import InputRefused

if TYPE_CHECKING:
    from mlxsft.models.source import ModelSource
    from mlxsft.recipe import DataRecipe

_PLACEHOLDER = re.compile(r"\{\{\s*[\w.-]+\s*\}\}")
ONE_A_TURN = "one example a turn"  # the note of a row whose earlier turns the template rewrites
OLDEST_LOST = "oldest turns left out, with their answers"
PART_LOST = "turns split, an answer that is too long left out"
NO_TRAINED_TOKEN = "no trained token"
_ROWS_AT_ONCE = 256  # rendered, then tokenized together on all cores


@dataclass(frozen=True, slots=True)
class Example:
    """A row, or a part of one, ready for training.

    `tokens` int32[T]; `mask` bool[T], where `mask[t]` says that predicting `tokens[t]` is trained (`mask[0]` is
    False); `answers` the index of the first token of each trained answer; `note` what was done to make the row fit, or
    empty.
    """

    tokens: np.ndarray
    mask: np.ndarray
    origin: Origin
    answers: tuple[int, ...] = ()
    note: str = ""
    trunk: np.ndarray | None = None  # [T, D], what the frozen layers give, where that is kept
    number: int = 0  # of all that are trained; what is random in training depends on it


Made = list[Example | LeftOut]  # what one row gives


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Rows whose text is rendered, and the ids of its pieces, which are on their way."""

    rows: list[Conversation]
    scripts: list[list[Script] | LeftOut]
    ids: Future[list[list[list[int]]]]


def load_renderer(source: ModelSource, template: str | Template | None = None) -> Renderer:
    """The renderer of a verified checkpoint: with its own template, one by name, one from a file, or one given.

    Raises InputRefused for a tokenizer or template that does not work, UsageError for a template that is not there.
    """
    tokenizer = Tokenizer.load(source)
    chosen = template if isinstance(template, Template) else choose_template(tokenizer, template, source.name)
    return Renderer(tokenizer, chosen, source.end_token_ids(), source.embedding_rows, source.positions)


def refuse_unusable(source: ModelSource) -> None:
    """Raise InputRefused for a checkpoint that nobody can chat with: its tokenizer, or a template of its own.

    It is for what only copies them; one without a template, or without a token that ends an answer, is left in peace.
    """
    tokenizer = Tokenizer.load(source)
    if tokenizer.chat_template is None:
        return
    try:
        ChatTemplate(tokenizer, choose_template(tokenizer, "model", source.name))
    except InputRefused as refusal:
        hint = "It would come along. Repair or remove it in a copy of the folder."
        raise InputRefused(f"{source.name}: {refusal.message}", hint) from refusal


class Renderer:
    """Turns conversations into tokens and masks for one tokenizer and one template.

    `end_tokens` are the ids at which an answer ends: those of the tokenizer, of the model's configurations, and the
    end-of-turn token that the template writes. `positions` is how many tokens the model takes, prompt and answer
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
        self.positions = positions
        self.embedding_rows = embedding_rows
        self._chat = ChatTemplate(tokenizer, template)
        self.notes = self._chat.notes
        self.opening = self._chat.opening
        self._end = tokenizer.encode_all([(self._chat.end_text, False)])[0]
        last = self._end[-1:]
        self._end_takes_space = any(map(tokenizer.takes_space, last))
        self.end_tokens = frozenset(end_tokens) | tokenizer.eos_token_ids | frozenset(last)

    def prompt(
        self, turns: Sequence[Turn], tools: Tools = (), *, said: Mapping[str, Sequence[int]] = MappingProxyType({})
    ) -> list[int]:
        """The tokens before the next answer: what chat feeds the model is what training put before the answer.

        Special tokens that the turns spell out are tokenized as ordinary text; an answer whose text is in `said` has
        the tokens given there. Raises InputRefused where the template refuses the turns.
        """
        fence = self.tokenizer.fence
        fenced = [{fence(key): _mapped(value, fence) for key, value in tool.items()} for tool in tools]
        with self._refusing():
            script = self._chat.prompt(map(self._fenced, turns), fenced)
        tokens: list[int] = []
        for piece, ids in zip(script, self._encode([script])[0], strict=True):
            own = said.get(piece.text.removesuffix(self._chat.end_text)) if piece.answer else None
            tokens += ids if own is None else [*own, *self._end]
        return self.checked_prompt(tokens)

    def plain_prompt(self, text: str) -> list[int]:
        """The tokens of a text without a template, with the beginning that the tokenizer gives a text.

        Special tokens that it spells out are tokenized as ordinary text. Raises InputRefused for no token at all.
        """
        ids = self._encode([[Piece(self.tokenizer.fence(text))]])[0][0]
        return self.checked_prompt(self.tokenizer.begun(ids))

    def checked_prompt(self, tokens: Sequence[int]) -> list[int]:
        """The tokens of a prompt that came as such. Raises InputRefused for none, and for one without embedding."""
        if not tokens:
            raise InputRefused("the prompt is empty")
        rows = self.embedding_rows if self.embedding_rows is not None else len(self.tokenizer.hf)
        if bad := [i for i in tokens if not 0 <= i < rows]:  # MLX would read foreign memory there
            raise InputRefused(f"the prompt has the token {bad[0]}, where the model has {rows}")
        return list(tokens)

    def answer_text(self, turns: Sequence[Turn], tools: Tools = ()) -> str:
        """What the template writes for the last turn, an answer, up to and including its end token.

        Raises InputRefused where the template refuses the turns.
        """
        with self._refusing():
            return self._chat.scripts(turns, tools)[-1][-1].text

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except TemplateRefused as error:
            raise InputRefused(f"chat template {self.template.name}: it refuses this conversation: {error}") from error

    def examples(self, row: Conversation, data: DataRecipe) -> Made:
        """What a row gives under the recipe's `data` section: its examples, or why it is left out."""
        return next(made for _, made in self.rendered([row], data))

    def rendered(self, rows: Iterable[Conversation], data: DataRecipe) -> Iterator[tuple[Conversation, Made]]:
        """Every row with what it gives, in order; while some rows are tokenized, the next are rendered."""
        waiting = iter(rows)
        before: _Chunk | None = None
        with ThreadPoolExecutor(1) as tokenizing:
            while chunk := list(islice(waiting, _ROWS_AT_ONCE)):
                scripts = [self._scripts(row, data) for row in chunk]
                texts = [script for made in scripts if isinstance(made, list) for script in made]
                now = _Chunk(chunk, scripts, tokenizing.submit(self._encode, texts))
                if before is not None:
                    yield from self._made(before, data)
                before = now
            if before is not None:
                yield from self._made(before, data)

    def _made(self, chunk: _Chunk, data: DataRecipe) -> Iterator[tuple[Conversation, Made]]:
        ids = iter(chunk.ids.result())
        for row, scripts in zip(chunk.rows, chunk.scripts, strict=True):
            if isinstance(scripts, LeftOut):
                yield row, [scripts]
            else:
                examples = [self._example(row, script, next(ids), data) for script in scripts]
                yield row, _without_untrained(self._fit(row, examples, data))

    # --- text --------------------------------------------------------------------------------------------------

    def _scripts(self, row: Conversation, data: DataRecipe) -> list[Script] | LeftOut:
        """The text of a row's examples; plain text is made a script without a prompt."""
        if data.special_tokens in ("refuse", "drop"):
            texts = (text for turn in row.turns for text in texts_of(turn))
            found = next((m[0] for text in texts if (m := self.tokenizer.special_pattern.search(text))), None)
            if found is not None:
                detail = f"the text contains {found!r}, which this tokenizer takes for a control token"
                return LeftOut(row.origin, "special token", detail, broken=data.special_tokens == "refuse")
        turns = row.turns if data.special_tokens == "allow" else tuple(map(self._fenced, row.turns))
        if turns[0].role == "text":
            return [[Piece(turns[0].content, trained=True)]]
        try:
            return self._chat.scripts(turns, row.tools)
        except TemplateRefused as error:
            return LeftOut(row.origin, "refused by the template", str(error))

    def _fenced(self, turn: Turn) -> Turn:
        """The turn with its spelled-out special tokens marked as the ordinary text that they are."""
        fence = self.tokenizer.fence
        plain = not (turn.reasoning or turn.tool_calls or turn.name or turn.call_id)
        if plain and fence(turn.content) == turn.content:
            return turn
        return replace(
            turn,
            content=fence(turn.content),
            reasoning=fence(turn.reasoning),
            tool_calls=tuple(
                ToolCall(fence(c.name), _mapped(c.arguments, fence), fence(c.id)) for c in turn.tool_calls
            ),
            name=fence(turn.name),
            call_id=fence(turn.call_id),
        )

    # --- tokens ------------------------------------------------------------------------------------------------

    def _encode(self, scripts: Sequence[Script]) -> list[list[list[int]]]:
        """Token ids of every piece of every script; all are tokenized at once."""
        texts = [(text, i == 0) for script in scripts for i, text in enumerate(self._texts(script))]
        ids = iter(self.tokenizer.encode_all(texts))
        return [[next(ids) for _ in script] for script in scripts]

    def _texts(self, script: Script) -> Iterator[str]:
        """The text of every piece; white space after an answer is left out where its end token takes it in."""
        behind_answer = False
        for piece in script:
            yield piece.text.lstrip() if behind_answer and self._end_takes_space else piece.text
            behind_answer = piece.answer

    def _example(self, row: Conversation, script: Script, ids: list[list[int]], data: DataRecipe) -> Example:
        """One example of the pieces of a script and their token ids."""
        if row.turns[0].role == "text":
            ids = [self.tokenizer.framed(ids[0])]
        tokens: list[int] = []
        mask: list[bool] = []
        answers = []
        for piece, new in zip(script, ids, strict=True):
            if piece.answer and piece.trained:
                answers.append(len(tokens))
            tokens += new
            mask += [piece.trained or data.train_on == "all"] * len(new)
        trained = np.array(mask, dtype=np.bool_)
        trained[:1] = False  # nothing stands before the first token that could predict it
        return Example(np.array(tokens, dtype=np.int32), trained, row.origin, tuple(answers))

    def _fit(self, row: Conversation, examples: list[Example], data: DataRecipe) -> Made:
        """The examples, or what `data.too_long` makes of them where one has too many tokens."""
        longest = max((len(e.tokens) for e in examples), default=0)
        if longest > data.max_tokens:
            return self._shorten(row, examples, data, longest)
        note = ONE_A_TURN if len(examples) > 1 else ""
        if any(_PLACEHOLDER.search(turn.content) for turn in row.turns):
            note = "a {{placeholder}} is left in the text (data.fill)"
        return self._noted(examples, note) or [LeftOut(row.origin, NO_TRAINED_TOKEN)]

    def _verified(self, example: Example) -> Example | LeftOut:
        """The example, unless it trains nothing or holds an id that the embedding has no row for."""
        if not example.mask.any():
            return LeftOut(example.origin, NO_TRAINED_TOKEN)
        if self.embedding_rows is not None and int(example.tokens.max()) >= self.embedding_rows:
            # MLX would read foreign memory there.
            detail = f"id {int(example.tokens.max())}, where the embedding has {self.embedding_rows} rows"
            return LeftOut(example.origin, "token without embedding", detail, broken=True)
        return example

    # --- rows that are too long --------------------------------------------------------------------------------

    def _shorten(self, row: Conversation, examples: list[Example], data: DataRecipe, longest: int) -> Made:
        """What a row of too many tokens gives."""
        detail = f"{longest} tokens, where data.max_tokens and the model allow {data.max_tokens}"
        if data.too_long in ("error", "drop"):
            return [LeftOut(row.origin, "too long", detail, broken=data.too_long == "error")]
        if row.turns[0].role == "text":
            return [self._verified(e) for e in _windows(examples[0], data.max_tokens)]
        if data.too_long == "split-turns" and len(parts := exchanges(row.turns)) > 1:
            return self._split(row, parts, data)
        return self._shortened(row, data) or [LeftOut(row.origin, _too_long_part(examples, data), detail)]

    def _shortened(self, row: Conversation, data: DataRecipe) -> Made:
        """The last exchanges that fit, or the last one without the beginning of its prompt; empty where none does."""
        last, examples = row, list[Example]()
        for turns in later(answered(row.turns)):
            last = replace(row, turns=turns)
            examples = self._plain(last, data)
            if _fit(examples, data):
                return self._noted(examples, _turns_lost(row, last))
        excess = max((len(e.tokens) for e in examples), default=0) - data.max_tokens
        for turns in cut(last.turns, excess, self.tokenizer):
            examples = self._plain(replace(row, turns=turns), data)
            if _fit(examples, data):
                return self._noted(examples, _turns_lost(row, last) or "prompt shortened")
        return []

    def _noted(self, examples: Iterable[Example], note: str) -> Made:
        return [self._verified(replace(e, note=note) if note else e) for e in examples]

    def _plain(self, row: Conversation, data: DataRecipe) -> list[Example]:
        """The examples of a row, whatever their length; none where the template refuses."""
        scripts = self._scripts(row, data)
        if isinstance(scripts, LeftOut):
            return []
        encoded = zip(scripts, self._encode(scripts), strict=True)
        return [self._example(row, script, ids, data) for script, ids in encoded]

    def _split(self, row: Conversation, parts: list[tuple[Turn, ...]], data: DataRecipe) -> Made:
        """Consecutive exchanges in as few examples as hold them; one that is too long by itself loses of its prompt."""
        made: Made = []
        system = row.turns[: row.turns[0].role == "system"]
        start = 0
        while start < len(parts):
            end, fitting = start + 1, list[Example]()
            while end <= len(parts):
                turns = (*system, *(turn for part in parts[start:end] for turn in part))
                examples = self._plain(replace(row, turns=turns), data)
                if not examples or any(len(e.tokens) > data.max_tokens for e in examples):
                    break
                fitting, end = examples, end + 1
            if fitting:
                made += [self._verified(replace(e, note="turns split")) for e in fitting]
                start = end - 1
            else:
                alone = replace(row, turns=(*system, *parts[start]))
                made += self.examples(alone, data)
                start += 1
        made = _without_untrained(made)
        if any(isinstance(m, LeftOut) for m in made):
            made = [replace(m, note=PART_LOST) if isinstance(m, Example) else m for m in made]
        return made


def _without_untrained(made: Made) -> Made:
    """What a row gives, without the parts in which nothing is trained where others are."""
    kept = [m for m in made if isinstance(m, Example) or m.reason != NO_TRAINED_TOKEN]
    return kept or made[:1]


def _fit(examples: Sequence[Example], data: DataRecipe) -> bool:
    """Whether there are examples, none of too many tokens."""
    return bool(examples) and all(len(e.tokens) <= data.max_tokens for e in examples)


def _turns_lost(row: Conversation, shortened: Conversation) -> str:
    """What the shortened row says of its turns: that it has fewer answers, or nothing."""
    fewer = len(exchanges(shortened.turns)) < len(exchanges(answered(row.turns)))
    return OLDEST_LOST if fewer else ""


def _too_long_part(examples: Sequence[Example], data: DataRecipe) -> str:
    """What keeps the longest example from fitting: its last answer where that takes half of the tokens allowed."""
    longest = max(examples, key=lambda e: len(e.tokens))
    answer = len(longest.tokens) - longest.answers[-1] if longest.answers else 0
    return "answer too long" if 2 * answer >= data.max_tokens else "prompt too long"


def _windows(example: Example, max_tokens: int) -> Iterator[Example]:
    """A long plain text in stretches that overlap by the one token that the next stretch is predicted from."""
    for start in range(0, len(example.tokens) - 1, max_tokens - 1):
        tokens = example.tokens[start : start + max_tokens]
        yield replace(example, tokens=tokens, mask=np.arange(len(tokens)) > 0, note="text split")


def texts_of(turn: Turn) -> Iterator[str]:
    """Every text in a turn."""
    yield from (turn.content, turn.reasoning)
    for call in turn.tool_calls:
        yield call.name
        yield from _strings(call.arguments)


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _mapped(value: object, change: Callable[[str], str]) -> object:
    """A JSON value with `change` applied to every string in it."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {_mapped(k, change): _mapped(v, change) for k, v in value.items()}
    return [_mapped(v, change) for v in value] if isinstance(value, list) else value

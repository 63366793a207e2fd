"""Answers in JSON under a schema: llguidance says, at each token, which ones may come next.

What it knows of JSON Schema: https://github.com/guidance-ai/llguidance/blob/main/docs/json_schema.md. What it does not
know it refuses. It asks no network for what a schema refers to. Properties come in the order of the schema.
"""

from __future__ import annotations

import importlib.util
import json
import re
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from mlxsft.data.render import Renderer
from mlxsft.data.tokenizer import Tokenizer, refusing
from mlxsft.errors import InputRefused, UsageError
from mlxsft.terminal import one_line

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from mlxsft.backends import Constraint

Schema = Mapping[str, Any]
ANY_OBJECT: Schema = {"type": "object"}
LONGEST = 100_000  # characters of a schema
# llguidance recurses from schema to schema: 5 KB for each in another, which takes 10 characters at least.
STACK = 256 << 20  # bytes
NOTHING = "the JSON schema: nothing that the tokenizer can write satisfies it"
# Space or a line with its indentation, once at each place where JSON takes white space: a model that is at a loss may
# otherwise write spaces for ever.
SPACE = r" |\n[ \t]{0,80}"


def read_schema(given: str) -> Schema:
    """The schema in a text that begins with a brace, or in a file. Raises InputRefused where there is none."""
    if given.lstrip().startswith("{"):
        where, text = "the JSON schema", given
    else:
        where = given
        try:
            text = Path(given).read_text(encoding="utf-8")
        except OSError as error:
            hint = "Give a file, or JSON that begins with {."
            raise InputRefused(f"{given}: cannot be read: {error.strerror or error}", hint) from error
        except UnicodeDecodeError as error:
            raise InputRefused(f"{given}: is not text in UTF-8") from error
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputRefused(one_line(f"{where}: is not JSON: {error}")) from error
    if not isinstance(schema, dict):
        raise InputRefused(f"{where}: expected a JSON object, got {json.dumps(schema):.50}")
    return schema


def require_llguidance() -> None:
    """Returns where llguidance is installed. Raises UsageError with the install command where it is not."""
    if importlib.util.find_spec("llguidance") is None:
        raise UsageError(
            "JSON answers need llguidance, not installed here", "Install it: pip install 'mlxsft[json-schema]'"
        )


class JsonSchema:
    """A schema made ready for the tokenizer and template of a renderer."""

    def __init__(self, renderer: Renderer, schema: Schema) -> None:
        """Raises InputRefused for what is no schema, no answer satisfies, or llguidance cannot do."""
        require_llguidance()
        tokenizer, end_tokens = renderer.tokenizer, renderer.end_tokens
        self._end_tokens = np.array(sorted(i for i in end_tokens if i < len(tokenizer.hf)))
        vocabulary = _vocabulary(tokenizer, end_tokens)
        grammar = _grammar(schema, renderer.opening)
        with refusing("the JSON schema cannot be used"):
            self._matcher = _with_stack(lambda: _matcher(vocabulary, grammar))
        self.constraint()(None)  # raises for a schema that is refused, or where nothing can come first

    def constraint(self) -> Constraint:
        """For one answer. It raises InputRefused where the schema turns out to be too complex on the way."""
        return _Answer(self._matcher.deep_copy(), self._end_tokens)


class _Answer:
    """How far one answer is."""

    def __init__(self, matcher: LLMatcher, end_tokens: NDArray[np.int64]) -> None:
        self._matcher, self._end_tokens = matcher, end_tokens

    def __call__(self, last: int | None) -> NDArray[np.bool_]:
        if last is not None and last not in self._end_tokens:
            self._matcher.consume_token(last)
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(bits, bitorder="little").view(np.bool_)
        allowed[self._end_tokens] = self._matcher.is_accepting()  # some of them may be ordinary text elsewhere
        _raise_problem(self._matcher)
        if not allowed.any():
            raise InputRefused(NOTHING)
        return allowed


@lru_cache(maxsize=4)  # half a second for 50,000 tokens, and each answer of a server needs it
def _vocabulary(tokenizer: Tokenizer, end_tokens: frozenset[int]) -> LLTokenizer:
    """The tokenizer as llguidance knows it. Raises InputRefused where it is of a kind that it does not know."""
    from llguidance import LLTokenizer

    if not tokenizer.hf.is_fast:
        raise InputRefused("JSON answers need a tokenizer with a tokenizer.json, and this one has none")
    ends = sorted(i for i in end_tokens if i < len(tokenizer.hf))
    with refusing("llguidance does not know tokenizers of this kind"):
        return LLTokenizer(tokenizer.hf.backend_tokenizer.to_str(), eos_token=ends)


def _grammar(schema: Schema, opening: str) -> str:
    """What llguidance reads: the schema, behind what the template may put between prompt and answer."""
    from llguidance import LLMatcher

    settings = {"whitespace_pattern": SPACE, "lenient": False}
    try:
        text = json.dumps({**schema, "x-guidance": settings}, allow_nan=False, separators=(",", ":"))
    except (ValueError, RecursionError) as error:
        raise InputRefused(f"the JSON schema: {error}") from error
    if len(text) > LONGEST:
        raise InputRefused(f"the JSON schema has {len(text):,} characters, and {LONGEST:,} are the most")
    try:
        if opening.isspace():
            return LLMatcher.grammar_from_lark(f"start: {json.dumps(opening)}? answer\nanswer: %json {text}")
        return LLMatcher.grammar_from_json_schema(text)
    except ValueError as error:
        raise InputRefused(one_line(f"the JSON schema: {error}")) from error


def _matcher(vocabulary: LLTokenizer, grammar: str) -> LLMatcher:
    from llguidance import LLMatcher, LLParserLimits

    return LLMatcher(vocabulary, grammar, log_level=0, limits=LLParserLimits(verbose_errors=False))


# llguidance quotes the grammar that `_grammar` has put around a schema, which nobody wrote.
_WITHIN_GRAMMAR = re.compile(r"at \d+\(\d+\): failed to compile JSON schema: (.*?)\n +\d+ \| ", re.DOTALL)


def _raise_problem(matcher: LLMatcher) -> None:
    if not matcher.is_error():
        return
    problem = matcher.get_error().removesuffix("\n<non-verbose/>")
    if problem == "NoExtensionBias":
        raise InputRefused(NOTHING)
    if within := _WITHIN_GRAMMAR.match(problem):
        problem = within[1]
    raise InputRefused(one_line(f"the JSON schema cannot be used: {problem[-300:]}"))


T = TypeVar("T")


def _with_stack(function: Callable[[], T]) -> T:
    """What a function returns in a thread with a stack of STACK bytes; Ctrl-C does not wait for it."""
    result: Future[T] = Future()

    def work() -> None:
        try:
            result.set_result(function())
        except BaseException as error:
            result.set_exception(error)

    before = threading.stack_size(STACK)
    try:
        threading.Thread(target=work, daemon=True).start()
    finally:
        threading.stack_size(before)
    return result.result()

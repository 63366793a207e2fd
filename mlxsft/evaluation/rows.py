"""A run's rows → what is asked and judged: held-out, training and general rows, and prompts with constraints."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mlxsft.data.conversation import Turn
from mlxsft.data.dataset import load_dataset
from mlxsft.data.formats import Conversation, conversations_of
from mlxsft.data.places import LeftOut, Origin
from mlxsft.data.render import Example, Renderer, texts_of
from mlxsft.data.rendered import RenderedRow, question_key
from mlxsft.data.sources import rows_of, sources_of
from mlxsft.errors import InputRefused
from mlxsft.evaluation import constraints
from mlxsft.evaluation.rules import RuleBook, Rules, checked
from mlxsft.recipe import DataRecipe

PROBE = Path(__file__).with_name("probe.jsonl")
INSTRUCTIONS = Path(__file__).with_name("instructions.jsonl")

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Asked:
    """A prompt that both models answer: its token ids, its text to show, and what is known of a right answer."""

    place: str  # file:line
    tokens: list[int]
    prompt: str
    reference: str = ""
    category: str = ""
    rules: Rules = field(default_factory=dict)
    constraints: Sequence[tuple[str, dict[str, Any]]] = ()


@dataclass(frozen=True)
class RowSet:
    """Rows whose loss is taken, and those of them that are asked; `total`: how many rows there were to choose from."""

    examples: list[list[Example]]  # of each row
    asked: list[Asked]
    total: int


NONE = RowSet([], [], 0)


def chosen(items: Sequence[_Item], count: int, seed: int, what: str) -> list[_Item]:
    """At most `count` of the items, the same for the same seed, in their order."""
    if len(items) <= count:
        return list(items)
    random = np.random.default_rng([seed, zlib.crc32(what.encode())])
    return [items[i] for i in sorted(random.choice(len(items), count, replace=False))]


def row_set(
    what: str,
    data: DataRecipe,
    rows: Sequence[RenderedRow],
    split: str,
    renderer: Renderer,
    book: RuleBook,
    *,
    count: int,
    samples: int,
    seed: int,
) -> RowSet:
    """At most `count` of the rows, which the recipe's data section has in its files of the split, `samples` of them
    asked. Raises InputRefused for a row whose `check` is no rule.
    """
    judged = chosen(rows, count, seed, what)
    with_answer = [row for row in judged if row.examples[-1].answers]
    asked = chosen(with_answer, samples, seed, f"{what} asked")
    texts = _texts(data, split, {(row.examples[0].origin, row.key) for row in asked})
    made = [_asked(row, *texts[row.examples[0].origin, row.key], renderer, book) for row in asked]
    return RowSet([row.examples for row in judged], made, len(rows))


def file_set(
    what: str, path: Path, renderer: Renderer, book: RuleBook, *, count: int, samples: int, seed: int
) -> tuple[RowSet, list[str]]:
    """Rows of a file, as `row_set` has them, and notes. Raises InputRefused for a file that cannot be taken."""
    data = DataRecipe(train=str(path), valid=None, special_tokens="escape")
    try:
        dataset = load_dataset(data, renderer, seed=0)
    except InputRefused as error:
        raise InputRefused(f"{what}: {error.message}", error.hint) from error
    left = len(dataset.left_out)
    notes = [f"{what}: {left} of {dataset.ledger['read']} rows are left out"] if left else []
    rows = dataset.rows["train"]
    return row_set(
        what, data, rows, "train", renderer, book, count=count, samples=samples, seed=seed
    ), notes  # fmt: skip


def constrained(path: Path, renderer: Renderer, *, samples: int, seed: int) -> tuple[list[Asked], list[str]]:
    """Prompts with constraints, in IFEval's layout (prompt, instruction_id_list, kwargs), and notes.

    A prompt with a constraint that is not known here is left out, which a note says. Raises InputRefused for rows in
    another layout.
    """
    found, unknown = [], list[str]()
    for row in rows_of([path]):
        if isinstance(row, LeftOut):
            raise InputRefused(str(row))
        origin, value = row
        prompt, given = _constraints(value, origin)
        missing = [name for name, _ in given if not constraints.known(name)]
        wrong = [p for name, arguments in given if name not in missing and (p := constraints.problem(name, arguments))]
        unknown += [*missing, *wrong][:1]
        if not missing and not wrong:
            found.append((prompt, given, origin))
    if not found:
        raise InputRefused(f"{path}: no prompt has constraints that can be checked")
    notes = [f"{path.name}: {len(unknown)} prompts are left out ({unknown[0]})"] if unknown else []
    kept = chosen(found, samples, seed, "instructions")
    return [
        Asked(_place(origin), renderer.prompt([Turn("user", prompt)]), prompt, constraints=given)
        for prompt, given, origin in kept
    ], notes


def training_texts(data: DataRecipe) -> Iterator[str]:
    """Every text of the training files' rows."""
    for _, row, _ in _conversations(data, "train"):
        for turn in row.turns:
            yield from texts_of(turn)


def _constraints(value: object, origin: Origin) -> tuple[str, list[tuple[str, dict[str, Any]]]]:
    """Prompt and (constraint, arguments) of a row. Raises InputRefused where it is none."""
    row = value if isinstance(value, dict) else {}
    prompt, names, arguments = row.get("prompt"), row.get("instruction_id_list"), row.get("kwargs")
    if (
        not isinstance(prompt, str)
        or not isinstance(names, list)
        or not isinstance(arguments, list)
        or len(names) != len(arguments)
        or not all(isinstance(a, dict) for a in arguments)
    ):
        raise InputRefused(
            f"{origin}: expected prompt, instruction_id_list and kwargs, with one object for each constraint"
        )
    given = [{k: v for k, v in a.items() if v is not None} for a in arguments]  # published files write absent as null
    return prompt, list(zip(map(str, names), given, strict=True))


def _conversations(data: DataRecipe, split: str) -> Iterator[tuple[Origin, Conversation, object]]:
    """Every usable row of the recipe's files, with the JSON value that it was read from."""
    for row in rows_of([source.rows for source in sources_of(data)[split]], split):
        if isinstance(row, LeftOut):
            continue
        origin, value = row
        for made in conversations_of(value, origin, data.format, data.fill, columns=data.columns):
            if isinstance(made, Conversation):
                yield origin, made, value


def _texts(
    data: DataRecipe, split: str, wanted: set[tuple[Origin, str]]
) -> dict[tuple[Origin, str], tuple[Conversation, object]]:
    """Conversation and JSON value of each wanted row, by place and question."""
    found: dict[tuple[Origin, str], tuple[Conversation, object]] = {}
    for origin, row, value in _conversations(data, split) if wanted else ():
        place = origin, question_key(row)
        if place in wanted:
            found.setdefault(place, (row, value))
            if len(found) == len(wanted):
                break
    return found


def _asked(row: RenderedRow, told: Conversation, value: object, renderer: Renderer, book: RuleBook) -> Asked:
    """The last answer of a row, to be given by the models: the prompt is, token for token, what was trained."""
    example = row.examples[-1]
    begin = example.answers[-1]
    ids = example.tokens.tolist()
    place = _place(example.origin)
    own = checked(value.get("check") if isinstance(value, dict) else None, f"{example.origin}: check")
    return Asked(
        place,
        ids[:begin],
        next((turn.content for turn in reversed(told.turns) if turn.role == "user"), ""),
        _reference(told, ids[begin:], renderer),
        told.category,
        book.of(own, told.category),
    )


def _reference(told: Conversation, answer: Sequence[int], renderer: Renderer) -> str:
    """The row's own answer: its text, or what the template makes of one with tool calls or reasoning."""
    last = next((turn for turn in reversed(told.turns) if turn.role == "assistant" and turn.trained), None)
    if last is not None and not last.tool_calls and not last.reasoning:
        return last.content.strip()
    end = next((i for i, token in enumerate(answer) if token in renderer.end_tokens), len(answer))
    return renderer.tokenizer.decode(answer[:end]).strip()


def _place(origin: Origin) -> str:
    """File and line without the folders, which are of this machine."""
    return f"{Path(origin.file).name}:{origin.line}"

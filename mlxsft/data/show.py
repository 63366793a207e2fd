"""Rows as they are trained, for people to look at."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import click

from mlxsft.data.formats import Conversation, read_conversations
from mlxsft.data.phrasings import load_phrasings
from mlxsft.data.render import ONE_A_TURN, Example, Renderer
from mlxsft.data.rows import LeftOut
from mlxsft.data.sources import RowSource
from mlxsft.data.template import answers_of
from mlxsft.terminal import printable

if TYPE_CHECKING:
    from mlxsft.recipe import DataRecipe


@dataclass(frozen=True)
class Shown:
    """One row: its examples with the text of each token, or why it is left out."""

    origin: str
    examples: list[tuple[Example, list[str]]]
    left_out: LeftOut | None
    prompt_matches: bool | None  # None for plain text, which has no prompt
    differs: str = ""  # why the prompts may differ

    def to_text(self, *, plain: bool) -> str:
        lines = [f"── {self.origin} " + "─" * max(0, 60 - len(self.origin))]
        for example, pieces in self.examples:
            lines.append(_marked(pieces, example.mask.tolist(), plain=plain))
            trained = int(example.mask.sum())
            note = f"; {example.note}" if example.note else ""
            lines.append(f"   {len(pieces)} tokens, {trained} trained{note}")
        if self.left_out is not None:
            lines.append(f"   left out: {printable(str(self.left_out))}")
        if self.prompt_matches is not None:
            same = "is, token for token," if self.prompt_matches else "is NOT"
            why = "" if self.prompt_matches or not self.differs else f" ({self.differs})"
            lines.append(f"   the prompt that chat renders {same} the prompt that is trained on{why}")
        return "\n".join(lines)

    def to_json(self) -> str:
        examples = [
            {"tokens": pieces, "ids": e.tokens.tolist(), "mask": e.mask.tolist(), "note": e.note}
            for e, pieces in self.examples
        ]
        left_out: dict[str, Any] | None = None
        if self.left_out is not None:
            left_out = {"reason": self.left_out.reason, "detail": self.left_out.detail}
        row = {"origin": self.origin, "examples": examples, "left_out": left_out, "prompt_matches": self.prompt_matches}
        return json.dumps(row, ensure_ascii=False)


def shown_rows(
    sources: Sequence[RowSource], data: DataRecipe, renderer: Renderer, count: int, *, seed: int = 0
) -> Iterator[Shown]:
    """The first `count` rows, each question in the phrasing that a run of this seed trains first."""
    phrasings = load_phrasings(data.templates) if data.templates is not None else None
    for row in islice(read_conversations(sources, format=data.format, columns=data.columns, fill=data.fill), count):
        if isinstance(row, LeftOut):
            yield Shown(str(row.origin), [], row, None)
            continue
        if phrasings is not None:
            (row,) = phrasings.phrase(row, seed=seed)
        made = list(renderer.examples(row, data))
        examples = [e for e in made if isinstance(e, Example)]
        left_out = next((e for e in made if isinstance(e, LeftOut)), None)
        pieces = [(e, renderer.tokenizer.pieces(e.tokens.tolist())) for e in examples]
        yield Shown(
            str(row.origin), pieces, left_out, _prompt_matches(row, examples, renderer), _differs(row, examples)
        )


def _prompt_matches(row: Conversation, examples: Sequence[Example], renderer: Renderer) -> bool | None:
    """Whether what chat would send before each trained answer is what stands before it in the example."""
    asked = [row.turns[:i] for i in answers_of(row.turns)]
    before = [e.tokens[:start].tolist() for e in examples for start in e.answers]
    if not asked or not before:
        return None
    prompts = [renderer.prompt(turns, row.tools) for turns in asked]
    return all(tokens in prompts for tokens in before)


def _differs(row: Conversation, examples: Sequence[Example]) -> str:
    """Why the prompts differ, where they do."""
    if any(turn.reasoning for turn in row.turns):
        return "the row thinks; chat asks for no thoughts"
    return "the row was shortened" if any(e.note not in ("", ONE_A_TURN) for e in examples) else ""


def _marked(pieces: Sequence[str], mask: Sequence[bool], *, plain: bool) -> str:
    pieces = [printable(piece) for piece in pieces]
    if plain:
        return "".join(f"[{p}]" if trained else p for p, trained in zip(pieces, mask, strict=True))
    return "".join(
        click.style(p, fg="green", bold=True) if trained else click.style(p, dim=True)
        for p, trained in zip(pieces, mask, strict=True)
    )

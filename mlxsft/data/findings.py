"""What a check can find: each finding's name, how grave it is, and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Severity = Literal["error", "warning", "note"]
EXAMPLES = 3  # rows that stand for a finding


@dataclass(frozen=True, slots=True)
class Kind:
    """A thing that is looked for."""

    title: str
    severity: Severity
    advice: str


@dataclass(frozen=True, slots=True)
class Shown:
    """One row that stands for a finding: its file:line and a few words of it, or what was found there."""

    place: str
    excerpt: str


@dataclass(frozen=True, slots=True)
class Finding:
    """`count` rows of which `share` (0 to 1) of all rows read is meant, with up to three of them."""

    id: str
    count: int
    share: float
    examples: list[Shown]
    detail: str = ""

    @property
    def kind(self) -> Kind:
        return KINDS[self.id]


@dataclass(slots=True)
class Tally:
    """How often something was found, and where first."""

    count: int = 0
    examples: list[Shown] = field(default_factory=list)

    def add(self, place: object, excerpt: str) -> None:
        self.count += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(Shown(str(place), shortened(excerpt)))


def shortened(text: str, width: int = 100) -> str:
    """The beginning of a text on one line, without what steers a terminal."""
    line = " ".join(text[: 4 * width].split())
    if not line.isprintable():
        line = " ".join("".join(c if c.isprintable() else " " for c in line).split())
    return line if len(line) <= width else line[: width - 1] + "…"


KINDS: Mapping[str, Kind] = {
    "leakage": Kind(
        "Held-out rows that also stand in training",
        "error",
        "Take them out of one side, or split anew with `mlxsft data split`; a score on them measures memory.",
    ),
    "secrets": Kind(
        "Keys and tokens", "error", "Revoke them and take them out: a model repeats what it was trained on."
    ),
    "pii": Kind(
        "Personal data", "error", "Replace them by made-up values, or make sure that you may train on and publish them."
    ),
    "broken": Kind("Rows that cannot be read", "error", "Correct these rows; training refuses a file that has any."),
    "special-tokens": Kind(
        "Special tokens of the tokenizer inside the text",
        "error",
        "Take them out, or set data.special_tokens: escape trains them as ordinary text.",
    ),
    "template": Kind(
        "Rows that the chat template refuses",
        "error",
        "Name a data.template that takes them (tools, roles), or reorder or merge their turns.",
    ),
    "lost-text": Kind(
        "Text that the tokenizer loses",
        "error",
        "The model can never write these characters; choose a model whose tokenizer knows them, or drop the rows.",
    ),
    "placeholders": Kind(
        "Placeholders that are not filled in",
        "warning",
        "Give their values: `--fill name=VALUE` here, data.fill in a recipe.",
    ),
    "duplicates": Kind("Exact copies", "warning", "Keep one of each: copies are weights that nobody chose."),
    "near-duplicates": Kind(
        "Near-duplicates",
        "warning",
        "Look whether they add anything; keep them on one side of a split with `mlxsft data split`.",
    ),
    "conflicting-answers": Kind(
        "Equal prompts with different answers",
        "warning",
        "Fine where variety is wanted; otherwise keep the best answer, since the model learns the mixture.",
    ),
    "too-long": Kind(
        "Rows over max_tokens", "warning", "Raise data.max_tokens, shorten the rows, or choose with data.too_long."
    ),
    "empty": Kind("Rows without a text to train or to ask", "warning", "Complete them or take them out."),
    "unanswered": Kind(
        "Rows in which nothing is trained", "warning", "They are left out: complete them, or train without them."
    ),
    "short-answers": Kind(
        "Answers of one word or none", "warning", "Fine for classification; otherwise they teach curtness."
    ),
    "refusals": Kind(
        "Refusals and 'as an AI language model'", "warning", "Take out those that you do not want repeated."
    ),
    "unended": Kind(
        "Answers that do not end", "warning", "They look cut off; the model learns to stop in mid-sentence."
    ),
    "opening-phrase": Kind(
        "One opening phrase dominates", "warning", "Vary how answers begin, or the model opens every answer this way."
    ),
    "answer-format": Kind(
        "One answer format or length dominates",
        "warning",
        "Fine where that is the task; otherwise add answers of other kinds, or the model knows only this one.",
    ),
    "languages": Kind("Rows outside the main language", "note", "Check that they are meant to be there."),
    "class-balance": Kind(
        "Categories with under a tenth of an even share", "note", "Add rows to them, or expect little of them."
    ),
}

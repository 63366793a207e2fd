"""One task in several phrasings, so that a small set does not teach a single one: what FLAN found to matter.

Phrasings are texts with fields: {instruction}, {input}, or {prompt} for both as the row has them.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mlxsft.data.conversation import Conversation, Task, Turn
from mlxsft.errors import UsageError
from mlxsft.recipe_file import Sheet, read_sheet, shown

FIELDS = ("instruction", "input", "prompt")
SUFFIXES = (".yaml", ".yml", ".json")
_FIELD = re.compile(r"\{(\w+)\}")

# Each suits a question as well as a command. The first of each kind is the row as it stands.
_INSTRUCTIONS = (
    "{instruction}",
    "Task: {instruction}",
    "Instruction: {instruction}",
    "Please help me with this: {instruction}",
    "Here is what I need.\n\n{instruction}",
    "I have a request for you: {instruction}",
    "Respond to the following.\n\n{instruction}",
    "{instruction}\n\nWrite your answer below.",
    "{instruction}\n\nAnswer:",
    "Read the request and answer it.\n\nRequest: {instruction}",
    "{instruction}\n\n{input}",
    "{input}\n\n{instruction}",
    "Task: {instruction}\n\nInput: {input}",
    "{instruction}\n\nInput:\n{input}",
    "Input:\n{input}\n\nInstruction:\n{instruction}",
    "Please help me with this: {instruction}\n\nThis is what it is about:\n{input}",
    "Given the following:\n\n{input}\n\n{instruction}",
    "Here is what I need.\n\n{instruction}\n\nHere is what I have.\n\n{input}",
    "{input}\n\nUse the above to respond to this: {instruction}",
    "{instruction}\n\n{input}\n\nAnswer:",
)
BUILT_IN: Mapping[str, tuple[str, ...]] = {"instructions": _INSTRUCTIONS}


@dataclass(frozen=True)
class Phrasings:
    """Phrasings by the rows that they suit: those with an input, and those without."""

    with_input: tuple[str, ...]
    without_input: tuple[str, ...]

    def phrase(self, row: Conversation, *, seed: int, copies: int = 1) -> list[Conversation]:
        """The row for each of its copies in an epoch, its question in another of the phrasings each time.

        Fewer than the copies where there are fewer phrasings; the very row alone where it is no single question. Which
        ones is a function of the seed and of what the row says, not of where it stands.
        """
        asked = [i for i, turn in enumerate(row.turns) if turn.role == "user"]
        if row.task is None or len(asked) != 1:
            return [row]
        suited = self.with_input if row.task.input.strip() else self.without_input
        if not suited:
            return [row]
        first = position_of(row, seed, "phrasing")
        chosen = [suited[(first + i) % len(suited)] for i in range(min(copies, len(suited)))]
        before, after = row.turns[: asked[0]], row.turns[asked[0] + 1 :]
        return [replace(row, turns=(*before, Turn("user", _phrased(text, row.task)), *after)) for text in chosen]


def position_of(row: Conversation, seed: int, purpose: str) -> int:
    """A number below 2^64 that follows from the seed, the purpose and what the turns of the row say."""
    digest = hashlib.blake2b(f"{seed}:{purpose}".encode(), digest_size=8)
    for turn in row.turns:
        digest.update(f"\0{turn.role}\0{turn.content}".encode())
    return int.from_bytes(digest.digest(), "big")


def _phrased(phrasing: str, task: Task) -> str:
    values = {"instruction": task.instruction, "input": task.input, "prompt": str(task)}
    return _FIELD.sub(lambda found: values[found[1]], phrasing).strip()


def load_phrasings(name: str) -> Phrasings:
    """The phrasings of a built-in name, or of a YAML or JSON file with a list of them under `phrasings`."""
    texts = BUILT_IN[name] if name in BUILT_IN else _read(name)
    fields = {text: set(_FIELD.findall(text)) for text in texts}
    return Phrasings(
        tuple(text for text in texts if fields[text] & {"input", "prompt"}),
        tuple(text for text in texts if "input" not in fields[text]),
    )


def is_file(name: str) -> bool:
    """Whether this is meant as a file rather than as a built-in name."""
    return "/" in name or os.sep in name or name.endswith(SUFFIXES)


def _read(name: str) -> Sequence[str]:
    if not is_file(name):
        known = ", ".join(BUILT_IN)
        raise UsageError(f"data.templates: got {shown(name)}", f"Built in: {known}; anything else is a .yaml file.")
    sheet = read_sheet(Path(name))
    texts = sheet.values.get("phrasings")
    for key in sheet.values:
        if key != "phrasings":
            sheet.complain((key,), "no such setting; a file of phrasings has one: phrasings")
    if not isinstance(texts, list) or not texts:
        sheet.complain(("phrasings",), "expected a list of texts with fields, such as 'Task: {instruction}'")
    else:
        for i, text in enumerate(texts):
            _check(sheet, i, text)
    sheet.refuse_if_wrong(f"Fields: {', '.join(f'{{{field}}}' for field in FIELDS)}.")
    assert isinstance(texts, list)  # anything else was refused
    return texts


def _check(sheet: Sheet, i: int, text: object) -> None:
    if not isinstance(text, str):
        sheet.complain(("phrasings", i), f"got {shown(text)}, expected text")
        return
    found = set(_FIELD.findall(text))
    if unknown := sorted(found - set(FIELDS)):
        sheet.complain(("phrasings", i), f"no such field: {{{unknown[0]}}}")
    elif not found & {"instruction", "prompt"}:
        sheet.complain(("phrasings", i), "neither {instruction} nor {prompt} is in it, so the task would be lost")
    elif "prompt" in found and len(found) > 1:
        sheet.complain(("phrasings", i), "{prompt} is instruction and input together; keep one or the other")

"""A file of questions → a file of answers, in the same order, several at once; a stopped one goes on where it was.

While it grows the file has the ending .part, and its first line says how its answers are made. A second start takes
over the answers that are there if it would make them in the same way, and is refused otherwise. The file itself is
there only when it is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from mlxsft import __version__
from mlxsft.backends import Backend, Sampling
from mlxsft.chat.generate import Answer, Writer, room_for_answer
from mlxsft.chat.json_schema import JsonSchema, Schema
from mlxsft.data.convert import messages_row
from mlxsft.data.formats import Conversation, LeftOut, Turn
from mlxsft.data.render import Renderer
from mlxsft.errors import InputRefused, UsageError
from mlxsft.models.adapter import sync_folder, writing

Row = dict[str, Any]  # a line of the result


@dataclass(frozen=True)
class Asking:
    """How every row is answered. Row n, from 0, is sampled with `sampling.seed` + n."""

    sampling: Sampling
    max_tokens: int
    system: str | None = None
    stops: tuple[str, ...] = ()
    at_once: int = 8
    json_schema: Schema | None = None


@dataclass(frozen=True)
class _Question:
    """A row of the result without its answer, the prompt, and how many tokens the answer may have."""

    row: Row
    prompt: list[int]
    longest: int


@dataclass
class Progress:
    """What was done: rows of the file, of which some were there already and some cannot be asked; tokens generated."""

    rows: int = 0
    there: int = 0
    left_out: int = 0
    tokens: int = 0


def question_of(row: Conversation, system: str | None) -> tuple[tuple[Turn, ...], str]:
    """The turns to answer, and the answer that the row itself has, or an empty text. Raises InputRefused for neither.

    A system prompt is put before rows that have none.
    """
    turns, expected = row.turns, ""
    if turns[0].role == "text":
        raise InputRefused("plain text asks nothing")
    if turns[-1].role == "assistant":
        turns, expected = turns[:-1], turns[-1].content
    if system and turns and turns[0].role != "system":
        turns = (Turn("system", system), *turns)
    if not turns or turns[-1].role not in ("user", "tool"):
        raise InputRefused("the row has no question before its last answer")
    return turns, expected


def answer_rows(
    backend: Backend,
    renderer: Renderer,
    rows: Sequence[Conversation | LeftOut],
    asking: Asking,
    write: Callable[[Row], None],
    *,
    first: int = 0,
    stop: Callable[[], bool] = lambda: False,
    watch: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
    """Has the rows from `first` on answered; `write` gets them in order, those that cannot be asked with the reason.

    Ends early, with every row that `write` got whole, when `stop()` says so. `watch` hears of every token. Raises
    InputRefused for a JSON schema that cannot be used.
    """
    progress = Progress(rows=first, there=first)
    schema = None if asking.json_schema is None else JsonSchema(renderer, asking.json_schema)
    streams = backend.streams(asking.at_once)
    running: dict[int, tuple[Row, Answer, Writer]] = {}
    done: dict[int, Row] = {}
    following = first
    try:
        while not stop() and progress.rows < len(rows):
            while following < len(rows) and len(running) < streams.capacity:
                made = _begun(renderer, rows[following], asking)
                if isinstance(made, _Question):
                    answer = Answer(prompt_tokens=len(made.prompt))
                    writer = Writer(renderer, answer, made.longest, opening=renderer.opening, stops=asking.stops)
                    running[following] = made.row, answer, writer
                    constraint = None if schema is None else schema.constraint()
                    streams.add(following, made.prompt, _seeded(asking.sampling, following), constraint)
                else:
                    done[following] = made
                    progress.left_out += 1
                following += 1
            for number, token in streams.step() if running else []:
                row, answer, writer = running[number]
                writer.push(token)
                progress.tokens += 1
                if writer.ended:
                    writer.finish()
                    streams.remove(number)
                    done[number] = _answered(row, answer)
                    del running[number]
            while progress.rows in done:
                write(done.pop(progress.rows))
                progress.rows += 1
            watch(progress)
    finally:
        streams.close()
    return progress


def _begun(renderer: Renderer, row: Conversation | LeftOut, asking: Asking) -> _Question | Row:
    """The question of a row; or the result's row that says why there is none."""
    if isinstance(row, LeftOut):
        return {"error": f"{row.reason} {row.detail}".strip(), "origin": str(row.origin)}
    try:
        turns, expected = question_of(row, asking.system)
        prompt = renderer.prompt(turns, row.tools)
        longest = min(asking.max_tokens, room_for_answer(prompt, renderer.positions, asking.max_tokens))
    except InputRefused as refused:
        return {"error": refused.message, "origin": str(row.origin)}
    made = messages_row(replace(row, turns=turns))
    made |= {"expected": expected} if expected else {}
    return _Question({**made, "origin": str(row.origin)}, prompt, longest)


def _answered(row: Row, answer: Answer) -> Row:
    said = {"role": "assistant", "content": answer.text}
    messages = [*row["messages"], said]
    return {**row, "messages": messages, "answer": answer.text, "finish": answer.finish, "tokens": answer.tokens}


def _seeded(sampling: Sampling, number: int) -> Sampling:
    return sampling if sampling.seed is None else replace(sampling, seed=(sampling.seed + number) % 2**63)


# --- the file --------------------------------------------------------------------------------------------------------


def fingerprint(
    backend: Backend,
    renderer: Renderer,
    asking: Asking,
    *,
    model: Mapping[str, str],
    files: Sequence[Path],
    reading: Mapping[str, Any],
) -> dict[str, str]:
    """What decides the answers, by what a person calls it; `model` are hashes, `reading` is how rows are read.

    How many are computed at once is not among it.
    """
    everything: dict[str, Any] = {
        "the model or the adapter": dict(model),
        "the rows": [[_sha256(file) for file in files], dict(reading)],
        "the template": renderer.template.sha256,
        "the tokenizer": renderer.tokenizer.fingerprint,
        "the backend": backend.name,
        "the version": __version__,
        "--system": asking.system,
        "--stop": list(asking.stops),
        "--max-tokens": asking.max_tokens,
        "--json-schema": json.dumps(asking.json_schema),  # as text: properties come in its order
        **{f"--{name.replace('_', '-')}": value for name, value in vars(asking.sampling).items()},
    }
    return {name: _short(json.dumps(value, sort_keys=True)) for name, value in everything.items()}


class AnswersFile:
    """The file of answers, whole or on its way."""

    def __init__(self, path: Path, made_by: Mapping[str, str], *, force: bool) -> None:
        """Raises UsageError where answers are there that were made in another way."""
        self._path, self._part, self._made_by = path, path.with_name(f"{path.name}.part"), dict(made_by)
        self.rows = 0  # there already
        self._file: TextIO | None = None
        with writing(self._part):
            kept = self._kept(force)
            path.parent.mkdir(parents=True, exist_ok=True)
            if kept is None:
                self._file = self._part.open("w", encoding="utf-8", newline="\n")
                self._line({"made_by": self._made_by})
            else:
                os.truncate(self._part, kept)  # a line that was being written
                self._file = self._part.open("a", encoding="utf-8", newline="\n")

    def write(self, row: Row) -> None:
        """Append a row."""
        with writing(self._part):
            self._line(row)
        self.rows += 1

    def finish(self) -> None:
        """Let the file be whole: without its first line, under its name."""
        self.close()
        aside = self._part.with_name(f".{self._part.name}.{os.getpid()}")
        try:
            with writing(self._path):
                with self._part.open("rb") as grown, aside.open("wb") as whole:
                    grown.readline()
                    while block := grown.read(1 << 20):
                        whole.write(block)
                    whole.flush()
                    os.fsync(whole.fileno())
                os.replace(aside, self._path)
                self._part.unlink()
                sync_folder(self._path.parent)
        finally:
            aside.unlink(missing_ok=True)

    def close(self) -> None:
        """Leave what was written as it is."""
        if self._file is not None:
            self._file.close()

    def _line(self, row: Row) -> None:
        assert self._file is not None
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._file.flush()

    def _kept(self, force: bool) -> int | None:
        """How many bytes of whole rows made in the same way are there; None where it begins anew."""
        if force or not self._part.exists():
            return None
        with self._part.open("rb") as file:
            head = file.readline()
            if not head.endswith(b"\n"):  # it was not even begun
                return None
            try:
                made_by = json.loads(head)["made_by"]
            except (ValueError, KeyError, TypeError):
                made_by = None
            if not isinstance(made_by, dict):
                raise UsageError(f"{self._part}: is not of an earlier start", "Remove it, or name another file.")
            if other := [name for name in self._made_by | made_by if made_by.get(name) != self._made_by.get(name)]:
                raise UsageError(
                    f"{self._part}: its answers were made otherwise; {', '.join(other)} differed",
                    "Give what was given then to go on, --force to begin anew, or another --output.",
                )
            size = file.tell()
            for line in file:
                if not line.endswith(b"\n"):
                    break
                size += len(line)
                self.rows += 1
        return size


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]

"""A conversation with commands, wherever it is held: `Face` is how a person and it hear each other."""

from __future__ import annotations

import json
import os
import random
import shlex
import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

from mlxsft.backends import Sampling
from mlxsft.chat.generate import Answer, Memory, continue_prompt, room_for_answer
from mlxsft.chat.load import Loaded
from mlxsft.chat.settings import SETTINGS
from mlxsft.data.convert import messages_row
from mlxsft.data.formats import Conversation, LeftOut, Origin, Turn, read_conversations
from mlxsft.data.render import Renderer
from mlxsft.data.shorten import exchanges
from mlxsft.errors import InputRefused, MlxsftError, UsageError
from mlxsft.interrupt import stop_requested

COMMANDS = {
    "/help": "show these commands",
    "/clear": "forget the conversation, but for the system prompt",
    "/system TEXT|off": "begin anew with this system prompt, or without; alone, show it",
    "/set NAME VALUE": "set temperature and others; without VALUE, show it; alone, show all",
    "/retry": "answer the last message again",
    "/undo": "take the last message and its answer back",
    "/edit TEXT": "put a better answer in place of the last one",
    "/save FILE": "write the conversation; --force FILE replaces a file",
    "/load FILE": "go on with the conversation of a file",
    "/tokens": "say how long the conversation is",
    "/adapter NAME|off": "let this adapter answer, or the base; alone, list them",
    "/compare A B": "both answer the last message; --blind keeps score",
    "/keep FILE": "append the last exchange to rows for `mlxsft train`",
    "/bye": "leave",
}
KEYS = {
    '"""': "begin and end a message of several lines, as Alt-Enter begins a line",
    "Ctrl-C": "stop the answer",
    "Ctrl-R": "search what was said before",
}
FORCE, BLIND = "--force", "--blind"
MULTILINE = '"""'  # begins and ends a message of several lines
BASE = "off"  # what the base is called where an adapter could be named
BASES = (BASE, "base")  # names that no adapter can have
TURN = 0.05  # seconds in which one of two answers that are compared is computed, until the other one goes on
LONGEST_RESERVE = 4  # an answer has at least this part of the model's positions, or --max-tokens


class Face(Protocol):
    """What a conversation needs of a terminal, or of a pipe."""

    def lines(self) -> Iterator[str]:
        """What the person says, until there is no more."""

    def show(self, texts: Iterable[str]) -> None:
        """An answer as it comes."""

    def beside(self, titles: Sequence[str], pieces: Iterable[tuple[int, str]]) -> None:
        """Answers side by side, each with what it is called, as they come: (which one, more of its text)."""

    def note(self, text: str) -> None:
        """Something that is no answer."""

    def ask(self, question: str, text: str = "", choices: Sequence[str] = ()) -> str | None:
        """What the person says to a question, `text` being there to be changed; None where nobody can be asked.

        Through a pipe, a line that is none of the `choices` is no answer, and is read again as what it is.
        """


class Chat:
    """One conversation; each adapter that answers has one key-value cache, so that a turn computes its own tokens."""

    def __init__(
        self,
        loaded: Loaded,
        face: Face,
        *,
        sampling: Sampling,
        max_tokens: int,
        system: str | None = None,
        keep: Path = Path("kept.jsonl"),
    ) -> None:
        """`keep` is where /keep appends rows."""
        self.loaded, self.face = loaded, face
        self.sampling, self.max_tokens = sampling, max_tokens
        self.turns: list[Turn] = []
        self._keep_file, self._kept = keep, ""
        self._memories: dict[str | None, Memory] = {}
        self._left_out = 0  # oldest exchanges, for which the model has no room
        self._drawn = 0  # answers, each of which takes another seed
        self._wins: Counter[str] = Counter()
        self.begin(system)

    @property
    def renderer(self) -> Renderer:
        """That of the adapter in use."""
        return self.loaded.renderers[self.loaded.backend.in_use]

    @property
    def _memory(self) -> Memory:
        """That of the adapter in use."""
        return self._memories.setdefault(self.loaded.backend.in_use, Memory(self.loaded.backend))

    def begin(self, system: str | None) -> None:
        """Begin a conversation anew, with this system prompt."""
        self.turns = [Turn("system", system)] if system else []
        self._left_out = 0

    def run(self) -> None:
        """Hold the conversation: every line is a message, but for those that begin with a slash."""
        lines = self.face.lines()
        for line in lines:
            try:
                if line.startswith("/"):
                    if not self.command(line.rstrip("\r\n")):
                        return
                elif message := _whole(line, lines):
                    self.say(message)
            except MlxsftError as refused:
                self.face.note(". ".join(part.rstrip(".") for part in (refused.message, refused.hint) if part) + ".")
            except KeyboardInterrupt:  # a second one, before the first token came
                self.face.note("(stopped)")

    # --- answers -------------------------------------------------------------------------------------------------

    def say(self, message: str) -> Answer:
        """Send a message and show the answer as it comes. Ctrl-C ends the answer; what was said of it stays.

        A question without an answer is as if it had not been asked. Raises InputRefused where it cannot be asked.
        """
        turns, answer = [*self.turns, Turn("user", message)], Answer()
        self._answer(turns, answer, self.face.show)
        if answer.finish == "stopped":
            self.face.note("(stopped)")
        elif answer.finish == "length":
            more = "/set max_tokens allows more" if answer.tokens == self.max_tokens else "the model has no more room"
            self.face.note(f"(cut off after {answer.tokens} tokens; {more})")
        if answer.text:
            self.turns = [*turns, Turn("assistant", answer.text)]
        return answer

    def _answer(self, turns: Sequence[Turn], answer: Answer, show: Callable[[Iterable[str]], None]) -> None:
        """Have these turns answered; `show` takes the text as it comes."""
        with stop_requested([signal.SIGINT]) as stop, closing(self._steps(turns, answer, stop)) as steps:
            show(filter(None, steps))

    def _steps(self, turns: Sequence[Turn], answer: Answer, stop: Callable[[], bool]) -> Generator[str, None, None]:
        """The steps of the next answer, for which its adapter has to be in use each time."""
        backend, renderer = self.loaded.backend, self.renderer
        prompt = self._prompt(turns)
        sampling = self.sampling
        if sampling.seed is not None:
            sampling = replace(sampling, seed=(sampling.seed + self._drawn) % 2**63)
        self._drawn += 1
        longest = min(self.max_tokens, room_for_answer(prompt, renderer.positions, self.max_tokens))
        return continue_prompt(
            backend,
            renderer,
            prompt,
            sampling,
            longest,
            memory=self._memory,
            answer=answer,
            opening=renderer.opening,
            stop=stop,
        )

    def _prompt(self, turns: Sequence[Turn]) -> list[int]:
        """The tokens before the answer; where the model has no room for it, whole oldest exchanges are left out.

        They stay left out, and a quarter more than is needed goes with them, because all that follows has to be
        computed anew then.
        """
        positions = self.renderer.positions
        system, parts = turns[: turns[0].role == "system"], exchanges(tuple(turns))
        left_out = min(self._left_out, len(parts) - 1)

        def tokens() -> list[int]:
            kept = [*system, *chain.from_iterable(parts[left_out:])]
            return self.renderer.prompt(kept, said=self._memory.said)

        prompt = tokens()
        if positions is not None:
            limit = positions - min(self.max_tokens, positions // LONGEST_RESERVE)
            wanted = limit if len(prompt) <= limit else limit * 3 // 4
            while len(prompt) > wanted and left_out < len(parts) - 1:
                left_out += 1
                prompt = tokens()
            if left_out > self._left_out:
                self.face.note(
                    f"(the model takes {positions} tokens: the oldest {left_out} of {len(parts) - 1} exchanges are "
                    "left out from here on)"
                )
        self._left_out = left_out
        return prompt

    # --- commands ------------------------------------------------------------------------------------------------

    def command(self, line: str) -> bool:
        """Carry out a line that begins with a command; whether the conversation goes on. Raises MlxsftError."""
        name, rest = [*line.split(maxsplit=1), ""][:2]
        rest = rest.strip()
        if rest and name in COMMANDS:  # where those that take something have it beside their name
            raise UsageError(f"{name} takes nothing behind it, and got {rest!r}: nothing was done.")
        match name:
            case "/bye":
                return False
            case "/help":
                self.face.note("\n".join(f"  {name:19}{what}" for name, what in (COMMANDS | KEYS).items()))
            case "/clear":
                self.begin(self.turns[0].content if self.turns and self.turns[0].role == "system" else None)
                self.face.note("The conversation is forgotten.")
            case "/system":
                self._system(rest)
            case "/set":
                self._set(rest.replace("=", " ").split())
            case "/retry":
                self._retry()
            case "/undo":
                self.turns = self.turns[: self._last("user")]
                self.face.note("The last message and its answer are taken back.")
            case "/edit":
                self._edit(rest)
            case "/save":
                self._save(rest)
            case "/load":
                self._load(rest)
            case "/tokens":
                self._tell_tokens()
            case "/adapter":
                self._use(rest)
            case "/compare":
                self._compare(_words(rest))
            case "/keep":
                self._keep(rest)
            case _:
                self.face.note(f"{name}: there is no such command; /help shows them. A space before it makes it text.")
        return True

    def _system(self, text: str) -> None:
        if text:
            self.begin(None if text == BASE else text)
            self.face.note(f"The conversation begins anew with{'out a' if text == BASE else ' this'} system prompt.")
        else:
            has = bool(self.turns) and self.turns[0].role == "system"
            self.face.note(self.turns[0].content if has else "There is no system prompt; /system TEXT sets one.")

    def _last(self, role: str) -> int:
        """Where the last turn of this role stands. Raises UsageError where there is none."""
        found = next((i for i in reversed(range(len(self.turns))) if self.turns[i].role == role), None)
        if found is None:
            raise UsageError("There is no answer yet." if role == "assistant" else "There is no message yet.")
        return found

    def _set(self, words: list[str]) -> None:
        values = vars(self.sampling) | {"max_tokens": self.max_tokens}
        if len(words) == 2 and words[0] in SETTINGS:
            value = SETTINGS[words[0]].read(*words)
            if words[0] == "max_tokens" and value is not None:
                self.max_tokens = int(value)
            else:
                changed: dict[str, Any] = {words[0]: value}
                self.sampling = replace(self.sampling, **changed)
                self._drawn = 0
        elif len(words) > 1 or not SETTINGS.keys() >= set(words):
            raise UsageError(f"/set takes a name and a value, or `default`. The names are: {', '.join(SETTINGS)}.")
        else:
            shown = {name: "off" if values[name] is None else values[name] for name in words or SETTINGS}
            self.face.note("\n".join(f"  {n:19}{value!s:8}{SETTINGS[n].help}" for n, value in shown.items()))

    def _retry(self) -> None:
        place, before = self._last("user"), self.turns
        self.turns = before[:place]
        if not self.say(before[place].content).text:
            self.turns = before
        if self.sampling.temperature == 0:
            self.face.note("(temperature is 0, which always gives the same answer; /set temperature 0.7 varies it)")

    def _edit(self, text: str) -> None:
        place = self._last("assistant")
        if not text:
            asked = self.face.ask("A better answer: ", self.turns[place].content)
            text = (asked or "").strip()
        if not text:
            raise UsageError("The answer stays. /edit TEXT puts TEXT in its place.")
        self.turns[place] = replace(self.turns[place], content=text)
        self.face.note("The answer is replaced; /keep keeps it.")

    def _save(self, rest: str) -> None:
        words = rest.split(" ")
        force = FORCE in (words[0], words[-1])
        file = _file(rest.removeprefix(FORCE).removesuffix(FORCE).strip() if force else rest, "/save")
        self._last("user")
        try:
            with file.open("w" if force else "x", encoding="utf-8", newline="\n") as out:
                out.write(_row(self.turns))
        except FileExistsError:
            raise UsageError(f"{file} is there already; /save --force {file} replaces it.") from None
        except OSError as error:
            raise UsageError(f"{file}: cannot be written: {error.strerror}") from error
        self.face.note(f"Saved: {file}")

    def _load(self, rest: str) -> None:
        file = _file(rest, "/load")
        expected = "/load takes what /save has written, or rows of conversations"
        try:
            rows = read_conversations([file], unanswered=True)
            row = next(rows, None)
        except MlxsftError as refused:
            raise InputRefused(refused.message, expected) from refused
        if row is None or isinstance(row, LeftOut) or row.turns[0].role == "text":
            why = f" ({row.reason})" if isinstance(row, LeftOut) else ""
            raise InputRefused(f"{file}: its first row is no conversation{why}", expected)
        self.begin(None)
        self.turns = list(row.turns)
        more = "" if next(rows, None) is None else " (the first of several)"
        asks = " /retry answers the last message." if self.turns[-1].role == "user" else ""
        self.face.note(f"{len(self.turns)} turns are loaded{more}.{asks}")

    def _tell_tokens(self) -> None:
        positions = self.renderer.positions
        said: list[int] = []
        if self.turns and self.turns[-1].role != "system":
            said = self.renderer.prompt(self.turns, said=self._memory.said)
        of = "" if positions is None else f" of the {positions} that the model takes"
        less = f"; the oldest {self._left_out} exchanges are left out" if self._left_out else ""
        self.face.note(f"{len(said)} tokens{of}{less}")

    # --- adapters ------------------------------------------------------------------------------------------------

    def _use(self, wanted: str) -> None:
        backend = self.loaded.backend
        if not wanted:
            names = [f"{'*' if n == backend.in_use else ' '} {n or BASE}" for n in self.loaded.renderers]
            self.face.note("\n".join(names))
            return
        name = self._named(wanted)
        began = time.perf_counter()
        backend.use(name)
        took = 1000 * (time.perf_counter() - began)
        self.face.note(f"{name or 'The base'} answers from here on ({took:.1f} ms).")

    def _named(self, wanted: str) -> str | None:
        """The name of an adapter in memory, None for the base; one in a folder is loaded first. Raises MlxsftError."""
        if wanted in BASES:
            return None
        if wanted not in self.loaded.renderers:
            folder = Path(wanted).expanduser()
            if not folder.is_dir():
                known = ", ".join(n or BASE for n in self.loaded.renderers)
                raise UsageError(f"{wanted}: there is no such adapter, and no such folder.", f"There are: {known}.")
            name = folder.resolve().name
            if name in self.loaded.renderers or name in BASES:
                whose = "the base is" if name in BASES else "another adapter is"
                raise UsageError(f"{wanted}: {whose} called {name} already; rename the folder.")
            self.loaded.add(name, folder)
            return name
        return wanted

    def _compare(self, words: list[str]) -> None:
        backend = self.loaded.backend
        blind, words = BLIND in words, [word for word in words if word != BLIND]
        turns, before = self.turns[: self._last("user") + 1], backend.in_use
        adapters = [n for n in self.loaded.renderers if n is not None]
        if not words:
            words = [BASE, *([before] if before is not None else adapters[:1])]
        if len(words) != 2:
            raise UsageError(f"/compare takes two adapters, or {BASE} for the base.")
        names = [self._named(word) for word in words]
        if names[0] == names[1]:
            raise UsageError(f"/compare takes two different adapters, or {BASE} for the base.")
        if blind:
            random.shuffle(names)
        titles = ["A", "B"] if blind else [name or "base" for name in names]
        drawn, answers = self._drawn, [Answer() for _ in names]
        try:
            with stop_requested([signal.SIGINT]) as stop, ExitStack() as open_steps:
                streams = []
                for name, answer in zip(names, answers, strict=True):
                    backend.use(name)
                    self._drawn = drawn  # both with the same seed
                    streams.append((name, open_steps.enter_context(closing(self._steps(turns, answer, stop)))))
                self.face.beside(titles, self._in_turn(streams))
        finally:
            backend.use(before)
        if any(answer.finish == "stopped" for answer in answers):
            self.face.note("(stopped)")
        elif blind:
            self._vote(dict(zip(titles, (name or "base" for name in names), strict=True)))

    def _in_turn(self, answers: Sequence[tuple[str | None, Generator[str, None, None]]]) -> Iterator[tuple[int, str]]:
        """(which answer, more of its text): those of (adapter, steps) take turns of TURN seconds, and grow together."""
        running = deque(enumerate(answers))
        while running:
            which, (adapter, steps) = running[0]
            self.loaded.backend.use(adapter)
            began = time.monotonic()
            for text in steps:
                yield which, text
                if time.monotonic() - began > TURN:
                    running.rotate(-1)
                    break
            else:
                running.popleft()

    def _vote(self, names: dict[str, str]) -> None:
        """Ask which answer is better, then say which was whose."""
        vote: str | None = "?"
        while vote not in (None, "", *names):
            vote = self.face.ask("Which is better, A or B? (Enter: neither) ", choices=["", *names])
            vote = None if vote is None else vote.strip().upper()
        if vote:
            self._wins[names[vote]] += 1
        told = ", ".join(f"{title} was {name}" for title, name in names.items())
        score = ", ".join(f"{name} {self._wins[name]}" for name in sorted(names.values()))
        self.face.note(f"{told}. Score: {score}.")

    def _keep(self, rest: str) -> None:
        file = _file(rest, "/keep") if rest else self._keep_file
        end = self._last("assistant") + 1
        # The turns before are what the answer is an answer to; only the last one is trained.
        turns = [replace(t, trained=False) if t.role == "assistant" else t for t in self.turns[: end - 1]]
        row = _row([*turns, self.turns[end - 1]])
        if row == self._kept:
            raise UsageError("This exchange is kept already.")
        special = self.renderer.tokenizer.special_pattern
        if (found := special.search("\n".join(turn.content for turn in self.turns[:end]))) is not None:
            raise UsageError(
                f"Not kept: the text contains {found[0]!r}, which is a control token, and training refuses such rows.",
                "/edit takes it out of the last answer; /undo goes back before an earlier one.",
            )
        try:
            with open(os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), "r+b") as out:
                if out.seek(0, os.SEEK_END) and (out.seek(-1, os.SEEK_END), out.read(1))[1] != b"\n":
                    row = f"\n{row}"  # a last line without its end
                out.write(row.encode())
        except OSError as error:
            raise UsageError(f"{file}: cannot be written: {error.strerror}") from error
        self._kept = row.lstrip()
        self.face.note(f"Kept in {file}; `mlxsft train` takes it as data.train.")


def _row(turns: Sequence[Turn]) -> str:
    """A conversation as a line of JSON."""
    return json.dumps(messages_row(Conversation(tuple(turns), Origin("chat", 1))), ensure_ascii=False) + "\n"


def _words(text: str) -> list[str]:
    """Words, of which those in quotation marks may have spaces. Raises UsageError."""
    words = shlex.shlex(text, posix=True)
    words.whitespace_split, words.quotes, words.escape, words.commenters = True, '"', "", ""
    try:
        return list(words)
    except ValueError:
        raise UsageError(f"{text}: a quotation mark is missing.") from None


def _file(name: str, command: str) -> Path:
    """The file of a command. Raises UsageError where there is none, and for what looks like an option."""
    if not name:
        raise UsageError(f"{command} takes the name of a file.")
    first, last = name.split()[0], name.split()[-1]
    if first.startswith("-") or last.startswith("--"):
        option = first if first.startswith("-") else last
        raise UsageError(f"{command} has no option {option}; a file of that name is ./{option}.")
    return Path(name).expanduser()


def is_open(text: str) -> bool:
    """Whether a message that begins with marks still waits for those that end it."""
    begun = text.strip()
    return begun.startswith(MULTILINE) and not begun.removeprefix(MULTILINE).endswith(MULTILINE)


def _whole(line: str, following: Iterator[str]) -> str:
    """The message that begins with a line: all up to the closing marks where it begins with such; empty for none."""
    text = line.rstrip("\r\n")
    while is_open(text) and (more := next(following, None)) is not None:
        text = "\n".join([text, more.rstrip("\r\n")])
    if not text.lstrip().startswith(MULTILINE):
        return text if text.strip() else ""
    return text.strip().removeprefix(MULTILINE).removesuffix(MULTILINE).strip("\n")

"""A conversation in the terminal."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TextIO

from mlxsft.backends import Backend, Sampling
from mlxsft.chat.generate import Answer, Memory, stream_answer
from mlxsft.data.formats import Turn
from mlxsft.data.render import Renderer
from mlxsft.errors import InputRefused
from mlxsft.interrupt import stop_requested
from mlxsft.terminal import printable

COMMANDS = {
    "/help": "show these commands",
    "/clear": "forget the conversation",
    "/system TEXT": "set the system prompt and begin anew; without TEXT, remove it",
    "/tokens": "say how long the conversation is",
    "/bye": "leave",
}


class Chat:
    """One conversation with one key-value cache: a new turn computes only its own tokens."""

    def __init__(
        self,
        backend: Backend,
        renderer: Renderer,
        *,
        sampling: Sampling,
        max_tokens: int,
        system: str | None = None,
        out: TextIO = sys.stdout,
        notes: TextIO = sys.stderr,
    ) -> None:
        self.backend, self.renderer = backend, renderer
        self.sampling, self.max_tokens = sampling, max_tokens
        self.out, self.notes = out, notes
        self.memory = Memory(backend)
        self.turns: list[Turn] = []
        self.begin(system)

    def begin(self, system: str | None) -> None:
        """Begin a conversation anew, with this system prompt."""
        self.turns = [Turn("system", system)] if system else []

    def say(self, message: str) -> Answer:
        """Send a message and write the answer as it comes. Ctrl-C ends the answer; what was said of it stays."""
        turns = [*self.turns, Turn("user", message)]
        answer = Answer()
        with stop_requested([signal.SIGINT]) as stop:
            for text in stream_answer(
                self.backend,
                self.renderer,
                turns,
                self.sampling,
                self.max_tokens,
                memory=self.memory,
                answer=answer,
                stop=stop,
            ):
                self.out.write(printable(text) if self.out.isatty() else text)
                self.out.flush()
        self.out.write("\n")
        self.out.flush()
        if answer.finish == "stopped":
            self.notes.write("(stopped)\n")
        if answer.text:  # a question without an answer is as if it had not been asked
            self.turns = [*turns, Turn("assistant", answer.text)]
        if answer.finish == "length" and answer.tokens >= self.max_tokens:
            self.notes.write(f"(cut off after {answer.tokens} tokens; --max-tokens allows more)\n")
        return answer

    def command(self, line: str) -> bool:
        """Carry out a line that begins with a command; whether the conversation goes on."""
        name, _, rest = line.partition(" ")
        match name:
            case "/bye":
                return False
            case "/clear":
                self.begin(self.turns[0].content if self.turns and self.turns[0].role == "system" else None)
                self.notes.write("The conversation is forgotten.\n")
            case "/system":
                self.begin(rest.strip() or None)
                which = "with this" if rest.strip() else "without a"
                self.notes.write(f"The conversation begins anew {which} system prompt.\n")
            case "/tokens":
                self.notes.write(f"{len(self.memory.tokens)} tokens\n")
            case _:
                if name != "/help":
                    self.notes.write(f"{name}: no such command.\n")
                self.notes.writelines(f"  {command:14}{what}\n" for command, what in COMMANDS.items())
        return True

    def run(self, lines: Iterable[str]) -> None:
        """Hold the conversation: every line is a message, but for those that begin with a slash."""
        for line in lines:
            message = line.rstrip("\r\n")
            if not message.strip():
                continue
            if message.startswith("/"):
                if not self.command(message):
                    return
                continue
            try:
                self.say(message)
            except InputRefused as refused:
                self.notes.write(f"{refused.message}\n")
            except KeyboardInterrupt:  # a second one, before the first token came
                self.notes.write("\n(stopped)\n")


def typed_lines(prompt: Callable[[], str]) -> Iterable[str]:
    """Lines from a person at a terminal, until the end of input; Ctrl-C at the prompt clears the line."""
    with suppress(ImportError):
        import readline  # noqa: F401  # arrow keys and earlier lines, where the system has it
    while True:
        try:
            yield prompt()
        except KeyboardInterrupt:
            sys.stderr.write("\n(/bye or Ctrl-D leaves)\n")
        except EOFError:
            return

"""The terminal: what is typed, what is remembered, and how an answer grows on the screen."""

from __future__ import annotations

import io
import os
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput
from rich.console import Console

from mlxsft.chat.terminal import TerminalFace, end_of_whole, history_file, without_echo

ALT_ENTER, CTRL_C, CTRL_D, CTRL_R = "\x1b\r", "\x03", "\x04", "\x12"
TEXT = """# Tools

Take *these*:

1. a wrench

2. a pump

   with a hose

- one

- two

```python
print("hello")

x = 1
```

| a | b |
|---|---|
| 1 | 2 |

**That** is all, see [docs](http://example.org/x).
"""


@pytest.fixture
def keys() -> Iterator[PipeInput]:
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        yield pipe


def test_enter_sends_alt_enter_begins_a_line_ctrl_c_clears_ctrl_d_leaves(keys: PipeInput) -> None:
    keys.send_text(f"q\rWho are{ALT_ENTER}you?\rgone{CTRL_C}hello\r{CTRL_D}")
    assert list(TerminalFace(None).lines()) == ["q", "Who are\nyou?", "hello"]


def test_marks_keep_a_message_open_until_they_end_it_and_ctrl_c_gives_it_up(keys: PipeInput) -> None:
    keys.send_text(f'"""\rWho are\r/bye\r"""\r"""oh{ALT_ENTER}no\r{CTRL_C}"""hello"""\r{CTRL_D}')
    assert list(TerminalFace(None).lines()) == ['"""\nWho are\n/bye\n"""', '"""hello"""']


def test_ctrl_r_searches_what_was_typed_before(keys: PipeInput, tmp_path: Path) -> None:
    keys.send_text(f"Who sells pumps?\rhello\r{CTRL_D}")
    assert list(TerminalFace(tmp_path / "history").lines()) == ["Who sells pumps?", "hello"]
    later = TerminalFace(tmp_path / "history")

    def search() -> None:
        for _ in range(3000):  # the file is read while the prompt is there
            if len(later._session.default_buffer._working_lines) == 3:
                break
            time.sleep(0.01)
        keys.send_text(f"{CTRL_R}pump\r\r{CTRL_D}")

    searching = threading.Thread(target=search, daemon=True)
    searching.start()
    assert list(later.lines()) == ["Who sells pumps?"]
    searching.join()


def test_bytes_that_are_no_text_do_not_end_the_program(keys: PipeInput, tmp_path: Path) -> None:
    keys.send_bytes(b"caf\xe9\rhello\r\x04")
    assert list(TerminalFace(tmp_path / "history").lines()) == ["caf\udce9", "hello"]
    assert "+caf?\n" in (tmp_path / "history").read_text()


@pytest.mark.skipif(os.name != "posix", reason="pseudo-terminals are POSIX")
def test_what_is_typed_while_an_answer_comes_is_not_written_into_it() -> None:
    import termios

    def echoes() -> bool:
        return bool(termios.tcgetattr(theirs)[3] & termios.ECHO)

    ours, theirs = os.openpty()
    with os.fdopen(ours), os.fdopen(theirs) as terminal:
        assert echoes()
        with without_echo(terminal):
            assert not echoes()
        assert echoes()
    with without_echo(io.StringIO()):
        pass


def test_an_answer_to_be_corrected_is_there_to_be_changed(keys: PipeInput) -> None:
    face = TerminalFace(None)
    keys.send_text("!\r")
    assert face.ask("A better answer: ", "I am Pip") == "I am Pip!"
    keys.send_text(CTRL_C)
    assert face.ask("Which?") is None


def test_history_is_kept_for_its_owner_alone(keys: PipeInput, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    file = tmp_path / "mlxsft" / "chat_history"
    file.parent.mkdir()
    file.write_text("")
    file.chmod(0o644)
    before = os.umask(0)
    try:
        assert history_file() == file
    finally:
        os.umask(before)
    keys.send_text(f"Who are you?\rbye\r{CTRL_D}")
    assert list(TerminalFace(history_file()).lines()) == ["Who are you?", "bye"]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert "+Who are you?" in file.read_text()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert history_file() is None


def screen(width: int = 60) -> Console:
    return Console(file=io.StringIO(), width=width, height=12, force_terminal=False)


def shown(pieces: list[str], width: int = 60) -> str:
    """What stands in the terminal once an answer has come in these pieces."""
    face = TerminalFace(None)
    face.console = screen(width)
    face.show(pieces)
    written: str = face.console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in written.splitlines() if line.strip())


def test_an_answer_looks_the_same_however_it_comes(keys: PipeInput) -> None:
    at_once = shown([TEXT])
    assert "http://example.org/x" in at_once  # an address is shown
    assert "```" not in at_once
    assert "**" not in at_once
    for size in (1, 3, 7, 50):
        assert shown([TEXT[i : i + size] for i in range(0, len(TEXT), size)]) == at_once


def test_what_is_whole_never_changes_as_the_text_grows() -> None:
    whole = ""
    for n in range(len(TEXT) + 1):
        now = TEXT[: end_of_whole(TEXT[:n])]
        assert now.startswith(whole)
        whole = now
    assert whole.endswith("| 1 | 2 |\n\n")
    for block in ("1. a wrench\n\n2. a pump\n\n   with a hose\n\n- one\n\n- two", 'hello")\n\nx = 1\n```'):
        begin = TEXT.index(block)
        assert not any(begin < end_of_whole(TEXT[:n]) < begin + len(block) for n in range(len(TEXT) + 1))


def test_an_answer_cannot_steer_the_terminal(keys: PipeInput) -> None:
    assert "\x1b" not in shown(["\x1b]0;title\x07 \x1b[2J", "[bold]x[/bold]"])
    assert "[bold]x[/bold]" in shown(["\x1b[2J", "[bold]x[/bold]"])

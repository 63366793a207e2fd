"""The command as a whole: help, exit codes, and that nothing heavy is imported before it is needed."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mlxsft import __version__, errors
from mlxsft.cli import app, call

HEAVY = ("mlx", "mlx_lm", "transformers", "huggingface_hub", "pydantic", "rich", "numpy", "torch", "yaml")


def test_the_command_line_imports_nothing_heavy() -> None:
    code = f"import sys, mlxsft.cli; print([m for m in {HEAVY!r} if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    commands = [[name] for name in app.commands]
    commands += [[name, sub] for name, c in app.commands.items() for sub in getattr(c, "commands", {})]
    for command in [[], *commands]:
        assert call([*command, "--help"]) == 0
        assert capsys.readouterr().out.startswith("Usage: mlxsft")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["--version"]) == 0
    assert capsys.readouterr().out == f"mlxsft, version {__version__}\n"


def test_usage_errors_exit_2_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["nonsense"], ["train"], ["train", "x", "--out", "y", "--nonsense"]):
        assert call(arguments) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err


def test_exit_codes_are_those_that_are_promised() -> None:
    assert {e.__name__: e.exit_code for e in errors.MlxsftError.__subclasses__() if "exit_code" in vars(e)} == {
        "UsageError": 2,
        "InputRefused": 3,
        "OutOfResources": 4,
        "Diverged": 5,
        "GateFailed": 6,
        "NetworkFailed": 7,
    }


def test_a_reader_that_has_had_enough_is_no_error() -> None:
    # More than the 64 KB that a pipe holds, so that the writer does notice.
    script = (
        f'{sys.executable} -c \'import click; from mlxsft.cli import app, run; app.add_command(click.Command("big",'
    )
    script += ' callback=lambda: [click.echo("x" * 1000) for _ in range(500)])); run()\' big | head -c 10'
    ran = subprocess.run(["bash", "-o", "pipefail", "-c", script], capture_output=True, text=True, check=False)
    assert ran.stderr == ""
    assert ran.returncode == 0


def test_no_color_is_honoured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("NO_COLOR", "1")
    assert call(["generate", "/no/such/folder", "hi"]) == 3
    assert "\x1b" not in capsys.readouterr().err

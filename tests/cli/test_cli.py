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
    script = f"{sys.executable} -m mlxsft recipes schema | head -c 10"
    ran = subprocess.run(["bash", "-o", "pipefail", "-c", script], capture_output=True, text=True, check=False)
    assert ran.stderr == ""
    assert ran.returncode == 0

"""The command `mlxsft`: one click group, and the one place that turns errors into messages and exit codes."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click

from mlxsft import __version__
from mlxsft.cli.adapters import adapters
from mlxsft.cli.bench import bench
from mlxsft.cli.chat import chat
from mlxsft.cli.convert import convert, quantize
from mlxsft.cli.data import data
from mlxsft.cli.doctor import doctor
from mlxsft.cli.evaluate import evaluate
from mlxsft.cli.export import export, import_
from mlxsft.cli.fuse import fuse
from mlxsft.cli.generate import generate
from mlxsft.cli.plan import plan
from mlxsft.cli.pull import pull, verify
from mlxsft.cli.push import push
from mlxsft.cli.quickstart import quickstart
from mlxsft.cli.recipes import recipes
from mlxsft.cli.runs import runs
from mlxsft.cli.serve import serve
from mlxsft.cli.train import train
from mlxsft.errors import Interrupted, MlxsftError, UsageError
from mlxsft.terminal import printable


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="mlxsft")
def app() -> None:
    """Instruction-tune a language model on your own laptop, offline, and know that it got better."""


for command in (
    quickstart,
    plan,
    train,
    runs,
    evaluate,
    generate,
    chat,
    serve,
    fuse,
    pull,
    convert,
    quantize,
    verify,
    export,
    import_,
    adapters,
    push,
    data,
    recipes,
    doctor,
    bench,
):
    app.add_command(command)


def call(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; bugs raise."""
    try:
        # Not click's own main(), which takes a closed pipe for an error.
        with app.make_context("mlxsft", list(arguments), color=_colour()) as context:
            app.invoke(context)
    except MlxsftError as error:
        report(error)
        return error.exit_code
    except click.exceptions.Exit as end:
        return end.exit_code
    except click.ClickException as error:
        error.show()
        return UsageError.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted.", err=True)
        return 130
    return 0


def report(error: MlxsftError) -> None:
    """Write an error and its hint to stderr."""
    if not isinstance(error, Interrupted):  # which was asked for
        click.secho("Error: ", fg="red", bold=True, nl=False, err=True, color=_colour())
    click.echo(printable(error.message), err=True)
    if error.hint:
        click.echo(f"  {printable(error.hint)}", err=True)


def _colour() -> bool | None:
    """No colour where people ask for none (https://no-color.org); else what click finds out by itself."""
    return False if os.environ.get("NO_COLOR") else None


def run() -> None:
    """The entry point of the `mlxsft` script."""
    try:
        code = call(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has had enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)

"""Examples of commands, declared beside each: `--help` ends with them, and README.md is made of them.

@click.command(epilog=examples("mlxsft runs show runs/mine  # curves in the terminal"))
"""

from __future__ import annotations

from collections.abc import Iterator
from inspect import cleandoc

import click

_TITLE = "Examples:"
_COLUMN = 70  # where the comments of an example begin, at the earliest


def examples(lines: str) -> str:
    """The epilog of a command from lines as one would type them, each with a comment behind two spaces and `#`."""
    typed = [line.partition("  #")[::2] for line in cleandoc(lines).splitlines()]
    aligned = [f"{line:<{_COLUMN - 2}}  #{comment}" if comment else line for line, comment in typed]
    return "\n".join(["\b", _TITLE, *(f"  {line}" for line in aligned)])  # click leaves lines after \b as they are


def examples_of(command: click.Command) -> list[str]:
    """The lines that `examples` was given, aligned; none where a command has no examples."""
    _, found, lines = (command.epilog or "").partition(f"{_TITLE}\n")
    return cleandoc(lines).splitlines() if found else []


def commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command below a group that is none itself, by the words that name it, in the order of `add_command`."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command

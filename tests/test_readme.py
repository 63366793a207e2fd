"""README.md beside the program: its examples, its files, its promises."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

import click
import pytest

from mlxsft.cli import app
from mlxsft.cli.examples import examples, examples_of
from mlxsft.recipe import load_recipe
from tests.readme import COMMANDS, README, generated

ROOT = README.parent
TEXT = README.read_text(encoding="utf-8")
SHELL = [line for block in re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL) for line in block.splitlines()]


def typed(line: str) -> Iterator[list[str]]:
    """The words behind each `mlxsft` of a line of a shell."""
    words = shlex.split(line, comments=True)
    for i, word in enumerate(words):
        if word == "mlxsft":
            yield list(takewhile(lambda w: w not in ("&&", ">", "|"), words[i + 1 :]))


def parsed(words: list[str]) -> click.Command:
    """The command that a command line calls. Raises click's errors where it has no such option or argument."""
    context = app.make_context("mlxsft", list(words))
    while isinstance(context.command, click.Group):
        name, command, rest = context.command.resolve_command(context, [*context._protected_args, *context.args])
        assert command is not None
        context = command.make_context(name, rest, parent=context)
    return context.command


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_an_example_that_calls_it(name: str) -> None:
    lines = examples_of(COMMANDS[name])
    assert lines, f'mlxsft {name}: give it epilog=examples("mlxsft {name} …  # what for"), then python -m tests.readme'
    for line in lines:
        assert [parsed(words) for words in typed(line)] == [COMMANDS[name]]


def test_an_example_with_an_option_that_does_not_exist_is_found() -> None:
    with pytest.raises(click.NoSuchOption):
        parsed(["data", "show", "rows.jsonl", "--model", "org/name", "--no-such-option"])
    with pytest.raises(click.MissingParameter):
        parsed(["train", "recipe.yaml"])


def test_the_help_of_a_command_ends_with_its_examples() -> None:
    command = click.Command(
        "x",
        epilog=examples(
            "mlxsft x  # short\nmlxsft x --with a-line-of-more-than-seventy-characters-in-all-it-is 1  # c"
        ),
    )
    assert examples_of(command) == [
        "mlxsft x" + " " * 62 + "# short",
        "mlxsft x --with a-line-of-more-than-seventy-characters-in-all-it-is 1  # c",
    ]
    told = command.get_help(click.Context(command, info_name="x"))
    assert told.endswith("\n".join(["Examples:", *(f"    {line}" for line in examples_of(command))]))
    assert examples_of(click.Command("y", epilog="Other words.")) == []


def test_the_readme_has_the_examples_of_the_program() -> None:
    assert generated(TEXT) == TEXT, "run: python -m tests.readme"
    assert {parsed(words) for line in SHELL for words in typed(line)} == set(COMMANDS.values())


def test_the_recipe_of_the_readme_is_one(tmp_path: Path) -> None:
    (block,) = (b for b in re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL) if b.startswith("model:"))
    (tmp_path / "recipe.yaml").write_text(block, encoding="utf-8")
    assert load_recipe(tmp_path / "recipe.yaml").adapter.rank == 16


def test_what_the_readme_names_exists() -> None:
    links = re.findall(r"\]\((?!https?://|#)([^)]+)\)|(?:src|srcset)=\"(?!https?://)([^\"]+)\"", TEXT)
    files = {a or b for a, b in links} | set(re.findall(r"(?:tests|recipes|mlxsft)/[\w/.-]+\.\w+", TEXT))
    assert len(files) > 8
    assert [name for name in sorted(files) if not (ROOT / name).exists()] == []
    headings = {
        re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for line in TEXT.splitlines()
        if line.startswith("#")
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", TEXT)) <= headings

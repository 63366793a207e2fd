"""What the commands of `mlxsft data` take alike: rows, and the settings of a recipe that say what becomes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from mlxsft.data.sources import RowSource
    from mlxsft.recipe import DataRecipe

Command = TypeVar("Command", bound=Callable[..., Any])

FORMATS = click.Choice(
    [
        "auto",
        "messages",
        "sharegpt",
        "self_instruct",
        "dolly",
        "alpaca",
        "flan",
        "prompt_completion",
        "text",
        "prompt",
    ]
)


def sources(context: click.Context, parameter: click.Parameter, names: Sequence[str]) -> list[RowSource]:
    """A callback: the files, folders and rows of the Hub that are named."""
    from mlxsft.data.sources import source_of

    try:
        return [source_of(name) for name in names]
    except ValueError as error:
        raise click.BadParameter(str(error), context, parameter) from None


files = click.argument("files", nargs=-1, required=True, callback=sources)
row_format = click.option(
    "--format", "row_format", type=FORMATS, default="auto", show_default=True, help="Layout of the rows."
)
columns = click.option(
    "--columns", multiple=True, metavar="NAME=COLUMN,...", help="What prompt, response, ... are called in FILES."
)
_SETTINGS = (
    click.option("--model", required=True, help="A checkpoint: its tokenizer and template are used."),
    click.option("--revision", help="Branch, tag or commit of a model on the Hub."),
    click.option("--template", help="Chat template: a built-in name or a Jinja file."),
    row_format,
    columns,
    click.option("--fill", multiple=True, metavar="NAME=VALUE", help="A value for {{NAME}} in the rows."),
    click.option("--max-tokens", type=click.IntRange(2), default=2048, show_default=True, help="Longest row."),
    click.option(
        "--too-long",
        type=click.Choice(["error", "drop", "keep-response", "split-turns"]),
        default="keep-response",
        show_default=True,
        help="What becomes of a row over --max-tokens.",
    ),
    click.option(
        "--train-on",
        type=click.Choice(["responses", "all"]),
        default="responses",
        show_default=True,
        help="Which tokens carry the loss.",
    ),
    click.option(
        "--special-tokens",
        type=click.Choice(["refuse", "escape", "drop", "allow"]),
        default="refuse",
        show_default=True,
        help="What becomes of special tokens spelled out in a row.",
    ),
)


def recipe_settings(command: Command) -> Command:
    """Gives a command the settings of a recipe's `data`, with the model whose tokens they are about."""
    for option in reversed(_SETTINGS):
        command = option(command)
    return command


def recipe_of(files: Sequence[RowSource], **settings: Any) -> DataRecipe:
    """What a recipe with these settings, as `recipe_settings` gives them, would say under `data`."""
    from mlxsft.recipe import DataRecipe

    given = {
        "train": [str(file) for file in files],
        "format": settings["row_format"],
        "columns": named_columns(settings["columns"]),
        "fill": dict(pair(text, "--fill") for text in settings["fill"]),
        "template": settings["template"] or None,
        "templates": settings.get("templates"),
    }
    given |= {name: settings[name] for name in ("max_tokens", "too_long", "train_on", "special_tokens")}
    return DataRecipe.model_validate(given)


def named_columns(given: Sequence[str]) -> dict[str, str]:
    """The columns by our names: NAME=COLUMN, several in one option with commas between them.

    A comma inside the name of a column stays, where what follows it is no NAME=.
    """
    from mlxsft.data.formats import COLUMNS

    columns: dict[str, str] = {}
    for text in given:
        last = ""
        for part in text.split(","):
            if last and "=" not in part:
                columns[last] += f",{part}"
                continue
            last, column = pair(part.strip(), "--columns")
            if last not in COLUMNS:
                raise click.BadParameter(f"got {last!r}; names: {', '.join(COLUMNS)}", param_hint="--columns")
            columns[last] = column
    return columns


def pair(text: str, option: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise click.BadParameter(f"got {text!r}, expected NAME=VALUE", param_hint=option)
    return name, value

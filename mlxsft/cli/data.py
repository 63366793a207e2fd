"""`mlxsft data`."""

from __future__ import annotations

from pathlib import Path

import click

from mlxsft.cli.data_check import check, split

FORMATS = click.Choice(["auto", "alpaca", "prompt_completion", "messages", "text"])


@click.group()
def data() -> None:
    """Look at rows before they are trained."""


data.add_command(check)
data.add_command(split)


@data.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--model", required=True, help="A checkpoint: its tokenizer and template are used.")
@click.option("--revision", help="Branch, tag or commit of a model on the Hub.")
@click.option("--template", help="Chat template: a built-in name or a Jinja file.")
@click.option("--format", "row_format", type=FORMATS, default="auto", show_default=True, help="Of the rows.")
@click.option("--train-on", type=click.Choice(["responses", "all"]), default="responses", show_default=True)
@click.option("--max-tokens", type=click.IntRange(2), default=2048, show_default=True, help="Longest row.")
@click.option(
    "--too-long", type=click.Choice(["error", "drop", "keep-response"]), default="keep-response", show_default=True
)
@click.option(
    "--special-tokens", type=click.Choice(["refuse", "escape", "drop", "allow"]), default="refuse", show_default=True
)
@click.option("--fill", multiple=True, metavar="NAME=VALUE", help="A value for {{NAME}} in the rows.")
@click.option("-n", "count", type=click.IntRange(1), default=3, show_default=True, help="How many rows.")
@click.option("--plain", is_flag=True, help="Mark trained tokens with [brackets] rather than colour.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a row: tokens, ids, mask.")
def show(
    files: tuple[Path, ...],
    model: str,
    revision: str | None,
    template: str | None,
    row_format: str,
    train_on: str,
    max_tokens: int,
    too_long: str,
    special_tokens: str,
    fill: tuple[str, ...],
    count: int,
    plain: bool,
    as_json: bool,
) -> None:
    """Show the tokens of the first rows, the trained ones marked, and whether chat will send the same prompt."""
    from mlxsft.data.render import load_renderer
    from mlxsft.data.show import shown_rows
    from mlxsft.models.source import open_model
    from mlxsft.recipe import DataRecipe

    settings = DataRecipe.model_validate(
        {
            "train": [str(f) for f in files],
            "format": row_format,
            "max_tokens": max_tokens,
            "too_long": too_long,
            "train_on": train_on,
            "special_tokens": special_tokens,
            "fill": dict(pair(f) for f in fill),
            "template": template,
        }
    )
    renderer = load_renderer(open_model(model, revision=revision), template)
    for shown in shown_rows(list(files), settings, renderer, count):
        click.echo(shown.to_json() if as_json else shown.to_text(plain=plain))


def pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise click.BadParameter(f"got {text!r}, expected NAME=VALUE", param_hint="--fill")
    return name, value

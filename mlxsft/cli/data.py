"""`mlxsft data`."""

from __future__ import annotations

from pathlib import Path

import click

from mlxsft.cli.data_check import check, split

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
    "--too-long",
    type=click.Choice(["error", "drop", "keep-response", "split-turns"]),
    default="keep-response",
    show_default=True,
)
@click.option(
    "--special-tokens", type=click.Choice(["refuse", "escape", "drop", "allow"]), default="refuse", show_default=True
)
@click.option("--columns", multiple=True, metavar="NAME=COLUMN", help="What prompt, response, ... are called in FILES.")
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
    columns: tuple[str, ...],
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
    from mlxsft.terminal import colours_wanted, told

    settings = DataRecipe.model_validate(
        {
            "train": [str(f) for f in files],
            "format": row_format,
            "max_tokens": max_tokens,
            "too_long": too_long,
            "train_on": train_on,
            "special_tokens": special_tokens,
            "columns": dict(pair(c, "--columns") for c in columns),
            "fill": dict(pair(f) for f in fill),
            "template": template or None,
        }
    )
    renderer = load_renderer(open_model(model, revision=revision, progress=told), settings.template)
    for shown in shown_rows(list(files), settings, renderer, count):
        click.echo(shown.to_json() if as_json else shown.to_text(plain=plain or not colours_wanted()))


@data.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The JSONL file to write.")
@click.option("--format", "row_format", type=FORMATS, default="auto", show_default=True, help="Of the rows.")
@click.option("--columns", multiple=True, metavar="NAME=COLUMN", help="What prompt, response, ... are called in FILES.")
@click.option("--skip-broken", is_flag=True, help="Leave broken rows out rather than write nothing.")
@click.option("--force", is_flag=True, help="Replace the file of --out where it exists.")
@click.option("--json", "as_json", is_flag=True, help="What became of the rows as one JSON object.")
def convert(
    files: tuple[Path, ...],
    out: Path,
    row_format: str,
    columns: tuple[str, ...],
    skip_broken: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Write rows of any layout as OpenAI messages, one JSON object a line."""
    import json

    from mlxsft.data.convert import convert_files

    named = dict(pair(column, "--columns") for column in columns)
    ledger, left_out = convert_files(files, out, format=row_format, columns=named, force=force, skip_broken=skip_broken)
    for row in left_out[:20]:
        click.echo(f"left out: {row}", err=True)
    if len(left_out) > 20:
        click.echo(f"and {len(left_out) - 20} more", err=True)
    counts = ", ".join(f"{count:,} {what}" for what, count in ledger.items())
    click.echo(json.dumps({"out": str(out), "ledger": ledger}) if as_json else f"{out}: {counts}")


def pair(text: str, option: str = "--fill") -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise click.BadParameter(f"got {text!r}, expected NAME=VALUE", param_hint=option)
    return name, value

"""`mlxsft recipes`: look at recipes, check them, bring in those of mlx-lm."""

from __future__ import annotations

from pathlib import Path

import click

from mlxsft.errors import UsageError


@click.group()
def recipes() -> None:
    """Look at recipes and check them."""


@recipes.command()
def schema() -> None:
    """Print the JSON Schema of a recipe: every setting, its meaning and its default."""
    import json

    from mlxsft.recipe import recipe_schema

    click.echo(json.dumps(recipe_schema(), indent=2, ensure_ascii=False))


@recipes.command()
@click.argument("file", metavar="RECIPE", type=click.Path(path_type=Path))
@click.option("--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Change a setting; may be repeated.")
def show(file: Path, overrides: tuple[str, ...]) -> None:
    """Check a recipe and print it resolved: every setting with its value, paths absolute."""
    from mlxsft.recipe import dump_recipe, load_recipe

    click.echo(dump_recipe(load_recipe(file, overrides)), nl=False)


@recipes.command("import")
@click.argument("file", metavar="FILE", type=click.Path(path_type=Path))
@click.option("--out", metavar="RECIPE", type=click.Path(path_type=Path), help="Write to this file, not to stdout.")
@click.option("--force", is_flag=True, help="Replace the file of --out where it exists.")
def import_(file: Path, out: Path | None, force: bool) -> None:
    """Turn mlx-lm's lora_config.yaml into a recipe; what differs is noted on stderr.

    Relative paths in FILE count from the current folder, as they do for mlx_lm.lora.
    """
    from mlxsft.recipe_import import import_mlx_lm

    text, notes = import_mlx_lm(file)
    if out is None:
        click.echo(text, nl=False)
    else:
        _write(out, text, force)
    for note in notes:
        click.echo(note, err=True)


def _write(out: Path, text: str, force: bool) -> None:
    from mlxsft.outputs import refuse_existing

    refuse_existing(out, force=force)
    try:
        out.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise UsageError(f"{out}: cannot be written: {error.strerror}") from None

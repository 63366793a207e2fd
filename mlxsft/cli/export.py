"""`mlxsft export` and `mlxsft import`."""

from __future__ import annotations

from pathlib import Path

import click

# What --to takes → the function that writes it: (adapter, out, model=, force=, tell=) → Written.
KINDS = {
    "peft": "mlxsft.models.peft:export_peft",
}


@click.command()
@click.argument("adapter", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--to", "kind", type=click.Choice(list(KINDS)), required=True, help="For whom it is written.")
@click.option("--model", help="The base, a folder or a Hub id, where the adapter does not say enough of it.")
@click.option("--force", is_flag=True, help="Replace what is in OUT.")
@click.option("--json", "as_json", is_flag=True, help="Write the summary as one JSON object.")
def export(adapter: Path, out: Path, kind: str, model: str | None, force: bool, as_json: bool) -> None:
    """Write ADAPTER, a run folder or a folder with an adapter, to OUT for another program.

    peft: for PEFT, transformers, vLLM and others; an adapter that was imported comes back as it was, to the last bit.
    """
    from importlib import import_module

    from mlxsft.terminal import told

    module, _, function = KINDS[kind].partition(":")
    written = getattr(import_module(module), function)(adapter, out, model=model, force=force, tell=told)
    show(written, as_json)


@click.command("import")
@click.argument("folder", metavar="PEFT_DIR", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--model", help="The base, a folder or a Hub id, to check the adapter against.")
@click.option("--force", is_flag=True, help="Replace the adapter in OUT.")
@click.option("--json", "as_json", is_flag=True, help="Write the summary as one JSON object.")
def import_(folder: Path, out: Path, model: str | None, force: bool, as_json: bool) -> None:
    """Write the PEFT adapter in PEFT_DIR to OUT in mlx-lm's layout, for mlxsft and mlx-lm.

    LoRA, rsLoRA and DoRA, whatever modules, layers, ranks and scales it has. What cannot be carried over is refused.
    """
    from mlxsft.models.peft import import_peft
    from mlxsft.terminal import told

    show(import_peft(folder, out, model=model, force=force, tell=told), as_json)


def show(written: object, as_json: bool) -> None:
    """Say what was written: the notes on stderr, the rest on stdout."""
    import json

    from mlxsft.models.written import Written
    from mlxsft.terminal import printable, told

    assert isinstance(written, Written)
    for note in written.notes:
        told(f"note: {note}")
    facts = {**written.facts, "notes": list(written.notes)}
    click.echo(json.dumps(facts, ensure_ascii=False) if as_json else printable(written.summary))

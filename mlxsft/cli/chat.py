"""`mlxsft chat`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mlxsft.cli.examples import examples
from mlxsft.cli.generate import answering


@click.command(
    epilog=examples("""
    mlxsft chat Qwen/Qwen2.5-0.5B-Instruct --adapter runs/mine  # in the terminal; /help lists its commands
    mlxsft chat org/name --adapter runs/mine --adapter old=runs/other  # the first one answers; /adapter swaps
    """)
)
@click.argument("model")
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="[NAME=]FOLDER",
    help="A run folder, or a folder with an adapter; repeatable. The first one answers.",
)
@click.option(
    "--keep",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("kept.jsonl"),
    show_default=True,
    help="Where /keep appends rows.",
)
@answering
def chat(
    model: str,
    adapters: tuple[str, ...],
    keep: Path,
    revision: str | None,
    template: str | None,
    system: str | None,
    settings: dict[str, Any],
    backend: str,
) -> None:
    """Talk with MODEL. Every line is a message, but for commands; /help shows them.

    Three quotation marks begin and end a message of several lines, as Alt-Enter begins a line. Ctrl-C stops an answer,
    Ctrl-R searches what was said before. Lines may also come through a pipe: then only the answers are written to
    stdout.
    """
    import sys

    from mlxsft.chat.generate import Sampling
    from mlxsft.chat.load import load_for_chat, named_adapters
    from mlxsft.chat.pipe import PipeFace
    from mlxsft.chat.session import BASES, Chat, Face
    from mlxsft.terminal import told, utf8_stdin

    named = named_adapters(adapters, base=BASES)
    loaded = load_for_chat(model, named, revision=revision, template=template, backend_name=backend, progress=told)
    loaded.backend.use(next(iter(named), None))
    max_tokens = settings.pop("max_tokens")
    face: Face
    if sys.stdin.isatty() and sys.stdout.isatty():
        from mlxsft.chat.terminal import TerminalFace, history_file

        face = TerminalFace(history_file())
        face.note(f"{loaded.backend.in_use or model} answers; /help shows the commands, /bye leaves.")
    else:
        face = PipeFace(utf8_stdin())
    Chat(loaded, face, sampling=Sampling(**settings), max_tokens=max_tokens, system=system, keep=keep).run()

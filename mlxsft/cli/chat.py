"""`mlxsft chat`."""

from __future__ import annotations

from pathlib import Path

import click

from mlxsft.cli.generate import answering


@click.command()
@click.argument("model")
@answering
def chat(
    model: str,
    adapter: Path | None,
    revision: str | None,
    template: str | None,
    system: str | None,
    max_tokens: int,
    temperature: float,
    top_p: float,
    min_p: float,
    top_k: int,
    repetition_penalty: float | None,
    seed: int | None,
    backend: str,
) -> None:
    """Talk with MODEL. Every line is a message; /help shows the commands.

    Lines may also come through a pipe: then only the answers are written to stdout.
    """
    import sys

    from mlxsft.chat.generate import Sampling
    from mlxsft.chat.load import load_for_chat
    from mlxsft.chat.session import Chat, typed_lines
    from mlxsft.terminal import told

    adapters = {} if adapter is None else {"adapter": adapter}
    loaded = load_for_chat(model, adapters, revision=revision, template=template, backend_name=backend, progress=told)
    loaded.backend.use(next(iter(adapters), None))
    renderer = loaded.renderers[loaded.backend.in_use]
    sampling = Sampling(temperature, top_p, top_k, min_p, repetition_penalty, seed)
    conversation = Chat(loaded.backend, renderer, sampling=sampling, max_tokens=max_tokens, system=system)
    if sys.stdin.isatty():
        click.echo("Talk to the model; /help shows the commands, /bye leaves.", err=True)
        conversation.run(typed_lines(lambda: input("> ")))
    else:
        conversation.run(sys.stdin)

"""`mlxsft generate`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from mlxsft.cli.train import BACKENDS


def answering(command: Callable[..., None]) -> Callable[..., None]:
    """The options that every command with a model that answers has."""
    options: list[Any] = [
        click.option("--adapter", type=click.Path(path_type=Path), help="A run folder, or a folder with an adapter."),
        click.option("--revision", help="Branch, tag or commit of a model on the Hub."),
        click.option("--template", help="Chat template: a built-in name or a Jinja file."),
        click.option("--system", help="A system prompt."),
        click.option("--max-tokens", type=click.IntRange(1), default=512, show_default=True, help="Longest answer."),
        click.option(
            "--temperature", type=click.FloatRange(0.0, 100.0), default=0.0, show_default=True, help="0: greedy."
        ),
        click.option(
            "--top-p", type=click.FloatRange(0.0, 1.0, min_open=True), default=1.0, help="Nucleus sampling; 1: off."
        ),
        click.option("--min-p", type=click.FloatRange(0.0, 1.0), default=0.0, help="Share of the likeliest; 0: off."),
        click.option("--top-k", type=click.IntRange(0), default=0, help="Only the K likeliest tokens; 0: off."),
        click.option(
            "--repetition-penalty", type=click.FloatRange(0.0, 10.0, min_open=True), help="Above 1 repeats less."
        ),
        click.option(
            "--seed", type=click.IntRange(0, 2**63 - 1), help="Of the sampling; the same seed gives the same text."
        ),
        click.option("--backend", type=BACKENDS, default="auto", show_default=True, help="What computes."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.command()
@click.argument("model")
@click.argument("prompt", required=False)
@answering
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object with the text and its figures.")
def generate(
    model: str,
    prompt: str | None,
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
    as_json: bool,
) -> None:
    """Answer PROMPT with MODEL; without PROMPT, what comes on stdin.

    The answer alone goes to stdout, as it comes.
    """
    import json
    import sys
    from dataclasses import asdict

    from mlxsft.chat.generate import Answer, Sampling, stream_answer
    from mlxsft.chat.load import load_for_chat
    from mlxsft.data.formats import Turn
    from mlxsft.errors import UsageError
    from mlxsft.terminal import printable, told

    if prompt is None and sys.stdin.isatty():
        raise UsageError("there is no PROMPT", "Give it as an argument or on stdin.")
    asked = prompt if prompt is not None else sys.stdin.read()
    if not asked.strip():
        raise UsageError("the prompt is empty", "Give it as an argument or on stdin.")
    adapters = {} if adapter is None else {"adapter": adapter}
    loaded = load_for_chat(model, adapters, revision=revision, template=template, backend_name=backend, progress=told)
    loaded.backend.use(next(iter(adapters), None))
    renderer = loaded.renderers[loaded.backend.in_use]
    turns = [*([Turn("system", system)] if system else []), Turn("user", asked)]
    sampling = Sampling(temperature, top_p, top_k, min_p, repetition_penalty, seed)
    answer = Answer()
    for text in stream_answer(loaded.backend, renderer, turns, sampling, max_tokens, answer=answer):
        if not as_json:
            click.echo(printable(text) if sys.stdout.isatty() else text, nl=False)
            sys.stdout.flush()
    click.echo(json.dumps(asdict(answer), ensure_ascii=False) if as_json else "")
    if answer.finish == "length" and not as_json:
        click.echo(f"(cut off after {answer.tokens} tokens; --max-tokens allows more)", err=True)

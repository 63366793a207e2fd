"""`mlxsft serve`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from mlxsft.cli.examples import examples
from mlxsft.cli.train import BACKENDS


@click.command(
    epilog=examples("""
    mlxsft serve Qwen/Qwen2.5-0.5B-Instruct --adapter pip=runs/mine  # OpenAI's API, and a page to compare in
    mlxsft serve org/name --adapter pip=runs/mine --adapter old=runs/older --key-file serve.key
    """)
)
@click.argument("model")
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="[NAME=]FOLDER",
    help="A run folder, or a folder with an adapter, and what requests call it; repeatable.",
)
@click.option("--revision", help="Branch, tag or commit of a model on the Hub.")
@click.option("--template", help="Chat template: a built-in name or a Jinja file.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0: any free one.")
@click.option("--key-file", type=click.Path(path_type=Path), help="File with the key; made where it is not there.")
@click.option(
    "--max-tokens", type=click.IntRange(1), default=2048, show_default=True, help="Longest answer by default."
)
@click.option("--backend", type=BACKENDS, default="auto", show_default=True, help="What computes.")
@click.option("--json", "as_json", is_flag=True, help="Write address, key file and models as one JSON object.")
def serve(
    model: str,
    adapters: tuple[str, ...],
    revision: str | None,
    template: str | None,
    host: str,
    port: int,
    key_file: Path | None,
    max_tokens: int,
    backend: str,
    as_json: bool,
) -> None:
    """Serve MODEL and adapters on it to clients of OpenAI's API, and as a page to chat in.

    Endpoints: /v1/chat/completions, /v1/completions, /v1/models, /health. The `model` of a request names the base or
    an adapter. Every request needs the key, which is printed at the start and kept in a file that only you can read.
    Ctrl-C and SIGTERM let the answers in flight finish.
    """
    import json
    import signal
    from functools import partial

    from mlxsft.chat.load import load_for_chat, named_adapters
    from mlxsft.errors import UsageError
    from mlxsft.interrupt import stop_requested
    from mlxsft.terminal import printable, told

    try:
        from mlxsft.chat.server import Listening, ModelServer, read_or_make_key, served_models
        from mlxsft.chat.server_worker import Worker
    except ModuleNotFoundError as error:
        raise UsageError(f"serving needs {error.name}, not installed here", "pip install 'mlxsft[serve]'") from error

    named = named_adapters(adapters)
    key, kept = read_or_make_key(key_file)
    load = partial(
        load_for_chat, model, named, revision=revision, template=template, backend_name=backend, progress=told
    )
    with Listening.at(host, port) as listening:
        worker = Worker(load)
        loaded = worker.start()
        models = served_models(loaded)
        for note in loaded.backend.notes:
            told(note)
        if not listening.is_local:
            told(f"Other machines can reach {listening.url}, and what is sent is not encrypted.")
        server = ModelServer(worker, models, listening, key=key, max_tokens=max_tokens)
        api = f"{listening.url}/v1"
        if as_json:
            click.echo(json.dumps({"url": api, "key_file": str(kept), "models": list(models)}))
        else:
            click.echo(
                f"{listening.url}/#key={key}\n  API: {api}   models: {printable(', '.join(models))}   key: {kept}"
            )
        with stop_requested([signal.SIGINT, signal.SIGTERM]):  # uvicorn raises them again when it has ended
            server.run()
    sys.stdout.flush()
    # MLX's streams end with the worker's thread and with the process, and where both end at once it aborts (seen once).
    os._exit(0)

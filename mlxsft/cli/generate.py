"""`mlxsft generate`."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from mlxsft.chat.settings import SETTINGS, Setting
from mlxsft.cli.examples import examples
from mlxsft.cli.rows import columns, named_columns, row_format, sources
from mlxsft.cli.train import BACKENDS

if TYPE_CHECKING:
    from mlxsft.chat.answers import Asking
    from mlxsft.chat.load import Loaded
    from mlxsft.data.sources import RowSource

ADAPTER = "adapter"  # what the one that is given is called in memory


def answering(command: Callable[..., None]) -> Callable[..., None]:
    """The options that every command with a model that answers has; `settings` has those of `chat/settings.py`."""

    @functools.wraps(command)
    def with_settings(**given: Any) -> None:
        command(settings={name: given.pop(name) for name in SETTINGS}, **given)

    options: list[Any] = [
        click.option("--revision", help="Branch, tag or commit of a model on the Hub."),
        click.option("--template", help="Chat template: a built-in name or a Jinja file."),
        click.option("--system", help="A system prompt."),
        *(
            click.option(
                f"--{name.replace('_', '-')}",
                type=_range(setting),
                default=setting.default,
                show_default=setting.default is not None,
                help=setting.help,
            )
            for name, setting in SETTINGS.items()
        ),
        click.option("--backend", type=BACKENDS, default="auto", show_default=True, help="What computes."),
    ]
    wrapped: Callable[..., None] = with_settings
    for option in reversed(options):
        wrapped = option(wrapped)
    return wrapped


def rows_source(context: click.Context, parameter: click.Parameter, name: str | None) -> RowSource | None:
    """A callback: the file, folder or rows of the Hub that are named."""
    return sources(context, parameter, [name])[0] if name is not None else None


def _range(setting: Setting) -> click.IntRange | click.FloatRange:
    if setting.whole:
        return click.IntRange(int(setting.low), int(setting.high))
    return _Range(setting.low, setting.high, min_open=setting.above)


class _Range(click.FloatRange):
    """Without what is no number, which is neither below nor above any limit."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value!r} is not a number", param, ctx)
        return number


@click.command(
    epilog=examples("""
    mlxsft generate org/name "Who are you?" --adapter runs/mine  # the text alone on stdout
    mlxsft generate org/name "Who are you?" --temperature 0.7 --seed 1 --json  # text, finish, tokens a second
    mlxsft generate org/name --adapter runs/mine --input rows.jsonl --output answers.jsonl  # eight rows at once
    """)
)
@click.argument("model")
@click.argument("prompt", required=False)
@click.option(
    "--adapter",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="A run folder, or a folder with an adapter.",
)
@click.option("--input", "rows", callback=rows_source, help="Rows to answer, in any layout that `data` reads.")
@click.option("--output", type=click.Path(path_type=Path), help="Where answers to --input go, as JSONL.")
@row_format
@columns
@click.option("--batch", type=click.IntRange(1, 256), default=8, show_default=True, help="Rows computed at once.")
@click.option("--stop", "stops", multiple=True, metavar="TEXT", help="Ends an answer before this text; repeatable.")
@click.option(
    "--json-schema",
    "schema",
    metavar="FILE|JSON",
    help="Answers are JSON that keeps to this schema.",
)
@answering
@click.option("--force", is_flag=True, help="Replace --output, and begin anew.")
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object with the text, or none, and its figures.")
def generate(
    model: str,
    prompt: str | None,
    adapter: Path | None,
    rows: RowSource | None,
    output: Path | None,
    row_format: str,
    columns: tuple[str, ...],
    batch: int,
    stops: tuple[str, ...],
    schema: str | None,
    revision: str | None,
    template: str | None,
    system: str | None,
    settings: dict[str, Any],
    backend: str,
    force: bool,
    as_json: bool,
) -> None:
    """Answer PROMPT with MODEL; without PROMPT, what comes on stdin, or every row of --input.

    The answer alone goes to stdout, as it comes. Answers to rows go to --output in the order of the rows, which are
    asked without their last answer; started again after it was stopped, the same command goes on. Row n, from 0, is
    sampled with --seed + n.
    """
    import sys

    from mlxsft.chat.answers import Asking
    from mlxsft.chat.generate import Sampling
    from mlxsft.chat.json_schema import read_schema, require_llguidance
    from mlxsft.chat.load import load_for_chat
    from mlxsft.errors import UsageError
    from mlxsft.terminal import told

    if rows is not None and prompt is not None:
        raise UsageError("there is a PROMPT and --input", "Give one of them.")
    if (rows is None) != (output is None):
        raise UsageError("--input and --output belong together", "Name the rows and where their answers go.")
    source = click.get_current_context().get_parameter_source
    for option, name in (
        ("--batch", "batch"),
        ("--format", "row_format"),
        ("--columns", "columns"),
        ("--force", "force"),
    ):
        if rows is None and source(name) is ParameterSource.COMMANDLINE:
            raise UsageError(f"{option} is about the rows of --input, and there are none", "Leave it out.")
    if any(not text for text in stops):
        raise UsageError("--stop: got an empty text")
    if schema is not None:
        require_llguidance()
    json_schema = None if schema is None else read_schema(schema)
    asked = _asked(prompt) if rows is None else ""

    def load() -> Loaded:
        loaded = load_for_chat(
            model,
            {} if adapter is None else {ADAPTER: adapter},
            revision=revision,
            template=template,
            backend_name=backend,
            progress=told,
        )
        loaded.backend.use(None if adapter is None else ADAPTER)
        return loaded

    max_tokens = settings.pop("max_tokens")
    asking = Asking(Sampling(**settings), max_tokens, system, stops, batch, json_schema)
    if rows is None or output is None:
        _answer(load(), asked, asking, as_json)
    else:
        _answer_rows(load, rows, output, asking, adapter, row_format, named_columns(columns), force, as_json)
    sys.stdout.flush()


def _asked(prompt: str | None) -> str:
    """The prompt, from stdin where none is given, without the end of its last line. Raises UsageError for none."""
    import sys

    from mlxsft.errors import UsageError
    from mlxsft.terminal import utf8_stdin

    if prompt is None and sys.stdin.isatty():
        raise UsageError(
            "there is no PROMPT",
            "Give it as an argument or on stdin, or rows with --input; `mlxsft chat` holds a conversation.",
        )
    asked = prompt if prompt is not None else utf8_stdin().read().removesuffix("\n")
    if not asked.strip():
        raise UsageError("the prompt is empty", "Give it as an argument or on stdin.")
    return asked


def _answer(loaded: Loaded, asked: str, asking: Asking, as_json: bool) -> None:
    import json
    import sys
    from dataclasses import asdict

    from mlxsft.chat.generate import Answer, stream_answer
    from mlxsft.chat.json_schema import JsonSchema
    from mlxsft.data.formats import Turn
    from mlxsft.terminal import printable

    turns = [*([Turn("system", asking.system)] if asking.system else []), Turn("user", asked)]
    renderer, answer = loaded.renderers[loaded.backend.in_use], Answer()
    schema = None if asking.json_schema is None else JsonSchema(renderer, asking.json_schema)
    for text in stream_answer(
        loaded.backend,
        renderer,
        turns,
        asking.sampling,
        asking.max_tokens,
        answer=answer,
        stops=asking.stops,
        constraint=None if schema is None else schema.constraint(),
    ):
        if not as_json:
            click.echo(printable(text) if sys.stdout.isatty() else text, nl=False)
            sys.stdout.flush()
    told = {**asdict(answer), "tokens_per_second": round(answer.tokens_per_second, 2)}
    click.echo(json.dumps(told, ensure_ascii=False) if as_json else "")
    if answer.finish == "length" and not as_json:
        more = "--max-tokens allows more" if answer.tokens == asking.max_tokens else "the model has no more room"
        click.echo(f"(cut off after {answer.tokens} tokens; {more})", err=True)


def _answer_rows(
    load: Callable[[], Loaded],
    rows: RowSource,
    output: Path,
    asking: Asking,
    adapter: Path | None,
    row_format: str,
    columns: dict[str, str],
    force: bool,
    as_json: bool,
) -> None:
    import json
    import time

    from mlxsft.chat.answers import AnswersFile, answer_rows, fingerprint
    from mlxsft.cli.bytes_bar import rows_bar
    from mlxsft.data.formats import LeftOut, raise_for_broken, read_conversations
    from mlxsft.data.sources import files_of
    from mlxsft.errors import Interrupted
    from mlxsft.interrupt import stop_requested
    from mlxsft.models.adapter import hashes_of
    from mlxsft.outputs import refuse_existing

    files = files_of([rows])
    refuse_existing(output, force=force, reads=files)
    read = list(read_conversations([rows], format=row_format, columns=columns, unanswered=True))
    raise_for_broken([row for row in read if isinstance(row, LeftOut)])
    loaded = load()
    backend, renderer = loaded.backend, loaded.renderers[loaded.backend.in_use]
    made_by = fingerprint(
        backend,
        renderer,
        asking,
        model=loaded.source.hashes() | ({} if adapter is None else hashes_of(adapter)),
        files=files,
        reading={"format": row_format, "columns": columns},
    )
    answers = AnswersFile(output, made_by, force=force)
    began, before = time.perf_counter(), answers.rows
    try:
        with stop_requested(said="Stopping...") as stop, rows_bar("answering", len(read), before) as watch:
            progress = answer_rows(backend, renderer, read, asking, answers.write, first=before, stop=stop, watch=watch)
        if progress.rows < len(read):
            raise Interrupted(
                f"{progress.rows} of {len(read)} rows are answered",
                "The same command goes on with the next one.",
                exit_code=stop.exit_code,
            )
        answers.finish()
    finally:
        answers.close()
    seconds = time.perf_counter() - began
    told = {
        "rows": progress.rows,
        "resumed_after": before,
        "left_out": progress.left_out,
        "tokens": progress.tokens,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(progress.tokens / seconds, 2),
    }
    if as_json:
        click.echo(json.dumps(told))
    else:
        less = f", {progress.left_out} of them cannot be asked (their `error` says why)" * bool(progress.left_out)
        click.echo(f"{output}: {progress.rows} rows{less}; {told['tokens_per_second']} tokens a second", err=True)

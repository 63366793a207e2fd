"""`mlxsft convert` and `mlxsft quantize`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxsft.cli.examples import examples

if TYPE_CHECKING:
    from mlxsft.models.check import CheckSettings
    from mlxsft.models.convert import Converted
    from mlxsft.models.quantize import QuantizeSettings

BITS = click.Choice(["2", "3", "4", "5", "6", "8"])
GROUPS = click.Choice(["16", "32", "64", "128"])
MODES = click.Choice(["affine", "mxfp4", "mxfp8", "nvfp4"])
MIXED = click.Choice(["mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6"])

METHODS = click.Choice(["dynamic", "dwq", "awq", "gptq"])
JUDGING = ("method", "calibration", "check", "max_kl", "target_kl", "max_size")  # the options of `checking`


def quantizing(command: Callable[..., None]) -> Callable[..., None]:
    """The options that say how matrices are packed."""
    options: list[Any] = [
        click.option("--bits", type=BITS, help="Of a number; affine has them all, the others one each.  [default: 4]"),
        click.option("--group-size", type=GROUPS, help="Numbers that share a scale.  [default: 64 for affine]"),
        click.option("--mode", type=MODES, default="affine", show_default=True, help="How numbers are packed."),
        click.option("--mixed", type=MIXED, help="Two widths by layer, the higher where it matters most."),
        click.option("--bits-for", default="", metavar="NAME=BITS,...", help="Other bits for these modules; 16: none."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def checking(command: Callable[..., None]) -> Callable[..., None]:
    """The options that say what the quantized model has to be worth."""
    options: list[Any] = [
        click.option("--method", type=METHODS, help="Learn from rows instead of rounding; kept only where it wins."),
        click.option("--calibration", metavar="FILE", help="Rows to learn from; a fifth is held out without --check."),
        click.option("--check", metavar="FILE|builtin", help="Measure what it cost, on these rows or a text of ours."),
        click.option("--max-kl", type=float, metavar="NATS", help="Exit 6 above this mean KL divergence; OUT is kept."),
        click.option("--target-kl", type=float, metavar="NATS", help="Raise bits by measured effect until this holds."),
        click.option("--max-size", metavar="SIZE", help="Raise bits where it helps most, up to this size: 3GB."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def writing(command: Callable[..., None]) -> Callable[..., None]:
    """The options of every command that writes a model."""
    options: list[Any] = [
        click.option("--revision", help="Branch, tag or commit of a model on the Hub."),
        click.option("--max-shard-size", default="5GiB", show_default=True, help="Of one file of weights."),
        click.option("--force", is_flag=True, help="Replace the model in OUT."),
        click.option("--json", "as_json", is_flag=True, help="Write the summary as one JSON object."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.command(
    epilog=examples("""
    mlxsft convert Qwen/Qwen2.5-0.5B-Instruct models/qwen --bits 4  # or a folder; without options as it is
    mlxsft convert models/hf models/mlx --dtype bfloat16 --mixed mixed_3_6 --bits-for "lm_head=8,embed_tokens=6"
    """)
)
@click.argument("source")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="Of what is not quantized.")
@click.option("--quantize", is_flag=True, help="Quantize; every option of it implies this.")
@quantizing
@checking
@click.option("--dequantize", is_flag=True, help="Make plain numbers of a quantized model.")
@writing
def convert(
    source: str,
    out: Path,
    dtype: str | None,
    quantize: bool,
    dequantize: bool,
    revision: str | None,
    max_shard_size: str,
    force: bool,
    as_json: bool,
    **asked: Any,
) -> None:
    """Write the checkpoint SOURCE, a folder or a Hub id, to the folder OUT as MLX has it.

    It is read tensor by tensor. Tokenizer, chat template and generation settings come along, code never does.
    """
    from mlxsft.models.convert import ConvertSettings, parse_size

    judged = _check_settings(asked)
    wanted = _quantize_settings(**asked) if quantize or judged or _any_asked(**asked) else None
    settings = ConvertSettings(dtype, wanted, dequantize, parse_size(max_shard_size), judged)
    _convert(source, out, settings, revision, force, as_json)


@click.command(
    epilog=examples("""
    mlxsft quantize models/mlx models/mlx-4bit --mode mxfp4  # a model that MLX has already
    mlxsft quantize models/mlx models/small --check rows.jsonl --target-kl 0.02 --max-size 400MB  # most for the bytes
    """)
)
@click.argument("source")
@click.argument("out", type=click.Path(path_type=Path))
@quantizing
@checking
@writing
def quantize(
    source: str,
    out: Path,
    revision: str | None,
    max_shard_size: str,
    force: bool,
    as_json: bool,
    **asked: Any,
) -> None:
    """Quantize the model in the folder SOURCE, as `mlxsft convert` wrote it, to the folder OUT.

    What that cost is measured with --check, and decided by --max-kl, --target-kl and --max-size.
    """
    from mlxsft.models.convert import ConvertSettings, parse_size

    judged = _check_settings(asked)
    settings = ConvertSettings(
        quantize=_quantize_settings(**asked), shard_bytes=parse_size(max_shard_size), check=judged
    )
    _convert(source, out, settings, revision, force, as_json)


def _any_asked(bits: str | None, group_size: str | None, mode: str, mixed: str | None, bits_for: str) -> bool:
    return bool(bits or group_size or mode != "affine" or mixed or bits_for)


def _quantize_settings(
    bits: str | None, group_size: str | None, mode: str, mixed: str | None, bits_for: str
) -> QuantizeSettings:
    from mlxsft.models.quantize import QuantizeSettings, parse_bits_for

    bit_count, numbers = (int(text) if text else None for text in (bits, group_size))
    return QuantizeSettings(bit_count, numbers, mode, mixed, parse_bits_for(bits_for))


def _check_settings(asked: dict[str, Any]) -> CheckSettings | None:
    """Of `checking`'s options, which are taken out; None where no quality is asked for."""
    given = {name: asked.pop(name) for name in JUDGING}
    if not any(value is not None for value in given.values()):
        return None
    from mlxsft.models.check import BUILT_IN, CheckSettings
    from mlxsft.models.convert import parse_size

    check, calibration, size = (given.pop(name) for name in ("check", "calibration", "max_size"))
    rows = BUILT_IN if check == "builtin" else Path(check) if check else None
    max_bytes = parse_size(size, "--max-size") if size else None
    return CheckSettings(rows, max_bytes=max_bytes, calibration=Path(calibration) if calibration else None, **given)


def _convert(source: str, out: Path, settings: Any, revision: str | None, force: bool, as_json: bool) -> None:
    import json

    from mlxsft.cli.bytes_bar import bytes_and_steps
    from mlxsft.errors import GateFailed
    from mlxsft.models.convert import convert as convert_model
    from mlxsft.terminal import told

    with bytes_and_steps("writing") as (progress, watch):
        options: dict[str, Any] = {"revision": revision, "force": force, "progress": progress, "watch": watch}
        done = convert_model(source, out, settings, tell=told, **options)
    for note in done.notes:
        told(f"note: {note}")
    click.echo(json.dumps(done.to_dict(), ensure_ascii=False, allow_nan=False) if as_json else _summary(done))
    if done.quality and done.quality.failed:
        raise GateFailed(f"{out}: {done.quality.failed}", "It is written and kept; take more bits or another mode.")


def _summary(done: Converted) -> str:
    from rich.filesize import decimal

    files = "1 file" if done.shards == 1 else f"{done.shards} files"
    quality = [f"quality {done.quality.sentence()}", *done.quality.worst()] if done.quality else []
    size = (
        f"{done.out}: {decimal(done.before_bytes)} before, {decimal(done.after_bytes)} after in {files}, "
        f"{done.bits_per_weight:.3f} bits per weight, {done.parameters:,} parameters"
    )
    return "\n".join([size, *quality])

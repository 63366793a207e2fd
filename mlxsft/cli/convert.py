"""`mlxsft convert` and `mlxsft quantize`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from mlxsft.models.convert import Converted
    from mlxsft.models.quantize import QuantizeSettings

BITS = click.Choice(["2", "3", "4", "5", "6", "8"])
GROUPS = click.Choice(["16", "32", "64", "128"])
MODES = click.Choice(["affine", "mxfp4", "mxfp8", "nvfp4"])
MIXED = click.Choice(["mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6"])


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


@click.command()
@click.argument("source")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="Of what is not quantized.")
@click.option("--quantize", is_flag=True, help="Quantize; every option of it implies this.")
@quantizing
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

    wanted = _quantize_settings(**asked) if quantize or _any_asked(**asked) else None
    settings = ConvertSettings(dtype, wanted, dequantize, parse_size(max_shard_size))
    _convert(source, out, settings, revision, force, as_json)


@click.command()
@click.argument("source")
@click.argument("out", type=click.Path(path_type=Path))
@quantizing
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
    """Quantize the model in the folder SOURCE, as `mlxsft convert` wrote it, to the folder OUT."""
    from mlxsft.models.convert import ConvertSettings, parse_size

    settings = ConvertSettings(quantize=_quantize_settings(**asked), shard_bytes=parse_size(max_shard_size))
    _convert(source, out, settings, revision, force, as_json)


def _any_asked(bits: str | None, group_size: str | None, mode: str, mixed: str | None, bits_for: str) -> bool:
    return bool(bits or group_size or mode != "affine" or mixed or bits_for)


def _quantize_settings(
    bits: str | None, group_size: str | None, mode: str, mixed: str | None, bits_for: str
) -> QuantizeSettings:
    from mlxsft.models.quantize import QuantizeSettings, parse_bits_for

    bit_count, numbers = (int(text) if text else None for text in (bits, group_size))
    return QuantizeSettings(bit_count, numbers, mode, mixed, parse_bits_for(bits_for))


def _convert(source: str, out: Path, settings: Any, revision: str | None, force: bool, as_json: bool) -> None:
    import json

    from mlxsft.cli.bytes_bar import bytes_bar
    from mlxsft.models.convert import convert as convert_model
    from mlxsft.terminal import told

    with bytes_bar("writing") as progress:
        done = convert_model(source, out, settings, revision=revision, force=force, tell=told, progress=progress)
    for note in done.notes:
        told(f"note: {note}")
    click.echo(json.dumps(done.to_dict(), ensure_ascii=False) if as_json else _summary(done))


def _summary(done: Converted) -> str:
    from rich.filesize import decimal

    files = "1 file" if done.shards == 1 else f"{done.shards} files"
    return (
        f"{done.out}: {decimal(done.before_bytes)} before, {decimal(done.after_bytes)} after in {files}, "
        f"{done.bits_per_weight:.3f} bits per weight, {done.parameters:,} parameters"
    )

"""`mlxsft fuse`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxsft.cli.convert import GROUPS, MODES, writing
from mlxsft.cli.examples import examples
from mlxsft.cli.train import BACKENDS

if TYPE_CHECKING:
    from mlxsft.models.fuse import Fused

BITS = click.Choice(["2", "3", "4", "5", "6", "8", "auto"])


@click.command(
    epilog=examples("""
    mlxsft fuse Qwen/Qwen2.5-0.5B-Instruct runs/mine models/mine  # one model with plain numbers
    mlxsft fuse models/qwen-4bit runs/mine models/mine --bits auto  # as few bits as hold what was tuned
    mlxsft fuse models/qwen-4bit runs/mine models/mine --check rows.jsonl --min-survival 0.95 --json
    mlxsft fuse Qwen/Qwen2.5-0.5B-Instruct runs/mine models/hf --backend torch  # transformers' layout; needs no MLX
    """)
)
@click.argument("model")
@click.argument("adapter", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="Of what is not quantized.")
@click.option("--bits", type=BITS, help="Quantize; auto: as few bits as hold what was tuned.")
@click.option("--group-size", type=GROUPS, help="Numbers that share a scale.  [default: 64 for affine]")
@click.option("--mode", type=MODES, default="affine", show_default=True, help="How numbers are packed.")
@click.option("--check", metavar="FILE|builtin|none", help="Rows to measure on.  [default: those the run held out]")
@click.option("--min-survival", type=float, default=0.9, show_default=True, help="Share of the tuning; 0: any.")
@click.option("--backend", type=BACKENDS, default="auto", show_default=True, help="torch: transformers' layout.")
@writing
def fuse(
    model: str,
    adapter: Path,
    out: Path,
    dtype: str | None,
    bits: str | None,
    group_size: str | None,
    mode: str,
    check: str | None,
    min_survival: float,
    backend: str,
    revision: str | None,
    max_shard_size: str,
    force: bool,
    as_json: bool,
) -> None:
    """Write the model that MODEL with ADAPTER is, a run folder for instance, to the folder OUT.

    It has plain numbers unless --bits is given, whatever MODEL has. On rows it is measured how much of the adapter's
    effect survived; where that is less than --min-survival, nothing is written and the exit code is 6.
    """
    import json

    from mlxsft.cli.bytes_bar import bytes_and_steps
    from mlxsft.models.check import BUILT_IN
    from mlxsft.models.convert import parse_size
    from mlxsft.models.fuse import FuseSettings, TuningLost
    from mlxsft.models.fuse import fuse as fuse_model
    from mlxsft.terminal import told

    rows = BUILT_IN if check == "builtin" else Path(check) if check not in (None, "none") else None
    settings = FuseSettings(
        dtype=dtype,
        bits=int(bits) if bits and bits != "auto" else bits,
        group_size=int(group_size) if group_size else None,
        mode=mode,
        shard_bytes=parse_size(max_shard_size),
        check=rows,
        measured=check != "none",
        min_survival=min_survival,
    )
    lost: TuningLost | None = None
    with bytes_and_steps("writing") as (progress, watch):
        options: dict[str, Any] = {"revision": revision, "force": force, "progress": progress, "watch": watch}
        try:
            done = fuse_model(model, adapter, out, settings, backend_name=backend, tell=told, **options)
        except TuningLost as error:
            lost, done = error, error.fused
    for note in done.notes:
        told(f"note: {note}")
    if as_json:
        click.echo(json.dumps(done.to_dict(), ensure_ascii=False))
    elif lost is None:
        click.echo(_summary(done))
    if lost:
        raise lost


def _summary(done: Fused) -> str:
    from rich.filesize import decimal

    files = "1 file" if done.shards == 1 else f"{done.shards} files"
    size = (
        f"{done.out}: {decimal(done.before_bytes)} before, {decimal(done.after_bytes)} after in {files}, "
        f"{done.bits_per_weight:.3f} bits per weight, {done.parameters:,} parameters"
    )
    return f"{size}\n{done.survival.sentence() if done.survival else 'what survived of the tuning was not measured'}"

"""`mlxsft export` and `mlxsft import`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mlxsft.cli.examples import examples

# What --to takes → the function that writes it: (adapter, out, model=, force=, tell=) → Written.
KINDS = {
    "peft": "mlxsft.models.peft:export_peft",
    "gguf": "mlxsft.models.gguf_export:to_gguf",
    "ollama": "mlxsft.models.gguf_export:to_ollama",
    "lmstudio": "mlxsft.models.gguf_export:to_lmstudio",
}
# Options that some of these functions take beside.
MORE = {"dtype": ("gguf", "ollama", "lmstudio"), "lora_only": ("gguf",), "progress": ("gguf", "ollama", "lmstudio")}


@click.command(
    epilog=examples("""
    mlxsft export runs/mine mine.gguf --to gguf --dtype q8_0  # base and adapter as one file; f16, bf16, f32 too
    mlxsft export models/qwen qwen.gguf --to gguf  # or a model folder, quantized by MLX or not
    mlxsft export runs/mine mine-lora.gguf --to gguf --lora-only  # for llama.cpp's --lora
    mlxsft export runs/mine ollama/mine --to ollama  # with a Modelfile; prints `ollama create` and `run`
    mlxsft export runs/mine mine.gguf --to lmstudio  # linked into LM Studio's folder of models
    mlxsft export runs/mine peft-adapter --to peft  # for PEFT, transformers, vLLM
    """)
)
@click.argument("adapter", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--to", "kind", type=click.Choice(list(KINDS)), required=True, help="For whom it is written.")
@click.option("--model", help="The base, a folder or a Hub id, where the adapter does not say enough of it.")
@click.option("--dtype", type=click.Choice(["f16", "bf16", "q8_0", "f32"]), help="Of matrices in GGUF.  [default: f16]")
@click.option("--lora-only", is_flag=True, help="In GGUF, the adapter without its base.")
@click.option("--force", is_flag=True, help="Replace what is in OUT.")
@click.option("--json", "as_json", is_flag=True, help="Write the summary as one JSON object.")
def export(
    adapter: Path,
    out: Path,
    kind: str,
    model: str | None,
    dtype: str | None,
    lora_only: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Write ADAPTER, a run folder or a folder with an adapter, to OUT for another program.

    peft: for PEFT, transformers, vLLM and others; an adapter that was imported comes back as it was, to the last bit.

    gguf: base and adapter as one file for llama.cpp; ADAPTER may be a folder with a whole model as well. ollama: a
    folder with that file and a Modelfile. lmstudio: that file, linked to where LM Studio finds it.
    """
    from importlib import import_module

    from mlxsft.cli.bytes_bar import bytes_bar
    from mlxsft.errors import UsageError
    from mlxsft.terminal import told

    with bytes_bar("writing") as progress:
        asked: dict[str, Any] = {"dtype": dtype, "lora_only": lora_only or None}
        for name in asked:
            if asked[name] is not None and kind not in MORE[name]:
                raise UsageError(f"--{name.replace('_', '-')}: --to {kind} has no such thing", "Leave it out.")
        asked["progress"] = progress if kind in MORE["progress"] else None
        more = {name: value for name, value in asked.items() if value is not None}
        module, _, function = KINDS[kind].partition(":")
        written = getattr(import_module(module), function)(adapter, out, model=model, force=force, tell=told, **more)
    show(written, as_json)


@click.command(
    "import",
    epilog=examples("mlxsft import peft-adapter adapters/mine --model org/base  # PEFT's, checked against the base"),
)
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

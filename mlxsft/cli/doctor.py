"""`mlxsft doctor`."""

from __future__ import annotations

from typing import Any

import click

from mlxsft.cli.examples import examples


@click.command(epilog=examples("mlxsft doctor  # what this machine has, and what to install"))
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object.")
def doctor(as_json: bool) -> None:
    """Say what this machine has, how fast it multiplies, and what to install."""
    import json

    facts = examine()
    if as_json:
        click.echo(json.dumps(facts, indent=2, ensure_ascii=False))
    else:
        _show(facts)


def examine() -> dict[str, Any]:
    """Everything that the command says; `todo` has one sentence for each thing that could be better."""
    import os
    import platform
    import shutil

    import psutil

    from mlxsft import __version__
    from mlxsft.machine import versions

    memory = psutil.virtual_memory()
    facts: dict[str, Any] = {
        "mlxsft": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions("mlx", "mlx-lm", "transformers", "torch", "peft"),
        "gxx": shutil.which("g++"),
        "memory": {"total_bytes": memory.total, "available_bytes": memory.available},
        "environment": {name: os.environ.get(name) for name in ("HF_HOME", "HF_HUB_OFFLINE", "MLXSFT_BLAS")},
    }
    return facts | _examine_mlx()


def _examine_mlx() -> dict[str, Any]:
    """Device, BLAS and speed of MLX, and what to do."""
    from dataclasses import asdict

    from mlxsft.backends import require_mlx
    from mlxsft.errors import UsageError

    try:
        require_mlx()
    except UsageError as error:
        todo = ". ".join(filter(None, (error.message, error.hint)))
        return {"device": None, "blas": None, "float32_matmul_flops": None, "todo": [todo]}
    from mlxsft.backends import mlx

    kind = mlx.device_kind()
    return {
        "device": {"kind": kind, "name": mlx.device_name()},
        "blas": asdict(mlx.BLAS) if mlx.BLAS else None,
        "float32_matmul_flops": mlx.matmul_rate(),
        "todo": [mlx.BLAS_HINT] if mlx.BLAS_HINT and kind == "cpu" else [],
    }


def _show(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    for name, value in _lines(facts):
        console.print(Text.assemble((f"{name:16}", "bold"), value))
    console.print(Text("\nWhat to do:" if facts["todo"] else "\nNothing to do.", "bold"))
    for line in facts["todo"]:
        console.print(Text(f"- {line}"))


def _lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """(what, value) of each fact, for people."""
    device, blas, rate, gib = facts["device"], facts["blas"], facts["float32_matmul_flops"], 2**30
    total, available = facts["memory"]["total_bytes"] / gib, facts["memory"]["available_bytes"] / gib
    own = "Accelerate" if facts["platform"].startswith("macOS") else "MLX's own"
    return [
        ("mlxsft", facts["mlxsft"]),
        ("Python", facts["python"]),
        ("platform", facts["platform"]),
        *((package, version or "not installed") for package, version in facts["packages"].items()),
        ("device", f"{device['kind']} ({device['name']})" if device else "none"),
        ("BLAS", f"{blas['name']} {blas['version'] or ''} ({blas['path']})" if blas else own),
        ("g++", facts["gxx"] or "not found (not needed: nothing is compiled on the CPU)"),
        ("memory", f"{total:.1f} GiB, {available:.1f} GiB available"),
        *((name, value if value is not None else "not set") for name, value in facts["environment"].items()),
        ("speed", f"{rate / 1e9:.0f} GFLOP/s in float32 matrix products" if rate else "not measured"),
    ]

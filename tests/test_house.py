"""The house rules that a machine can check."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted((ROOT / "mlxsft").rglob("*.py"))


@pytest.mark.parametrize("command", [["ruff", "check"], ["ruff", "format", "--check"], ["mypy"]])
def test_linters_and_types_have_nothing_to_say(command: list[str]) -> None:
    ran = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def imports(module: Path) -> set[str]:
    """Top-level packages that a module imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    return found


@pytest.mark.parametrize("module", MODULES, ids=lambda m: str(m.relative_to(ROOT)))
def test_array_libraries_are_imported_in_the_backends_only(module: Path) -> None:
    if module.parent.name != "backends":
        assert not imports(module) & {"mlx", "mlx_lm", "torch", "peft"}
    elif not module.stem.startswith("torch"):
        assert not imports(module) & {"torch", "peft"}


def test_no_module_is_a_drawer_for_everything() -> None:
    assert not {m.stem for m in MODULES} & {"utils", "common", "helpers", "misc"}

"""`mlxsft doctor` says what is there, and never fails."""

from __future__ import annotations

import importlib.util
import json
import sys
from importlib import metadata

import pytest
from click.testing import CliRunner

from mlxsft.cli.doctor import doctor


def test_facts_as_json() -> None:
    result = CliRunner().invoke(doctor, ["--json"])
    assert result.exit_code == 0
    facts = json.loads(result.stdout)
    assert facts["packages"]["mlx-lm"] == metadata.version("mlx-lm")
    assert facts["device"]["kind"] in ("cpu", "gpu")
    assert facts["device"]["name"]
    assert facts["memory"]["total_bytes"] >= facts["memory"]["available_bytes"] > 0
    assert 1e8 < facts["float32_matmul_flops"] < 1e15
    assert facts["environment"].keys() == {"HF_HOME", "HF_HUB_OFFLINE", "MLXSFT_BLAS"}
    assert isinstance(facts["todo"], list)
    if sys.platform == "linux":
        assert (facts["blas"] is None) == bool(facts["todo"])


def test_facts_for_people(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", "/somewhere/[bold]else")
    result = CliRunner().invoke(doctor)
    assert result.exit_code == 0
    assert f"Python          {sys.version.split()[0]}" in result.stdout
    assert "/somewhere/[bold]else" in result.stdout  # no markup
    assert "GFLOP/s in float32 matrix products" in result.stdout


def test_a_machine_without_mlx(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "mlx" else found(name))
    result = CliRunner().invoke(doctor, ["--json"])
    assert result.exit_code == 0
    facts = json.loads(result.stdout)
    assert facts["device"] is None
    assert facts["float32_matmul_flops"] is None
    assert facts["todo"][0].startswith("mlx is not installed. Install it: pip install")
    assert "mlx is not installed" in CliRunner().invoke(doctor).stdout


def test_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    facts = json.loads(CliRunner().invoke(doctor, ["--json"]).stdout)
    assert "MLX does not exist for this machine" in facts["todo"][0]

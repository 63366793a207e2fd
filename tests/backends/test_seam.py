"""The seam: who may open a backend."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mlxsft.backends import leave_out_torch, load_backend
from mlxsft.errors import UsageError
from mlxsft.models.source import ModelSource


def test_unknown_backend_is_refused(llama: object) -> None:
    with pytest.raises(UsageError, match="'tpu'"):
        load_backend("tpu", llama)  # type: ignore[arg-type]  # never looked at


def test_a_process_that_computes_with_mlx_never_imports_torch(llama: ModelSource) -> None:
    code = (
        "import sys; from mlxsft.backends import leave_out_torch, load_backend; from pathlib import Path\n"
        "from mlxsft.data.render import load_renderer; from mlxsft.models.source import open_model\n"
        "leave_out_torch('mlx'); source = open_model(sys.argv[1])\n"
        "print(len(load_renderer(source).tokenizer.hf), load_backend('mlx', source).name, sys.modules['torch'])"
    )
    ran = subprocess.run([sys.executable, "-c", code, str(llama.folder)], capture_output=True, text=True, check=True)
    assert ran.stdout.split()[1:] == ["mlx", "None"]
    assert not ran.stderr


def test_a_process_that_may_compute_with_torch_can_import_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    leave_out_torch("torch")
    assert "torch" not in sys.modules
    leave_out_torch("mlx")
    assert sys.modules["torch"] is None
    monkeypatch.delitem(sys.modules, "torch")

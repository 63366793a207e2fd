"""Adapters that were trained elsewhere, on random checkpoints of the size that they are for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from mlxsft.backends.mlx import MlxBackend
from mlxsft.backends.torch import TorchBackend
from mlxsft.errors import InputRefused
from mlxsft.models.adapter import load_adapter
from mlxsft.models.passport import load_adapter_for
from mlxsft.models.peft import export_peft, import_peft
from mlxsft.models.source import open_model
from tests.models.test_peft import mlx_lm_logits, our_logits, torch_logits

pytestmark = pytest.mark.filterwarnings("ignore")  # of PEFT

PEFT, MLX = "peft-smollm-135m-medical", "mlx-qwen2.5-0.5b-identity"


def checkpoint(real: Path, shape: str, folder: Path) -> Path:
    """A random checkpoint of a real size."""
    make = real.parent / "tools" / "make_checkpoint.py"
    subprocess.run([sys.executable, str(make), shape, str(folder), "--dtype", "float32"], check=True)
    return folder


def test_a_real_peft_adapter_comes_in_and_goes_out_as_it_was(real: Path, tmp_path: Path) -> None:
    given = real / "adapters" / PEFT
    written = import_peft(given, tmp_path / "ours")
    assert {name: written.facts[name] for name in ("kind", "modules", "rank", "scale")} == {
        "kind": "lora", "modules": 60, "rank": 16, "scale": 2.0,
    }  # fmt: skip
    export_peft(tmp_path / "ours", tmp_path / "back")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "back" / file).read_bytes() == (given / file).read_bytes()


def test_a_real_adapter_of_mlx_lms_goes_to_peft_and_comes_back_as_it_was(real: Path, tmp_path: Path) -> None:
    given = real / "adapters" / MLX
    export_peft(given, tmp_path / "peft")
    import_peft(tmp_path / "peft", tmp_path / "back")
    before, after = load_adapter(given), load_adapter(tmp_path / "back")
    assert before.config == after.config
    assert before.tensors.keys() == after.tensors.keys()
    assert all(np.array_equal(tensor, after.tensors[name]) for name, tensor in before.tensors.items())


@pytest.mark.long
def test_a_real_peft_adapter_gives_the_logits_of_peft_and_mlx_lm(real: Path, tmp_path: Path) -> None:
    base, given = checkpoint(real, "smollm2-135m", tmp_path / "base"), real / "adapters" / PEFT
    model = AutoModelForCausalLM.from_pretrained(base)
    plain, theirs = torch_logits(model), torch_logits(PeftModel.from_pretrained(model, given).eval())
    written = import_peft(given, tmp_path / "ours", model=str(base))
    assert written.notes == ()
    assert load_adapter(tmp_path / "ours").config["lora_parameters"]["keys"] == ["self_attn.q_proj", "self_attn.v_proj"]
    ours, in_mlx_lm = our_logits(base, tmp_path / "ours"), mlx_lm_logits(base, tmp_path / "ours")
    effect, gaps = np.abs(theirs - plain).max(), [np.abs(logits - theirs).max() for logits in (ours, in_mlx_lm)]
    print(f"largest effect {effect:.3g}, from peft: ours {gaps[0]:.2g}, mlx-lm {gaps[1]:.2g}")
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    np.testing.assert_allclose(in_mlx_lm, theirs, rtol=0, atol=1e-4)
    assert np.abs(theirs - plain).max() > 1e-2


@pytest.mark.long
def test_a_real_adapter_of_mlx_lms_gives_the_logits_of_mlx_lm_and_peft(real: Path, tmp_path: Path) -> None:
    base, given = checkpoint(real, "qwen2.5-0.5b", tmp_path / "base"), real / "adapters" / MLX
    source = open_model(str(base))
    saved, notes = load_adapter_for(source, given)
    assert "no passport" in notes[0]
    theirs, ours = mlx_lm_logits(base, given), our_logits(base, given)
    backend = TorchBackend(source)
    backend.attach_saved(saved.config, saved.tensors)
    on_torch = torch_logits(backend.model)
    del backend
    export_peft(given, tmp_path / "peft", model=str(base))
    model = AutoModelForCausalLM.from_pretrained(base)
    plain, in_peft = torch_logits(model), torch_logits(PeftModel.from_pretrained(model, tmp_path / "peft").eval())
    effect, gaps = (
        np.abs(in_peft - plain).max(),
        [np.abs(logits - theirs).max() for logits in (ours, on_torch, in_peft)],
    )
    print(f"largest effect {effect:.3g}, from mlx-lm: ours {gaps[0]:.2g}, torch {gaps[1]:.2g}, peft {gaps[2]:.2g}")
    for logits in (ours, on_torch, in_peft):
        np.testing.assert_allclose(logits, theirs, rtol=0, atol=1e-4)
    assert np.abs(in_peft - plain).max() > 1e-2


@pytest.mark.long
def test_half_of_a_real_adapter_is_refused_with_what_is_missing(real: Path, tmp_path: Path) -> None:
    base = checkpoint(real, "qwen2.5-0.5b", tmp_path / "base")
    saved = load_adapter(real / "adapters" / MLX)
    tensors = {name: tensor for name, tensor in saved.tensors.items() if ".22." not in name}
    with pytest.raises(InputRefused) as caught:
        MlxBackend(open_model(str(base))).attach_saved(saved.config, tensors)
    assert caught.value.message.count("is missing") == 4
    assert "model.layers.22.self_attn.q_proj.lora_a: is missing, expected (896, 8)" in caught.value.message

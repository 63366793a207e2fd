"""An adapter folder is replaced whole or not at all, and a bad one is refused with every problem named."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import TensorSpec, safe_open, serialize_file
from safetensors.numpy import load_file, save_file

from mlxsft.errors import Diverged, InputRefused, OutOfResources, UsageError
from mlxsft.models.adapter import atomic_write, load_adapter, save_adapter

Q = "model.layers.0.self_attn.q_proj"
CONFIG: dict[str, Any] = {
    "fine_tune_type": "lora",
    "num_layers": 1,
    "lora_parameters": {"rank": 2, "scale": 2.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]},
}


def pair(rank: int = 2) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((6, rank)), rng.standard_normal((rank, 4))
    return {f"{Q}.lora_a": a.astype(np.float32), f"{Q}.lora_b": b.astype(np.float32)}


def write_raw(path: Path, dtype: str, data: np.ndarray) -> None:
    """A safetensors file of `pair`'s names, whose bytes are called `dtype`; for dtypes that NumPy does not have."""
    specs = {}
    for name, shape in ((f"{Q}.lora_a", (6, 2)), (f"{Q}.lora_b", (2, 4))):
        array = np.resize(data, shape)
        specs[name] = (array, shape)
    serialize_file(
        {n: TensorSpec(dtype=dtype, shape=s, data_ptr=a.ctypes.data, data_len=a.nbytes) for n, (a, s) in specs.items()},
        path,
    )


def refusal(folder: Path) -> str:
    with pytest.raises(InputRefused) as caught:
        load_adapter(folder)
    assert caught.value.exit_code == 3
    assert str(folder) in caught.value.message
    return caught.value.message


# ---- there and back -------------------------------------------------------------------------------------------------


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    config = {**CONFIG, "mlxsft": {"template": {"name": "plain", "text": "ü"}}}
    save_adapter(tmp_path / "new" / "run", pair(), config)
    assert sorted(p.name for p in (tmp_path / "new" / "run").iterdir()) == [
        "adapter_config.json",
        "adapters.safetensors",
    ]
    adapter = load_adapter(tmp_path / "new" / "run")
    assert adapter.config == config
    assert adapter.tensors.keys() == pair().keys()
    for name, tensor in pair().items():
        assert adapter.tensors[name].dtype == np.float32
        np.testing.assert_array_equal(adapter.tensors[name], tensor)
        adapter.tensors[name] += 1  # the arrays are the caller's own


def test_views_and_other_floats_are_saved_as_their_values(tmp_path: Path) -> None:
    tensors = pair()
    views = {
        f"{Q}.lora_a": np.asfortranarray(tensors[f"{Q}.lora_a"]),  # the same values, transposed in memory
        f"{Q}.lora_b": tensors[f"{Q}.lora_b"].astype(np.float64)[:, ::-1],
    }
    save_adapter(tmp_path, views, CONFIG)
    stored = load_file(tmp_path / "adapters.safetensors")
    np.testing.assert_array_equal(stored[f"{Q}.lora_a"], tensors[f"{Q}.lora_a"])
    np.testing.assert_array_equal(stored[f"{Q}.lora_b"], tensors[f"{Q}.lora_b"][:, ::-1])


def test_the_same_adapter_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_adapter(tmp_path / name, pair(), CONFIG)
    for file in ("adapters.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_an_adapter_made_elsewhere_with_alpha_and_scale(real: Path) -> None:
    adapter = load_adapter(real / "adapters" / "mlx-qwen2.5-0.5b-identity")
    assert len(adapter.tensors) == 16
    keys = ["self_attn.q_proj", "self_attn.v_proj"]  # of the tensors: the file has none
    assert adapter.config["lora_parameters"] == {"rank": 8, "alpha": 16, "dropout": 0.0, "scale": 10.0, "keys": keys}
    assert adapter.tensors["model.layers.20.self_attn.q_proj.lora_a"].shape == (896, 8)


def test_a_checkpoint_of_a_run_has_the_runs_config(tmp_path: Path) -> None:
    save_adapter(tmp_path, pair(), CONFIG)
    step = tmp_path / "checkpoints" / "step-0000002"
    step.mkdir(parents=True)
    save_file({name: 2 * tensor for name, tensor in pair().items()}, step / "adapters.safetensors")
    adapter = load_adapter(step)
    assert adapter.config == CONFIG
    np.testing.assert_array_equal(adapter.tensors[f"{Q}.lora_b"], 2 * pair()[f"{Q}.lora_b"])


@pytest.mark.parametrize(
    ("dtype", "stored", "values"),
    [
        ("bfloat16", np.array([0x3F80, 0xC040, 0x0000, 0x3DCD], np.uint16), [1.0, -3.0, 0.0, 0.10009765625]),
        ("float16", np.array([1.0, -3.0, 0.0, 0.1], np.float16), [1.0, -3.0, 0.0, 0.0999755859375]),
        ("float64", np.array([1.0, -3.0, 0.0, 0.5], np.float64), [1.0, -3.0, 0.0, 0.5]),
    ],
)
def test_other_floats_become_float32(tmp_path: Path, dtype: str, stored: np.ndarray, values: list[float]) -> None:
    save_adapter(tmp_path, pair(), CONFIG)
    write_raw(tmp_path / "adapters.safetensors", dtype, stored)
    tensor = load_adapter(tmp_path).tensors[f"{Q}.lora_b"]
    assert tensor.dtype == np.float32
    np.testing.assert_array_equal(tensor, np.array([values, values], np.float32))


def test_factors_of_experts_and_dora_are_read(tmp_path: Path) -> None:
    zeros = np.zeros
    tensors = {"e.lora_a": zeros((3, 2, 6)), "e.lora_b": zeros((3, 4, 2)), **pair(), f"{Q}.m": zeros(4)}
    parameters = {**CONFIG["lora_parameters"], "keys": ["e", "self_attn.q_proj"]}
    save_adapter(tmp_path, tensors, {**CONFIG, "fine_tune_type": "dora", "lora_parameters": parameters})
    assert load_adapter(tmp_path).tensors["e.lora_a"].shape == (3, 2, 6)


OLD = {"rank": 2, "alpha": 4, "scale": 10.0, "dropout": 0.05}


@pytest.mark.parametrize(
    "config",
    [
        {"lora_layers": 1, "lora_parameters": OLD},
        {"lora_layers": 1, "use_dora": False, **OLD},
        {"num_layers": 1, "fine_tune_type": "lora", "lora_parameters": {**OLD, "keys": None}},
    ],
)
def test_configs_that_mlx_lm_wrote_in_earlier_years(tmp_path: Path, config: dict[str, Any]) -> None:
    save_adapter(tmp_path, pair(), {"model": "/somewhere", "seed": 0, **config})
    read = load_adapter(tmp_path).config
    assert read["num_layers"] == 1
    assert read["lora_parameters"] == {**OLD, "keys": ["self_attn.q_proj"]}


def test_an_early_dora_is_one(tmp_path: Path) -> None:
    save_adapter(tmp_path, {**pair(), f"{Q}.m": np.ones(4)}, {"lora_layers": 1, "use_dora": True, **OLD})
    assert load_adapter(tmp_path).config["fine_tune_type"] == "dora"


def test_full_weights_need_no_rank(tmp_path: Path) -> None:
    save_adapter(tmp_path, {"model.norm.weight": np.ones(4)}, {"fine_tune_type": "full"})
    assert load_adapter(tmp_path).tensors["model.norm.weight"].shape == (4,)


# ---- what is not saved ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
def test_tensors_that_are_not_finite_are_not_saved(tmp_path: Path, bad: float) -> None:
    save_adapter(tmp_path, pair(), CONFIG)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    tensors = {name: tensor.astype(np.float64) for name, tensor in pair().items()}
    tensors[f"{Q}.lora_b"][1, 1] = bad
    with pytest.raises(Diverged, match=r"q_proj\.lora_b") as caught:
        save_adapter(tmp_path, tensors, {**CONFIG, "num_layers": 9})
    assert caught.value.exit_code == 5
    assert "lora_a" not in caught.value.message
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_an_adapter_without_tensors_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match="no tensors"):
        save_adapter(tmp_path / "run", {}, CONFIG)
    assert not (tmp_path / "run").exists()


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_every_bad_tensor_is_named_at_once(tmp_path: Path) -> None:
    parameters = {**CONFIG["lora_parameters"], "keys": ["a", "b", "c", "d", "e", "z"]}
    save_adapter(tmp_path, pair(), {**CONFIG, "lora_parameters": parameters})
    tensors: dict[str, np.ndarray] = {
        "a.lora_a": np.full((6, 2), np.nan, np.float32),
        "a.lora_b": np.array([[np.inf, 0], [0, 0]], np.float32),
        "b.lora_a": np.zeros((6, 2), np.int32),
        "b.lora_b": np.zeros((2, 4), np.float32),
        "c.lora_a": np.zeros((6, 2), np.float32),
        "d.lora_b": np.zeros((2, 4), np.float32),
        "e.lora_a": np.zeros((6, 3), np.float32),
        "e.lora_b": np.zeros((3, 4), np.float32),
        "f.weight": np.zeros(3, np.float32),
        f"{Q}.lora_a": np.zeros((6, 2), np.float32),
        f"{Q}.lora_b": np.zeros((2, 4), np.float32),
    }
    save_file(tensors, tmp_path / "adapters.safetensors")
    lines = {line.strip() for line in refusal(tmp_path).splitlines()[1:]}
    assert lines == {
        f"{Q}: lora_parameters.keys does not name this module",
        "z: is in lora_parameters.keys, but there are no tensors of it",
        "a.lora_a: 12 of 12 values are not finite",
        "a.lora_b: 1 of 4 values are not finite",
        "b.lora_a: is stored as I32, expected F32, F16 or BF16",
        "c.lora_a: c.lora_b is missing",
        "d.lora_b: d.lora_a is missing",
        "e.lora_a: has the shape (6, 3), which is not of rank 2",
        "e.lora_b: has the shape (3, 4), which is not of rank 2",
        "f.weight: is no part of a low-rank adapter, expected names that end in lora_a, lora_b or m",
    }


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8", "bool"])
def test_a_dtype_that_is_no_float_of_an_adapter_is_refused(tmp_path: Path, dtype: str) -> None:
    save_adapter(tmp_path, pair(), CONFIG)
    write_raw(tmp_path / "adapters.safetensors", dtype, np.zeros(4, np.uint8))
    assert refusal(tmp_path).count("is stored as") == 2


@pytest.mark.parametrize("infinite", [0x7F80, 0x7FC0])
def test_a_bfloat16_that_is_not_finite_is_refused(tmp_path: Path, infinite: int) -> None:
    save_adapter(tmp_path, pair(), CONFIG)
    write_raw(tmp_path / "adapters.safetensors", "bfloat16", np.array([infinite, 0, 0, 0], np.uint16))
    assert f"{Q}.lora_b: 2 of 8 values are not finite" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_layers": None}, "num_layers is None"),
        ({"num_layers": "4"}, "num_layers is '4'"),
        ({"fine_tune_type": "ia3"}, "fine_tune_type is 'ia3', expected lora, dora or full"),
        ({"lora_parameters": [2]}, "lora_parameters is [2], expected an object"),
        ({"lora_parameters": {"rank": 2, "alpha": 16}}, "lora_parameters.scale is None"),
        ({"lora_parameters": {"rank": 2, "scale": 10**400}}, "lora_parameters.scale is 1000"),
        ({"lora_parameters": {"rank": 2, "scale": True}}, "lora_parameters.scale is True"),
        ({"lora_parameters": {"rank": 0, "scale": 1}}, "lora_parameters.rank is 0"),
        ({"lora_parameters": {"rank": 2.0, "scale": 1}}, "lora_parameters.rank is 2.0"),
        ({"lora_parameters": {"rank": 2, "scale": 1, "keys": "q_proj"}}, "lora_parameters.keys is 'q_proj'"),
    ],
)
def test_a_config_that_mlx_lm_could_not_use_is_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    save_adapter(tmp_path, pair(), {**CONFIG, **change})
    assert words in refusal(tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"{", "is not JSON"),
        (b'{"lora_parameters": "\xff"}', "is not JSON"),
        (b"[]", "expected a JSON object, found list"),
        (b"[" * 200_000, "nested too deeply"),
        (json.dumps(CONFIG).replace("2.0", "Infinity").encode(), "lora_parameters.scale is inf"),
    ],
)
def test_a_config_that_is_malformed_is_refused(tmp_path: Path, text: bytes, words: str) -> None:
    save_adapter(tmp_path, pair(), CONFIG)
    (tmp_path / "adapter_config.json").write_bytes(text)
    assert words in refusal(tmp_path)


@pytest.mark.parametrize("cut", [0, 7, 60, -1])
def test_malformed_safetensors_are_refused(tmp_path: Path, cut: int) -> None:
    save_adapter(tmp_path, pair(), CONFIG)
    path = tmp_path / "adapters.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    assert "is not valid safetensors" in refusal(tmp_path)


def test_a_file_without_tensors_is_refused(tmp_path: Path) -> None:
    save_adapter(tmp_path, pair(), CONFIG)
    save_file({}, tmp_path / "adapters.safetensors")
    assert "holds no tensor" in refusal(tmp_path)


@pytest.mark.parametrize("file", ["adapters.safetensors", "adapter_config.json"])
def test_half_of_an_adapter_is_refused(tmp_path: Path, file: str) -> None:
    save_adapter(tmp_path, pair(), CONFIG)
    (tmp_path / file).unlink()
    assert f"{file} is missing" in refusal(tmp_path)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert "no such adapter folder" in refusal(tmp_path / "nothing")


def test_what_is_something_else_is_called_by_its_name(real: Path) -> None:
    assert "PEFT adapter (adapter_model.safetensors)" in refusal(real / "adapters" / "peft-smollm-135m-medical")
    assert "a whole model, not an adapter" in refusal(real / "models" / "stories260k-llama")


def test_a_pickled_peft_adapter_is_called_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.bin").touch()
    assert "PEFT adapter (adapter_model.bin)" in refusal(tmp_path)


# ---- written whole or not at all ------------------------------------------------------------------------------------


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for content in (b"first", b"second, longer", b""):
        atomic_write(path, content)
        assert path.read_bytes() == content
        assert list(tmp_path.iterdir()) == [path]


def test_a_new_file_has_the_rights_of_any_other(tmp_path: Path) -> None:
    atomic_write(tmp_path / "a", b"x")
    (tmp_path / "b").write_bytes(b"x")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == stat.S_IMODE((tmp_path / "b").stat().st_mode)


@pytest.mark.parametrize(
    ("step", "number", "kind", "code"),
    [
        ("fsync", errno.ENOSPC, OutOfResources, 4),
        ("replace", errno.EDQUOT, OutOfResources, 4),
        ("replace", errno.EACCES, UsageError, 2),
    ],
)
def test_a_write_that_fails_leaves_the_file_from_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, number: int, kind: type[Exception], code: int
) -> None:
    def fail(*args: object) -> None:
        raise OSError(number, os.strerror(number))

    path = tmp_path / "x"
    atomic_write(path, b"before")
    monkeypatch.setattr(os, step, fail)
    with pytest.raises(kind, match="cannot be written") as caught:
        atomic_write(path, b"after")
    assert getattr(caught.value, "exit_code", None) == code
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_the_tensors_are_on_disk_before_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    replace, fsync = os.replace, os.fsync

    def seen(source: Path, target: Path) -> None:
        order.append(Path(target).name)
        replace(source, target)

    def synced(handle: int) -> None:
        order.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        fsync(handle)

    monkeypatch.setattr(os, "replace", seen)
    monkeypatch.setattr(os, "fsync", synced)
    save_adapter(tmp_path, pair(), CONFIG)
    assert order == ["file", "adapters.safetensors", "folder", "file", "adapter_config.json", "folder"]


def test_the_header_is_the_one_that_mlx_writes(tmp_path: Path) -> None:
    save_adapter(tmp_path, pair(), CONFIG)
    with safe_open(tmp_path / "adapters.safetensors", framework="np") as opened:
        assert opened.metadata() == {"format": "mlx"}
        assert sorted(opened.keys()) == [f"{Q}.lora_a", f"{Q}.lora_b"]

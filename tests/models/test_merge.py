"""Merged adapters: PEFT's numbers where PEFT has the method, and what each method promises."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import merge_utils
from torch import nn

from mlxsft.cli import call
from mlxsft.errors import InputRefused, UsageError
from mlxsft.models.adapter import Adapter, load_adapter, save_adapter
from mlxsft.models.merge import merge

SIZES = {"model.layers.0.self_attn.q_proj": (12, 8), "model.layers.1.self_attn.q_proj": (12, 20)}
SCALES, WEIGHTS = (2.0, 0.75), (0.7, -0.4)


def write_adapter(
    folder: Path, seed: int, *, rank: int = 4, scale: float = 2.0, base: str | None = "a", **change: Any
) -> Path:
    rng = np.random.default_rng(seed)
    tensors = {}
    for path, (inputs, outputs) in SIZES.items():
        tensors[f"{path}.lora_a"] = rng.standard_normal((inputs, rank)).astype(np.float32)
        tensors[f"{path}.lora_b"] = rng.standard_normal((rank, outputs)).astype(np.float32)
    parameters = {"rank": rank, "scale": scale, "dropout": 0.0, "keys": ["self_attn.q_proj"]}
    passport = {"base": {"name": f"base {base}", "sha256": {"model.safetensors": base}}, "template": {"name": "chatml"}}
    config: dict[str, Any] = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters}
    config |= {"mlxsft": passport} if base else {}
    save_adapter(folder, tensors, config | change)
    return folder


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    return [write_adapter(tmp_path / str(i), i, scale=scale) for i, scale in enumerate(SCALES)]


def change_of(adapter: Adapter, path: str) -> np.ndarray:
    """What an adapter adds to the weight of a module, [inputs, outputs]."""
    scale = adapter.config["lora_parameters"]["scale"]
    return np.asarray(scale * (adapter.tensors[f"{path}.lora_a"] @ adapter.tensors[f"{path}.lora_b"]))


class Layered(nn.Module):
    """A model with modules of the paths and sizes of SIZES."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        layers = []
        for inputs, outputs in SIZES.values():
            layer = nn.Module()
            layer.self_attn = nn.Module()
            layer.self_attn.q_proj = nn.Linear(inputs, outputs, bias=False)
            layers.append(layer)
        self.model.layers = nn.ModuleList(layers)


def merged_by_peft(
    adapters: list[Adapter], method: str, weights: tuple[float, ...], density: float
) -> dict[str, np.ndarray]:
    """add_weighted_adapter's tensors, under our names and in our shapes."""
    names = [f"adapter{i}" for i in range(len(adapters))]
    model: Any = None
    for name, adapter in zip(names, adapters, strict=True):
        parameters = adapter.config["lora_parameters"]
        rank, scale = parameters["rank"], parameters["scale"]
        config = LoraConfig(r=rank, lora_alpha=rank * scale, target_modules=["q_proj"])  # type: ignore[arg-type]
        if model is None:
            model = get_peft_model(Layered(), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        for path in SIZES:
            layer = model.base_model.model.get_submodule(path)
            layer.lora_A[name].weight.data = torch.from_numpy(adapter.tensors[f"{path}.lora_a"].T.copy())
            layer.lora_B[name].weight.data = torch.from_numpy(adapter.tensors[f"{path}.lora_b"].T.copy())
    options = {} if method in ("cat", "linear") else {"density": density}
    model.base_model.add_weighted_adapter(names, list(weights), "merged", combination_type=method, **options)
    found = {}
    for path in SIZES:
        layer = model.base_model.model.get_submodule(path)
        found[f"{path}.lora_a"] = layer.lora_A["merged"].weight.detach().numpy().T
        found[f"{path}.lora_b"] = layer.lora_B["merged"].weight.detach().numpy().T
        assert layer.scaling["merged"] == 1.0
    return found


@pytest.mark.parametrize("method", ["cat", "linear", "ties"])
@pytest.mark.parametrize("density", [0.3, 0.75])
def test_the_numbers_are_those_of_peft(two: list[Path], tmp_path: Path, method: str, density: float) -> None:
    merge(two, tmp_path / "out", method=method, weights=WEIGHTS, density=density)
    ours, theirs = (
        load_adapter(tmp_path / "out"),
        merged_by_peft(list(map(load_adapter, two)), method, WEIGHTS, density),
    )
    assert ours.config["lora_parameters"]["scale"] == 1.0
    assert ours.tensors.keys() == theirs.keys()
    for name, tensor in ours.tensors.items():
        np.testing.assert_allclose(tensor, theirs[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("method", "theirs"), [("dare", "dare_linear"), ("dare-ties", "dare_ties")])
def test_dare_is_pefts_with_the_same_numbers_kept(
    two: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, theirs: str
) -> None:
    """PEFT draws from torch's global state; here it is given what we drew, in its order."""
    adapters = list(map(load_adapter, two))
    alone = []  # each adapter by itself, so that what is kept of it can be seen
    for i in (0, 1):
        factors = tuple(float(i == j) for j in (0, 1))
        merge(two, tmp_path / f"alone{i}", method="dare", weights=factors, density=0.6, seed=5)
        alone.append(load_adapter(tmp_path / f"alone{i}").tensors)
    masks: Iterator[np.ndarray] = (
        (alone[i][f"{path}.{leaf}"] != 0).T for path in SIZES for leaf in ("lora_a", "lora_b") for i in (0, 1)
    )
    monkeypatch.setattr(
        merge_utils.torch,
        "bernoulli",
        lambda shaped: torch.from_numpy(next(masks).astype(np.float32)).view(shaped.shape),
    )
    expected = merged_by_peft(adapters, theirs, WEIGHTS, 0.6)
    merge(two, tmp_path / "out", method=method, weights=WEIGHTS, density=0.6, seed=5)
    for name, tensor in load_adapter(tmp_path / "out").tensors.items():
        np.testing.assert_allclose(tensor, expected[name], rtol=1e-6, atol=1e-7)


def test_dare_keeps_the_share_and_the_mean_and_depends_on_the_seed_alone(tmp_path: Path) -> None:
    one = write_adapter(tmp_path / "one", 0, rank=64, scale=1.0)
    name = "model.layers.1.self_attn.q_proj.lora_b"
    found = []
    for number, seed in enumerate((0, 0, 1)):
        merge([one], tmp_path / f"out{number}", method="dare", density=0.25, seed=seed)
        found.append(load_adapter(tmp_path / f"out{number}").tensors[name])
    np.testing.assert_array_equal(found[0], found[1])
    assert not np.array_equal(found[0], found[2])
    kept, plain = found[0] != 0, load_adapter(one).tensors[name]
    assert abs(kept.mean() - 0.25) < 4 * (0.25 * 0.75 / kept.size) ** 0.5
    np.testing.assert_allclose(found[0][kept], plain[kept] / 0.25, rtol=1e-6)


def test_cat_adds_exactly_the_weighted_sum_whatever_the_ranks(tmp_path: Path) -> None:
    three = [write_adapter(tmp_path / str(i), i, rank=rank, scale=1.5) for i, rank in enumerate((2, 5, 3))]
    written = merge(three, tmp_path / "out", weights=(1.0, 0.5, -2.0))
    merged = load_adapter(tmp_path / "out")
    assert written.facts["rank"] == merged.config["lora_parameters"]["rank"] == 10
    for path in SIZES:
        parts = [w * change_of(load_adapter(f), path) for w, f in zip((1.0, 0.5, -2.0), three, strict=True)]
        np.testing.assert_allclose(change_of(merged, path), sum(parts), rtol=1e-5, atol=1e-5)


def test_an_adapter_merged_with_nothing_is_itself(two: list[Path], tmp_path: Path) -> None:
    for method in ("cat", "linear"):
        merge(two[:1], tmp_path / method, method=method)
        for path in SIZES:
            one, same = change_of(load_adapter(two[0]), path), change_of(load_adapter(tmp_path / method), path)
            np.testing.assert_allclose(same, one, rtol=1e-5, atol=1e-5)


def test_modules_that_only_one_has_are_merged_of_that_one(two: list[Path], tmp_path: Path) -> None:
    adapter = load_adapter(two[1])
    gone, stays = SIZES
    tensors = {name: tensor for name, tensor in adapter.tensors.items() if not name.startswith(gone)}
    save_adapter(two[1], tensors, {**adapter.config, "num_layers": 1})
    merge(two, tmp_path / "out", weights=(2.0, 1.0))
    merged, first = load_adapter(tmp_path / "out"), load_adapter(two[0])
    np.testing.assert_allclose(change_of(merged, gone), 2 * change_of(first, gone), rtol=1e-5)
    assert merged.config["num_layers"] == -1
    assert merged.config["lora_parameters"]["keys"] == [gone, stays]


def test_the_passport_says_what_was_merged(two: list[Path], tmp_path: Path) -> None:
    merge(two, tmp_path / "out", method="dare-ties", weights=WEIGHTS, density=0.5, seed=3)
    passport = load_adapter(tmp_path / "out").config["mlxsft"]
    merged = passport["merged"]
    assert passport["base"]["name"] == "base a"
    assert passport["template"] == {"name": "chatml"}
    assert {k: merged[k] for k in ("method", "weights", "density", "seed")} == {
        "method": "dare-ties", "weights": list(WEIGHTS), "density": 0.5, "seed": 3,
    }  # fmt: skip
    assert [len(part["sha256"]) for part in merged["adapters"]] == [64, 64]
    assert str(tmp_path) not in json.dumps(passport)


@pytest.mark.parametrize(
    ("change", "method", "words"),
    [
        ({"base": "b"}, "cat", "was trained on other weights (base b) than"),
        ({"rank": 2}, "linear", "linear needs adapters of the same rank"),
        ({"rank": 2}, "ties", "ties needs adapters of the same rank"),
    ],
)
def test_what_does_not_go_together_is_refused(
    two: list[Path], tmp_path: Path, change: dict[str, Any], method: str, words: str
) -> None:
    other = write_adapter(tmp_path / "other", 7, **change)
    with pytest.raises(InputRefused) as caught:
        merge([*two, other], tmp_path / "out", method=method)
    assert words in caught.value.message
    assert not (tmp_path / "out").exists()


def test_other_kinds_and_sizes_are_all_named(two: list[Path], tmp_path: Path) -> None:
    adapter, path = load_adapter(two[0]), next(iter(SIZES))
    dora, full, wide = tmp_path / "dora", tmp_path / "full", tmp_path / "wide"
    lengths = {f"{p}.m": np.ones(outputs) for p, (_, outputs) in SIZES.items()}
    save_adapter(dora, {**adapter.tensors, **lengths}, {**adapter.config, "fine_tune_type": "dora"})
    save_adapter(full, {"model.norm.weight": np.ones(4)}, {"fine_tune_type": "full", "num_layers": 1})
    save_adapter(wide, {**adapter.tensors, f"{path}.lora_a": np.ones((99, 4))}, adapter.config)
    with pytest.raises(InputRefused) as caught:
        merge([two[0], dora, full, wide], tmp_path / "out")
    for words in (f"{dora}: is a DoRA", f"{full}: holds whole weights", f"{wide}: {path}.lora_a is for 99 numbers"):
        assert words in caught.value.message


# ---- the command ----------------------------------------------------------------------------------------------------


def test_the_command(two: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    foreign = write_adapter(tmp_path / "foreign", 9, base=None)
    command = ["adapters", "merge", *map(str, [*two, foreign]), "--out", str(tmp_path / "out")]
    assert call([*command, "--weights", "1,0.5,-2", "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["rank"] == 12
    assert f"{foreign}: its passport names no base" in said.err
    assert call(command) == UsageError.exit_code
    assert call([*command, "--force", "--weights", "1,2"]) == UsageError.exit_code
    assert "2 weights for 3 adapters" in capsys.readouterr().err
    assert call([*command, "--force", "--weights", "1,2,x"]) == UsageError.exit_code
    assert call([*command, "--force", "--density", "0"]) == UsageError.exit_code
    assert call([*command, "--force"]) == 0


def test_adapters_without_a_module_in_common_are_of_strangers(two: list[Path], tmp_path: Path) -> None:
    tensors = {f"elsewhere.{name}": tensor for name, tensor in load_adapter(two[0]).tensors.items()}
    config = {key: value for key, value in load_adapter(two[0]).config.items() if key != "mlxsft"}
    save_adapter(tmp_path / "stranger", tensors, config)
    with pytest.raises(InputRefused, match="tune no module in common"):
        merge([two[0], tmp_path / "stranger"], tmp_path / "out")


@pytest.mark.parametrize("option", [["--density", "0.2"], ["--method", "ties", "--seed", "3"]])
def test_settings_that_a_method_has_not_are_refused(
    two: list[Path], tmp_path: Path, option: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(["adapters", "merge", *map(str, two), "--out", str(tmp_path / "out"), *option]) == 2
    assert "does nothing with" in capsys.readouterr().err

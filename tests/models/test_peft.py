"""PEFT's adapters in mlx-lm's layout and back: the logits of peft and of mlx-lm, the same file after a round trip."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from mlxsft.backends.mlx import MlxBackend, mx
from mlxsft.backends.mlx_models import load_checkpoint, make_float32, mlx_lm
from mlxsft.backends.torch import TorchBackend
from mlxsft.cli import call
from mlxsft.errors import InputRefused, UsageError
from mlxsft.models import peft_config
from mlxsft.models.adapter import load_adapter, save_adapter
from mlxsft.models.base_modules import base_matrices
from mlxsft.models.peft import export_peft, import_peft
from mlxsft.models.source import open_model
from mlxsft.recipe_training import AdapterRecipe
from tests.backends.conftest import learned_adapter
from tests.backends.test_mlx_parity import save
from tests.tiny import write_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT has a few to say about tied and turned matrices

TOKENS = np.random.default_rng(0).integers(4, 256, (2, 12))
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "gpt2": ("gpt2", {"tie_word_embeddings": True}),
    "neox": ("gpt_neox", {"intermediate_size": 128, "hidden_act": "gelu_pytorch_tanh"}),
    "phi3": ("phi3", {}),
    "gemma2": ("gemma2", {"hidden_size": 64}),
}
PATTERN = {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 3}, "alpha_pattern": {"v_proj": 5}}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "list": ("llama", {"target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "rslora, all-linear": ("llama", {"target_modules": "all-linear", "use_rslora": True}),
    "dora": ("llama", {"target_modules": ["k_proj", "up_proj"], "use_dora": True}),
    "patterns": ("llama", {"target_modules": ["q_proj", "v_proj", "down_proj"], **PATTERN}),
    "patterns, dora": ("llama", {"target_modules": ["q_proj", "v_proj"], "use_dora": True, **PATTERN}),
    "patterns, rslora": ("llama", {"target_modules": ["q_proj", "o_proj"], "use_rslora": True, **PATTERN}),
    "regex": ("llama", {"target_modules": r".*\.1\.self_attn\.(q|o)_proj"}),
    "layers": ("llama", {"target_modules": ["q_proj", "gate_proj"], "layers_to_transform": [0]}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "conv1d, dora": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "use_dora": True}),
    "fused qkv under another name": ("neox", {"target_modules": ["query_key_value", "dense_4h_to_h"]}),
    "fused qkv": ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"]}),
    "embeddings and head": ("llama", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "tied embeddings": ("tied", {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}),
    "scaled embeddings": ("gemma2", {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random checkpoint of each architecture, as transformers saves it."""
    made = {}
    for name, (family, changes) in BASES.items():
        made[name] = save(tmp_path_factory.mktemp(name), family, {}, **changes)
    return made


def peft_model(base: Path, folder: Path, **config: Any) -> PeftModel:
    """PEFT's adapter with random values, saved in `folder`."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**{"r": 4, "lora_alpha": 7} | config))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model.eval()


def torch_logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(model(torch.from_numpy(TOKENS)).logits)


def our_logits(base: Path, adapter: Path | None) -> np.ndarray:
    backend = MlxBackend(open_model(str(base)))
    if adapter is not None:
        saved = load_adapter(adapter)
        backend.attach_saved(saved.config, saved.tensors)
    return np.array(backend.model(mx.array(TOKENS)))


def mlx_lm_logits(base: Path, adapter: Path) -> np.ndarray:
    model = load_checkpoint(open_model(str(base)))
    make_float32(model)
    mlx_lm("tuner.utils").load_adapters(model, str(adapter))
    model.eval()
    return np.array(model(mx.array(TOKENS)))


def reloaded(base: Path, folder: Path) -> np.ndarray:
    return torch_logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval())


def lora_tensors(folder: Path) -> dict[str, np.ndarray]:
    return {n: t for n, t in load_file(folder / "adapter_model.safetensors").items() if ".lora_" in n}


# ---- the same model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_pefts_adapter_gives_pefts_logits_here_and_in_mlx_lm_and_comes_back(
    bases: dict[str, Path], tmp_path: Path, case: str
) -> None:
    name, config = CASES[case]
    base, given, ours, back = bases[name], tmp_path / "peft", tmp_path / "ours", tmp_path / "back"
    theirs = torch_logits(peft_model(base, given, **config))
    import_peft(given, ours, model=str(base))
    logits = our_logits(base, ours)
    np.testing.assert_allclose(logits, theirs, rtol=0, atol=1e-4)
    np.testing.assert_allclose(mlx_lm_logits(base, ours), theirs, rtol=0, atol=1e-4)
    assert np.abs(logits - our_logits(base, None)).max() > 0.1
    export_peft(ours, back)
    before, after = lora_tensors(given), lora_tensors(back)
    assert before.keys() == after.keys()
    assert all(before[n].tobytes() == after[n].tobytes() for n in before)
    files = ["adapter_config.json"]
    if "embed_tokens" not in config["target_modules"]:  # beside which PEFT stores the base's own
        files.append("adapter_model.safetensors")
    assert all((given / file).read_bytes() == (back / file).read_bytes() for file in files)
    assert np.array_equal(reloaded(base, back), theirs)


def test_the_text_model_of_one_that_sees_has_other_names_in_mlx_lm(tmp_path: Path) -> None:
    text = {
        **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"num_key_value_heads": 2, "vocab_size": write_tokenizer(tmp_path / "base"), "tie_word_embeddings": False},
        "rope_parameters": {"rope_type": "default", "rope_theta": 50.0, "mrope_section": [1, 1, 2]},
    }
    vision = {"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 32, "patch_size": 14}
    config = AutoConfig.for_model("qwen2_vl", text_config=text, vision_config=vision)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).float()
    model.save_pretrained(tmp_path / "base")
    targets = r"model\.language_model\..*\.(q_proj|down_proj)"
    model = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=40, target_modules=targets, init_lora_weights=False)
    ).eval()
    model.save_pretrained(tmp_path / "peft")
    import_peft(tmp_path / "peft", tmp_path / "ours", model=str(tmp_path / "base"))
    adapter = load_adapter(tmp_path / "ours")
    assert adapter.config["num_layers"] == 2
    assert min(adapter.tensors) == "language_model.model.layers.0.mlp.down_proj.lora_a"
    logits = our_logits(tmp_path / "base", tmp_path / "ours")
    np.testing.assert_allclose(logits, torch_logits(model), rtol=0, atol=1e-4)
    assert np.abs(logits - our_logits(tmp_path / "base", None)).max() > 0.01
    export_peft(tmp_path / "ours", tmp_path / "back")
    file = "adapter_model.safetensors"
    assert (tmp_path / "back" / file).read_bytes() == (tmp_path / "peft" / file).read_bytes()


def test_the_torch_backend_takes_modules_of_single_layers(bases: dict[str, Path], tmp_path: Path) -> None:
    theirs = torch_logits(peft_model(bases["llama"], tmp_path / "peft", **CASES["layers"][1]))
    import_peft(tmp_path / "peft", tmp_path / "ours")
    saved, backend = load_adapter(tmp_path / "ours"), TorchBackend(open_model(str(bases["llama"])))
    backend.attach_saved(saved.config, saved.tensors)
    np.testing.assert_allclose(torch_logits(backend.model), theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("base", "recipe"),
    [
        ("llama", AdapterRecipe(rank=4, alpha=6.0)),
        ("llama", AdapterRecipe(rank=3, alpha=5.0, kind="dora", layers=1)),
        ("llama", AdapterRecipe(rank=4, alpha=6.0, targets=("q_proj", "model.embed_tokens", "lm_head"))),
        ("tied", AdapterRecipe(rank=4, alpha=6.0, targets=("q_proj", "model.embed_tokens"))),
        ("gpt2", AdapterRecipe(rank=4, alpha=6.0)),
        ("neox", AdapterRecipe(rank=4, alpha=6.0, targets=("query_key_value", "model.embed_out"))),
        ("phi3", AdapterRecipe(rank=4, alpha=6.0, init="pissa")),
    ],
)
def test_our_adapter_gives_our_logits_in_peft_and_comes_back(
    bases: dict[str, Path], tmp_path: Path, base: str, recipe: AdapterRecipe
) -> None:
    backend = MlxBackend(open_model(str(bases[base])))
    backend.attach(recipe, seed=0)
    backend.load_adapter_state(learned_adapter(backend))
    save_adapter(tmp_path / "ours", backend.adapter_state(), backend.adapter_config())
    export_peft(tmp_path / "ours", tmp_path / "peft", model=str(bases[base]))
    expected = np.array(backend.model(mx.array(TOKENS)))
    np.testing.assert_allclose(reloaded(bases[base], tmp_path / "peft"), expected, rtol=0, atol=1e-4)
    import_peft(tmp_path / "peft", tmp_path / "back", model=str(bases[base]))
    for file in ("adapters.safetensors", "adapter_config.json"):
        assert (tmp_path / "back" / file).read_bytes() == (tmp_path / "ours" / file).read_bytes()


def test_with_its_base_the_config_is_as_short_as_mlx_lms(bases: dict[str, Path], tmp_path: Path) -> None:
    peft_model(bases["llama"], tmp_path / "peft", target_modules=["q_proj", "lm_head"])
    for model, layers, keys in (
        (str(bases["llama"]), 2, ["lm_head", "self_attn.q_proj"]),
        (None, -1, ["lm_head", *(f"model.layers.{i}.self_attn.q_proj" for i in (0, 1))]),
    ):
        written = import_peft(tmp_path / "peft", tmp_path / "ours", model=model, force=True) if model else None
        if written is None:  # PEFT has stored the head's own weights beside it
            with pytest.raises(InputRefused, match="only with --model"):
                import_peft(tmp_path / "peft", tmp_path / "ours", force=True)
            continue
        config = load_adapter(tmp_path / "ours").config
        assert (config["num_layers"], config["lora_parameters"]["keys"]) == (layers, keys)
        assert written.notes == ("base_model.model.lm_head.base_layer.weight: is the base's own, and is left out",)


@pytest.mark.parametrize("bits", [3, 4])
def test_a_quantized_base_has_the_sizes_that_it_had(bases: dict[str, Path], tmp_path: Path, bits: int) -> None:
    peft_model(bases["llama"], tmp_path / "peft", target_modules=["q_proj", "down_proj"])
    quantized = tmp_path / "quantized"
    assert call(["convert", str(bases["llama"]), str(quantized), "--bits", str(bits), "--group-size", "32"]) == 0
    sizes = {path: (m.rows, m.columns) for path, m in base_matrices(open_model(str(quantized))).items()}
    assert sizes == {path: (m.rows, m.columns) for path, m in base_matrices(open_model(str(bases["llama"]))).items()}
    assert sizes["model.layers.0.mlp.down_proj"] == (32, 48)


# ---- to the last bit ------------------------------------------------------------------------------------------------

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
FLOAT32 = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**64), max_value=2.0**64)


def write_peft(folder: Path, tensors: dict[str, np.ndarray], **config: Any) -> Path:
    """A PEFT folder; names of tensors are those of modules, with `lora_A.weight` or another end."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(content | config, indent=2, sort_keys=True))
    named = {f"base_model.model.{name}": np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def factors(path: str, rank: int = 2, dtype: type = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(len(path))
    a, b = rng.standard_normal((rank, 6)), rng.standard_normal((4, rank))
    return {f"{path}.lora_A.weight": a.astype(dtype), f"{path}.lora_B.weight": b.astype(dtype)}


@given(
    values=st.lists(FLOAT32, min_size=8, max_size=8),
    alphas=st.tuples(*[st.one_of(st.integers(1, 64), st.floats(0.1, 1e3), st.integers(-9, -1))] * 2),
    ranks=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    rslora=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_any_ranks_and_scales_come_back_to_the_last_bit(
    tmp_path_factory: pytest.TempPathFactory,
    values: list[float],
    alphas: tuple[float, float],
    ranks: tuple[int, int],
    rslora: bool,
) -> None:
    folder = tmp_path_factory.mktemp("adapters")
    tensors = {}
    for path, rank in zip((Q, V), ranks, strict=True):
        tensors |= factors(path, rank)
        tensors[f"{path}.lora_B.weight"] = np.resize(np.array(values, np.float32), (4, rank))
    patterns = {"rank_pattern": {"v_proj": ranks[1]}, "alpha_pattern": {"v_proj": alphas[1]}}
    given = write_peft(folder / "peft", tensors, r=ranks[0], lora_alpha=alphas[0], use_rslora=rslora, **patterns)
    import_peft(given, folder / "ours")
    ours = load_adapter(folder / "ours")
    scale = ours.config["lora_parameters"]["scale"]
    for path, rank, alpha in zip((Q, V), ranks, alphas, strict=True):
        product = scale * (ours.tensors[f"{path}.lora_a"].astype(np.float64) @ ours.tensors[f"{path}.lora_b"])
        a, b = (tensors[f"{path}.lora_{side}.weight"].astype(np.float64) for side in "AB")
        expected = alpha / (rank**0.5 if rslora else rank) * (b @ a).T
        np.testing.assert_allclose(product, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max() + 1e-40)
    export_peft(folder / "ours", folder / "back")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (folder / "back" / file).read_bytes() == (given / file).read_bytes()


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_types_come_back_as_they_were(tmp_path: Path, dtype: type) -> None:
    narrow = {name: tensor.astype(dtype) for name, tensor in factors(Q, dtype=np.float16).items()}
    given = write_peft(tmp_path / "peft", narrow)
    import_peft(given, tmp_path / "ours")
    export_peft(tmp_path / "ours", tmp_path / "back")
    file = "adapter_model.safetensors"
    assert (tmp_path / "back" / file).read_bytes() == (given / file).read_bytes()


def test_an_adapter_that_was_changed_since_is_exported_as_it_is(tmp_path: Path) -> None:
    import_peft(write_peft(tmp_path / "peft", factors(Q), target_modules=["q_proj"]), tmp_path / "ours")
    adapter = load_adapter(tmp_path / "ours")
    wider = {}
    for name, tensor in adapter.tensors.items():
        more = (0, 1)  # another column of A, another row of B
        wider[name] = np.pad(tensor, [(0, 0), more] if name.endswith("lora_a") else [more, (0, 0)], constant_values=1)
    config = {**adapter.config, "lora_parameters": {**adapter.config["lora_parameters"], "rank": 3}}
    save_adapter(tmp_path / "ours", wider, config)
    export_peft(tmp_path / "ours", tmp_path / "back")
    stored = load_file(tmp_path / "back" / "adapter_model.safetensors")
    np.testing.assert_array_equal(stored[f"base_model.model.{Q}.lora_A.weight"].T, wider[f"{Q}.lora_a"])
    assert json.loads((tmp_path / "back" / "adapter_config.json").read_text())["r"] == 3


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"peft_type": None}, "peft_type is None"),
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
        ({"lora_bias": True}, "lora_bias: what it asks for"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
        ({"use_qalora": True}, "use_qalora"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"target_parameters": ["experts.up_proj"]}, "target_parameters"),
        ({"r": 3}, "says rank 3, lora_A and lora_B have 2 and 2"),
        ({"r": 0}, "r is 0"),
        ({"lora_alpha": "8"}, "lora_alpha is '8'"),
        ({"rank_pattern": {"q_proj": 3}}, "says rank 3"),
        ({"rank_pattern": {"q_proj": 0.5}}, "rank_pattern is"),
        ({"rank_pattern": {"(": 2}}, "no regular expression"),
        ({"alpha_pattern": {"q_proj": 0}}, "the alpha of model.layers.0.self_attn.q_proj is 0"),
        ({"target_modules": ["v_proj"]}, "does not name this module"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, "does not name this module"),
        ({"use_dora": True}, "lora_magnitude_vector is missing"),
    ],
)
def test_what_cannot_be_carried_over_is_refused_by_name(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    given = write_peft(tmp_path / "peft", factors(Q) | factors(V), **change)
    with pytest.raises(InputRefused) as caught:
        import_peft(given, tmp_path / "ours")
    assert words in caught.value.message
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({f"{Q}.lora_A.weight": np.zeros((2, 6), np.float32)}, f"{Q}: lora_b is missing"),
        (factors(Q) | {"lm_head.weight": np.zeros((4, 6), np.float32)}, "lm_head.weight: whole weights"),
        (factors(Q) | {f"{Q}.bias": np.zeros(4, np.float32)}, "a trained bias"),
        (factors(Q) | {f"{Q}.lora_A.weight": np.full((2, 6), np.nan, np.float32)}, "12 of 12 values are not finite"),
        (factors(Q) | {f"{Q}.lora_A.weight": np.zeros((2, 6), np.int32)}, "is stored as I32"),
        (factors(Q) | {"prompt_embeddings": np.zeros(4, np.float32)}, "prompt_embeddings: is no tensor of a LoRA"),
        (factors("model.embed_tokens"), "give --model"),
        ({f"transformer.h.0.attn.{n.rpartition('proj.')[2]}": t for n, t in factors(Q).items()}, "Give its base"),
    ],
)
def test_tensors_that_cannot_be_carried_over_are_named(
    tmp_path: Path, tensors: dict[str, np.ndarray], words: str
) -> None:
    given = write_peft(tmp_path / "peft", tensors, target_modules=["q_proj", "embed_tokens", "attn"])
    with pytest.raises(InputRefused) as caught:
        import_peft(given, tmp_path / "ours")
    assert words in f"{caught.value.message} {caught.value.hint}"


def test_against_its_base_every_misfit_is_named(bases: dict[str, Path], tmp_path: Path) -> None:
    peft_model(bases["llama"], tmp_path / "peft", target_modules=["q_proj"])
    file = tmp_path / "peft" / "adapter_model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if ".0." in name]:
        tensors[name.replace(".0.", ".7.")] = tensors.pop(name)
    tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"] = np.zeros((9, 4), np.float32)
    save_file(tensors, file)
    with pytest.raises(InputRefused) as caught:
        import_peft(tmp_path / "peft", tmp_path / "ours", model=str(bases["llama"]))
    assert {line.strip() for line in caught.value.message.splitlines()[1:]} == {
        "model.layers.7.self_attn.q_proj: the model has no such module",
        "model.layers.1.self_attn.q_proj: is for 32 inputs and 9 outputs, the model has 32 and 32",
        "model.layers.0.self_attn.q_proj: adapter_config.json names this module, and its tensors are missing",
    }


def test_an_embedding_that_peft_adapts_without_the_tied_head_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    peft_model(bases["tied"], tmp_path / "peft", target_modules=["embed_tokens"])
    with pytest.raises(InputRefused, match="adapts this embedding alone"):
        import_peft(tmp_path / "peft", tmp_path / "ours", model=str(bases["tied"]))


def test_whole_weights_are_left_out_only_where_they_are_the_bases_own(bases: dict[str, Path], tmp_path: Path) -> None:
    model = peft_model(bases["llama"], tmp_path / "peft", target_modules=["q_proj"], modules_to_save=["lm_head"])
    expected = torch_logits(model)
    written = import_peft(tmp_path / "peft", tmp_path / "ours", model=str(bases["llama"]))
    assert written.notes == ("base_model.model.lm_head.weight: is the base's own, and is left out",)
    np.testing.assert_allclose(our_logits(bases["llama"], tmp_path / "ours"), expected, rtol=0, atol=1e-4)
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.add_(1e-3)
    model.save_pretrained(tmp_path / "peft")
    with pytest.raises(InputRefused, match=r"lm_head.weight: whole weights .* differ from the base's"):
        import_peft(tmp_path / "peft", tmp_path / "ours", model=str(bases["llama"]), force=True)


def test_a_pattern_that_never_ends_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft_config, "SECONDS", 2.0)
    path = f"model.layers.0.{'a' * 60}!"
    given = write_peft(tmp_path / "peft", factors(path), target_modules=r".*\.(a+)+")
    with pytest.raises(InputRefused, match="take longer than 2 s"):
        import_peft(given, tmp_path / "ours")


def test_pickle_is_refused(tmp_path: Path) -> None:
    given = write_peft(tmp_path / "peft", factors(Q))
    (given / "adapter_model.safetensors").rename(given / "adapter_model.bin")
    with pytest.raises(InputRefused, match="pickle only"):
        import_peft(given, tmp_path / "ours")


@pytest.mark.parametrize(
    ("tensors", "config", "words"),
    [
        ({"model.norm.weight": np.ones(4)}, {"fine_tune_type": "full"}, "fine_tune_type is full"),
        (
            {"model.layers.0.e.lora_a": np.ones((3, 2, 6)), "model.layers.0.e.lora_b": np.ones((3, 4, 2))},
            {"fine_tune_type": "lora"},
            "model.layers.0.e: experts",
        ),
        ({"model.wte.lora_a": np.ones((6, 2)), "model.wte.lora_b": np.ones((2, 4))}, {}, "give --model"),
        (
            {f"model.embed_tokens.{n}": np.ones(s) for n, s in (("lora_a", (6, 2)), ("lora_b", (2, 4)), ("m", (6,)))},
            {"fine_tune_type": "dora"},
            "PEFT's DoRA has a length for each column",
        ),
    ],
)
def test_what_peft_has_not_is_refused_by_name(
    tmp_path: Path, tensors: dict[str, np.ndarray], config: dict[str, Any], words: str
) -> None:
    save_adapter(tmp_path / "ours", tensors, {"num_layers": 1, "lora_parameters": {"rank": 2, "scale": 2.0}, **config})
    with pytest.raises(InputRefused) as caught:
        export_peft(tmp_path / "ours", tmp_path / "peft")
    assert words in caught.value.message


# ---- the commands ---------------------------------------------------------------------------------------------------


def test_the_commands_write_say_and_never_overwrite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = write_peft(tmp_path / "peft", factors(Q))
    ours, back = tmp_path / "ours", tmp_path / "back"
    assert call(["import", str(given), str(ours), "--json"]) == 0
    said = capsys.readouterr()
    facts = json.loads(said.out)
    assert (facts["kind"], facts["modules"], facts["rank"], facts["scale"]) == ("lora", 1, 2, 2.0)
    assert "without --model" in said.err
    assert call(["export", str(ours), str(back), "--to", "peft"]) == 0
    assert "1 modules in PEFT's layout" in capsys.readouterr().out
    for command in (["import", str(given), str(ours)], ["export", str(ours), str(back), "--to", "peft"]):
        assert call(command) == UsageError.exit_code
        assert "--force" in capsys.readouterr().err
        assert call([*command, "--force"]) == 0


def test_a_run_is_never_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = write_peft(tmp_path / "peft", factors(Q))
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "adapter_config.json").write_text("{}")
    assert call(["import", str(given), str(run), "--force"]) == UsageError.exit_code
    assert "is not replaced" in capsys.readouterr().err
    assert (run / "checkpoints").is_dir()

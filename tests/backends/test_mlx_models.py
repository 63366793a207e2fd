"""Checkpoints on MLX: loaded where transformers loads them, float32 on the CPU, refused in one sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from mlxsft.backends import load_backend
from mlxsft.backends.mlx import BLAS_HINT, MlxBackend, mx, tree_flatten
from mlxsft.backends.mlx_models import mlx_lm
from mlxsft.errors import InputRefused
from mlxsft.models.source import ModelSource, open_model
from mlxsft.recipe import AdapterRecipe, TrainRecipe
from tests.backends.conftest import leave_little_memory, make_batch, quantized_llama
from tests.tiny import write_llama, write_tokenizer


def logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    return np.array(MlxBackend(open_model(str(folder))).model(mx.array(tokens)))


def assert_as_transformers(folder: Path, vocabulary: int) -> None:
    tokens = make_batch(rows=2, width=24, vocabulary=vocabulary).tokens
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens.astype(np.int64))).logits.numpy()
    np.testing.assert_allclose(logits(folder, tokens), expected, atol=1e-4)


# ---- what mlx-lm alone refuses --------------------------------------------------------------------------------------


def test_a_tied_matrix_that_is_stored_only_as_the_head(real: Path) -> None:
    folder = real / "models" / "tinystories-656k-llama-original"
    with pytest.raises(ValueError, match="Missing 1 parameters"):
        mlx_lm("utils").load_model(folder)
    assert_as_transformers(folder, 500)


def test_a_tied_head_without_an_embedding_of_our_own(tmp_path: Path) -> None:
    folder = write_llama(tmp_path)
    expected = logits(folder, make_batch().tokens)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, folder / "model.safetensors")
    assert np.array_equal(logits(folder, make_batch().tokens), expected)


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_config_says_nothing_about(tmp_path: Path, tied: bool) -> None:
    """transformers leaves tie_word_embeddings out where it is the default; mlx-lm's default is another one."""
    folder = write_llama(tmp_path, tied=tied)
    config = json.loads((folder / "config.json").read_text())
    tokens = make_batch().tokens
    expected = logits(folder, tokens)
    del config["tie_word_embeddings"]
    (folder / "config.json").write_text(json.dumps(config))
    assert np.array_equal(logits(folder, tokens), expected)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GPT-2 as transformers saves it."""
    folder = tmp_path_factory.mktemp("gpt2")
    rows = write_tokenizer(folder)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=rows, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=2, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("prefix", ["transformer.", ""])
@pytest.mark.parametrize("extra", ["", "buffers", "head"])
def test_gpt2_under_every_name(tmp_path: Path, gpt2: Path, prefix: str, extra: str) -> None:
    tensors = {n.removeprefix("transformer."): a for n, a in load_file(gpt2 / "model.safetensors").items()}
    if extra == "buffers":
        for layer in range(2):
            tensors[f"h.{layer}.attn.bias"] = np.tril(np.ones((1, 1, 64, 64), np.float32))
            tensors[f"h.{layer}.attn.masked_bias"] = np.full((1,), -1e4, np.float32)
    stored = {prefix + name: array for name, array in tensors.items()}
    if extra == "head":
        stored["lm_head.weight"] = tensors["wte.weight"]
    for file in gpt2.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_as_transformers(tmp_path, 256)


def test_gpt2_is_trained(gpt2: Path) -> None:
    backend = load_backend("auto", open_model(str(gpt2)))
    backend.attach(AdapterRecipe(rank=4, targets=("c_attn", "c_fc")), seed=0)
    backend.optimize(TrainRecipe(steps=1, checkpoint_activations=True))
    losses = []
    for _ in range(10):
        losses.append(backend.accumulate(make_batch())[0])
        backend.apply(1e-2, 1.0)
    assert losses[-1] < losses[0] - 5


# ---- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "mode"), [(4, "affine"), (3, "affine"), (8, "affine"), (4, "mxfp4")])
def test_a_quantized_base_becomes_float32_once(tmp_path: Path, bits: int, mode: str) -> None:
    source = quantized_llama(tmp_path, bits, mode)
    backend = MlxBackend(source)
    assert {array.dtype for _, array in tree_flatten(backend.model.parameters())} == {mx.float32}
    assert [n for n in backend.notes if n != BLAS_HINT] == []
    assert backend.parameters()[0] == MlxBackend(open_model(str(tmp_path / "base"))).parameters()[0]
    plain, _ = mlx_lm("utils").load_model(source.folder)
    plain.set_dtype(mx.float32)  # the scales: the packed numbers stay
    tokens = mx.array(make_batch().tokens)
    np.testing.assert_allclose(np.array(backend.model(tokens)), np.array(plain(tokens)), atol=2e-5)


def test_a_half_precision_base_becomes_float32(tmp_path: Path) -> None:
    folder = write_llama(tmp_path)
    tensors = {n: a.astype(np.float16) for n, a in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert_as_transformers(folder, 256)


def test_where_memory_does_not_suffice_the_base_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = quantized_llama(tmp_path)
    leave_little_memory(monkeypatch)
    backend = MlxBackend(source)
    (note,) = [n for n in backend.notes if n != BLAS_HINT]
    assert "stays in its own number format" in note
    assert "0.0 GiB of memory are available" in note
    backend.attach(AdapterRecipe(rank=2), seed=0)  # QLoRA
    backend.optimize(TrainRecipe(steps=1))
    before = backend.accumulate(make_batch())[0]
    backend.apply(1e-2, 1.0)
    assert backend.accumulate(make_batch())[0] < before


# ---- refusals -------------------------------------------------------------------------------------------------------


def changed_llama(folder: Path, **changes: object) -> ModelSource:
    config = folder / "config.json"
    write_llama(folder)
    values = {**json.loads(config.read_text()), **changes}
    config.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))
    return open_model(str(folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "nosuchmodel"}, "Model type nosuchmodel not supported"),
        ({"model_type": "base"}, "mlx-lm cannot load this checkpoint"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_hidden_layers": 3}, r"Missing 9 parameters: model\.layers\.2\.input_layernorm\.weight"),
        ({"num_hidden_layers": 1}, r"9 parameters not in model.*model\.layers\.1\."),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "cannot load"),
        ({"rope_scaling": {"type": "linear", "factor": "x"}}, "cannot load"),
        ({"quantization": {"bits": 4}}, "group_size"),
    ],
)
def test_what_mlx_lm_cannot_load_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    source = changed_llama(tmp_path, **changes)
    with pytest.raises(InputRefused, match=message) as caught:
        MlxBackend(source)
    assert "\n" not in caught.value.message


def test_a_head_that_differs_from_the_tied_embedding_is_not_dropped(tmp_path: Path, gpt2: Path) -> None:
    for file in gpt2.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(gpt2 / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["transformer.wte.weight"] + 1}, tmp_path / "model.safetensors")
    with pytest.raises(InputRefused, match=r"lm_head\.weight"):
        MlxBackend(open_model(str(tmp_path)))


# ---- what mlx-lm does to the process --------------------------------------------------------------------------------

IMPORT = """
import resource, yaml
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, 9000))
from mlxsft.backends.mlx_models import mlx_lm
for module in ("utils", "generate", "tuner.utils", "models.cache", "sample_utils"):
    mlx_lm(module)
print(*resource.getrlimit(resource.RLIMIT_NOFILE), repr(yaml.safe_load("1e-5")))
"""


@pytest.mark.parametrize(("soft", "after"), [(500, 2048), (5000, 5000)])
def test_importing_mlx_lm_leaves_the_process_as_it_was(soft: int, after: int) -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT.format(soft=soft)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(after), "9000", "'1e-5'"]

"""Training on PyTorch: sums that add up, runs that resume bit for bit, and what saves time and memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from mlxsft.backends.mlx import BLAS_HINT, MlxBackend
from mlxsft.backends.torch import TorchBackend
from mlxsft.backends.torch_loss import pieces
from mlxsft.backends.torch_models import decoder_layers
from mlxsft.cli import call
from mlxsft.data.batches import Batch
from mlxsft.errors import InputRefused, UsageError
from mlxsft.models.source import ModelSource, open_model
from mlxsft.recipe_training import OPTIMIZERS, AdapterRecipe, TrainRecipe
from tests.backends.conftest import make_batch, quantized_llama, rows_of
from tests.backends.test_mlx_packing import CONFIGS
from tests.backends.test_mlx_parity import save
from tests.tiny import write_llama, write_tokenizer
from tests.training.test_run import events, same_adapter, train, write_recipe

LORA = AdapterRecipe(rank=4, alpha=8.0)
KINDS = {
    "lora": AdapterRecipe(rank=4, dropout=0.2),
    "dora": AdapterRecipe(kind="dora", rank=4, dropout=0.2),
    "pissa": AdapterRecipe(rank=4, init="pissa"),
    "full": AdapterRecipe(kind="full"),
}


def training(source: ModelSource, adapter: AdapterRecipe = LORA, **train: Any) -> TorchBackend:
    backend = TorchBackend(source)
    backend.attach(adapter, seed=0)
    backend.optimize(TrainRecipe.model_validate({"steps": 1, **train}))
    return backend


def go(backend: TorchBackend, steps: range, rows: int = 4) -> None:
    for step in steps:
        for part in rows_of(make_batch(seed=step), rows):
            backend.accumulate(part)
        backend.apply(1e-3, 1.0)


def drift(one: TorchBackend, other: TorchBackend) -> float:
    """The largest difference between two adapters."""
    a, b = one.adapter_state(), other.adapter_state()
    return float(max(np.abs(a[name] - b[name]).max() for name in a))


# ---- updates --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "optimizer"), [*((kind, "adamw") for kind in KINDS), *(("lora", name) for name in OPTIMIZERS)]
)
def test_a_resumed_run_is_the_same_bit_for_bit(llama: ModelSource, kind: str, optimizer: str) -> None:
    settings: dict[str, Any] = {"optimizer": optimizer, "weight_decay": 0.1, "neftune_alpha": 5.0}
    straight, begun, resumed = (training(llama, KINDS[kind], **settings) for _ in range(3))
    go(straight, range(4))
    go(begun, range(2))
    resumed.load_adapter_state(begun.adapter_state())
    resumed.load_optimizer_state(begun.optimizer_state())
    go(resumed, range(2, 4))
    for one, other in (
        (straight.adapter_state(), resumed.adapter_state()),
        (straight.optimizer_state(), resumed.optimizer_state()),
    ):
        assert one.keys() == other.keys()
        assert [name for name in one if not np.array_equal(one[name], other[name])] == []


@pytest.mark.parametrize("kind", ["plain", *KINDS])
def test_one_row_at_a_time_makes_the_update_of_all_at_once(llama: ModelSource, kind: str) -> None:
    """With dropout and noise too, whose zeros are those of the row."""
    settings: dict[str, Any] = {} if kind == "plain" else {"neftune_alpha": 5.0}
    together, alone = (training(llama, KINDS.get(kind, LORA), **settings) for _ in range(2))
    go(together, range(20), rows=8)
    go(alone, range(20), rows=1)
    assert drift(together, alone) < 2e-6


@pytest.mark.parametrize("kind", KINDS)
def test_activations_computed_again_make_the_same_updates(llama: ModelSource, kind: str) -> None:
    kept, again = training(llama, KINDS[kind]), training(llama, KINDS[kind], checkpoint_activations=True)
    go(kept, range(3))
    go(again, range(3))
    assert drift(kept, again) < 2e-6


def test_dropout_depends_on_seed_and_row_and_is_off_in_losses(llama: ModelSource) -> None:
    batch = make_batch()
    backends = [training(llama, KINDS["dora"], seed=seed) for seed in (1, 1, 2)]
    for backend in backends:
        go(backend, range(2))
        backend.load_adapter_state(backends[0].adapter_state())
    others = replace(batch, numbers=np.indices(batch.tokens.shape)[0] + 8)
    first, same, other = ([b.accumulate(rows)[0] for rows in (batch, others)] for b in backends)
    assert first == same != other
    assert first[0] != first[1]
    assert np.array_equal(backends[0].losses(batch), backends[2].losses(batch))


def test_dropout_of_the_model_itself_is_off(tmp_path: Path) -> None:
    """GPT-2's config asks for a tenth, which MLX's models do not have; PyTorch's global state stays untouched."""
    source = open_model(str(save(tmp_path, "gpt2", {}, tie_word_embeddings=True)))
    assert source.config["resid_pdrop"] == 0.1
    before = torch.random.get_rng_state()
    one, other = training(source), training(source)
    go(one, range(2))
    go(other, range(2))
    assert drift(one, other) == 0
    assert torch.equal(before, torch.random.get_rng_state())


def test_nothing_is_updated_by_a_loss_that_is_not_finite(llama: ModelSource) -> None:
    backend = training(llama)
    before = backend.adapter_state()
    backend.load_adapter_state({name: np.full_like(t, 1e30) for name, t in before.items()})
    backend.accumulate(make_batch())
    assert not np.isfinite(backend.apply(1e-3, 1.0))
    backend.load_adapter_state(before)
    backend.accumulate(make_batch())
    assert np.isfinite(backend.apply(1e-3, 1.0))
    assert backend.optimizer_state()["step"] == 1


def test_smoothed_labels_are_pytorchs(llama: ModelSource) -> None:
    backend, batch = training(llama, label_smoothing=0.1), make_batch()
    with torch.no_grad():
        logits = backend.model(torch.from_numpy(batch.tokens.astype(np.int64))).logits[:, :-1]
    targets = torch.from_numpy(np.where(batch.mask, batch.tokens, -100)[:, 1:].astype(np.int64))
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), label_smoothing=0.1, reduction="sum"
    )
    np.testing.assert_allclose(backend.accumulate(batch)[0], expected.item(), rtol=1e-6)


def test_the_head_in_chunks_is_the_head_at_once(llama: ModelSource, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once = training(llama)
    go(at_once, range(2))
    monkeypatch.setattr("mlxsft.backends.torch_head.CHUNK_BYTES", 1)
    monkeypatch.setattr("mlxsft.backends.torch_head.CHUNK_ROWS", 16)
    chunked = training(llama)
    go(chunked, range(2))
    assert drift(at_once, chunked) < 2e-6
    np.testing.assert_allclose(at_once.losses(make_batch()), chunked.losses(make_batch()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("at_once", [1, 24, 50])
def test_a_micro_batch_in_pieces_makes_the_update_of_it_whole(
    llama: ModelSource, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    batch = make_batch()
    whole, parts = ([batch.part(*place) for place in pieces(batch, size)] for size in (10_000, at_once))
    assert [len(whole), len(parts)] == [1, -(-8 // max(1, at_once // 12))]
    assert sum(int(part.mask.sum()) for part in parts) == int(batch.mask.sum())
    assert all(part.mask[:, -1].any() for part in parts)  # nothing is computed after the last trained token
    together, apart = training(llama), training(llama)
    go(together, range(3), rows=8)
    monkeypatch.setattr("mlxsft.backends.torch.AT_ONCE", at_once)
    go(apart, range(3), rows=8)
    assert drift(together, apart) < 2e-6


# ---- trunk and packing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_the_trunk_kept_and_released_makes_the_updates_of_the_whole_model(tmp_path: Path, family: str) -> None:
    source = open_model(str(save(tmp_path, family, {}, tie_word_embeddings=True, num_hidden_layers=4)))
    upper = AdapterRecipe(rank=4, alpha=8.0, layers=2)
    plain, kept = training(source, upper), training(source, upper)
    assert kept.trunk_layers() == 2
    given = [replace(part, trunk=kept.trunk(part)) for part in rows_of(make_batch(), 4)]
    kept.release_trunk()
    assert all(p.is_meta for layer in decoder_layers(kept.model)[:2] for p in layer.parameters())
    for _ in range(3):
        for part in given:
            kept.accumulate(part)
            plain.accumulate(replace(part, trunk=None))
        plain.apply(1e-3, 1.0)
        kept.apply(1e-3, 1.0)
    assert drift(plain, kept) < 1e-5
    np.testing.assert_allclose(kept.losses(make_batch()), plain.losses(make_batch()), rtol=1e-5, atol=1e-5)
    assert not any(p.is_meta for p in kept.model.parameters())


def packed_and_padded() -> tuple[Batch, Batch]:
    """Three rows of 12, 9 and 1 tokens in one sequence, and side by side."""
    rng = np.random.default_rng(0)
    rows = [rng.integers(4, 256, n, dtype=np.int32) for n in (12, 9, 1)]
    padded = np.zeros((3, 12), np.int32)
    for line, row in zip(padded, rows, strict=True):
        line[: len(row)] = row
    tokens = np.concatenate([*rows, np.zeros(4, np.int32)])[None]
    segments = np.repeat([1, 2, 3, 0], [12, 9, 1, 4]).astype(np.int32)[None]
    places = np.concatenate([np.arange(12), np.arange(9), [0], np.zeros(4, int)])[None]
    mask = np.arange(12) < np.array([[12], [9], [1]])
    mask[:, 0] = False
    return Batch(tokens, places > 0, segments), Batch(padded, mask)


@pytest.mark.parametrize("family", ["qwen2", "mistral", "gemma2", "gemma3", "gpt2", "mamba"])
def test_packed_rows_do_not_see_each_other_or_are_refused(tmp_path: Path, family: str) -> None:
    """GPT-2 too, which MLX cannot pack: here every row has positions of its own."""
    from transformers import AutoModelForCausalLM

    write_tokenizer(tmp_path)
    AutoModelForCausalLM.from_config(CONFIGS[family]()).save_pretrained(tmp_path)
    why = training(open_model(str(tmp_path)), AdapterRecipe(kind="full", targets="all")).why_not_packed(
        *packed_and_padded()
    )
    assert (why is not None) == (family == "mamba")


# ---- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_mlx_lm_converted_is_the_same_model(tmp_path: Path, family: str) -> None:
    from mlxsft.backends.mlx_models import mlx_lm

    sizes = {"tie_word_embeddings": True} if family == "gpt2" else {}
    source = save(tmp_path / "hf", family, {}, **sizes)
    if family == "gpt2":  # which mlx-lm wants as OpenAI published it
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps(config | {"n_ctx": 64}))
        tensors = load_file(source / "model.safetensors")
        tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    mlx_lm("utils")
    from mlx_lm.convert import convert

    convert(str(source), str(tmp_path / "mlx"), dtype="float32")
    plain, converted = (TorchBackend(open_model(str(folder))) for folder in (source, tmp_path / "mlx"))
    assert np.array_equal(plain.losses(make_batch()), converted.losses(make_batch()))


@pytest.mark.parametrize(("bits", "mode"), [(3, "affine"), (4, "affine"), (8, "affine"), (4, "mxfp4"), (4, "nvfp4")])
def test_quantized_checkpoints_are_those_of_mlx(tmp_path: Path, bits: int, mode: str) -> None:
    source = quantized_llama(tmp_path, bits, mode)
    ours, theirs = MlxBackend(source), TorchBackend(source)
    np.testing.assert_allclose(ours.losses(make_batch()), theirs.losses(make_batch()), rtol=1e-5, atol=1e-5)
    for adapter in (LORA, KINDS["pissa"]):
        go(training(source, adapter), range(1))
    with pytest.raises(UsageError, match=r"adapter\.kind: full, but the model is quantized: 14 modules"):
        training(source, KINDS["full"])


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    folder = write_llama(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(InputRefused, match=r"tensors are missing .* model\.layers\.2\.input_layernorm\.weight"):
        TorchBackend(open_model(str(folder)))


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    folder = write_llama(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "abacus"}))
    with pytest.raises(InputRefused, match="transformers cannot load this checkpoint"):
        TorchBackend(open_model(str(folder)))


def test_experts_are_no_targets(tmp_path: Path) -> None:
    source = open_model(str(save(tmp_path, "qwen3_moe", {}, num_experts=4, num_experts_per_tok=2, head_dim=8)))
    for adapter in (LORA, KINDS["full"]):
        with pytest.raises(UsageError, match="includes experts"):
            training(source, adapter)
    backend = training(source, AdapterRecipe(rank=4, targets=("q_proj", "v_proj")))
    go(backend, range(1))


def test_dora_of_an_embedding_is_refused(llama: ModelSource) -> None:
    with pytest.raises(UsageError, match=r"model\.embed_tokens takes no DoRA here"):
        training(llama, AdapterRecipe(kind="dora", rank=4, targets=("model.embed_tokens",)))


# ---- as people use it -----------------------------------------------------------------------------------------------


def test_a_run_begun_on_one_backend_goes_on_on_the_other(tmp_path: Path, tiny_llama: Path) -> None:
    recipe, runs = write_recipe(tmp_path, tiny_llama, adapter={"rank": 4, "alpha": 8}), {}
    for first, second in (("mlx", "torch"), ("torch", "mlx"), ("torch", "torch")):
        out = tmp_path / f"{first}-{second}"
        assert train(recipe, out, "train.steps=4", backend=first) == 0
        assert train(recipe, out, backend=second, resume=True, allow_changes=["steps"]) == 0
        runs[first, second] = out
        assert [e["backend"] for e in events(out, "start")] == [first, second]
    losses = {pair: [e["loss"] for e in events(out, "step")] for pair, out in runs.items()}
    assert [len(found) for found in losses.values()] == [6, 6, 6]
    for found in losses.values():
        np.testing.assert_allclose(found, losses["torch", "torch"], rtol=1e-4)
    states = [load_file(run / "adapters.safetensors") for run in runs.values()]
    for name, tensor in states[0].items():
        for other in states[1:]:
            np.testing.assert_allclose(tensor, other[name], atol=1e-3 * np.abs(tensor).max())


def test_a_resumed_run_ends_as_the_straight_one(tmp_path: Path, tiny_llama: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_llama)  # with dropout
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    assert train(recipe, straight, backend="torch") == 0
    shutil.copytree(straight, resumed)
    shutil.rmtree(resumed / "checkpoints" / "step-0000006")
    assert train(recipe, resumed, backend="torch", resume=True) == 0
    assert same_adapter(straight, resumed)


def test_a_run_with_its_trunk_kept_and_rows_packed_has_the_losses_of_one_without(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "model", layers=4)
    recipe, found = write_recipe(tmp_path, model, adapter={"rank": 4, "layers": 1}, data__valid=0.2), []
    for cache, batching in (("off", "buckets"), ("memory", "buckets"), ("disk", "packed")):
        out, settings = tmp_path / cache, [f"train.cache_trunk={cache}", f"train.batching={batching}"]
        assert train(recipe, out, *settings, backend="torch") == 0
        assert bool(events(out, "trunk")) == (cache != "off")
        assert not [e for e in events(out, "note") if "train." in e["message"]]
        found.append([e["loss"] for e in events(out, "step")])
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4)
    np.testing.assert_allclose(found[2], found[0], rtol=1e-4)


def test_both_backends_answer_with_the_adapter_of_either(
    tmp_path: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, tiny_llama, train={"steps": 40, "batch_size": 4, "learning_rate": 0.01})
    assert train(recipe, tmp_path / "run", backend="torch") == 0
    answers = set()
    for backend in ("mlx", "torch"):
        capsys.readouterr()
        arguments = ["--adapter", str(tmp_path / "run"), "--backend", backend, "--max-tokens", "20"]
        assert call(["generate", str(tiny_llama), "Who are you?", *arguments]) == 0
        answers.add(capsys.readouterr().out)
    assert len(answers) == 1
    assert answers != {"\n"}


def test_chat_goes_on_with_its_cache(tmp_path: Path, tiny_llama: Path) -> None:
    command = [sys.executable, "-m", "mlxsft", "chat", str(tiny_llama), "--backend", "torch", "--max-tokens", "5"]
    ran = subprocess.run(command, input="hello\n/tokens\nWho?\n", capture_output=True, text=True, check=True)
    assert len(ran.stdout.splitlines()) >= 2
    assert "Traceback" not in ran.stderr


def test_auto_takes_torch_where_mlx_has_no_fast_blas() -> None:
    code = "from mlxsft.backends import fastest; print(*fastest())"
    for setting, expected in (("off", "torch PyTorch computes, because for MLX MLXSFT_BLAS is off"), ("", "mlx None")):
        environment = {**os.environ, "MLXSFT_BLAS": setting}
        ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        if setting or not BLAS_HINT:
            assert ran.stdout.startswith(expected)


def test_without_torch_the_install_command_is_said(llama: ModelSource) -> None:
    hidden = "import sys; sys.modules['torch'] = None; import importlib.util as u; find = u.find_spec\n"
    code = hidden + (
        "u.find_spec = lambda name, *rest: None if name in ('torch', 'peft') else find(name, *rest)\n"
        "from mlxsft.cli import call; import sys; sys.exit(call(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "generate", str(llama.folder), "hi", "--max-tokens", "2", "--backend"]
    refused = subprocess.run([*command, "torch"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "torch and peft" in refused.stderr
    assert "pip install torch --index-url https://download.pytorch.org/whl/cpu" in refused.stderr
    assert subprocess.run([*command, "auto"], capture_output=True, check=False).returncode == 0

"""Packed rows on MLX: the losses, gradients and updates of the same rows padded; models that cannot are found out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    MambaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
)

from mlxsft.backends.mlx import BLAS_HINT, MlxBackend, mx
from mlxsft.backends.mlx_packing import Isolated
from mlxsft.data.batches import Batch, batches, epoch_order, pack, stack
from mlxsft.data.render import Example
from mlxsft.data.rows import Origin
from mlxsft.models.source import open_model
from mlxsft.recipe import AdapterRecipe, TrainRecipe
from mlxsft.training.events import from_json
from mlxsft.training.packing import packs
from mlxsft.training.report import event_line
from tests.backends.conftest import learned_adapter
from tests.tiny import write_llama, write_tokenizer
from tests.training.test_run import events, same_adapter, train, write_recipe

SHAPE = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
# Windows of 8 tokens, which the rows below are longer than.
CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "qwen2": lambda: Qwen2Config(**SHAPE),
    "mistral": lambda: MistralConfig(**SHAPE, head_dim=8, sliding_window=8),
    "gemma2": lambda: Gemma2Config(**SHAPE, head_dim=8, sliding_window=8, query_pre_attn_scalar=8),
    "gemma3": lambda: Gemma3TextConfig(
        **SHAPE,
        head_dim=8,
        sliding_window=8,
        query_pre_attn_scalar=8,
        sliding_window_pattern=2,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "gpt2": lambda: GPT2Config(vocab_size=320, n_embd=32, n_head=4, n_layer=2, n_positions=128),
    "mamba": lambda: MambaConfig(vocab_size=320, hidden_size=32, state_size=4, num_hidden_layers=2),
}
PACKABLE = ["llama", "qwen2", "mistral", "gemma2", "gemma3"]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A checkpoint of random weights, made once for each kind."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            if kind == "llama":
                write_llama(folder)
            else:
                torch.manual_seed(0)
                model = AutoModelForCausalLM.from_config(CONFIGS[kind]())
                for parameter in model.parameters():  # as transformers begins, every loss is about the same
                    parameter.data.add_(0.05 * torch.randn_like(parameter))
                model.save_pretrained(folder)
                write_tokenizer(folder)
            made[kind] = folder
        return made[kind]

    return make


def make_rows(count: int = 12, *, shortest: int = 4, longest: int = 40, seed: int = 0) -> list[Example]:
    """Rows of random tokens, about half of them trained."""
    rng = np.random.default_rng(seed)
    rows = []
    for number, length in enumerate(rng.integers(shortest, longest, count).tolist()):
        mask = rng.random(length) < 0.5
        mask[0], mask[-1] = False, True
        rows.append(Example(rng.integers(4, 256, length).astype(np.int32), mask, Origin("rows.jsonl", number + 1)))
    return rows


def row_losses(backend: MlxBackend, rows: list[Example], *, packed: bool) -> list[np.ndarray]:
    """The losses of the trained tokens of each row."""
    batch = pack([rows]) if packed else stack(rows)
    losses = backend.losses(batch)[batch.mask]
    return np.split(losses, np.cumsum([int(row.mask.sum()) for row in rows])[:-1])


def trainer(folder: Path, **train: object) -> MlxBackend:
    backend = MlxBackend(open_model(str(folder)))
    backend.attach(AdapterRecipe(rank=4, alpha=8.0), seed=0)
    backend.load_adapter_state(learned_adapter(backend))
    backend.optimize(TrainRecipe.model_validate({"steps": 1, **train}))
    return backend


def updates(backend: MlxBackend, rows: list[Example], steps: int, *, packed: bool) -> list[float]:
    """Updates of four rows each; their losses."""
    found = []
    order = [u for epoch in range(steps) for u in epoch_order([len(r.tokens) for r in rows], 4, seed=0, epoch=epoch)]
    for update in order[:steps]:
        sums = [backend.accumulate(b) for b in batches([rows[i] for i in update], 80, packed=packed)]
        found.append(sum(loss for loss, _ in sums) / sum(trained for _, trained in sums))
        backend.apply(1e-3, 1.0)
    return found


# ---- equal to padded ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PACKABLE)
def test_rows_have_the_losses_of_rows_of_their_own(kind: str, checkpoint: Callable[[str], Path]) -> None:
    backend, rows = trainer(checkpoint(kind)), make_rows()
    in_sequence, alone = (row_losses(backend, rows, packed=packed) for packed in (True, False))
    for one, other in zip(in_sequence, alone, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    batch = pack([rows])
    leaking = backend.losses(Batch(batch.tokens, batch.mask))[batch.mask]  # the test can tell
    assert np.abs(leaking - np.concatenate(alone)).max() > 0.01


@pytest.mark.parametrize("kind", PACKABLE)
def test_packed_is_padded_over_twenty_updates(kind: str, checkpoint: Callable[[str], Path]) -> None:
    packed, padded = trainer(checkpoint(kind)), trainer(checkpoint(kind))
    before = packed.adapter_state()
    rows = make_rows(16)
    one, other = updates(packed, rows, 20, packed=True), updates(padded, rows, 20, packed=False)
    assert one == pytest.approx(other, rel=1e-5)
    drift = np.concatenate([np.abs(a - padded.adapter_state()[n]).ravel() for n, a in packed.adapter_state().items()])
    moved = max(float(np.abs(a - before[n]).max()) for n, a in packed.adapter_state().items())
    assert drift.max() < 1e-3 * moved
    assert drift.mean() < 1e-5 * moved


def test_activations_computed_again_are_those_of_the_same_segments(checkpoint: Callable[[str], Path]) -> None:
    kept, again = trainer(checkpoint("llama")), trainer(checkpoint("llama"), checkpoint_activations=True)
    rows = make_rows(8)
    assert updates(kept, rows, 4, packed=True) == pytest.approx(updates(again, rows, 4, packed=True), rel=1e-6)
    again.close()


def test_padding_and_neighbours_change_no_bit_of_a_row(checkpoint: Callable[[str], Path]) -> None:
    backend, rows = trainer(checkpoint("llama")), make_rows(4)
    others = [rows[0], Example(rows[1].tokens[::-1].copy(), rows[1].mask, rows[1].origin), *rows[2:]]
    one, other = row_losses(backend, rows, packed=True), row_losses(backend, others, packed=True)
    assert [np.array_equal(a, b) for a, b in zip(one, other, strict=True)] == [True, False, True, True]


@pytest.mark.parametrize("name", ["stories260k-llama", "tinystories-656k-llama"])
def test_rows_packed_on_real_checkpoints(real: Path, name: str) -> None:
    backend = MlxBackend(open_model(str(real / "models" / name)))
    rows = make_rows(8, shortest=20, longest=100)
    in_sequence, alone = (row_losses(backend, rows, packed=packed) for packed in (True, False))
    np.testing.assert_allclose(np.concatenate(in_sequence), np.concatenate(alone), rtol=1e-5, atol=2e-5)


# ---- the mask -------------------------------------------------------------------------------------------------------


def test_the_mask_literally() -> None:
    cache = Isolated(mx.array([[1, 1, 1, 2, 2, 0]]))
    assert np.array(cache.make_mask(6)).astype(int).tolist() == [[[
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],  # padding attends to itself: a row of the mask without a token would be NaN
    ]]]  # fmt: skip
    windowed = np.array(cache.make_mask(6, window_size=2))[0, 0].astype(int)
    assert windowed[2].tolist() == [0, 1, 1, 0, 0, 0]
    assert windowed[3].tolist() == [0, 0, 0, 1, 0, 0]


# ---- who may pack ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PACKABLE)
def test_models_with_relative_positions_pack(kind: str, checkpoint: Callable[[str], Path]) -> None:
    train = TrainRecipe(batching="packed", batch_size=4)
    assert packs(trainer(checkpoint(kind)), train, make_rows(), 512) == (True, [])
    assert packs(trainer(checkpoint(kind)), TrainRecipe(), make_rows(), 512) == (False, [])


@pytest.mark.parametrize(
    ("kind", "why"), [("gpt2", "differs by"), ("mamba", "as a ArraysCache, which knows nothing of rows")]
)
def test_models_that_cannot_pack_are_padded_and_it_is_said(
    kind: str, why: str, checkpoint: Callable[[str], Path]
) -> None:
    backend = MlxBackend(open_model(str(checkpoint(kind))))
    packed, notes = packs(backend, TrainRecipe(batching="packed", batch_size=4), make_rows(), 128)
    assert not packed
    assert len(notes) == 1
    assert "padded in buckets, not packed" in notes[0]
    assert why in notes[0]


def test_half_precision_is_judged_by_what_leaking_would_do(checkpoint: Callable[[str], Path]) -> None:
    for kind, may in (("llama", True), ("gpt2", False)):
        backend = MlxBackend(open_model(str(checkpoint(kind))))
        backend.model.set_dtype(mx.bfloat16)
        rows = make_rows()
        why = backend.why_not_packed(pack([rows[:5]]), stack(rows[:5]))
        assert (why is None) == may, (kind, why)


def test_updates_of_one_row_have_nothing_to_pack(checkpoint: Callable[[str], Path]) -> None:
    packed, notes = packs(trainer(checkpoint("llama")), TrainRecipe(batching="packed", batch_size=1), make_rows(), None)
    assert not packed
    assert "no two rows" in notes[0]


# ---- whole runs -----------------------------------------------------------------------------------------------------


def run(recipe: Path, out: Path, batching: str, *, resume: bool = False) -> Path:
    assert train(recipe, out, f"train.batching={batching}", resume=resume) == 0
    return out


def test_a_packed_run_is_the_padded_run(tmp_path: Path, tiny_llama: Path) -> None:
    recipe = write_recipe(
        tmp_path, tiny_llama, adapter__dropout=0.0, data__valid=0.2, eval__every=2, train__micro_batch_tokens=400
    )
    padded, packed = run(recipe, tmp_path / "padded", "buckets"), run(recipe, tmp_path / "packed", "packed")
    for kind, field in (("step", "loss"), ("eval", "loss")):
        one, other = ([e[field] for e in events(folder, kind)] for folder in (padded, packed))
        assert one == pytest.approx(other, rel=1e-4)
    for field in ("tokens", "trained_tokens"):
        assert [e[field] for e in events(padded, "step")] == [e[field] for e in events(packed, "step")]
    steps = events(packed, "step")
    share = 1 - sum(s["tokens"] for s in steps) / sum(s["computed_tokens"] for s in steps)
    (end,) = events(packed, "end")
    assert end["padding_share"] == pytest.approx(share)
    assert share < events(padded, "end")[0]["padding_share"]
    assert [e for e in events(packed, "note") if e["message"] != BLAS_HINT] == []


def test_a_packed_run_repeats_and_resumes_bit_for_bit(tmp_path: Path, tiny_llama: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_llama)  # with dropout
    straight, again = run(recipe, tmp_path / "straight", "packed"), run(recipe, tmp_path / "again", "packed")
    assert same_adapter(straight, again)
    (again / "checkpoints" / "step-0000006" / "state.safetensors").write_bytes(b"")  # step 4 is the newest whole one
    run(recipe, again, "packed", resume=True)
    assert [e["step"] for e in events(again, "start")] == [0, 4]
    assert same_adapter(straight, again)
    ends = [events(folder, "end")[-1]["padding_share"] for folder in (straight, again)]
    assert ends[0] == ends[1]
    said = event_line(from_json(json.dumps(events(again, "end")[-1])))
    assert f"{ends[0]:.1%} of the computed tokens were padding" in said


def test_a_run_that_cannot_pack_says_so_and_is_the_padded_run(
    tmp_path: Path, checkpoint: Callable[[str], Path]
) -> None:
    recipe = write_recipe(tmp_path, checkpoint("gpt2"), train__micro_batch_tokens=400)
    padded, packed = run(recipe, tmp_path / "padded", "buckets"), run(recipe, tmp_path / "packed", "packed")
    assert same_adapter(padded, packed)
    assert any("not packed" in e["message"] for e in events(packed, "note"))

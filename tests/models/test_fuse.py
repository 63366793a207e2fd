"""What `fuse` writes: the model that base and adapter are together, on every backend, and how much of it is kept."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from mlxsft.backends.mlx import MlxBackend, mx
from mlxsft.backends.mlx_convert import tree_unflatten
from mlxsft.backends.mlx_models import mlx_lm
from mlxsft.backends.torch import TorchBackend
from mlxsft.data.render import load_renderer
from mlxsft.errors import InputRefused, UsageError
from mlxsft.models.adapter import load_adapter, save_adapter
from mlxsft.models.check import BUILT_IN, CheckSettings, read_rows
from mlxsft.models.convert import ConvertSettings, convert
from mlxsft.models.dequantize import dequantized_tensors
from mlxsft.models.fuse import Fused, FuseSettings, TuningLost, fuse
from mlxsft.models.gguf_adapter import Tuned
from mlxsft.models.lock import read_lock, verify
from mlxsft.models.quantize import QuantizeSettings
from mlxsft.models.source import open_model
from mlxsft.models.survival import NOISE, Survival, Survivors
from mlxsft.models.tensors import StoredTensors
from mlxsft.recipe_training import AdapterRecipe
from tests.backends.conftest import learned_adapter
from tests.backends.test_mlx_parity import save
from tests.backends.test_torch_parity import MODELS
from tests.models.test_convert import as_openai_published_it, in_shards, tensors
from tests.models.test_quality import log_probabilities
from tests.tiny import write_llama

FAMILIES = {name: MODELS[name] for name in ("llama-untied-grouped", "qwen2", "qwen3", "gemma3", "phi3", "gpt2")}
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {"mixtral": ("mixtral", {}), "qwen3_moe": ("qwen3_moe", {})}
UNMEASURED = FuseSettings(measured=False)
TOKENS = np.random.default_rng(0).integers(4, 256, (2, 24), dtype=np.int32)
EVERYTHING = ("all-linear", "model.embed_tokens")
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"targets": EVERYTHING},
    "rslora": {"rslora": True},
    "dora": {"kind": "dora"},
    "dora-embedding": {"kind": "dora", "targets": EVERYTHING},
    "pissa": {"init": "pissa", "targets": EVERYTHING},
    "one-layer": {"layers": 1},
    "full": {"kind": "full", "targets": ("all", "model.embed_tokens", "model.norm")},
}


def adapted(model: Path, folder: Path, size: float = 1.0, **fields: Any) -> Path:
    """An adapter as after some training, saved; LoRA's B is `size` times what `learned_adapter` makes of it."""
    low_rank = {} if fields.get("kind") == "full" else {"rank": 4, "alpha": 8.0}
    backend = MlxBackend(open_model(str(model)))
    backend.attach(AdapterRecipe.model_validate(low_rank | fields), seed=0)
    learned = learned_adapter(backend)
    scaled = {name: size * array if name.endswith(".lora_b") else array for name, array in learned.items()}
    save_adapter(folder, scaled, backend.adapter_config())
    return folder


def logits(folder: Path, adapter: Path | None = None) -> np.ndarray:
    """[B, T, V] of our MLX backend."""
    backend = MlxBackend(open_model(str(folder)))
    if adapter:
        saved = load_adapter(adapter)
        backend.attach_saved(saved.config, saved.tensors)
    return np.array(backend.model(mx.array(TOKENS)))


def torch_logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        found: np.ndarray = model(torch.from_numpy(TOKENS.astype(np.int64))).logits.numpy()
    return found


def mlx_lm_logits(folder: Path) -> np.ndarray:
    model, _ = mlx_lm("utils").load(str(folder))
    model.set_dtype(mx.float32)
    return np.array(model(mx.array(TOKENS)))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`checkpoint(family)`: a random one, as transformers saves it."""
    made: dict[str, Path] = {}

    def of(family: str) -> Path:
        if family not in made:
            kind, changes = (FAMILIES | MIXTURES)[family]
            made[family] = save(tmp_path_factory.mktemp(family), kind, {}, **changes)
        return made[family]

    return of


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untied Llama whose rows divide into groups of 32, its numbers large enough to tell tokens apart."""
    folder = write_llama(tmp_path_factory.mktemp("wide") / "model", width=64, tied=False)
    arrays = load_file(folder / "model.safetensors")
    arrays |= {name: 2 * array for name, array in arrays.items() if "norm" not in name}
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# ---- the same model -------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.rope_scaling. is deprecated:FutureWarning")  # of mlx-lm's loading
@pytest.mark.parametrize("family", [*FAMILIES, *MIXTURES])
def test_the_logits_are_those_of_base_and_adapter(
    checkpoint: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    """With experts too, which mlx-lm stacks; for mlx-lm and both backends."""
    model = checkpoint(family)
    adapter = adapted(model, tmp_path / "adapter")
    fuse(str(model), adapter, tmp_path / "out", UNMEASURED)
    expected = logits(model, adapter)
    assert np.abs(expected - logits(model)).max() > 0.1
    on_torch = TorchBackend(open_model(str(tmp_path / "out"))).model
    for found in (logits(tmp_path / "out"), mlx_lm_logits(tmp_path / "out"), torch_logits(on_torch)):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", [*KINDS, "mixtral", "gpt2"])
def test_what_goes_into_a_gguf_file_is_what_is_fused(
    checkpoint: Callable[[str], Path], tiny_llama: Path, tmp_path: Path, case: str
) -> None:
    """Numbers fused in NumPy as they pass, beside those that MLX fuses: every tensor, experts and Conv1D too."""
    model = tiny_llama if case in KINDS else checkpoint(case)
    adapter = adapted(model, tmp_path / "adapter", **KINDS.get(case, {}))
    fuse(str(model), adapter, tmp_path / "out", UNMEASURED)
    source = open_model(str(model))
    tune = Tuned(load_adapter(adapter), str(source.config["model_type"]))
    passing = dict(tune(dequantized_tensors(StoredTensors(source), source.config)))
    expected = MlxBackend(open_model(str(tmp_path / "out")))
    changed = tmp_path / "changed"
    shutil.copytree(model, changed)
    for file in changed.glob("model*"):
        file.unlink()
    save_file({name: np.ascontiguousarray(array) for name, array in passing.items()}, changed / "model.safetensors")
    np.testing.assert_allclose(logits(changed), np.array(expected.model(mx.array(TOKENS))), rtol=0, atol=1e-4)
    assert np.abs(logits(changed) - logits(model)).max() > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter(tiny_llama: Path, tmp_path: Path, kind: str) -> None:
    """A tied head changes with its embedding."""
    adapter = adapted(tiny_llama, tmp_path / "adapter", **KINDS[kind])
    fuse(str(tiny_llama), adapter, tmp_path / "out", UNMEASURED)
    expected = logits(tiny_llama, adapter)
    assert np.abs(expected - logits(tiny_llama)).max() > 0.01
    np.testing.assert_allclose(logits(tmp_path / "out"), expected, rtol=0, atol=1e-4)
    assert tensors(tmp_path / "out").keys() == tensors(tiny_llama).keys()


def test_a_head_of_its_own_and_one_that_is_the_embedding(wide: Path, tiny_llama: Path, tmp_path: Path) -> None:
    adapter = adapted(wide, tmp_path / "adapter", targets=("lm_head", "model.embed_tokens"))
    for backend in ("mlx", "torch"):
        out = tmp_path / backend
        fuse(str(wide), adapter, out, UNMEASURED, backend_name=backend)
        np.testing.assert_allclose(logits(out), logits(wide, adapter), rtol=0, atol=1e-4)
    for backend in ("mlx", "torch"):
        with pytest.raises(InputRefused, match=r"lm_head"):
            fuse(str(tiny_llama), adapter, tmp_path / "tied", UNMEASURED, backend_name=backend)
    assert not (tmp_path / "tied").exists()


@pytest.mark.parametrize("kind", ["lora", "dora", "pissa"])
def test_the_weights_are_those_of_mlx_lm(wide: Path, tmp_path: Path, kind: str) -> None:
    adapter = adapted(wide, tmp_path / "adapter", **KINDS[kind])
    fuse(str(wide), adapter, tmp_path / "out", UNMEASURED)
    theirs = fused_by_mlx_lm(wide, adapter, tmp_path / "theirs")
    found, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", theirs))
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-4, atol=1e-6, err_msg=name)


def fused_by_mlx_lm(model: Path, adapter: Path, out: Path) -> Path:
    """What `mlx_lm.fuse` does."""
    utils = mlx_lm("utils")
    loaded, tokenizer, config = utils.load(str(model), adapter_path=str(adapter), return_config=True)
    loaded.update_modules(tree_unflatten([(n, m.fuse()) for n, m in loaded.named_modules() if hasattr(m, "fuse")]))
    utils.save(out, str(model), loaded, tokenizer, config, donate_model=False)
    return out


@pytest.mark.parametrize(("bits", "mode"), [(3, "affine"), (4, "affine"), (8, "affine"), (4, "mxfp4"), (4, "nvfp4")])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_quantized_base_becomes_plain_numbers(wide: Path, tmp_path: Path, bits: int, mode: str, kind: str) -> None:
    """Rounded once, from float32, whatever the type of its scales is."""
    packed = QuantizeSettings(bits=bits, mode=mode)
    convert(str(wide), tmp_path / "packed", ConvertSettings(dtype="bfloat16", quantize=packed))
    adapter = adapted(tmp_path / "packed", tmp_path / "adapter", kind=kind)
    expected = logits(tmp_path / "packed", adapter)
    for backend in ("mlx", "torch"):
        exact, usual = tmp_path / f"exact-{backend}", tmp_path / f"usual-{backend}"
        settings = FuseSettings(dtype="float32", measured=False)
        fuse(str(tmp_path / "packed"), adapter, exact, settings, backend_name=backend)
        np.testing.assert_allclose(logits(exact), expected, rtol=0, atol=1e-4)
        done = fuse(str(tmp_path / "packed"), adapter, usual, UNMEASURED, backend_name=backend)
        assert (done.quantization, done.bits_per_weight) == (None, 16)
        one, other = tensors(exact), tensors(usual)
        for name, (dtype, _, stored) in other.items():
            assert "bfloat16" in dtype
            precise = mx.array(np.frombuffer(one[name][2], np.float32)).astype(mx.bfloat16)
            assert bytes(memoryview(precise.view(mx.uint8))) == stored, name
        assert not {"quantization", "quantization_config"} & json.loads((usual / "config.json").read_text()).keys()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_type_of_its_own(tiny_llama: Path, tmp_path: Path, dtype: str) -> None:
    adapter = adapted(tiny_llama, tmp_path / "adapter")
    for backend in ("mlx", "torch"):
        settings = FuseSettings(dtype=dtype, measured=False)
        fuse(str(tiny_llama), adapter, tmp_path / backend, settings, backend_name=backend)
    one, other = tensors(tmp_path / "mlx"), tensors(tmp_path / "torch")
    assert {entry[0] for entry in one.values()} == {f"mlx.core.{dtype}"}
    assert one.keys() == other.keys()
    for name, (_, _, stored) in one.items():  # sums of products, which two libraries may add up in another order
        ours, theirs = (np.frombuffer(x, np.uint16).astype(np.int32) for x in (stored, other[name][2]))
        assert np.abs(ours - theirs).max() <= 1, name
        assert (ours != theirs).mean() < 0.01, name


# ---- transformers' layout -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "kind"), [*((f, "lora") for f in FAMILIES), *(("gpt2", k) for k in ("dora", "full")), ("qwen3", "full")]
)
def test_transformers_loads_what_torch_writes(
    checkpoint: Callable[[str], Path], tmp_path: Path, family: str, kind: str
) -> None:
    """GPT-2's Conv1D keeps its matrices the other way round."""
    model = checkpoint(family)
    adapter, out = adapted(model, tmp_path / "adapter", kind=kind), tmp_path / "out"
    fuse(str(model), adapter, out, FuseSettings(shard_bytes=20_000, measured=False), backend_name="torch")
    source = open_model(str(out))
    assert len(source.files) > 1
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, attn_implementation="eager").eval()
    backend, saved = TorchBackend(open_model(str(model))), load_adapter(adapter)
    before = torch_logits(backend.model)
    backend.attach_saved(saved.config, saved.tensors)
    expected = torch_logits(backend.model)
    assert np.abs(expected - before).max() > 0.01
    np.testing.assert_allclose(torch_logits(loaded), expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(logits(out), logits(model, adapter), rtol=0, atol=1e-4)


def test_names_of_other_layouts(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """GPT-2 as OpenAI published it and as mlx-lm saves it; a tied matrix that is stored as the head alone."""
    published = shutil.copytree(checkpoint("gpt2"), tmp_path / "published")
    as_openai_published_it(published)
    convert(str(published), tmp_path / "mlx", ConvertSettings())
    adapter = adapted(published, tmp_path / "adapter")
    head_alone = write_llama(tmp_path / "head-alone")
    arrays = load_file(head_alone / "model.safetensors")
    arrays["lm_head.weight"] = arrays.pop("model.embed_tokens.weight")
    save_file(arrays, head_alone / "model.safetensors", metadata={"format": "pt"})
    on_embedding = adapted(head_alone, tmp_path / "on-embedding", targets=("model.embed_tokens",))
    for model, tuned in ((published, adapter), (tmp_path / "mlx", adapter), (head_alone, on_embedding)):
        out = tmp_path / f"{model.name}-out"
        fuse(str(model), tuned, out, UNMEASURED, backend_name="torch")
        loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
        np.testing.assert_allclose(torch_logits(loaded), logits(model, tuned), rtol=0, atol=1e-4)


def test_torch_fuses_no_experts_and_packs_nothing(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    model = checkpoint("mixtral")
    adapter = adapted(model, tmp_path / "adapter")
    with pytest.raises(InputRefused, match=r"switch_mlp\.\w+: is no matrix of this model"):
        fuse(str(model), adapter, tmp_path / "out", UNMEASURED, backend_name="torch")
    with pytest.raises(UsageError, match="MLX alone packs numbers"):
        fuse(str(model), adapter, tmp_path / "out", FuseSettings(bits=4), backend_name="torch")
    assert not (tmp_path / "out").exists()


# ---- memory ---------------------------------------------------------------------------------------------------------


SHARD = 12 << 20  # bytes


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """67 MB of float32 in 4 files, 20 MB of it one matrix; an adapter on that and on some of the others."""
    folder = tmp_path_factory.mktemp("large")
    one = write_llama(folder / "one", layers=5, embeddings=10_000, width=512)
    rng, targets = np.random.default_rng(0), {"self_attn.q_proj": (512, 512), "mlp.down_proj": (1024, 512)}
    shapes = {f"model.layers.{i}.{path}": shape for i in range(5) for path, shape in targets.items()}
    shapes["model.embed_tokens"] = (10_000, 512)
    low_rank = {f"{path}.lora_a": rng.normal(size=(shape[0], 8)) for path, shape in shapes.items()}
    low_rank |= {f"{path}.lora_b": rng.normal(size=(8, shape[1])) for path, shape in shapes.items()}
    parameters = {"rank": 8, "scale": 0.01, "dropout": 0.0, "keys": [*targets, "model.embed_tokens"]}
    save_adapter(folder / "adapter", low_rank, {"num_layers": 5, "lora_parameters": parameters})
    return in_shards(one, folder / "four", 4), folder / "adapter"


@pytest.mark.parametrize(
    ("stored", "bits"), [("float32", None), ("float32", 4), ("bfloat16", None), ("bfloat16", 4), ("4bit", None)]
)
def test_never_more_than_a_few_tensors_are_in_memory(
    large: tuple[Path, Path], tmp_path: Path, stored: str, bits: int | None
) -> None:
    """At most 1.3 times the largest file, or 3 times the largest tensor, of what is read or written."""
    gc.collect()  # arrays of other tests are no part of it
    model, adapter = large
    if stored != "float32":
        how = ConvertSettings("bfloat16", QuantizeSettings() if stored == "4bit" else None, shard_bytes=SHARD)
        convert(str(model), tmp_path / stored, how)
        model = tmp_path / stored
    done = fuse(str(model), adapter, tmp_path / "out", FuseSettings(bits=bits, measured=False, shard_bytes=SHARD))
    width = 4 if stored == "float32" else 2
    files = [*model.glob("*.safetensors"), *(tmp_path / "out").glob("*.safetensors")]
    limit = max(1.3 * max(file.stat().st_size for file in files), 3 * width * 10_000 * 512)
    assert done.peak_bytes <= limit
    assert done.peak_bytes < 0.75 * width * done.parameters


# ---- what survived --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    file.write_text("".join(BUILT_IN.read_text(encoding="utf-8").splitlines(keepends=True)[:3]), encoding="utf-8")
    return file


def survivors(model: Path, adapter: Path, rows: Path, backend: str = "mlx") -> Survivors:
    source = open_model(str(model))
    renderer = load_renderer(source)
    examples, _, _ = read_rows(CheckSettings(rows), renderer)
    return Survivors(source, load_adapter(adapter), backend, examples, "text", renderer)


def share(survival: Survival) -> float:
    assert survival.share is not None
    return survival.share


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_the_figures_are_those_of_whole_logits(wide: Path, rows: Path, tmp_path: Path, backend: str) -> None:
    adapter = adapted(wide, tmp_path / "adapter")
    fuse(str(wide), adapter, tmp_path / "exact", UNMEASURED)
    fuse(str(wide), adapter, tmp_path / "out", FuseSettings(bits=5, group_size=32, measured=False))
    judge = survivors(wide, adapter, rows, backend)
    found = judge.stored(open_model(str(tmp_path / "out")))
    p, q, base = (
        np.concatenate([log_probabilities(folder, batch) for batch in judge.batches])
        for folder in (tmp_path / "exact", tmp_path / "out", wide)
    )
    kl, effect = ((np.exp(p) * (p - x)).sum(axis=-1).mean() for x in (q, base))
    assert found.tokens == len(p)
    assert found.kl == pytest.approx(kl, rel=1e-3)
    assert found.effect_kl == pytest.approx(effect, rel=1e-3)
    assert found.share == pytest.approx(1 - kl / effect, abs=1e-3)
    same, base_same = ((p.argmax(axis=-1) == x.argmax(axis=-1)).mean() for x in (q, base))
    assert found.agreement == pytest.approx(same, abs=1e-9)
    assert found.base_agreement == pytest.approx(base_same, abs=1e-9)
    assert 0 < share(found) < 1


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_the_adapter_is_one_the_base_is_zero_and_no_effect_is_none(
    wide: Path, rows: Path, tmp_path: Path, backend: str
) -> None:
    adapter = adapted(wide, tmp_path / "adapter", 0.3)
    fuse(str(wide), adapter, tmp_path / "out", UNMEASURED)
    judge = survivors(wide, adapter, rows, backend)
    assert share(judge.stored(open_model(str(wide)))) == 0
    exact = judge.stored(open_model(str(tmp_path / "out")))
    assert share(exact) == pytest.approx(1, abs=1e-3)
    assert exact.kl < 0.1 * NOISE
    idle = survivors(wide, adapted(wide, tmp_path / "idle", 0.0), rows, backend)
    assert idle.stored(open_model(str(wide))).share is None


def test_the_trial_is_what_is_written(wide: Path, rows: Path, tmp_path: Path) -> None:
    adapter = adapted(wide, tmp_path / "adapter")
    done = fuse(str(wide), adapter, tmp_path / "out", FuseSettings(check=rows, bits=4, group_size=32, min_survival=0))
    judge = survivors(wide, adapter, rows)
    source = open_model(str(tmp_path / "out"))
    from mlxsft.models.quantize import Scheme

    paths = [name.removesuffix(".scales") for name in source.tensors if name.endswith(".scales")]
    assert done.quantization == {"bits": 4, "group_size": 32, "mode": "affine"}
    trial = judge.planned(dict.fromkeys(paths, Scheme(4, 32)), dict.fromkeys(paths, "F32"))
    assert trial.kl == pytest.approx(judge.stored(source).kl, rel=1e-3)
    layers = judge.lost(dict.fromkeys(paths, Scheme(4, 32)), dict.fromkeys(paths, "F32"))
    assert [lost.kl for lost in layers] == sorted((lost.kl for lost in layers), reverse=True)
    assert {lost.layer for lost in layers} == {"model.embed_tokens", "lm_head", "model.layers.0", "model.layers.1"}
    assert all(lost.kl > 0 for lost in layers)


# ---- the neighbour's trap -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model in 4 bits, as people tune it."""
    out = tmp_path_factory.mktemp("packed") / "model"
    convert(str(wide), out, ConvertSettings(quantize=QuantizeSettings(bits=4, group_size=32)))
    return out


def test_a_small_tuning_of_a_4_bit_base_is_rounded_away_by_mlx_lm_and_not_by_us(
    packed: Path, rows: Path, tmp_path: Path
) -> None:
    adapter = adapted(packed, tmp_path / "adapter", 0.25)
    theirs = fused_by_mlx_lm(packed, adapter, tmp_path / "theirs")
    judge = survivors(packed, adapter, rows)
    assert share(judge.stored(open_model(str(theirs)))) < 0.5
    with pytest.raises(TuningLost, match="less than 90% of the tuning would survive") as caught:
        fuse(str(packed), adapter, tmp_path / "out", FuseSettings(check=rows, bits=4, group_size=32))
    lost = caught.value.fused
    assert lost.survival is not None
    assert share(lost.survival) < 0.9
    assert caught.value.exit_code == 6
    assert not (tmp_path / "out").exists()
    assert lost.lost[0].layer in str(caught.value.hint)
    held = held_share(
        fuse(str(packed), adapter, tmp_path / "out", FuseSettings(check=rows, bits="auto", group_size=32))
    )
    assert held >= 0.9
    plain = held_share(fuse(str(packed), adapter, tmp_path / "plain", FuseSettings(check=rows)))
    assert plain == pytest.approx(1, abs=1e-3)


def held_share(done: Fused) -> float:
    assert done.survival is not None
    return share(done.survival)


@pytest.mark.parametrize(("size", "bits"), [(0.1, None), (0.8, 8), (2.0, 6)])
def test_auto_takes_the_fewest_bits_that_hold(
    wide: Path, rows: Path, tmp_path: Path, size: float, bits: int | None
) -> None:
    """And what is said to hold, where bits do not, does hold."""
    adapter = adapted(wide, tmp_path / "adapter", size)
    auto = fuse(str(wide), adapter, tmp_path / "auto", FuseSettings(check=rows, bits="auto", group_size=32))
    assert (auto.quantization["bits"] if auto.quantization else None) == bits
    assert held_share(auto) >= 0.9
    with pytest.raises(TuningLost) as caught:
        fuse(str(wide), adapter, tmp_path / "fewer", FuseSettings(check=rows, bits=4, group_size=32))
    assert caught.value.fused.held_by == (f"--bits {bits}" if bits else "no --bits")
    assert f"It would survive with {caught.value.fused.held_by}." in str(caught.value.hint)


def test_a_tuning_below_the_type_of_the_result_is_held_by_float32(wide: Path, rows: Path, tmp_path: Path) -> None:
    adapter = adapted(wide, tmp_path / "adapter", 0.1)
    with pytest.raises(TuningLost) as caught:
        fuse(str(wide), adapter, tmp_path / "out", FuseSettings(check=rows, dtype="bfloat16", min_survival=0.9999))
    assert caught.value.fused.held_by == "--dtype float32"
    assert caught.value.fused.lost
    assert held_share(fuse(str(wide), adapter, tmp_path / "out", FuseSettings(check=rows, min_survival=0.999))) > 0.999


def test_what_was_there_stays_where_too_little_survives(packed: Path, rows: Path, tmp_path: Path) -> None:
    adapter, out = adapted(packed, tmp_path / "adapter", 0.25), tmp_path / "out"
    fuse(str(packed), adapter, out, UNMEASURED)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(UsageError, match="is there already"):
        fuse(str(packed), adapter, out, FuseSettings())
    with pytest.raises(TuningLost):
        fuse(str(packed), adapter, out, FuseSettings(check=rows, bits=4, group_size=32), force=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "out"]
    fuse(str(packed), adapter, out, FuseSettings(check=rows, bits=4, group_size=32, min_survival=0), force=True)
    assert json.loads((out / "config.json").read_text())["quantization"]["bits"] == 4
    lock = read_lock(out)
    assert lock is not None
    assert verify(out, lock).same
    with pytest.raises(UsageError, match="where the source is"):
        fuse(str(out), adapter, out, UNMEASURED, force=True)


# ---- refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"bits": 7}, "--bits 7: affine has"),
        ({"bits": "auto", "mode": "mxfp4"}, "--bits auto with --mode mxfp4"),
        ({"bits": "auto", "measured": False}, "--bits auto needs to measure"),
        ({"min_survival": 1.5}, r"--min-survival 1\.5: expected a share"),
        ({"group_size": 48}, "--group-size 48: affine has"),
    ],
)
def test_settings_at_odds(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        FuseSettings(**settings)


def test_an_adapter_of_another_base_is_refused(wide: Path, tiny_llama: Path, tmp_path: Path) -> None:
    adapter = adapted(wide, tmp_path / "adapter")
    for backend in ("mlx", "torch"):
        with pytest.raises(InputRefused):
            fuse(str(tiny_llama), adapter, tmp_path / "out", FuseSettings(), backend_name=backend)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["mlxsft"] = {"base": {"name": "other", "sha256": {"model.safetensors": "0" * 64}}}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputRefused, match=r"was trained on other weights \(other\)"):
        fuse(str(wide), adapter, tmp_path / "out", UNMEASURED)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]

"""GGUF files in llama.cpp itself: its greedy answers, tokens and prompts are ours, for every family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM

from mlxsft.backends import Sampling, load_backend
from mlxsft.cli import call
from mlxsft.data.formats import Turn
from mlxsft.data.render import load_renderer
from mlxsft.data.tokenizer import Tokenizer as OurTokenizer
from mlxsft.errors import InputRefused, UsageError
from mlxsft.models.adapter import load_adapter, save_adapter
from mlxsft.models.gguf import export_gguf
from mlxsft.models.gguf_export import to_gguf
from mlxsft.models.gguf_tokenizer import tokenizer_facts
from mlxsft.models.source import ModelSource, open_model
from tests.llama_cpp import loaded
from tests.tiny import TEXT, write_llama, write_tokenizer

SIZES = {
    **{"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 3, "eos_token_id": 2},
    "pad_token_id": None,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
GEMMA = {"head_dim": 32, "sliding_window": 8, "query_pre_attn_scalar": 24}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {
        **{"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 32}, "rope_theta": 1000.0},
        **{"attention_bias": True, "mlp_bias": True},
    },
    "mistral": {"sliding_window": None, "head_dim": 32},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 32},
    "gemma2": {**GEMMA, "attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0},
    "gemma3_text": {**GEMMA, "num_hidden_layers": 7},
    "phi3": {"partial_rotary_factor": 0.5, "sliding_window": None},
    "gpt2": {},
    "smollm3": {"num_hidden_layers": 5},
    "olmo2": {"tie_word_embeddings": True},
}
SEEDS = {"gemma3_text": 1}  # llama.cpp has GELU from a table of float16: 5e-4 nats, enough for the closest of choices
ENDS = {0, 2}  # <|endoftext|> and <|im_end|>, at which llama.cpp stops by their names


def write_family(folder: Path, kind: str) -> ModelSource:
    """A model of a family with random numbers, none of them what a new model would have, as transformers saves it."""
    rows = write_tokenizer(folder)
    sizes = (
        SIZES if kind != "gpt2" else {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "eos_token_id": 2}
    )
    config = AutoConfig.for_model(kind, **{**sizes, "vocab_size": rows + 5, **FAMILIES[kind]})
    model = AutoModelForCausalLM.from_config(config)
    random = torch.Generator().manual_seed(SEEDS.get(kind, 0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = 0.1 * torch.randn(parameter.shape, generator=random)
            parameter.copy_(noise + ("norm" in name or ".ln_" in name) * parameter)
    model.save_pretrained(folder)
    return open_model(str(folder))


def cut(tokens: list[int]) -> list[int]:
    """What comes before the first end token."""
    return tokens[: next((i for i, token in enumerate(tokens) if token in ENDS), len(tokens))]


def ours(source: ModelSource, prompts: list[list[int]], count: int, backend: str = "torch") -> list[list[int]]:
    """Greedy answers before the first end token."""
    computing, answers = load_backend(backend, source), []
    for prompt in prompts:
        stream = computing.stream(prompt, Sampling(), computing.new_cache())
        tokens = [next(stream) for _ in range(count)]
        stream.close()
        answers.append(cut(tokens))
    computing.close()
    return answers


def random_prompts(source: ModelSource, count: int = 20, length: int = 12) -> list[list[int]]:
    random = np.random.default_rng(0)
    return [random.integers(4, (source.embedding_rows or 0) - 5, length).tolist() for _ in range(count)]


# ---- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FAMILIES)
def test_llama_cpp_answers_as_we_do(tmp_path: Path, kind: str) -> None:
    source = write_family(tmp_path / kind, kind)
    done = export_gguf(source, tmp_path / "model.gguf", dtype="f32")
    prompts = random_prompts(source)
    with loaded(done.out) as llama:
        assert [cut(llama.greedy(prompt, 20)) for prompt in prompts] == ours(source, prompts, 20)


@pytest.mark.parametrize(("dtype", "agreeing"), [("f16", 0.99), ("bf16", 0.97), ("q8_0", 0.95)])
def test_fewer_bits_choose_as_the_model_does(tmp_path: Path, real: Path, dtype: str, agreeing: float) -> None:
    """At each of 500 positions of texts that it writes itself, for a trained model."""
    source = open_model(str(real / "models" / "stories260k-llama"))
    done = export_gguf(source, tmp_path / "model.gguf", dtype=dtype)
    tokenizer = OurTokenizer.load(source)
    prompts = [tokenizer.encode(text) for text in STORIES]
    model = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32)
    same = count = 0
    with loaded(done.out) as llama, torch.no_grad():
        for prompt in prompts:
            found = llama.greedy(prompt, 25)
            choices = model(torch.tensor([prompt + found])).logits[0].argmax(-1)[len(prompt) - 1 : -1]
            same, count = same + int((choices == torch.tensor(found)).sum()), count + len(found)
    assert count >= 480
    assert same / count >= agreeing


STORIES = [
    f"{begin} {who}"
    for begin in ("Once upon a time there was", "One day", "In a small house lived", "Tom and Lily saw")
    for who in ("a little dog", "a big bird", "a red ball", "a sad girl", "the sun")
]


@pytest.mark.parametrize("name", ["stories260k-llama", "tinystories-656k-llama", "tinystories-656k-llama-original"])
def test_a_trained_model_writes_the_same_stories(tmp_path: Path, real: Path, name: str) -> None:
    source = open_model(str(real / "models" / name))
    done = export_gguf(source, tmp_path / "model.gguf", dtype="f32")
    tokenizer = OurTokenizer.load(source)
    prompts = [[1, *tokenizer.encode(text)] for text in STORIES]
    with loaded(done.out) as llama:
        theirs = [tokenizer.decode(llama.greedy(prompt, 20)) for prompt in prompts]
        assert [llama.tokenize(text) for text in STORIES] == prompts
    backend = "torch" if "original" in name else "auto"
    assert theirs == [tokenizer.decode(answer) for answer in ours(source, prompts, 20, backend)]
    assert len(set(theirs)) > 10


@pytest.mark.parametrize(("bits", "kind"), [(4, "llama"), (8, "gpt2"), (4, "mixtral")])
def test_a_quantized_base_answers_the_same(tmp_path: Path, kind: str, bits: int) -> None:
    """What MLX computes with packed weights, from a folder in MLX's layout."""
    write_family(tmp_path / "base", kind)
    converted = ["convert", str(tmp_path / "base"), str(tmp_path / "mlx"), "--bits", str(bits), "--group-size", "32"]
    assert call(converted) == 0
    source = open_model(str(tmp_path / "mlx"))
    done = export_gguf(source, tmp_path / "model.gguf", dtype="f32")
    prompts = random_prompts(source, 8)
    with loaded(done.out) as llama:
        assert [cut(llama.greedy(prompt, 12)) for prompt in prompts] == ours(source, prompts, 12, "mlx")


def test_wide_numbers_are_refused_where_f16_cannot_hold_them(tmp_path: Path) -> None:
    source = write_llama(tmp_path / "model")
    from safetensors.numpy import load_file, save_file

    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e5
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(InputRefused, match=r"ffn_up\.weight: holds numbers that f16 cannot hold"):
        export_gguf(open_model(str(source)), tmp_path / "model.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_an_incomplete_checkpoint_is_named(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    source = write_llama(tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(InputRefused, match=r"lacks blk\.1\.ffn_up\.weight"):
        export_gguf(open_model(str(source)), tmp_path / "model.gguf")


def test_memory_is_that_of_one_tensor(tmp_path: Path) -> None:
    """Peak of what Python allocates, NumPy's arrays among it, for a model of forty layers."""
    import tracemalloc

    source = open_model(str(write_llama(tmp_path / "model", layers=40, width=128)))
    export_gguf(source, tmp_path / "warm.gguf")
    tracemalloc.start()
    export_gguf(source, tmp_path / "model.gguf")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert source.weight_bytes > 14e6
    assert peak < 4e6


# ---- tokens ---------------------------------------------------------------------------------------------------------

TEXTS = [
    "Hello, I'm Pip!  Who are you?\n\n\tI've 12345 apples, 3.14 and x = y**2; don't you'll WE'RE",
    "naïve café — 漢字かな交じり 🙂👍🏽 Привет, мир! مرحبا",
    "   leading, trailing   \n",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
]


@pytest.mark.parametrize("name", ["smollm", "qwen2.5", pytest.param("qwen3", marks=pytest.mark.long)])
def test_real_tokenizers_cut_the_same(tmp_path: Path, real: Path, name: str) -> None:
    source = open_model(str(write_llama(tmp_path / "model", tokenizer_from=real / "tokenizers" / name, layers=1)))
    done = export_gguf(source, tmp_path / "model.gguf", dtype="f16")
    tokenizer = OurTokenizer.load(source)
    with loaded(done.out) as llama:
        assert [llama.tokenize(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
        template = json.loads((source.folder / "tokenizer_config.json").read_text())["chat_template"]
        said = [{"role": "user", "content": "Who are you?"}]
        expected = tokenizer.apply_template(template, said, add_generation_prompt=True)
        assert llama.chat_prompt(said) == expected


def write_sentencepiece(folder: Path, *, prefix: bool) -> None:
    """A BPE over characters with bytes to fall back on, and a merge for every pair, as of SentencePiece's files."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    replace = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefix else replace
    special = ["<unk>", "<s>", "<|im_start|>", "<|im_end|>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # words alone are learned
    tokenizer.train_from_iterator([TEXT] * 8, trainer)
    said = json.loads(tokenizer.to_str())
    said["added_tokens"] = said["added_tokens"][:4]
    vocabulary, made = said["model"]["vocab"], dict.fromkeys("".join(pair) for pair in said["model"]["merges"])
    said["model"]["merges"] = [
        [piece[:i], piece[i:]]
        for piece in made
        for i in range(1, len(piece))
        if piece[:i] in vocabulary and piece[i:] in vocabulary
    ]
    said["pre_tokenizer"] = None
    said["decoder"] = json.loads(
        decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]).__getstate__()
    )
    (folder / "tokenizer.json").write_text(json.dumps(said))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_cuts_the_same(tmp_path: Path, prefix: bool) -> None:
    folder = write_llama(tmp_path / "model", embeddings=430)
    write_sentencepiece(folder, prefix=prefix)
    source = open_model(str(folder))
    facts, notes = tokenizer_facts(source)
    assert (facts["tokenizer.ggml.model"], facts["tokenizer.ggml.add_space_prefix"], notes) == ("llama", prefix, [])
    done = export_gguf(source, tmp_path / "model.gguf")
    tokenizer = OurTokenizer.load(source)
    with loaded(done.out) as llama:
        for text in [*TEXTS[:3], TEXT]:
            assert llama.tokenize(text) == tokenizer.encode(text)


def test_a_tokenizer_that_llama_cpp_has_not_is_refused(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "model")
    said = json.loads((folder / "tokenizer.json").read_text())
    said["pre_tokenizer"] = {"type": "Whitespace"}
    (folder / "tokenizer.json").write_text(json.dumps(said))
    with pytest.raises(InputRefused, match="no name for how its tokenizer finds words: Whitespace"):
        export_gguf(open_model(str(folder)), tmp_path / "model.gguf")


# ---- adapters -------------------------------------------------------------------------------------------------------


def write_adapter(folder: Path, source: ModelSource, keys: list[str], rank: int = 4) -> Path:
    """A LoRA of some strength on the modules of these names in all layers."""
    from mlxsft.models.base_modules import base_matrices

    random, tensors = np.random.default_rng(1), {}
    for path, matrix in base_matrices(source).items():
        if path.endswith(tuple(keys)):
            tensors[f"{path}.lora_a"] = random.normal(0, 0.2, (matrix.columns, rank))
            tensors[f"{path}.lora_b"] = random.normal(0, 0.2, (rank, matrix.rows))
    parameters = {"rank": rank, "scale": 2.5, "dropout": 0.0, "keys": sorted(keys)}
    save_adapter(folder, tensors, {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters})
    return folder


@pytest.mark.parametrize(
    ("kind", "keys"),
    [("llama", ["self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"]), ("gpt2", ["attn.c_attn", "mlp.c_fc"])],
)
@pytest.mark.parametrize("alone", [False, True])
def test_a_tuned_model_answers_as_base_and_adapter(tmp_path: Path, kind: str, keys: list[str], alone: bool) -> None:
    source = write_family(tmp_path / kind, kind)
    run = write_adapter(tmp_path / "run", source, keys)
    written = to_gguf(run, tmp_path / "run.gguf", model=str(source.folder), dtype="f32", lora_only=alone)
    prompts, adapter = random_prompts(source, 8), load_adapter(run)
    backend = load_backend("torch", source)
    backend.attach_saved(adapter.config, adapter.tensors)
    expected = []
    for prompt in prompts:
        stream = backend.stream(prompt, Sampling(), backend.new_cache())
        tokens = [next(stream) for _ in range(12)]
        expected.append(cut(tokens))
    base = export_gguf(source, tmp_path / "base.gguf", dtype="f32").out
    with loaded(base if alone else written.out, lora=written.out if alone else None) as llama:
        assert [cut(llama.greedy(prompt, 12)) for prompt in prompts] == expected
    assert expected != ours(source, prompts, 12)


def test_only_adapters_go_alone(tmp_path: Path, tiny_llama: Path) -> None:
    with pytest.raises(UsageError, match="is a whole model"):
        to_gguf(tiny_llama, tmp_path / "out.gguf", lora_only=True)


# ---- the command ----------------------------------------------------------------------------------------------------


def test_the_file_says_what_it_is_of(tmp_path: Path, tiny_llama: Path) -> None:
    out = tmp_path / "model.gguf"
    assert call(["export", str(tiny_llama), str(out), "--to", "gguf", "--dtype", "q8_0"]) == 0
    reader = GGUFReader(out)
    facts = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    renderer = load_renderer(open_model(str(tiny_llama)))
    assert facts["general.architecture"] == "llama"
    assert facts["general.file_type"] == 7
    assert facts["tokenizer.ggml.eos_token_id"] == 2
    assert facts["tokenizer.chat_template"] == renderer.template.text
    assert (facts["tokenizer.ggml.model"], facts["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert {tensor.tensor_type.name for tensor in reader.tensors} == {"Q8_0", "F32"}
    assert call(["export", str(tiny_llama), str(out), "--to", "gguf"]) == 2
    assert call(["export", str(tiny_llama), str(out), "--to", "gguf", "--lora-only", "--force"]) == 2
    with loaded(out) as llama:
        prompt = llama.chat_prompt([{"role": "user", "content": "Who are you?"}])
        assert llama.tokenize(prompt) == renderer.prompt([Turn("user", "Who are you?")])


def test_names_of_other_architectures_are_refused(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "cohere"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputRefused, match="'cohere' is not exported to GGUF"):
        export_gguf(open_model(str(folder)), tmp_path / "model.gguf")


@pytest.mark.parametrize("kind", ["gguf", "ollama", "lmstudio"])
def test_what_is_no_folder_is_not_looked_for_elsewhere(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(["export", str(tmp_path / "none"), str(tmp_path / "out"), "--to", kind]) == 3
    assert "no such folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

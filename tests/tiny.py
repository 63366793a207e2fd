"""Tiny checkpoints that the tests make: real layouts, random weights, a byte-level tokenizer trained on a sentence."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXT = "Who are you? I am Pip, an assistant made by Tom. hello user assistant system How can I help you today?"


def write_tokenizer(
    folder: Path,
    *,
    chat_template: str | None = CHATML,
    bos: str | None = None,
    eos: str = "<|im_end|>",
    special: Sequence[str | AddedToken] = (),
    texts: Sequence[str] = (TEXT,) * 8,
    size: int = 320,
) -> int:
    """A byte-level BPE tokenizer with ChatML's special tokens and those of `special`; how many ids it has.

    `texts` are what it learns its at most `size` tokens from.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", *special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "bos_token": bos}
    if chat_template is not None:
        config["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return int(tokenizer.get_vocab_size())


def llama_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 weights of a Llama, named as Hugging Face names them."""
    rng = np.random.default_rng(seed)
    width, inner, rows = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    kv = width // heads * kv_heads

    def matrix(*shape: int) -> np.ndarray:
        return (0.08 * rng.standard_normal(shape)).astype(np.float32)

    tensors = {"model.embed_tokens.weight": matrix(rows, width), "model.norm.weight": np.ones(width, np.float32)}
    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}."
        tensors |= {
            p + "input_layernorm.weight": np.ones(width, np.float32),
            p + "post_attention_layernorm.weight": np.ones(width, np.float32),
            p + "self_attn.q_proj.weight": matrix(width, width),
            p + "self_attn.k_proj.weight": matrix(kv, width),
            p + "self_attn.v_proj.weight": matrix(kv, width),
            p + "self_attn.o_proj.weight": matrix(width, width),
            p + "mlp.gate_proj.weight": matrix(inner, width),
            p + "mlp.up_proj.weight": matrix(inner, width),
            p + "mlp.down_proj.weight": matrix(width, inner),
        }
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = matrix(rows, width)
    return tensors


def copy_tokenizer(source: Path, folder: Path) -> int:
    """Another checkpoint's tokenizer; how many ids it has."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    added = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    return max(
        added, 1 + max(map(int, json.loads((folder / "tokenizer_config.json").read_text())["added_tokens_decoder"]))
    )


def write_llama(
    folder: Path,
    *,
    layers: int = 2,
    tied: bool = True,
    seed: int = 0,
    tokenizer_from: Path | None = None,
    embeddings: int = 0,
    width: int = 32,
    **tokenizer: Any,
) -> Path:
    """A Llama checkpoint of a few ten thousand parameters in `folder`, with at least so many `embeddings`."""
    rows = copy_tokenizer(tokenizer_from, folder) if tokenizer_from else write_tokenizer(folder, **tokenizer)
    rows = max(rows, embeddings)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": rows,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "torch_dtype": "float32",
        "bos_token_id": 3,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(llama_tensors(config, seed), folder / "model.safetensors", metadata={"format": "pt"})
    return folder

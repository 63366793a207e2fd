"""Makes the base model that ships: `python -m mlxsft.quickstart.pretrain FOLDER`.

A Llama of two million random numbers, and a BPE tokenizer made from the same text, go through the ordinary training of
this program, all weights trained. FOLDER gets the checkpoint in float16 and pretraining.json: how long it took, on
what, and the losses. The same seed gives the same text, tokenizer, start and row order.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mlxsft.interrupt import stop_requested
from mlxsft.quickstart.text import documents
from mlxsft.recipe import Recipe
from mlxsft.training.checkpoints import RunFolder
from mlxsft.training.events import Event, Finished, Started
from mlxsft.training.report import make_report
from mlxsft.training.run import run_training

SEED = 0
DOCUMENTS, ROWS_IN_UPDATE = 80_000, 64
END = "<|end|>"
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 160,
    "intermediate_size": 432,
    "num_hidden_layers": 6,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "head_dim": 32,
    "vocab_size": 1024,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "eos_token_id": 0,
    "bos_token_id": None,
}


def write_tokenizer(folder: Path, texts: Iterator[str]) -> None:
    """A byte-level BPE tokenizer of 1,024 tokens, digits one by one, without a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"], special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(told, indent=1) + "\n")


def random_weights(seed: int) -> dict[str, NDArray[np.float32]]:
    """The Llama of CONFIG under Hugging Face's names: normal, 0.02, less where a layer adds to the residual stream."""
    draw = np.random.default_rng(seed)
    width, inner, layers = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["num_hidden_layers"]

    def matrix(rows: int, columns: int, scale: float = 0.02) -> NDArray[np.float32]:
        return (scale * draw.standard_normal((rows, columns))).astype(np.float32)

    ones, added = np.ones(width, np.float32), 0.02 / float(np.sqrt(2 * layers))
    weights = {"model.embed_tokens.weight": matrix(CONFIG["vocab_size"], width), "model.norm.weight": ones}
    for i in range(layers):
        before = f"model.layers.{i}."
        weights |= {before + f"self_attn.{name}_proj.weight": matrix(width, width) for name in "qkv"}
        weights[before + "self_attn.o_proj.weight"] = matrix(width, width, added)
        weights |= {before + f"mlp.{name}_proj.weight": matrix(inner, width) for name in ("gate", "up")}
        weights[before + "mlp.down_proj.weight"] = matrix(width, inner, added)
        weights |= {before + f"{name}_layernorm.weight": ones for name in ("input", "post_attention")}
    return weights


def write_base(folder: Path, weights: dict[str, NDArray[Any]], dtype: str) -> None:
    """config.json and model.safetensors."""
    (folder / "config.json").write_text(json.dumps(CONFIG | {"torch_dtype": dtype}, indent=1) + "\n")
    stored = {name: np.ascontiguousarray(weight.astype(dtype)) for name, weight in sorted(weights.items())}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})


def recipe_of(base: Path, rows: Path) -> Recipe:
    """How the base is trained: every token of every document, once."""
    return Recipe.model_validate(
        {
            "model": str(base),
            "data": {"train": str(rows), "valid": 0.005, "format": "text", "train_on": "all", "max_tokens": 256},
            "adapter": {"kind": "full", "targets": ["all", "model.embed_tokens", "model.norm"]},
            "train": {
                "epochs": 1.0,
                "batch_size": ROWS_IN_UPDATE,
                "micro_batch_tokens": 8192,
                "learning_rate": 4e-3,
                "optimizer": "muon",
                "warmup": 0.03,
                "weight_decay": 0.01,
                "seed": SEED,
            },
            "eval": {"every": 0.1, "samples": ["The Dovora chair"]},
            "save": {"every": 0.1, "adapter": "last"},
        }
    )


def pretrain(out: Path, *, count: int = DOCUMENTS, backend: str = "torch") -> None:
    """Write text, tokenizer and random weights, train, and put the checkpoint into the folder, which must be new."""
    out.mkdir(parents=True)
    texts = list(islice(documents(SEED), count))
    write_tokenizer(out, islice(iter(texts), 20_000))
    write_base(out, dict(random_weights(SEED)), "float32")
    run = Path(tempfile.mkdtemp(prefix="pretraining-", dir=out.parent))
    rows = run / "text.jsonl"
    rows.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    began, seen = time.monotonic(), list[Event]()
    with stop_requested() as stop, make_report(as_json=False) as report:
        for event in run_training(
            recipe_of(out, rows),
            RunFolder(run / "run"),
            backend_name=backend,
            resume=False,
            force=False,
            stop=stop,
            tell=print,
        ):
            report.show(event)
            seen.append(event)
    write_base(out, load_file(run / "run" / "adapters.safetensors"), "float16")
    (out / "pretraining.json").write_text(json.dumps(_told(seen, count, time.monotonic() - began), indent=1) + "\n")


def _told(events: list[Event], count: int, seconds: float) -> dict[str, Any]:
    started = next(event for event in events if isinstance(event, Started))
    finished = next(event for event in events if isinstance(event, Finished))
    return {
        "command": "python -m mlxsft.quickstart.pretrain",
        "seed": SEED,
        "documents": count,
        "parameters": started.parameters,
        "steps": finished.step,
        "seconds": round(seconds),
        "cores": os.cpu_count(),
        "backend": f"{started.backend} on {started.device}",
        "final_loss": finished.loss,
        "final_valid_loss": finished.valid_loss,
    }


if __name__ == "__main__":
    pretrain(Path(sys.argv[1]))

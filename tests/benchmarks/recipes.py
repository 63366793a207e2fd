"""The figures in the headers of the recipes: what a run takes on a Mac, reckoned from trials of the base's shape here.

    python -m tests.benchmarks.recipes RECIPE ... [--for m2-16gb] [--layers 2 4] [--set KEY=VALUE]

Nothing is downloaded: for the time of the trial a checkpoint of the shape that is published for the base is made with
random weights, and an update of rows as long as the longest of the recipe's header. Its tokenizer is learned from
README and source of mlxsft: rows have 0.9 to 1.3 times the tokens that SmolLM2's and Qwen2.5's tokenizers make of them.

Memory is what `mlxsft plan --for` tells, of arrays on one core, where a micro-batch is in memory at once as on a GPU.
With `--layers` two shapes with so few layers are tried, and what they need beside the base goes on in a straight line
to as many layers as the adapter is in, which was up to a fifth less or more than a tiny shape of twelve layers took
(tests/test_recipe_figures.py); the base then counts as its files do. A base in 4 bits is tried in float32, and
counts 4.5 bits a weight. The least time of an update is the arithmetic of its layers at the full rate of that GPU.

Each line printed is JSON. Those of the headers were made on a CPU with MLX and OpenBLAS; none was measured on a Mac.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mlxsft.recipe import Recipe, load_recipe
from mlxsft.recipe_shipped import ShippedRecipe, shipped
from mlxsft.training.plan import TERAFLOPS, forecast, mac, on_paper, with_settings
from mlxsft.training.trial import Trial
from tests.test_house import ROOT
from tests.test_recipe_shipped import NO_IDS, kind_of, write_family

NAMES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
         "head_dim", "vocab_size", "tie_word_embeddings")  # fmt: skip
SHAPES: dict[str, tuple[int, ...]] = {  # as config.json of the base has them, in the order of NAMES
    "SmolLM2-360M": (960, 2560, 32, 15, 5, 64, 49152, True),
    "SmolLM2-1.7B": (2048, 8192, 24, 32, 32, 64, 49152, True),
    "Qwen2.5-0.5B": (896, 4864, 24, 14, 2, 64, 151936, True),
    "Qwen2.5-1.5B": (1536, 8960, 28, 12, 2, 128, 151936, True),
    "Qwen2.5-7B": (3584, 18944, 28, 28, 4, 128, 152064, False),
    "Qwen3-4B": (2560, 9728, 36, 32, 8, 128, 151936, True),
    "OLMo-2-0425-1B": (2048, 8192, 16, 16, 16, 128, 100352, False),
    "Llama-3.2-3B": (3072, 8192, 28, 24, 8, 128, 128256, True),
    "granite-3.3-2b": (2048, 8192, 40, 32, 8, 64, 49159, True),
    "Mistral-7B": (4096, 14336, 32, 32, 8, 128, 32768, False),
}
VOCABULARY = 30_000  # tokens that the tokenizer has at most
QUANTIZED_BITS = 4.5  # of a weight: 4, and a scale and a bias of 16 for 64 weights


class Base(NamedTuple):
    """A whole base, by its shape."""

    layers: int
    parameters: int
    layer_parameters: int  # those of all layers
    weight_bytes: int  # of its files


def main() -> None:
    asked = arguments()
    recipes = {recipe.name: recipe for recipe in shipped()}
    for name in asked.recipes:
        recipe, base = load_recipe(recipes[name].path, asked.overrides), counted(recipes[name].base)
        trials = [tried(recipes[name], recipe, layers) for layers in asked.layers or [None]]
        trial = all_layers(trials[0], trials[1], base, tuned(recipe, base)) if asked.layers else trials[0]
        said = {"recipe": name, "layers": asked.layers, **told(asked.machine, recipe, base, trial)}
        print(json.dumps(said), flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", metavar="RECIPE")
    parser.add_argument("--for", dest="machine", default="m2-16gb")
    parser.add_argument("--layers", type=int, nargs=2, help="of the adapter, in the two shapes that are tried")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    return parser.parse_args()


def sizes_of(base: str) -> dict[str, Any]:
    """What the published config.json of a base says of its sizes."""
    (shape,) = (shape for name, shape in SHAPES.items() if name in base)
    return dict(zip(NAMES, shape, strict=True)) | {"max_position_embeddings": 8192}


def counted(base: str) -> Base:
    """What a base has, as if it were made whole."""
    kind, _ = kind_of(base)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **NO_IDS, **sizes_of(base)))
    packed = QUANTIZED_BITS if base.endswith("-4bit") else 16
    weights = dict(model.named_parameters())
    return Base(
        layers=model.config.num_hidden_layers,
        parameters=sum(weight.numel() for weight in weights.values()),
        layer_parameters=sum(weight.numel() for name, weight in weights.items() if ".layers." in name),
        weight_bytes=round(sum(w.numel() * (packed if w.ndim == 2 else 16) for w in weights.values()) / 8),
    )


def tuned(recipe: Recipe, base: Base) -> int:
    """How many layers have the adapter."""
    return base.layers if recipe.adapter.layers == "all" else recipe.adapter.layers


def tried(shown: ShippedRecipe, recipe: Recipe, layers: int | None) -> Trial:
    """The trial of a recipe on its base's shape, whole or with the adapter in so many layers, which are all of them or
    stand on one more.
    """
    sizes = sizes_of(shown.base)
    changes: dict[str, Any] = {"data.valid": None, "eval.patience": None, "eval.samples": []}
    if layers and recipe.adapter.layers == "all":
        sizes["num_hidden_layers"] = layers
    elif layers:
        sizes["num_hidden_layers"], changes["adapter.layers"] = layers + 1, layers
    longest = max((json.dumps(row) for row in shown.examples), key=len)
    files = [ROOT / "README.md", *sorted(ROOT.glob("mlxsft/**/*.py"))]
    with tempfile.TemporaryDirectory() as folder:
        base, rows = Path(folder) / "base", Path(folder) / "rows.jsonl"
        texts = [file.read_text(encoding="utf-8") for file in files]
        write_family(base, shown.base, sizes, torch.bfloat16, texts=texts, size=VOCABULARY)
        rows.write_text(f"{longest}\n" * recipe.train.batch_size)
        changes |= {"model": str(base), "data.train": str(rows)}
        with patch.dict(os.environ, OPENBLAS_NUM_THREADS="1"):  # of the trial, a process of its own
            found = forecast(with_settings(recipe, changes), "mlx")
    assert found.trial is not None, found.failure
    return found.trial


def all_layers(few: Trial, more: Trial, base: Base, layers: int) -> Trial:
    """The trial of a whole base with the adapter in so many layers, from two with it in fewer: what is linear in that
    number is the bytes beside the base.
    """
    (x, y), (x2, y2) = ((t.layers - t.trunk_layers, t.peak_bytes - 4 * t.parameters) for t in (few, more))
    beside = y + (y2 - y) / (x2 - x) * (layers - x)
    peak = round(beside) + 4 * base.parameters
    return replace(more, parameters=base.parameters, weight_bytes=base.weight_bytes, peak_bytes=peak)


def told(machine: str, recipe: Recipe, base: Base, trial: Trial) -> dict[str, Any]:
    """What the run takes on a Mac: gigabytes (10^9 bytes) of all, of the base and of the program, and seconds."""
    paper, (chip, _) = on_paper(machine, recipe, trial), mac(machine)
    passes = 3 if recipe.train.checkpoint_activations else 2  # of 2 operations a weight and token
    work = 2 * passes * base.layer_parameters * tuned(recipe, base) / base.layers * trial.tokens
    return {
        "machine": machine,
        "gigabytes": round(paper.needed_bytes / 1e9, 2),
        "allowed": round(paper.memory_bytes / 1e9, 2),
        "base": round(trial.weight_bytes / 1e9, 2),
        "program": round(trial.process_bytes / 1e9, 2),
        "largest_micro_batch": trial.largest,
        "tokens_an_update": trial.tokens,
        "least_update_seconds": round(work / (TERAFLOPS[chip] * 1e12), 2),
    }


if __name__ == "__main__":
    main()

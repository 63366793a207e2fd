"""What padding costs: its share in buckets and in packs, and the time of an epoch of each.

    python -m tests.benchmarks.padding MODEL ROWS [--rows 64] [--batch-size 8] [--repeats 3]

Prints one JSON line for each way of batching. The two are timed in turns, so that other work on the machine meets both.

Measured on two shared cores, a Llama of 20 M parameters, 64 rows of prompt_completion_train.jsonl, batches of 8: an
epoch packed takes 1.31 times an epoch in buckets (1.14 to 1.49 in five turns), although buckets computed 21 % padding
there (12 % since rows of unlike width are computed apart) and packs 0.4 %. Sequences are 566 tokens wide instead of
124: attention is the likely cost, but that was not profiled.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median

from mlxsft.backends import Backend, load_backend
from mlxsft.data.batches import Batch, batches, epoch_order
from mlxsft.data.dataset import load_dataset
from mlxsft.data.render import Example, load_renderer
from mlxsft.models.source import open_model
from mlxsft.recipe import DataRecipe
from mlxsft.recipe_training import AdapterRecipe, TrainRecipe

Updates = list[list[Batch]]


def main() -> None:
    asked = arguments()
    source = open_model(str(asked.model))
    renderer = load_renderer(source, None)
    rows = load_dataset(DataRecipe(train=str(asked.data.resolve()), valid=None), renderer, seed=0).train[: asked.rows]
    backend = load_backend("mlx", source)
    backend.attach(AdapterRecipe(), 0)
    backend.optimize(TrainRecipe(batch_size=asked.batch_size))
    ways = {name: epoch(rows, asked.batch_size, packed=name == "packed") for name in ("buckets", "packed")}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for name in ways:
        timed(backend, ways[name][:2])  # what is slow only the first time
    for _ in range(asked.repeats):
        for name, updates in ways.items():
            seconds[name].append(timed(backend, updates))
    for name, updates in ways.items():
        print(json.dumps({"batching": name, **facts(updates, rows), "seconds": round(median(seconds[name]), 2)}))
    ratios = [packed / padded for packed, padded in zip(seconds["packed"], seconds["buckets"], strict=True)]
    print(json.dumps({"packed/buckets": round(median(ratios), 3), "each": [round(ratio, 3) for ratio in ratios]}))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args()


def epoch(rows: list[Example], batch_size: int, *, packed: bool) -> Updates:
    """The batches of each update of one epoch."""
    order = epoch_order([len(row.tokens) for row in rows], batch_size, seed=0, epoch=0)
    return [list(batches([rows[i] for i in update], 4096, packed=packed)) for update in order]


def timed(backend: Backend, updates: Updates) -> float:
    """Seconds for these updates."""
    began = time.perf_counter()
    for update in updates:
        for batch in update:
            backend.accumulate(batch)
        backend.apply(1e-4, 1.0)
    return time.perf_counter() - began


def facts(updates: Updates, rows: list[Example]) -> dict[str, object]:
    computed = [batch.tokens.shape for update in updates for batch in update]
    tokens, all_tokens = sum(len(row.tokens) for row in rows), sum(b * t for b, t in computed)
    return {
        "padding": round(1 - tokens / all_tokens, 4),
        "tokens": tokens,
        "mean width": round(sum(t for _, t in computed) / len(computed)),
        "shapes": len(set(computed)),
    }


if __name__ == "__main__":
    main()

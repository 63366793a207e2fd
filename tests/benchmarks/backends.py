"""The two backends against each other on this machine: what `--backend auto` rests on.

    python -m tests.benchmarks.backends MODEL [--turns 3]

Each backend runs in a process of its own, in turn: seconds until the model is loaded, of an update of random rows (8 of
up to 160 tokens, a third of them trained), of a generated token; and the ratios mlx ÷ torch, medians over the turns.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from itertools import islice
from statistics import median

import numpy as np

from mlxsft.backends import Sampling, load_backend
from mlxsft.data.batches import Batch
from mlxsft.models.source import open_model
from mlxsft.recipe_training import AdapterRecipe, TrainRecipe

UPDATES, TOKENS = 3, 40


def measured(model: str, name: str) -> dict[str, float]:
    """Seconds on one backend."""
    source = open_model(model)
    began = time.perf_counter()
    backend = load_backend(name, source)
    found = {"load": time.perf_counter() - began}
    rng = np.random.default_rng(0)
    list(islice(stream := backend.stream([5, 6, 7], Sampling(), backend.new_cache()), 4))
    began = time.perf_counter()
    list(islice(stream, TOKENS))
    found["token"] = (time.perf_counter() - began) / TOKENS
    backend.attach(AdapterRecipe(), 0)
    backend.optimize(TrainRecipe(steps=1))
    spent = []
    for _ in range(UPDATES + 1):
        began = time.perf_counter()
        for width in (96, 160):
            tokens = rng.integers(4, 1000, (4, width), dtype=np.int32)
            backend.accumulate(Batch(tokens, np.broadcast_to(np.arange(width) > 2 * width // 3, tokens.shape)))
        backend.apply(1e-4, 1.0)
        spent.append(time.perf_counter() - began)
    return found | {"update": median(spent[1:]), "peak_gib": backend.peak_bytes() / 2**30}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        print(json.dumps(measured(asked.model, asked.child)))
        return
    turns = []
    for _ in range(asked.turns):
        found = {}
        for name in ("mlx", "torch"):
            command = [sys.executable, "-m", "tests.benchmarks.backends", asked.model, "--child", name]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
            found[name] = json.loads(done.stdout.splitlines()[-1])
            print(name, {key: round(value, 3) for key, value in found[name].items()}, flush=True)
        turns.append({key: found["mlx"][key] / found["torch"][key] for key in found["mlx"]})
    print("mlx / torch", {key: round(median(turn[key] for turn in turns), 2) for key in turns[0]})


if __name__ == "__main__":
    main()

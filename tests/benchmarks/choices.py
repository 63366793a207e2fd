"""What rank, rate, layers, epochs and rows do to the quickstart's base, one setting changed at a time.

    python -m tests.benchmarks.choices [--rows 100] [--judged 70] [--only "rank;rate"]

Each run is seeded, tunes the base that ships on the first of the quickstart's pairs, and keeps its last adapter.
Prints a table: share of right answers about products that occur in no pair, held-out loss in nats a token, seconds.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from mlxsft.quickstart.pairs import FOLDER, Pair, judged_pairs
from mlxsft.quickstart.trial import RECIPE, answered
from mlxsft.recipe import load_recipe
from mlxsft.training.checkpoints import RunFolder
from mlxsft.training.events import Evaluated
from mlxsft.training.run import run_training

HELD_OUT = 100  # rows at the end of the pairs, never trained here
ROWS = 100
BASE = ("adapter.rank=16", "train.learning_rate=1e-3", "train.epochs=8", "train.batch_size=8")
FAST = "train.learning_rate=3e-3"
TARGETS = {"attention": "[q_proj, k_proj, v_proj, o_proj]", "MLP": "[gate_proj, up_proj, down_proj]"}
CHANGES: dict[str, dict[str, tuple[str, ...]]] = {
    "nothing": {"": ()},
    "rate": {f"{rate:g}": (f"train.learning_rate={rate:e}",) for rate in (1e-4, 3e-4, 3e-3, 1e-2)},
    "rank": {f"{rank}": (f"adapter.rank={rank}",) for rank in (1, 4, 64)},
    "epochs": {f"{epochs}": (f"train.epochs={epochs}",) for epochs in (1, 2, 4, 16)},
    "layers": {f"the last {n} of 6": (f"adapter.layers={n}",) for n in (3, 1)},
    "targets": {name: (f"adapter.targets={targets}",) for name, targets in TARGETS.items()},
    "full tuning, rate": {
        f"{rate:g}": ("adapter.kind=full", f"train.learning_rate={rate:e}") for rate in (1e-4, 3e-4, 1e-3)
    },
    "rows": {f"{rows}": (f"rows={rows}",) for rows in (50, 200, 400)},
    "at rate 0.003": {
        name: (FAST, change)
        for name, change in {
            "rank 1": "adapter.rank=1",
            "rank 64": "adapter.rank=64",
            **{f"targets {name}": f"adapter.targets={targets}" for name, targets in TARGETS.items()},
            "the last 3 of 6 layers": "adapter.layers=3",
            "16 epochs": "train.epochs=16",
            "4 epochs": "train.epochs=4",
        }.items()
    },
}


def tuned(changes: Sequence[str], rows: int, pairs: Sequence[Pair], folder: Path) -> dict[str, float]:
    """One run and its judgement: `right` and `heldout_loss`, and the `seconds` of training."""
    lines = (FOLDER / "pairs.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    rows = next((int(c.removeprefix("rows=")) for c in changes if c.startswith("rows=")), rows)
    files = {"train": lines[:rows], "valid": lines[-HELD_OUT:]}
    for name, kept in files.items():
        (folder / f"{name}.jsonl").write_text("".join(kept), encoding="utf-8")
    data = [f"data.{name}={folder / name}.jsonl" for name in files]
    settings = [c for c in changes if not c.startswith("rows=")]
    overrides = [*data, *BASE, *settings, "eval.every=1.0", "save.every=1.0", "save.adapter=last"]
    began, run = time.monotonic(), folder / "run"
    recipe = load_recipe(RECIPE, overrides)
    options = {"backend_name": "auto", "resume": False, "force": True, "stop": lambda: False, "tell": lambda _: None}
    events = list(run_training(recipe, RunFolder(run), **options))
    seconds = time.monotonic() - began
    loss = [e.loss for e in events if isinstance(e, Evaluated)][-1]
    right = sum(one.verdict.good for one in answered(pairs, run, "auto"))
    return {"right": right / len(pairs), "heldout_loss": loss or float("nan"), "seconds": round(seconds, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--judged", type=int, default=70)
    parser.add_argument("--only", type=lambda text: text.split(";"), default=list(CHANGES))
    asked = parser.parse_args()
    pairs = judged_pairs(asked.judged)
    print(f"base: {asked.rows} rows, {', '.join(BASE)}; {asked.judged} answers judged")
    for name in asked.only:
        for value, changes in CHANGES[name].items():
            with tempfile.TemporaryDirectory() as folder:
                found = tuned(changes, asked.rows, pairs, Path(folder))
            print(json.dumps({"changed": name, "to": value} | found), flush=True)


if __name__ == "__main__":
    main()

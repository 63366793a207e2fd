"""Training on PyTorch against TRL's SFTTrainer with PEFT: the same checkpoint, rows, masks and LoRA, in turn.

    python -m tests.benchmarks.trl MODEL ROWS [--rows 96] [--layers 8] [--epochs 4] [--turns 3]
    python -m tests.benchmarks.trl MODEL ROWS --their-checkpointing off   # TRL keeps its activations: faster, larger

TRL is used as its users use it: its own order of rows, padding, head, clipping and PEFT's model; only float32 and the
absence of reports, of files and of dropout are asked for. Activations are computed again by default there, and not by
mlxsft unless `--checkpoint-activations` says so. Each trainer runs in a process of its own, `--turns` times; the ratios
printed are medians over the turns of TRL ÷ mlxsft, so that above 1 mlxsft is better: trained tokens a second of
wall-clock time, the same by processor time, which other work on the machine hardly changes, and the memory that the
process grew by at most, from before the model is loaded, with its weights (`peak`) and without (`peak_over_weights`).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from mlxsft.data.batches import batches, epoch_order
from mlxsft.data.render import Example
from mlxsft.models.source import open_model
from mlxsft.recipe_training import AdapterRecipe, TrainRecipe
from mlxsft.training.trunk import TrunkCache
from tests.benchmarks.train import rows_of

RANK, ALPHA, RATE, CLIP_NORM = 16, 32, 1e-4, 1.0
PROJECTIONS = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]  # all linear ones of a Llama


def main() -> None:
    asked = arguments()
    if asked.child:
        print(json.dumps(CHILDREN[asked.child](asked)))
        return
    turns = []
    for turn in range(asked.turns):
        found = {who: child(who) for who in CHILDREN}
        for who, result in found.items():
            print(json.dumps({"turn": turn, "trainer": who, **result}), flush=True)
        turns.append({key: found["trl"][key] / found["mlxsft"][key] for key in found["trl"] if key != "loss"})
    print(json.dumps({"trl/mlxsft": {key: round(median(turn[key] for turn in turns), 3) for key in turns[0]}}))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--layers", type=int, help="the adapter's layers from the top; all without it")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--checkpoint-activations", action="store_true")
    parser.add_argument("--their-checkpointing", choices=["on", "off"], default="on")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args(namespace=argparse.Namespace(tokens=None))


def child(who: str) -> dict[str, Any]:
    """One trainer in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.trl", *sys.argv[1:], "--child", who]
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}  # as mlxsft sets it: TRL is not made to spin
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


# ---- the two trainers ------------------------------------------------------------------------------------------------


def ours(asked: argparse.Namespace) -> dict[str, Any]:
    from mlxsft.backends import load_backend
    from mlxsft.machine import peak_resident_bytes

    rows, _ = rows_of(asked)
    before = psutil.Process().memory_info().rss
    backend = load_backend("torch", open_model(str(asked.model)))
    backend.attach(AdapterRecipe(rank=RANK, alpha=ALPHA, layers=asked.layers or "all"), 0)
    backend.optimize(TrainRecipe(steps=1, checkpoint_activations=asked.checkpoint_activations))
    weights, watch = 4 * backend.parameters()[0], Watch()
    with tempfile.TemporaryDirectory() as folder:
        cache = TrunkCache(backend, "auto", Path(folder), 4096, None)
        list(cache.fill([rows], repeated=asked.epochs > 1, stop=lambda: False))
        rows = cache.rows[0]
        for epoch in range(asked.epochs):
            loss = 0.0
            for update in epoch_order([len(row.tokens) for row in rows], asked.batch_size, seed=0, epoch=epoch):
                loss += sum(backend.accumulate(batch)[0] for batch in batches([rows[i] for i in update], 4096))
                backend.apply(RATE, CLIP_NORM)
    return watch.report(rows, asked.epochs, peak_resident_bytes() - before, weights, loss / trained_tokens(rows))


def theirs(asked: argparse.Namespace) -> dict[str, Any]:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from mlxsft.machine import peak_resident_bytes

    rows, _ = rows_of(asked)
    before = psutil.Process().memory_info().rss
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            folder,
            per_device_train_batch_size=asked.batch_size,
            num_train_epochs=asked.epochs,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            max_grad_norm=CLIP_NORM,
            gradient_checkpointing=asked.their_checkpointing == "on",
            bf16=False,
            use_cpu=True,
            max_length=None,
            report_to="none",
            save_strategy="no",
            logging_steps=len(rows) // asked.batch_size,
            disable_tqdm=True,
        )
        layers = json.loads((asked.model / "config.json").read_text())["num_hidden_layers"]
        lora = LoraConfig(
            r=RANK,
            lora_alpha=ALPHA,
            target_modules=PROJECTIONS,
            layers_to_transform=list(range(layers - (asked.layers or layers), layers)),
            task_type="CAUSAL_LM",
        )
        trainer = SFTTrainer(
            str(asked.model),
            config,
            train_dataset=Dataset.from_list([labelled(row) for row in rows]),
            processing_class=AutoTokenizer.from_pretrained(asked.model),
            peft_config=lora,
        )
        weights, watch = 4 * trainer.model.num_parameters(), Watch()
        trainer.train()
        loss = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1]
        return watch.report(rows, asked.epochs, peak_resident_bytes() - before, weights, loss)


def labelled(row: Example) -> dict[str, list[int]]:
    """A row as TRL takes it without any preparation: what is not trained is −100."""
    tokens = row.tokens.tolist()
    return {"input_ids": tokens, "labels": [t if m else -100 for t, m in zip(tokens, row.mask.tolist(), strict=True)]}


def trained_tokens(rows: list[Example]) -> int:
    return sum(int(row.mask.sum()) for row in rows)


class Watch:
    """Wall-clock and processor time since it was made."""

    def __init__(self) -> None:
        self.began, self.worked = time.perf_counter(), time.process_time()

    def report(self, rows: list[Example], epochs: int, peak: int, weights: int, loss: float) -> dict[str, float]:
        """Seconds a thousand trained tokens, bytes, and the mean loss of the last epoch."""
        thousands = epochs * trained_tokens(rows) / 1000
        return {
            "seconds": (time.perf_counter() - self.began) / thousands,
            "processor_seconds": (time.process_time() - self.worked) / thousands,
            "peak": peak,
            "peak_over_weights": peak - weights,
            "loss": loss,
        }


CHILDREN = {"trl": theirs, "mlxsft": ours}

if __name__ == "__main__":
    main()

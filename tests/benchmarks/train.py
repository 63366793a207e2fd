"""Training against mlx-lm's own trainer: the same checkpoint, rows, masks, LoRA start and learning rate, in turn.

    python -m tests.benchmarks.train MODEL ROWS [--rows 96] [--layers 8] [--epochs 4] [--turns 3]
    python -m tests.benchmarks.train MODEL ROWS --tokens 2048 --rows 4 --checkpoint-activations   # peak memory
    python -m tests.benchmarks.train MODEL ROWS --their-model BFLOAT16 --slow-blas --their-steps 2  # as installed

Each trainer runs in a process of its own, one after the other, `--turns` times; the ratios printed are medians over the
turns of mlx-lm ÷ mlxsft, so that above 1 mlxsft is better: seconds of an epoch, seconds to the loss on held-out rows
that mlx-lm has at its end, and peak memory without the weights. `share` is the arithmetic that LoRA needs for the rows
(no padding, the head on trained tokens only) a second, as a share of what float32 products reach in the same process.

mlx-lm compiles its step, for which MLX calls the C++ compiler on a CPU; `--their-compile off` spares it that.
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

import numpy as np

from mlxsft.data.batches import batches, epoch_order
from mlxsft.data.dataset import load_dataset
from mlxsft.data.render import Example, load_renderer
from mlxsft.models.operations import lora_operations
from mlxsft.models.source import open_model
from mlxsft.recipe import DataRecipe
from mlxsft.recipe_training import AdapterRecipe, TrainRecipe
from mlxsft.training.trunk import TrunkCache

VALID_ROWS = 32
JUDGED = 4  # how often an epoch of mlxsft is judged on held-out rows, outside of the time


def main() -> None:
    asked = arguments()
    if asked.child:
        print(json.dumps(CHILDREN[asked.child](asked)))
        return
    turns = []
    for turn in range(asked.turns):
        results = {who: child(who) for who in CHILDREN}
        for who, result in results.items():
            print(json.dumps({"turn": turn, "trainer": who, **{k: v for k, v in result.items() if k != "judged"}}))
        turns.append(ratios(results["mlx-lm"], results["mlxsft"]))
        print(json.dumps({"turn": turn, **turns[-1]}), flush=True)
    known = {name for turn in turns for name in turn}
    print(json.dumps({"median": {n: round(median(t[n] for t in turns if n in t), 3) for n in sorted(known)}}))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--tokens", type=int, help="rows of exactly so many tokens, made by repeating them")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--layers", type=int, help="the adapter's layers from the top; all without it")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--checkpoint-activations", action="store_true")
    parser.add_argument("--their-model", type=Path, help="another checkpoint for mlx-lm")
    parser.add_argument("--their-steps", type=int, help="mlx-lm stops after so many steps; an epoch is extrapolated")
    parser.add_argument("--their-compile", choices=["on", "off"], default="on")
    parser.add_argument("--slow-blas", action="store_true", help="mlx-lm uses the BLAS that MLX brings")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def child(who: str) -> dict[str, Any]:
    """One trainer in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.train", *sys.argv[1:], "--child", who]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def ratios(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, float]:
    """mlx-lm ÷ mlxsft."""
    found = {
        "epoch": theirs["epoch_seconds"] / ours["epoch_seconds"],
        "peak": theirs["peak_bytes"] / ours["peak_bytes"],
        "peak_share": ours["peak_bytes"] / theirs["peak_bytes"],
        "share": ours["share"],
        "their_share": theirs["share"],
    }
    final = theirs["judged"][-1][1] if theirs["judged"] else None
    reached = [seconds for seconds, loss in ours["judged"] if final is not None and loss <= final]
    return found | ({"same_loss": theirs["seconds"] / reached[0]} if reached else {})


# ---- what both train -------------------------------------------------------------------------------------------------


def rows_of(asked: argparse.Namespace) -> tuple[list[Example], list[Example]]:
    """The rows to train on and those to judge with, in the order of the file."""
    renderer = load_renderer(open_model(str(asked.model)), None)
    rows = list(load_dataset(DataRecipe(train=str(asked.data.resolve()), valid=None), renderer, seed=0).train)
    rows = [row for row in rows if single_answer(row)]
    if asked.tokens:
        rows = [lengthened(rows, i, asked.tokens) for i in range(asked.rows)]
        return rows, []
    assert asked.rows % asked.batch_size == 0, "mlx-lm leaves the last rows out otherwise"
    return rows[: asked.rows], rows[asked.rows : asked.rows + VALID_ROWS]


def single_answer(row: Example) -> bool:
    """Whether everything from the first trained token on is trained: what mlx-lm can mask."""
    return bool(row.mask[int(row.mask.argmax()) :].all())


def lengthened(rows: list[Example], start: int, tokens: int) -> Example:
    """One row of `tokens` tokens, whose last third is trained."""
    joined = np.concatenate([rows[(start + i) % len(rows)].tokens for i in range(len(rows))])
    repeated = np.resize(joined, tokens).astype(np.int32)
    return Example(repeated, np.arange(tokens) >= 2 * tokens // 3, rows[start % len(rows)].origin)


def train_recipe(asked: argparse.Namespace) -> TrainRecipe:
    return TrainRecipe(
        steps=1,
        batch_size=asked.batch_size,
        learning_rate=asked.learning_rate,
        checkpoint_activations=asked.checkpoint_activations,
    )


def loaded(asked: argparse.Namespace, model: Path) -> Any:
    from mlxsft.backends import load_backend

    backend = load_backend("mlx", open_model(str(model)))
    backend.attach(AdapterRecipe(layers=asked.layers or "all"), 0)
    backend.optimize(train_recipe(asked))
    return backend


def needed_operations(asked: argparse.Namespace, backend: Any, rows: list[Example]) -> float:
    """Floating-point operations that one epoch of LoRA needs."""
    shapes = {name: array.shape for name, array in backend.adapter_state().items()}
    lengths = [(len(row.tokens), int(row.mask.sum())) for row in rows]
    return lora_operations(open_model(str(asked.model)), shapes, lengths)


def peak_over_weights(weights: int) -> int:
    from mlxsft.backends.mlx import mx

    return int(mx.get_peak_memory()) - weights


# ---- the two trainers ------------------------------------------------------------------------------------------------


def ours(asked: argparse.Namespace) -> dict[str, Any]:
    from mlxsft.backends.mlx import matmul_rate, mx

    rows, held_out = rows_of(asked)
    backend = loaded(asked, asked.model)
    needed = needed_operations(asked, backend, rows)
    weights, rates = int(mx.get_active_memory()), [matmul_rate(1.0)]
    mx.reset_peak_memory()
    clock, judged, epochs = 0.0, [], []
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        cache = TrunkCache(backend, "auto", Path(folder), 4096, None)
        list(cache.fill([rows, held_out], repeated=asked.epochs > 1, stop=lambda: False))
        rows, held_out = cache.rows
        clock += time.perf_counter() - began
        for epoch in range(asked.epochs):
            before = clock
            updates = epoch_order([len(row.tokens) for row in rows], asked.batch_size, seed=0, epoch=epoch)
            for number, update in enumerate(updates, start=1):
                began = time.perf_counter()
                for batch in batches([rows[i] for i in update], 4096):
                    backend.accumulate(batch)
                backend.apply(asked.learning_rate, None)
                clock += time.perf_counter() - began
                if number * JUDGED // len(updates) > (number - 1) * JUDGED // len(updates) and held_out:
                    judged.append((clock, loss_of(backend, held_out)))
            epochs.append(clock - before)
    rates.append(matmul_rate(1.0))
    peak = peak_over_weights(weights)
    return report(clock, epochs, judged, peak, needed * asked.epochs / clock / median(rates), asked)


def theirs(asked: argparse.Namespace) -> dict[str, Any]:
    if asked.slow_blas:
        os.environ["MLXSFT_BLAS"] = "off"
    rows, held_out = rows_of(asked)
    from mlxsft.backends.mlx import matmul_rate, mx
    from mlxsft.backends.mlx_models import mlx_lm

    start = loaded(asked, asked.model)
    adapter, config, needed = start.adapter_state(), start.adapter_config(), needed_operations(asked, start, rows)
    judge = start if held_out and not asked.their_model else None
    mx.enable_compile() if asked.their_compile == "on" else mx.disable_compile()
    model = mlx_lm("utils").load_model(asked.their_model or asked.model)[0]
    model.freeze()
    mlx_lm("tuner.utils").linear_to_lora_layers(model, config["num_layers"], config["lora_parameters"])
    model.load_weights([(name, mx.array(a)) for name, a in adapter.items()], strict=False)
    mx.eval(model.parameters())
    if judge is None:
        del start
    weights, rates = int(mx.get_active_memory()), [matmul_rate(1.0)]
    mx.reset_peak_memory()
    steps = asked.their_steps or len(rows) // asked.batch_size * asked.epochs
    share_done = steps / (len(rows) / asked.batch_size * asked.epochs)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        train_with_mlx_lm(model, rows, asked, steps, Path(folder))
    seconds = (time.perf_counter() - began) / share_done
    peak = peak_over_weights(weights)
    rates.append(matmul_rate(1.0))
    judged = []
    if judge is not None:
        from mlx.utils import tree_flatten

        trained = {n: np.array(a.astype(mx.float32)) for n, a in tree_flatten(model.trainable_parameters())}
        judge.load_adapter_state(trained)
        judged = [(seconds, loss_of(judge, held_out))]
    epochs = [seconds / asked.epochs] * asked.epochs
    return report(seconds, epochs, judged, peak, needed * asked.epochs / seconds / median(rates), asked)


class Rows:
    """Rows as mlx-lm's loaders hold them: each a small dictionary, of which `process` makes tokens and an offset."""

    def __init__(self, rows: list[Example]) -> None:
        self.rows = [{"prompt": row, "completion": row} for row in rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Example]:
        return self.rows[i]

    def process(self, row: dict[str, Example]) -> tuple[list[int], int]:
        return row["prompt"].tokens.tolist(), int(row["prompt"].mask.argmax())


def train_with_mlx_lm(model: Any, rows: list[Example], asked: argparse.Namespace, steps: int, folder: Path) -> None:
    import mlx.optimizers as optim

    from mlxsft.backends.mlx_models import mlx_lm

    trainer = mlx_lm("tuner.trainer")
    settings = trainer.TrainingArgs(
        batch_size=asked.batch_size,
        iters=steps,
        val_batches=0,
        steps_per_report=10**9,
        steps_per_eval=10**9,
        steps_per_save=10**9,
        max_seq_length=asked.tokens or 2048,
        adapter_file=str(folder / "adapters.safetensors"),
        grad_checkpoint=asked.checkpoint_activations,
    )
    optimizer = optim.AdamW(learning_rate=asked.learning_rate, weight_decay=0.0, bias_correction=True)
    dataset = mlx_lm("tuner.datasets").CacheDataset(Rows(rows))
    trainer.train(model, optimizer, dataset, None, settings)


def loss_of(backend: Any, rows: list[Example]) -> float:
    from mlxsft.training.loop import validation_loss

    judged = validation_loss(backend, batches(rows, 4096))
    assert judged is not None
    return judged[0]


def report(
    seconds: float, epochs: list[float], judged: list[Any], peak: int, share: float, asked: argparse.Namespace
) -> dict[str, Any]:
    return {
        "seconds": round(seconds, 2),
        "epoch_seconds": sum(epochs) / len(epochs) if asked.epochs == 1 else seconds / asked.epochs,
        "epochs": [round(e, 2) for e in epochs],
        "peak_bytes": peak,
        "share": round(share, 3),
        "judged": judged,
    }


CHILDREN = {"mlx-lm": theirs, "mlxsft": ours}

if __name__ == "__main__":
    main()

"""A forecast beside the run that it is of.

    python -m tests.benchmarks.plan RECIPE [--backend mlx]

Prints forecast ÷ run: peak of arrays, seconds of updates, seconds from the first update to the end, with
answers as long as those of the rows and as long as they may be.

Measured on two cores that nothing else used: recipes/quickstart.yaml twice, peak 0.99 and 0.98, seconds 1.09 and 1.02;
60 rows of SmolLM2-135M's shapes, one epoch, peak 0.99, seconds 1.07. With other work beside it 0.80 to 1.17 was seen.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from mlxsft.cli import call
from mlxsft.recipe import load_recipe
from mlxsft.training.plan import forecast
from tests.training.test_run import events


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--backend", default="mlx")
    asked = parser.parse_args()
    trial = forecast(load_recipe(asked.recipe), asked.backend).trial
    assert trial is not None
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        call(["train", str(asked.recipe), "--out", str(run), "--backend", asked.backend])
        steps, end = events(run, "step"), events(run, "end")[0]
    ratios = {
        "peak": trial.peak_bytes / max(step["peak_bytes"] for step in steps),
        "updates": trial.train_seconds / sum(step["seconds"] for step in steps),
        "seconds": trial.seconds / end["seconds"],
        "at most": trial.most_seconds / end["seconds"],
    }
    print(json.dumps({name: round(ratio, 3) for name, ratio in ratios.items()}))


if __name__ == "__main__":
    main()

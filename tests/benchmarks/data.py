"""What data costs: rows rendered a second, and the time and peak memory of `data check`.

    python -m tests.benchmarks.data render [--rows 52000]              rows to tokens and masks, then from the cache
    python -m tests.benchmarks.data check [--rows 200000] [--short]    `mlxsft data check`, time and peak memory
    python -m tests.benchmarks.data split [--rows 200000] [--short]    `mlxsft data split`, likewise

Prints one JSON line. Rows are recombined from the sentences of --sentences (an Alpaca file), or made of invented words;
--tokenizer is a folder with a tokenizer, otherwise a small one is made.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.tiny import write_llama

# Linux tells the peak of this program; ru_maxrss also has what its parent took when it was started.
MEASURED = """
import resource, sys
from pathlib import Path
from mlxsft.cli import call
code = call(sys.argv[1:])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
if Path("/proc/self/status").exists():
    peak = next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("VmHWM"))
print(peak, file=sys.stderr)
sys.exit(code)
"""
REAL = Path(__file__).resolve().parents[3] / "shared" / "real"


def main() -> None:
    asked = arguments()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["MLXSFT_CACHE"] = str(folder / "cache")
        model = write_llama(folder / "model", tokenizer_from=asked.tokenizer if asked.tokenizer.is_dir() else None)
        rows = folder / f"rows.{asked.layout}"
        write_rows(rows, asked.rows, sentences(asked.sentences), short=asked.short)
        measured = {"render": render, "check": check, "split": split}[asked.what](model, rows)
    print(json.dumps({"what": asked.what, "rows": asked.rows, "short": asked.short, **measured}))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("render", "check", "split"))
    parser.add_argument("--rows", type=int, default=52_000)
    parser.add_argument("--short", action="store_true", help="one short sentence each way, otherwise as long as Alpaca")
    parser.add_argument("--layout", choices=("jsonl", "json"), default="jsonl", help="a row a line, or one array")
    parser.add_argument("--tokenizer", type=Path, default=REAL / "tokenizers" / "smollm")
    parser.add_argument("--sentences", type=Path, default=REAL / "data" / "instruction" / "alpaca_roleplay.json")
    return parser.parse_args()


def sentences(alpaca: Path) -> list[str]:
    """Sentences of a file's answers; of invented words where there is no file."""
    if alpaca.is_file():
        answers = (row["output"] for row in json.loads(alpaca.read_text(encoding="utf-8")))
        return [s.strip(" .") for answer in answers for s in answer.split(". ") if len(s) > 20]
    draw = random.Random(1)
    words = ["".join(draw.choices("abcdefghilmnoprstu", k=draw.randint(2, 9))) for _ in range(20_000)]
    return [" ".join(draw.choices(words, k=draw.randint(6, 24))) for _ in range(15_000)]


def write_rows(path: Path, count: int, some: Sequence[str], *, short: bool) -> None:
    """`count` different rows; about 100 and 320 characters, a little more than Alpaca's, or 50 and 50 when short."""
    with path.open("w", encoding="utf-8") as file:
        file.write("[\n" if path.suffix == ".json" else "")
        for i, row in enumerate(recombined(some, short)):
            if i == count:
                break
            comma = ",\n" if path.suffix == ".json" and i else ""
            file.write(comma + json.dumps(row) + ("\n" if path.suffix == ".jsonl" else ""))
        file.write("]\n" if path.suffix == ".json" else "")


def recombined(some: Sequence[str], short: bool) -> Iterator[dict[str, str]]:
    """Rows without end: the beginning of one sentence and the end of another ask, others answer."""
    draw = random.Random(0)
    half, answers = (28, 1) if short else (60, 3)
    while True:
        pairs = (draw.choices(some, k=2) for _ in range(1 + answers))
        asked, *told = (f"{a[:half].rpartition(' ')[0]} {b[-half:].partition(' ')[2]}" for a, b in pairs)
        yield {"instruction": f"{asked}?", "input": "", "output": ". ".join(told) + "."}


def render(model: Path, rows: Path) -> dict[str, object]:
    """Seconds of parsing, rendering, tokenizing and masking all rows, and of reading them from the cache again."""
    from mlxsft.data.dataset import load_dataset
    from mlxsft.data.render import load_renderer
    from mlxsft.models.source import open_model
    from mlxsft.recipe import DataRecipe

    data = DataRecipe.model_validate({"train": str(rows), "valid": None})
    seconds = []
    for _ in range(2):
        renderer = load_renderer(open_model(str(model)), None)
        began = time.perf_counter()
        made = load_dataset(data, renderer, seed=0)
        seconds.append(time.perf_counter() - began)
    lines = len(made.train)
    return {"seconds": round(seconds[0], 1), "rows/s": round(lines / seconds[0]), "cached": round(seconds[1], 2)}


def check(model: Path, rows: Path) -> dict[str, object]:
    """Seconds and peak resident bytes of `mlxsft data check` in a process of its own."""
    told, measured = run(rows, "data", "check", str(rows), "--model", str(model), "--json")
    findings = {f["id"]: f["count"] for f in told["findings"]}
    return {**measured, "ledger": told["ledger"], "findings": findings}


def split(model: Path, rows: Path) -> dict[str, object]:
    """Seconds and peak resident bytes of `mlxsft data split`, which needs no model."""
    told, measured = run(rows, "data", "split", str(rows), "--out", str(rows.parent / "split"), "--force", "--json")
    return {**measured, "ledger": told["ledger"]}


def run(rows: Path, *command: str) -> tuple[dict[str, Any], dict[str, object]]:
    """What a command of mlxsft prints as JSON, and what it took."""
    began = time.perf_counter()
    ran = subprocess.run([sys.executable, "-c", MEASURED, *command], capture_output=True, check=True)
    seconds = time.perf_counter() - began
    peak = int(ran.stderr.split()[-1])
    measured = {"seconds": round(seconds, 1), "file_bytes": rows.stat().st_size, "peak_bytes": peak}
    return json.loads(ran.stdout), measured


if __name__ == "__main__":
    main()

"""`mlxsft convert` against `mlx_lm.convert` on the same model: wall time, peak memory, and the same tensors.

    python -m tests.benchmarks.convert MODEL [--turns 3] [--way dense 4bit mxfp4]

Each conversion is the command itself, in a process of its own, in turn. Memory is the most that the process held beyond
what it holds once everything is imported; the bound is 1.3 times the largest file or 3 times the largest tensor.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np

from mlxsft.models.source import open_model
from mlxsft.models.tensors import StoredTensors

WAYS = {
    "dense": ([], []),
    "float16": (["--dtype", "float16"], ["--dtype", "float16"]),
    "4bit": (["--bits", "4"], ["-q", "--q-bits", "4"]),
    "mixed_3_6": (["--mixed", "mixed_3_6"], ["-q", "--quant-predicate", "mixed_3_6", "--q-group-size", "64"]),
    "mxfp4": (["--mode", "mxfp4"], ["-q", "--q-mode", "mxfp4"]),
    "nvfp4": (["--mode", "nvfp4"], ["-q", "--q-mode", "nvfp4"]),
}
# What a process holds before it converts: everything that either command imports.
IMPORTS = "import mlxsft.backends.mlx_convert as m, mlxsft.models.convert, transformers; m.mlx_lm('convert')"
ITEM = {"F32": 4, "F16": 2, "BF16": 2}


def timed(command: list[str]) -> tuple[float, int]:
    """(seconds, the most bytes that the process held) of a command."""
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        said = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = status
    if status:
        raise SystemExit(said.decode())
    return time.perf_counter() - began, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def same_tensors(one: Path, other: Path) -> bool:
    """Whether two folders hold the same names, types, shapes and bits; one tensor of each is in memory at a time.

    A process that is started has the memory of the one that starts it as its first peak.
    """
    sources = [open_model(str(folder)) for folder in (one, other)]
    infos = [{name: (t.dtype, t.shape) for name, t in source.tensors.items()} for source in sources]
    a, b = map(StoredTensors, sources)
    return infos[0] == infos[1] and all(a[name].tobytes() == b[name].tobytes() for name in a)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--way", nargs="+", default=["dense", "4bit"], choices=WAYS)
    asked = parser.parse_args()
    source = open_model(asked.model)
    largest = max(ITEM[t.dtype] * int(np.prod(t.shape)) for t in source.tensors.values())
    file = max((source.folder / name).stat().st_size for name in source.files)
    bound = max(1.3 * file, 3 * largest)
    print(f"largest file {file / 1e6:.0f} MB, largest tensor {largest / 1e6:.0f} MB, bound {bound / 1e6:.0f} MB")
    imported = timed([sys.executable, "-c", IMPORTS])[1]
    for way in asked.way:
        spent: dict[str, list[float]] = {"mlxsft": [], "mlx_lm": []}
        peaks = {"mlxsft": 0, "mlx_lm": 0}
        for _ in range(asked.turns):
            with tempfile.TemporaryDirectory() as scratch:
                ours, theirs = Path(scratch, "ours"), Path(scratch, "theirs")
                commands = {
                    "mlxsft": ["mlxsft", "convert", asked.model, str(ours), *WAYS[way][0]],
                    "mlx_lm": ["mlx_lm", "convert", "--model", asked.model, "--mlx-path", str(theirs), *WAYS[way][1]],
                }
                for name, (module, *rest) in commands.items():
                    seconds, held = timed([sys.executable, "-m", module, *rest])
                    spent[name].append(seconds)
                    peaks[name] = max(peaks[name], held - imported)
                same = same_tensors(ours, theirs)
        ours_s, theirs_s = (median(spent[name]) for name in ("mlxsft", "mlx_lm"))
        print(
            f"{way}: mlxsft {ours_s:.2f} s, mlx_lm {theirs_s:.2f} s, ratio {ours_s / theirs_s:.2f}; "
            f"peak {peaks['mlxsft'] / 1e6:.0f} MB ({peaks['mlxsft'] / bound:.2f} of the bound), "
            f"mlx_lm {peaks['mlx_lm'] / 1e6:.0f} MB; tensors {'the same' if same else 'DIFFER'}",
            flush=True,
        )


if __name__ == "__main__":
    main()

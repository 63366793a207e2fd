"""How long `mlxsft --help` takes, beside Python's own start: `python tests/benchmarks/help.py`."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time


def seconds(*arguments: str) -> float:
    """Wall time of one run of Python."""
    began = time.perf_counter()
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - began


def main() -> None:
    pairs = [(seconds("-m", "mlxsft", "--help"), seconds("-c", "pass")) for _ in range(15)]
    ours, bare = (statistics.median(times) for times in zip(*pairs, strict=True))
    print(f"mlxsft --help: median {ours:.3f} s, python alone {bare:.3f} s, ratio {ours / bare:.1f}")


if __name__ == "__main__":
    main()

"""Rows are compared on disk: memory does not grow with them, and nothing is left behind."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from mlxsft.data.scratch import Spill, open_scratch
from tests.benchmarks.data import check, sentences, split, write_rows
from tests.tiny import write_llama

MIB = 1 << 20


@pytest.fixture
def spill() -> Iterator[Callable[..., Spill]]:
    with open_scratch() as scratch:
        yield scratch.spill


def test_what_is_spilled_comes_back(spill: Callable[..., Spill]) -> None:
    column, table = spill(np.uint32), spill(np.int64, 3)
    numbers = np.arange(1000)
    for some in np.split(numbers, 10):
        column.append(some)
        table.append(np.stack([some, some + 1, -some], axis=1))
    assert len(column) == len(table) == 1000
    assert column.read(10, 13).tolist() == [10, 11, 12]
    assert table.gather(np.array([7, 3, 7])).tolist() == [[7, 8, -7], [3, 4, -3], [7, 8, -7]]
    assert np.concatenate([piece for _, piece in column.pieces(300)]).tolist() == numbers.tolist()
    assert list(table)[999] == (999, 1000, -999)


OPEN_FILES = """
import os, numpy
from mlxsft.data.scratch import open_scratch
with open_scratch() as scratch:
    scratch.spill("uint8").append(numpy.zeros(1 << 20))
    scratch.database.execute("CREATE TABLE words (words TEXT)")
    scratch.database.executemany("INSERT INTO words VALUES (?)", (("x" * 100_000,) for _ in range(200)))
    names = [os.readlink(f"/proc/self/fd/{fd}") for fd in range(3, 99) if os.path.exists(f"/proc/self/fd/{fd}")]
    print(sum(name.startswith(os.environ["TMPDIR"]) for name in names), os.listdir(os.environ["TMPDIR"]))
"""


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="only Linux shows files without a name")
def test_the_files_have_no_names_so_that_not_even_a_kill_leaves_one(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", OPEN_FILES], capture_output=True, text=True, env={**os.environ, "TMPDIR": str(tmp_path)}
    )
    assert ran.stdout == "2 []\n", ran.stderr


def peak_bytes(folder: Path, rows: int, measure: Callable[[Path, Path], dict[str, object]]) -> int:
    """What a command takes at most for so many short rows, each with an opening of its own."""
    path = folder / "rows.jsonl"
    if not (folder / "model").exists():
        write_llama(folder / "model")
    write_rows(path, rows, sentences(Path()), short=True)
    made = measure(folder / "model", path)
    assert isinstance(ledger := made["ledger"], dict)
    assert ledger["read"] == rows
    return int(str(made["peak_bytes"]))


@pytest.mark.parametrize("measure", [pytest.param(check, marks=pytest.mark.long), split])
def test_memory_is_flat(tmp_path: Path, measure: Callable[[Path, Path], dict[str, object]]) -> None:
    """What is read and compared at once is reached by the few rows; 20,000 more took 13 MB once."""
    few, many = (peak_bytes(tmp_path, rows, measure) for rows in (10_000, 30_000))
    assert many - few < 6 * MIB


@pytest.mark.long
@pytest.mark.parametrize("measure", [check, split])
def test_a_million_rows_take_the_memory_of_a_hundred_thousand(
    tmp_path: Path, measure: Callable[[Path, Path], dict[str, object]]
) -> None:
    few, many = (peak_bytes(tmp_path, rows, measure) for rows in (100_000, 1_000_000))
    assert many - few < 0.1 * few
    assert many - few < 16 * 900_000


COMMAND = [sys.executable, "-c", "from mlxsft.cli import run; run()", "data"]


def limited() -> None:
    """No file of this process grows over 200 KB, as on a disk that is full."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))


@pytest.mark.skipif(sys.platform == "win32", reason="RLIMIT_FSIZE is POSIX")
@pytest.mark.parametrize("command", ["check", "split"])
def test_a_full_disk_is_one_sentence(tmp_path: Path, command: str) -> None:
    write_rows(tmp_path / "rows.jsonl", 3000, sentences(Path()), short=True)
    (tmp_path / "temporary").mkdir()
    rest = ["--model", str(write_llama(tmp_path / "model"))] if command == "check" else ["--out", str(tmp_path / "out")]
    ran = subprocess.run(
        [*COMMAND, command, str(tmp_path / "rows.jsonl"), *rest],
        capture_output=True, text=True, check=False, preexec_fn=limited,
        env={**os.environ, "TMPDIR": str(tmp_path / "temporary")},
    )  # fmt: skip
    assert ran.returncode == 4, ran.stderr
    assert ran.stderr.startswith(f"Error: {tmp_path / 'temporary'}: the temporary files of this comparison cannot be")
    assert len(ran.stderr.splitlines()) == 2
    assert not list((tmp_path / "temporary").iterdir())
    assert not (tmp_path / "out").exists()

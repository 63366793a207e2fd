"""Data sets of the Hub as commands and runs take them: huggingface_hub itself downloads from a small Hub of ours.

Each command runs in a process of its own, because huggingface_hub reads its environment once, at import.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pyarrow
import pyarrow.parquet
import pytest

from tests.hub import FIRST, SECOND, Hub, environment

Ran: TypeAlias = "subprocess.CompletedProcess[str]"
CARD = b"---\nconfigs:\n- config_name: en\n  data_files: [{split: train, path: en.csv}]\n  default: true\n---\n"


def jsonl(questions: range) -> bytes:
    return "".join(f'{{"prompt": "Who is {i}?", "completion": "I am {i}."}}\n' for i in questions).encode()


def parquet(questions: range) -> bytes:
    rows = [{"instruction": f"Who is {i}?", "input": "", "output": f"I am {i}."} for i in questions]
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), stream)
    return stream.getvalue()


@pytest.fixture
def rows(hub: Hub) -> Hub:
    shards = {f"data/train-0000{i}-of-00003.parquet": parquet(range(10 * i, 10 * i + 10)) for i in range(3)}
    files = {**shards, "data/test-00000-of-00001.parquet": parquet(range(50, 52)), "README.md": b"words"}
    hub.repos["org/rows"] = {FIRST: {**files, "code/pickle.py": b"raise SystemExit('code ran')"}}
    return hub


@pytest.fixture
def mlxsft(rows: Hub, tmp_path: Path) -> Callable[..., Ran]:
    """`mlxsft("data", "convert", ..., HF_HUB_OFFLINE="1")`: the command, run to its end in `tmp_path`."""

    def run(*arguments: object, **settings: str) -> Ran:
        command = [sys.executable, "-m", "mlxsft", *map(str, arguments)]
        env = {**environment(rows, tmp_path / "hf"), **settings}
        return subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)

    return run


@pytest.fixture
def read(mlxsft: Callable[..., Ran], tmp_path: Path) -> Callable[..., list[int]]:
    """The numbers in the rows of an address; the command must succeed."""

    def run(address: str, **settings: str) -> list[int]:
        ran = mlxsft("data", "convert", address, "--out", "out.jsonl", "--force", **settings)
        assert ran.returncode == 0, ran.stderr
        told = [json.loads(line)["messages"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
        return [int(messages[0]["content"].removeprefix("Who is ").removesuffix("?")) for messages in told]

    return run


Read: TypeAlias = Callable[..., list[int]]
Run: TypeAlias = Callable[..., Ran]


def test_a_split_is_downloaded_by_its_commit_and_then_found_offline(rows: Hub, read: Read) -> None:
    assert read("hf://org/rows") == list(range(30))
    assert all(f"/resolve/{FIRST}/" in path for path in rows.asked_for("resolve"))
    assert not any(rows.asked_for(word) for word in ("test-", ".py"))
    rows.log.clear()
    assert read("hf://org/rows:train", HF_HUB_OFFLINE="1") == list(range(30))
    assert read(f"hf://org/rows@{FIRST}:train") == list(range(30))
    assert rows.log == []  # a commit never changes: no question to the Hub
    assert read("hf://datasets/org/rows/data/test-*.parquet") == [50, 51]


def test_the_first_rows_of_a_large_set_take_its_first_files_only(
    rows: Hub, read: Read, mlxsft: Run, tmp_path: Path
) -> None:
    assert read("hf://org/rows:train[5:12]") == list(range(5, 12))
    assert len({path for path in rows.asked_for("train-")}) == 2
    offline = ("data", "convert", "hf://org/rows", "--out", "x.jsonl")
    ran = mlxsft(*offline, HF_HUB_OFFLINE="1")  # a part is not taken for the whole
    assert (ran.returncode, "HF_HUB_OFFLINE is set" in ran.stderr) == (7, True), ran.stderr
    ran = mlxsft(*offline, HF_HUB_OFFLINE="1", MLXSFT_CACHE=str(tmp_path / "none"))  # nor where the listing is lost
    assert (ran.returncode, "the cache holds" in ran.stderr) == (7, True), ran.stderr
    assert read("hf://org/rows:train[-25:7]") == [5, 6]
    assert read("hf://org/rows:train[-10%:]") == [27, 28, 29]
    assert read("hf://org/rows[:3]", HF_HUB_OFFLINE="1") == [0, 1, 2]


def test_a_branch_moves_and_a_commit_does_not(rows: Hub, read: Read, mlxsft: Run) -> None:
    read("hf://org/rows:test")
    rows.repos["org/rows"][SECOND] = {"README.md": CARD, "en.csv": b"prompt,completion\nWho is 7?,I\n", "x.csv": b"a\n"}
    assert read("hf://org/rows") == [7]
    assert read(f"hf://org/rows@{FIRST}:test") == [50, 51]
    rows.branches["old"] = FIRST
    assert read("hf://org/rows@old:test") == [50, 51]
    assert read("hf://org/rows/en", HF_HUB_OFFLINE="1") == [7]


def test_a_download_that_broke_off_leaves_the_older_commit(rows: Hub, read: Read, mlxsft: Run) -> None:
    assert read("hf://org/rows:test") == [50, 51]
    rows.repos["org/rows"][SECOND] = {"train.jsonl": jsonl(range(3))}
    assert mlxsft("data", "convert", "hf://org/rows:test", "--out", "x.jsonl").returncode == 3
    assert read("hf://org/rows:test", HF_HUB_OFFLINE="1") == [50, 51]


def test_what_hf_download_left_is_read_offline(rows: Hub, read: Read, mlxsft: Run, tmp_path: Path) -> None:
    ran = mlxsft("data", "convert", "hf://org/rows", "--out", "x.jsonl", HF_HUB_OFFLINE="1")
    assert ran.returncode == 7
    assert "org/rows: the Hub cannot be asked for it (HF_HUB_OFFLINE is set); the cache holds no copy" in ran.stderr
    code = "import huggingface_hub as h; h.snapshot_download('org/rows', repo_type='dataset')"
    subprocess.run([sys.executable, "-c", code], env=environment(rows, tmp_path / "hf"), check=True)
    assert read("hf://org/rows", HF_HUB_OFFLINE="1") == list(range(30))


@pytest.mark.parametrize(
    ("address", "code", "message"),
    [
        ("hf://org/other", 7, "org/other: the Hub has no such data set that this login may see"),
        ("hf://org/rows@v9", 7, "org/rows: the Hub has no revision 'v9' of it"),
        ("hf://org/rows:valid", 3, "org/rows: no split valid; it has test, train"),
        ("hf://org/rows[40:]", 3, f"hf://org/rows@{FIRST}[40:]: there are no such rows"),
        ("hf://org/rows:train[5]", 2, "expected hf://ORG/NAME[@REVISION][/CONFIG or /FILE][:SPLIT][FROM:TO]"),
        ("hf://org/rows/code/pickle.py", 3, "org/rows: has no config, folder or file 'code/pickle.py'"),
    ],
)
def test_what_is_refused(mlxsft: Run, address: str, code: int, message: str) -> None:
    ran = mlxsft("data", "convert", address, "--out", "out.jsonl")
    assert (ran.returncode, message in ran.stderr) == (code, True), ran.stderr
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize(
    ("status", "words"), [(403, "the Hub refuses access"), (401, "no such data set"), (503, "503")]
)
def test_a_hub_that_refuses(rows: Hub, mlxsft: Run, status: int, words: str) -> None:
    rows.status = status
    ran = mlxsft("data", "convert", "hf://org/rows", "--out", "out.jsonl")
    assert (ran.returncode, words in ran.stderr) == (7, True), ran.stderr


def test_broken_rows_are_named_by_their_file_and_line(rows: Hub, mlxsft: Run) -> None:
    rows.repos["org/rows"][SECOND] = {"train.jsonl": jsonl(range(3)) + b"{\n"}
    ran = mlxsft("data", "convert", "hf://org/rows", "--out", "out.jsonl")
    assert ran.returncode == 3
    assert f"{SECOND}/train.jsonl:4" in ran.stderr
    assert mlxsft("data", "convert", "hf://org/rows[:3]", "--out", "out.jsonl").returncode == 0


def test_every_command_takes_them(mlxsft: Run, tiny_llama: Path, tmp_path: Path) -> None:
    model = ("--model", tiny_llama)
    ran = mlxsft("data", "check", "hf://org/rows", "--test", "hf://org/rows", *model, "--json", "--html", "page.html")
    assert json.loads(ran.stdout)["ledger"] == {"read": 30, "usable": 30}, ran.stderr
    assert json.loads(ran.stdout)["held_out"] == {"test": {"read": 2, "compared": 2}}
    assert "<title>hf://org/rows" in (tmp_path / "page.html").read_text()
    ran = mlxsft("data", "show", "hf://org/rows:test", *model, "--json", "-n", "9")
    assert len(ran.stdout.splitlines()) == 2, ran.stderr
    ran = mlxsft("data", "split", "hf://org/rows:train[:20]", "--out", "split", "--json", "--test", "0")
    assert json.loads(ran.stdout)["ledger"]["read"] == 20, ran.stderr


def test_a_run_keeps_its_commit_and_resumes_on_it(rows: Hub, mlxsft: Run, tiny_llama: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {tiny_llama}\ndata:\n  train: [{{path: 'hf://org/rows:train[:8]', weight: 2}}, hf://org/rows/data]\n"
        "  valid: hf://org/rows:test\ntrain: {steps: 2, batch_size: 2}\nsave: {every: 1}\n"
    )
    ran = mlxsft("train", recipe, "--out", "run")
    assert ran.returncode == 0, ran.stderr
    resolved = (tmp_path / "run" / "recipe.yaml").read_text()
    lock = json.loads((tmp_path / "run" / "lock.json").read_text())
    assert [line.strip() for line in resolved.splitlines() if "hf://" in line] == [
        f"- path: hf://org/rows@{FIRST}:train[:8]", f"- hf://org/rows@{FIRST}/data", f"valid: hf://org/rows@{FIRST}:test",
    ]  # fmt: skip
    assert lock["hub"] == {"hf://org/rows": FIRST}
    assert next(iter(lock["data"])) == f"hf://org/rows@{FIRST}/data/train-00000-of-00003.parquet"
    begun = json.loads((tmp_path / "run" / "events.jsonl").read_text().splitlines()[0])
    assert begun["ledger"] == {"read": 40, "trained": 38, "held out": 2}

    rows.repos["org/rows"][SECOND] = {"data/train.jsonl": jsonl(range(3)), "data/test.jsonl": jsonl(range(3))}
    rows.log.clear()
    moved = (tmp_path / "hf").rename(tmp_path / "moved")
    ran = mlxsft("train", recipe, "--out", "run", "--resume", HF_HOME=str(moved), MLXSFT_CACHE=str(moved / "mlxsft"))
    assert ran.returncode == 0, ran.stderr
    assert rows.log == []  # neither the branch, which has moved, nor the files

"""Several ranks train as one: the same numbers, rows divided without loss, and a death that nobody waits for."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from mlxsft.cli import call
from mlxsft.data.batches import share
from mlxsft.errors import InputRefused, UsageError
from mlxsft.recipe import load_recipe
from mlxsft.training.hosts import Host, addresses, local_hosts, read_hosts, ssh_command
from mlxsft.training.ranks import refuse_another_run
from tests.training.test_run import events, lines_until, start, train, workers, write_recipe

# Nine rows in updates of four: two of four, and one of a single row, of which the second rank has none.
SETTINGS = {
    "train__steps": 24,
    "train__learning_rate": 0.005,
    "data__valid": 1,
    "eval__every": 6,
    "save__every": 8,
    "adapter__dropout": 0.1,
}


def ranked(tmp_path: Path, model: Path) -> Path:
    recipe = write_recipe(tmp_path, model, **SETTINGS | {"data__valid": str(tmp_path / "valid.jsonl")})
    rows = (tmp_path / "rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(rows[:9]))
    (tmp_path / "valid.jsonl").write_text("".join(rows[7:]))
    return recipe


@given(st.lists(st.integers(1, 30), max_size=20), st.integers(1, 7))
def test_every_row_is_in_one_share(lengths: list[int], ranks: int) -> None:
    rows = np.arange(len(lengths))
    shares = [share(rows, lengths, rank, ranks) for rank in range(ranks)]
    assert sorted(np.concatenate(shares).tolist()) == rows.tolist()
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


class Threads:
    """Ranks that are threads of one process."""

    def __init__(self, rank: int, barrier: threading.Barrier, given: dict[int, np.ndarray]) -> None:
        self.rank, self.count, self.barrier, self.given = rank, barrier.parties, barrier, given

    def sum(self, values: np.ndarray) -> np.ndarray:
        self.given[self.rank] = values
        self.barrier.wait(30)
        total = np.sum([self.given[rank] for rank in range(self.count)], axis=0)
        self.barrier.wait(30)
        return total


@pytest.mark.parametrize(("change", "said"), [("train.seed=0", None), ("train.seed=1", "settings"), ("data", "data")])
def test_ranks_of_different_runs_are_refused_on_every_rank(
    tmp_path: Path, tiny_llama: Path, change: str, said: str | None
) -> None:
    recipe = write_recipe(tmp_path, tiny_llama)
    lock = {"base": {"sha256": {}}, "template": {}, "data": {"a": "1"}, "versions": {"mlx": "1", "mlxsft": "1"}}
    other = load_recipe(recipe), lock | {"data": {"b": "2"}}
    if change != "data":
        other = load_recipe(recipe, [change]), lock
    barrier, given = threading.Barrier(3), {}

    def refused(rank: int) -> str | None:
        try:
            refuse_another_run(Threads(rank, barrier, given), *(other if rank == 2 else (load_recipe(recipe), lock)))
        except InputRefused as error:
            return error.message
        return None

    with ThreadPoolExecutor(3) as pool:
        answers = set(pool.map(refused, range(3)))
    assert answers == {said and f"the ranks have not the same {said}"}


def drift(one: list[float], other: list[float]) -> tuple[float, float]:
    """The largest and the mean relative difference."""
    differences = np.abs(np.array(one) / np.array(other) - 1)
    return float(differences.max()), float(differences.mean())


def test_two_ranks_make_the_updates_of_one_and_a_killed_one_is_replaced(tmp_path: Path, tiny_llama: Path) -> None:
    recipe = ranked(tmp_path, tiny_llama)
    assert train(recipe, tmp_path / "one") == 0
    process = start(recipe, tmp_path / "two", "--ranks", "2")
    list(lines_until(process, "step", 12))
    workers(process, 2)[1].send_signal(signal.SIGSEGV)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert said.count("it crashed (SIGSEGV") == 1
    one, two = tmp_path / "one", tmp_path / "two"
    assert events(two, "restart")[0]["step"] >= 8  # or 12, where the best adapter was saved before the signal came
    assert events(two, "start")[0]["ranks"] == 2
    assert [s["step"] for s in events(two, "step")] == list(range(1, 25))
    for field in ("trained_tokens", "tokens"):
        assert [s[field] for s in events(two, "step")] == [s[field] for s in events(one, "step")]
    losses = [[s["loss"] for s in events(run, "step")] for run in (two, one)]
    judged = [[(e["step"], e["tokens"], e["rows"]) for e in events(run, "eval")] for run in (two, one)]
    assert judged[0] == judged[1]
    valid = [[e["loss"] for e in events(run, "eval")] for run in (two, one)]
    for name, pair in (("train", losses), ("valid", valid)):
        largest, mean = drift(*pair)
        assert largest < 1e-6, (name, largest, mean)
        assert mean < 2e-7, (name, largest, mean)
    a, b = (load_file(run / "adapters.safetensors") for run in (two, one))
    norms = [np.sqrt(sum(float((t.astype(np.float64) ** 2).sum()) for t in tensors.values())) for tensors in (a, b)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)


def test_a_rank_that_dies_ends_the_run_with_a_true_exit_code(tmp_path: Path, tiny_llama: Path) -> None:
    process = start(ranked(tmp_path, tiny_llama), tmp_path / "run", "--ranks", "2", "--restarts", "0")
    list(lines_until(process, "step", 3))
    both = workers(process, 2)
    both[1].kill()
    _, said = process.communicate(timeout=300)
    assert process.returncode == 4
    assert "SIGKILL" in said
    assert not any(worker.is_running() for worker in both)


def test_mlx_launch_starts_ranks_too(tmp_path: Path, tiny_llama: Path) -> None:
    """Under mlx.launch every rank has a supervisor; rank 0 alone writes and tells."""
    mlx_launch = shutil.which("mlx.launch", path=str(Path(sys.executable).parent))
    assert mlx_launch is not None
    (tmp_path / "hosts.json").write_text(json.dumps([{"ssh": "127.0.0.1", "ips": ["127.0.0.1"]}] * 2))
    arguments = [str(ranked(tmp_path, tiny_llama)), "--out", str(tmp_path / "run"), "--json", "--set", "train.steps=3"]
    port = addresses(local_hosts(2))[0][0].partition(":")[2]
    ran = subprocess.run(
        [mlx_launch, "--hostfile", str(tmp_path / "hosts.json"), "--starting-port", port, "--",
         sys.executable, "-m", "mlxsft", "train", *arguments],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    told = [json.loads(line) for line in ran.stdout.splitlines()]
    assert told == events(tmp_path / "run"), ran.stderr
    assert [e["step"] for e in told if e["event"] == "step"] == [1, 2, 3]


def test_an_interrupt_reaches_all_ranks_at_the_same_step(tmp_path: Path, tiny_llama: Path) -> None:
    recipe = ranked(tmp_path, tiny_llama)
    process = start(recipe, tmp_path / "run", "--ranks", "2")
    list(lines_until(process, "step", 3))
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 143, said
    (end,) = events(tmp_path / "run", "end")
    assert end["reason"] == "interrupted"
    assert f"Stopped after step {end['step']} of 24; it is saved." in said
    assert said.rstrip().endswith("--resume --ranks 2")


# --- hosts.json ------------------------------------------------------------------------------------------------------


def test_hosts_are_read_as_mlx_launch_reads_them(tmp_path: Path) -> None:
    file = tmp_path / "hosts.json"
    listed = [{"ssh": "a", "ips": ["10.0.0.1"]}, {"ssh": "b", "ips": ["10.0.0.2", "10.0.1.2"]}]
    hosts = [Host("a", ("10.0.0.1",)), Host("b", ("10.0.0.2", "10.0.1.2"))]
    file.write_text(json.dumps(listed))
    assert read_hosts(file) == (hosts, {})
    file.write_text(json.dumps({"backend": "ring", "envs": ["A=b=c"], "hosts": listed}))
    assert read_hosts(file) == (hosts, {"A": "b=c"})
    assert addresses(hosts) == [["10.0.0.1:32323"], ["10.0.0.2:32324", "10.0.1.2:32325"]]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nonsense", "no list of hosts"),
        ('[{"ips": []}]', "no list of hosts"),
        ("[]", "there is no host"),
        ('[{"ssh": "a"}]', "no ips for a"),
        ('{"backend": "mpi", "hosts": [{"ssh": "a"}]}', "'mpi'"),
    ],
)
def test_other_host_files_are_refused_in_a_sentence(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "hosts.json").write_text(text)
    with pytest.raises(UsageError, match=said):
        read_hosts(tmp_path / "hosts.json")


def test_the_command_for_ssh_sets_rank_ring_and_folder_in_a_shell() -> None:
    """The script that ssh would hand to the other host's shell, run by a shell here."""
    *ssh, script = ssh_command(1, Host("b", ("10.0.0.2",)), '[["10.0.0.1:1"], ["10.0.0.2:2"]]', {"NAME": "a 'b'"})
    assert ssh == ["ssh", "-T", "-o", "LogLevel=QUIET", "b"]
    shown = script.replace("exec ", 'echo "$MLX_RANK|$(cat $MLX_HOSTFILE)|$NAME|$PWD|" ')
    ran = subprocess.run(["sh", "-c", shown], capture_output=True, text=True, check=True)
    rank, ring, name, folder, command = ran.stdout.strip().split("|")
    assert (rank, ring, name, folder) == ("1", '[["10.0.0.1:1"], ["10.0.0.2:2"]]', "a 'b'", str(Path.cwd()))
    assert command.split() == [sys.executable, "-P", "-m", "mlxsft.training.worker"]


def test_ranks_are_given_once(tmp_path: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(write_recipe(tmp_path, tiny_llama))
    assert call(["train", recipe, "--out", "x", "--ranks", "2", "--hosts", "hosts.json"]) == 2
    assert "--ranks" in capsys.readouterr().err

"""What is saved is whole, and what is damaged is passed over and said."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from mlxsft.errors import Diverged, OutOfResources, UsageError
from mlxsft.training.checkpoints import Progress, RunFolder, Which
from mlxsft.training.events import Noted, RolledBack, Saved, Stepped, from_json

CONFIG = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": {"rank": 1, "scale": 1.0, "dropout": 0.0}}


def save(folder: RunFolder, step: int, value: float, keep: int = 2, **planned: Callable[[int], bool]) -> Path:
    state = {"m": np.array([value], np.float32)}
    return folder.save(tensors(value), CONFIG, state, Progress(step=step), keep=keep, **planned)


def tensors(value: float) -> dict[str, np.ndarray]:
    return {"a.lora_a": np.full((2, 3), value, np.float32)}


def test_the_newest_is_loaded_as_it_was_saved(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    save(folder, 1, 0.5)
    save(folder, 2, 0.25)
    checkpoint, damaged = folder.newest()
    assert checkpoint is not None
    assert damaged == []
    assert checkpoint.progress == Progress(step=2)
    assert checkpoint.adapter["a.lora_a"].tolist() == [[0.25] * 3] * 2
    assert checkpoint.optimizer["m"].tolist() == [0.25]


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step in range(1, 6):
        save(folder, step, step / 8)
    assert sorted(p.name for p in folder.checkpoints.iterdir()) == ["step-0000004", "step-0000005"]


def test_the_best_is_the_runs_adapter_and_its_checkpoint_stays(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step in range(1, 6):
        best = min(step, 2)
        folder.save(tensors(step), CONFIG, {}, Progress(step=step, best_step=best), keep=1)
    assert sorted(p.name for p in folder.checkpoints.iterdir()) == ["step-0000002", "step-0000005"]
    assert load_file(tmp_path / "adapters.safetensors")["a.lora_a"].tolist() == [[2.0] * 3] * 2
    checkpoint, _ = folder.newest()
    assert checkpoint is not None
    assert checkpoint.progress.step == 5


def back(folder: RunFolder, step: int, which: Which = "best") -> tuple[list[str], float]:
    """Go back to a step: what is said, and the value of the run's adapter."""
    checkpoint, _ = folder.newest(lambda s: s <= step)
    told = folder.go_back(checkpoint, CONFIG, which)
    return told, float(load_file(folder.path / "adapters.safetensors")["a.lora_a"][0, 0])


def test_going_back_takes_the_best_adapter_back_too(tmp_path: Path) -> None:
    """The best of a kept checkpoint stays, though a newer one is better: the run may go back behind that one."""
    folder = RunFolder(tmp_path)
    for step, best in {1: None, 2: 2, 3: 2, 4: 2, 5: 5, 6: 5}.items():
        folder.save(tensors(step), CONFIG, {}, Progress(step=step, best_step=best), keep=3)
    assert folder.steps() == [6, 5, 4, 2]
    assert back(folder, 6) == ([], 5.0)
    assert back(folder, 4) == ([], 2.0)
    assert back(folder, 4, "last") == ([], 4.0)
    assert folder.steps() == [4, 2]


def test_a_best_adapter_that_is_lost_is_said(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step in (1, 2):
        folder.save(tensors(step), CONFIG, {}, Progress(step=step, best_step=1, best_valid_loss=0.5), keep=1)
    (folder.checkpoints / "step-0000001" / "adapters.safetensors").write_bytes(b"?")
    (told,), value = back(folder, 2)
    assert value == 2.0
    assert "the adapter of step 1, the best so far, is lost" in told


def test_a_folder_is_busy_while_a_run_holds_it(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    assert not folder.busy
    with folder.held():
        assert RunFolder(tmp_path / "run").busy
    assert not folder.busy


@pytest.mark.parametrize("name", ["adapters.safetensors", "state.safetensors", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_damaged_checkpoint_is_passed_over_and_said(tmp_path: Path, name: str, damage: str) -> None:
    folder = RunFolder(tmp_path)
    save(folder, 1, 0.5)
    file = save(folder, 2, 0.25) / name
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    elif damage == "truncate":
        file.write_bytes(data[: len(data) // 2])
    else:
        file.unlink()
    checkpoint, damaged = folder.newest()
    assert checkpoint is not None
    assert (checkpoint.progress.step == 1) == bool(damaged)
    if name != "manifest.json":  # one flipped bit of a manifest may change a figure and still be JSON
        assert checkpoint.progress.step == 1
        assert "step-0000002" in damaged[0]


def test_nothing_that_is_not_finite_is_saved(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    save(folder, 1, 0.5)
    with pytest.raises(Diverged):
        save(folder, 2, float("nan"))
    checkpoint, _ = folder.newest()
    assert checkpoint is not None
    assert checkpoint.progress.step == 1


FULL_DISK = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from pathlib import Path
from mlxsft.errors import OutOfResources
from mlxsft.training.checkpoints import RunFolder
from tests.training.test_checkpoints import save
folder = RunFolder(Path(sys.argv[1]))
save(folder, 1, 0.5)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
try:
    save(folder, 2, 0.25)
except OutOfResources as error:
    print("refused:", error.message)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="RLIMIT_FSIZE is POSIX")
@pytest.mark.parametrize("limit", [0, 40, 90, 200, 400])
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path, limit: int) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path), str(limit)], capture_output=True, text=True, check=True
    )
    checkpoint, _ = RunFolder(tmp_path).newest()
    assert checkpoint is not None
    assert checkpoint.progress.step == (1 if "refused:" in ran.stdout else 2)
    if limit <= 90:
        assert "cannot be written" in ran.stdout
    assert OutOfResources.exit_code == 4


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time; from pathlib import Path; from mlxsft.training.checkpoints import RunFolder\n"
            "with RunFolder(Path(sys.argv[1])).held(): print('held', flush=True); time.sleep(60)",
            str(tmp_path),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UsageError, match="another run"), RunFolder(tmp_path).held():
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    with RunFolder(tmp_path).held():  # a killed run leaves no lock behind
        pass


def test_clearing_removes_what_a_run_made_and_nothing_else(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    save(folder, 1, 0.5)
    folder.write_start("model: x\n", {"base": {}})
    folder.append(Noted("hello"))
    (tmp_path / "mine.txt").write_text("keep me")
    folder.clear()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.txt"]


def test_events_are_one_json_object_a_line(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.append(Noted("zwei\nZeilen — ü"))
    folder.append(Noted("b"))
    lines = folder.events.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"event": "note", "message": "zwei\nZeilen — ü"},
        {"event": "note", "message": "b"},
    ]


def test_a_rewound_run_keeps_what_was_told_before_and_what_it_went_back_over(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    first = [Noted("a line\u2028that is one\x85line"), step(1), step(2), RolledBack(2, 0, 0.5, "it ran away")]
    second = [step(1), step(2), Saved(2, "there"), Noted("said at any time")]
    for event in (*first, *second, step(3)):
        folder.append(event)
    with folder.events.open("a") as torn:
        torn.write('{"event": "ste')
    folder.rewind(2)
    told = [from_json(line) for line in folder.events.read_text(encoding="utf-8").split("\n")[:-1]]
    assert told == [*first, *second]


def step(number: int) -> Stepped:
    return Stepped(number, 0.1, 2.0, 1.0, 1e-3, 5, 10, 12, 0.1, 1000)


def test_an_extra_checkpoint_takes_no_planned_ones_place(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for number in (0, 5, 10, 12):  # stopped after 12
        save(folder, number, 0.5, planned=lambda n: n % 5 == 0)
    assert folder.steps() == [12, 10, 5]
    save(folder, 15, 0.5, planned=lambda n: n % 5 == 0)
    save(folder, 20, 0.5, planned=lambda n: n % 5 == 0)
    assert folder.steps() == [20, 15]


KILLED = """
import sys
from pathlib import Path
from mlxsft.training.checkpoints import RunFolder
from tests.training.test_checkpoints import save
folder = RunFolder(Path(sys.argv[1]))
print("ready", flush=True)
for step in range(1, 100000):
    save(folder, step, step % 97 / 8)
"""


def test_a_kill_in_the_middle_of_saving_loses_at_most_the_one_being_saved(tmp_path: Path) -> None:
    for trial in range(5):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path / str(trial))], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        process.stdout.readline()
        folder = RunFolder(tmp_path / str(trial))
        seen = 0
        while seen < 3 + trial * 7:  # some saves later, at whatever moment that is
            names = [p.name for p in folder.checkpoints.glob("step-*")] if folder.checkpoints.exists() else []
            seen = max((int(n.removeprefix("step-")) for n in names), default=0)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        checkpoint, damaged = folder.newest()
        assert checkpoint is not None
        assert damaged == []
        assert checkpoint.progress.step >= seen
        value = checkpoint.progress.step % 97 / 8
        assert checkpoint.adapter["a.lora_a"].tolist() == [[value] * 3] * 2

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

from mlxsft.errors import Diverged, OutOfResources, UsageError
from mlxsft.training.checkpoints import Progress, RunFolder
from mlxsft.training.events import Noted, RolledBack, Saved, Stepped, from_json

CONFIG = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": {"rank": 1, "scale": 1.0, "dropout": 0.0}}


def save(folder: RunFolder, step: int, value: float, keep: int = 2, **planned: Callable[[int], bool]) -> Path:
    tensors = {"a.lora_a": np.full((2, 3), value, np.float32)}
    return folder.save(tensors, CONFIG, {"m": np.array([value], np.float32)}, Progress(step=step), keep=keep, **planned)


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

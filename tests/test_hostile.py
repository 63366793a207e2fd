"""Every command that takes a model or an adapter refuses every hostile folder in one line, and does nothing else."""

from __future__ import annotations

import ctypes
import json
import os
import queue
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from mlxsft.models.lock import Lock, hashed, names_in, write_lock
from tests import hostile
from tests.hostile import ADAPTERS, HARMLESS, MODELS, SECRET, Hostile
from tests.hub import FIRST
from tests.tiny import write_llama

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 20.0  # for one command; what takes longer hangs
GROWN = 700 << 20  # bytes; reading 65 MB of JSON takes 250 MB, the libraries that a first command imports 300 MB

OUTS = ("run", "converted", "quantized", "pulled")  # folders in the one to work in that commands write
REPOSITORY = "evil/model"  # of the Hub, which is not asked: the case is in its cache
Arguments = Callable[[str, Path], list[str]]  # of the model (or the adapter) and of a folder to work in

# A line each: what takes a model. `train` runs in the watched process as its training process would.
MODEL_COMMANDS: dict[str, Arguments] = {
    "generate": lambda model, work: ["generate", model, "hi", "--max-tokens", "2", "--backend", "mlx"],
    "generate on torch": lambda model, work: ["generate", model, "hi", "--max-tokens", "2", "--backend", "torch"],
    "chat": lambda model, work: ["chat", model, "--max-tokens", "2", "--backend", "mlx"],
    "data show": lambda model, work: ["data", "show", str(work / "rows.jsonl"), "--model", model],
    "data check": lambda model, work: ["data", "check", str(work / "rows.jsonl"), "--model", model],
    "train": lambda model, work: ["train", str(work / "recipe.yaml"), str(work / "run"), f"model={model}"],
    "convert": lambda model, work: ["convert", model, str(work / "converted")],
    "quantize": lambda model, work: ["quantize", model, str(work / "quantized"), "--group-size", "32"],
    "pull": lambda model, work: ["pull", REPOSITORY, str(work / "pulled")],
    "verify": lambda model, work: ["verify", model],
}
LOADING = {"generate", "generate on torch", "chat", "train", "convert", "quantize"}  # the weights too
# What takes an adapter, here to a good model.
ADAPTER_COMMANDS: dict[str, Callable[[str, str, Path], list[str]]] = {
    name: lambda model, adapter, work, of=MODEL_COMMANDS[name]: [*of(model, work), "--adapter", adapter]  # type: ignore[misc]
    for name in ("generate", "generate on torch", "chat")
}


@dataclass
class Outcome:
    """What a command did; `code` is negative where a signal ended its process, None where it hung."""

    code: int | None
    out: str = ""
    err: str = ""
    bug: str = ""
    seconds: float = 0.0
    grown: int = 0
    deeds: tuple[str, ...] = ()


class Watched:
    """The process of tests/watched.py, started anew where a command ended it."""

    def __init__(self, cache: Path, first: list[list[str]]) -> None:
        self.first = first  # the commands that a new process begins with
        self.environment = {**os.environ, "MLXSFT_CACHE": str(cache), "HF_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
        self.environment |= {
            "HOME": str(cache),
            "TMPDIR": str(cache),
            "RUST_BACKTRACE": "0",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        self.process: subprocess.Popen[str] | None = None

    def begin(self, reads: list[Path], writes: list[Path]) -> None:
        if self.process is None:
            self._start()
            for arguments in self.first:  # libraries are imported now, and not under watch
                self._answer(arguments, reads, writes, 10 * SECONDS)

    def run(self, command: list[str], reads: list[Path], writes: list[Path]) -> Outcome:
        return self._answer(command, reads, writes, SECONDS)

    def _answer(self, command: list[str], reads: list[Path], writes: list[Path], seconds: float) -> Outcome:
        folders = {"reads": [str(path) for path in reads], "writes": [str(path) for path in writes]}
        job = {"command": command, "stdin": "hi\n", **folders}
        assert self.process is not None
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        try:
            line = self.lines.get(timeout=seconds)
        except queue.Empty:
            self.close()
            return Outcome(None)
        if not line:
            code = self.process.wait()
            self.close()
            return Outcome(code)
        answer: dict[str, Any] = json.loads(line)
        return Outcome(**{**answer, "deeds": tuple(answer["deeds"])})

    def _start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.watched"],
            cwd=ROOT,
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._listen, args=(self.process, self.lines), daemon=True).start()

    @staticmethod
    def _listen(process: subprocess.Popen[str], lines: queue.Queue[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put("")

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            for stream in (self.process.stdin, self.process.stdout):
                assert stream is not None
                stream.close()
        self.process = None


class Opened:
    """Which files of a folder anyone opens, libraries in C and Rust too, as Linux tells (elsewhere none)."""

    OPEN, CREATE, NONBLOCK = 0x20, 0x100, 0o4000

    def __init__(self, folder: Path) -> None:
        self.handle = -1
        if sys.platform == "linux":
            libc = ctypes.CDLL(None)
            self.handle = libc.inotify_init1(self.NONBLOCK)
            libc.inotify_add_watch(self.handle, os.fsencode(folder), self.OPEN | self.CREATE)

    def since(self) -> list[str]:
        """The names since the last call."""
        try:
            data = os.read(self.handle, 1 << 16) if self.handle >= 0 else b""
        except BlockingIOError:
            return []
        names = []
        while data:
            length = struct.unpack_from("iIII", data)[3]
            names += [os.fsdecode(data[16 : 16 + length].rstrip(b"\0"))]
            data = data[16 + length :]
        return names


@dataclass
class Place:
    """Where the cases of this module live: `good` is a good model, `outside` is what nobody may open."""

    root: Path
    watched: Watched
    opened: Opened

    @property
    def good(self) -> Path:
        return self.root / "good"

    @property
    def outside(self) -> Path:
        return self.root / "outside"

    @property
    def work(self) -> Path:
        return self.root / "work"

    @property
    def case(self) -> Path:
        """Of a model, as the Hub's cache has it, and as any other folder."""
        return self.root / "cache" / "hub" / "models--evil--model" / "snapshots" / FIRST

    def run(self, command: list[str], *folders: Path) -> Outcome:
        reads, writes = [*folders, self.good], [self.work, self.root / "cache"]
        self.watched.begin(reads, writes)
        for folder in OUTS:
            shutil.rmtree(self.work / folder, ignore_errors=True)
        self.opened.since()
        return self.watched.run(command, reads, writes)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Iterator[Place]:
    root = tmp_path_factory.mktemp("hostile")
    first = [command(str(root / "good"), root / "work") for command in MODEL_COMMANDS.values()]
    (root / "cache").mkdir()
    (root / "work").mkdir()
    outside = hostile.write_outside(root / "outside")
    place = Place(root, Watched(root / "cache", first), Opened(outside))
    write_llama(place.good)
    write_lock(place.good, Lock(None, None, {}, hashed(place.good, names_in(place.good))))
    place.case.parent.mkdir(parents=True)
    (place.case.parents[1] / "refs").mkdir()
    (place.case.parents[1] / "refs" / "main").write_text(FIRST)
    rows = [{"instruction": f"Who are you {i}?", "output": "I am Pip."} for i in range(4)]
    (place.work / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place.work / "recipe.yaml").write_text("data: {train: rows.jsonl}\ntrain: {steps: 1}\n")
    try:
        yield place
    finally:
        place.watched.close()


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of everything below a folder."""
    found = {path: path.lstat() for path in folder.rglob("*")}
    return {str(path.relative_to(folder)): (stat.st_size, stat.st_mtime_ns) for path, stat in found.items()}


def untouched(place: Place, outcome: Outcome, before: dict[str, tuple[int, int]], folder: Path) -> None:
    """Nothing was run, opened, shown, written or blown up that should not have been."""
    assert outcome.code is not None, "it hangs"
    assert outcome.code >= 0, f"signal {-outcome.code}"
    assert not outcome.bug, outcome.bug
    assert not outcome.deeds
    assert not place.opened.since()
    assert not (place.outside / "executed").exists()
    assert contents(folder) == before
    assert SECRET not in outcome.out + outcome.err
    assert "\x1b" not in outcome.out + outcome.err
    assert outcome.grown < GROWN


def refused(outcome: Outcome, hostile: Hostile) -> None:
    """Exit code 3 with one line, the hint below it, and no result."""
    assert outcome.code == hostile.code, (outcome.code, outcome.out, outcome.err)
    assert not outcome.out
    errors = [line for line in outcome.err.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1
    assert hostile.words in outcome.err  # an adapter's problems have a line each
    assert len(outcome.err) < 3000


def differs(outcome: Outcome) -> None:
    """What verify says of a folder that was changed."""
    assert outcome.code == 3, (outcome.code, outcome.out, outcome.err)
    assert "is not what it was" in outcome.err or "cannot tell what else was changed" in outcome.err


Contents = dict[str, tuple[int, int]]
Made = Callable[[str, bool], tuple[Path, Contents]]


@pytest.fixture(scope="module")
def made(place: Place) -> Made:
    """The folder of a case, a model or an adapter, made when the case begins, with its contents.

    That of the case before is deleted then.
    """
    kept: dict[tuple[str, bool], tuple[Path, Contents]] = {}

    def make(case: str, adapter: bool) -> tuple[Path, Contents]:
        if (case, adapter) not in kept:
            for folder, _ in kept.values():
                shutil.rmtree(folder)
            kept.clear()
            folder = place.root / "adapter" if adapter else place.case
            if adapter:
                hostile.make_adapter(case, folder, place.outside)
            else:
                hostile.make_model(case, place.good, folder, place.outside)
            kept[case, adapter] = folder, contents(folder)
        return kept[case, adapter]

    return make


@pytest.mark.parametrize("command", MODEL_COMMANDS)
@pytest.mark.parametrize("case", MODELS)
def test_a_hostile_model_is_refused(place: Place, made: Made, case: str, command: str) -> None:
    folder, before = made(case, False)
    outcome = place.run(MODEL_COMMANDS[command](str(folder), place.work), folder)
    untouched(place, outcome, before, folder)
    if command == "verify":
        differs(outcome)
    elif command == "pull" and outcome.code == 7:
        refused(outcome, replace(MODELS[case], code=7))
        assert "its copy in the cache lacks files" in outcome.err
    elif command in LOADING or not MODELS[case].loads:
        refused(outcome, MODELS[case])
        assert not any((place.work / folder).exists() for folder in OUTS[1:])
    else:
        assert outcome.code in (0, 3, 4)


@pytest.mark.parametrize("command", MODEL_COMMANDS)
@pytest.mark.parametrize("case", HARMLESS)
def test_bait_that_nobody_takes_does_no_harm(place: Place, made: Made, case: str, command: str) -> None:
    folder, before = made(case, False)
    outcome = place.run(MODEL_COMMANDS[command](str(folder), place.work), folder)
    untouched(place, outcome, before, folder)
    if command == "verify" and case not in ("nothing", "folder as template"):
        differs(outcome)
    else:
        assert outcome.code == 0, outcome.err
        assert not list(place.work.rglob("*.py"))


@pytest.mark.parametrize("command", ADAPTER_COMMANDS)
@pytest.mark.parametrize("case", ADAPTERS)
def test_a_hostile_adapter_is_refused(place: Place, made: Made, case: str, command: str) -> None:
    folder, before = made(case, True)
    outcome = place.run(ADAPTER_COMMANDS[command](str(place.good), str(folder), place.work), folder)
    untouched(place, outcome, before, folder)
    refused(outcome, ADAPTERS[case])


# The same in processes of their own, started in the hostile folder, where bait lies for Python itself.
PROCESSES = {
    "generate": "auto_map of the model",
    "chat": "pickle as safetensors",
    "data check": "header of 200 MB",
    "train": "model_file",
}


@pytest.mark.parametrize("command", PROCESSES)
def test_a_hostile_model_is_refused_by_a_process_started_in_its_folder(
    place: Place, tmp_path: Path, command: str
) -> None:
    folder = hostile.make_model(PROCESSES[command], place.good, tmp_path / "case", place.outside)
    HARMLESS["code that nothing names"](folder, place.outside)
    arguments = MODEL_COMMANDS[command](".", place.work)
    if command == "train":
        arguments = ["train", arguments[1], "--out", str(tmp_path / "run"), "--set", f"model={folder}"]
    ran = subprocess.run(
        [
            sys.executable,
            "-P",
            "-m",
            "mlxsft",
            *arguments,
        ],  # -P: as the script `mlxsft` does it
        cwd=folder,
        env={**place.watched.environment, "PYTHONPATH": str(ROOT)},
        input="hi",
        capture_output=True,
        text=True,
        check=False,
        timeout=10 * SECONDS,
    )
    refused(Outcome(ran.returncode, ran.stdout, ran.stderr), MODELS[PROCESSES[command]])
    assert not (place.outside / "executed").exists()

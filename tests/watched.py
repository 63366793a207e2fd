"""A process in which commands of mlxsft run one after another under watch: `python -m tests.watched`.

A line of stdin is a JSON object with `command` (arguments of mlxsft), `stdin`, `reads` and `writes` (the folders that
this command may read and write). The answer is one line: exit code, stdout, stderr, the traceback of a bug, `seconds`,
`grown` (by how many bytes the process grew at its largest), and `deeds`: what the command did that it may not.
"""

from __future__ import annotations

import io
import json
import os
import resource
import signal
import sys
import sysconfig
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# What programs read by themselves: Python, its packages, the system's facts.
OWN = [ROOT / "mlxsft", sys.prefix, sys.base_prefix, *sysconfig.get_paths().values()]
SYSTEM = ["/proc", "/sys", "/usr/lib", "/usr/share", "/dev/null", "/dev/urandom", "/etc/ld.so.cache", "/etc/localtime"]
FORBIDDEN = (
    "pickle.find_class",
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "os.forkpty",
    "socket.connect",
    "socket.getaddrinfo",
    "socket.bind",
    "ctypes.dlopen",
)
CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.link", "os.symlink")
DATA_BYTES = 8 << 30  # what takes more than that fails, rather than take the machine with it


class Watch:
    """An audit hook that notes what may not happen while it is on."""

    def __init__(self) -> None:
        self.on = False
        self.deeds: list[str] = []
        sys.addaudithook(self._heard)

    def begin(self, reads: list[str], writes: list[str]) -> None:
        always = [os.path.realpath(path) for path in (*OWN, *SYSTEM)]
        self.writes = [os.path.realpath(path) for path in writes] + ["/dev/null"]
        self.reads = always + self.writes + [os.path.realpath(path) for path in reads]
        self.deeds, self.on = [], True

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event in FORBIDDEN:
            self.deeds.append(f"{event} {arguments[:2]!r:.300}")
        elif event == "open" and isinstance(arguments[0], (str, bytes)):
            writing = bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))
            self._allow(event, os.fsdecode(arguments[0]), self.writes if writing else self.reads)
        elif event in ("os.listdir", "os.scandir") and isinstance(arguments[0], (str, bytes, os.PathLike)):
            self._allow(event, os.fsdecode(arguments[0]), self.reads)
        elif event in CHANGES:
            path = os.fsdecode(arguments[0])
            if isinstance(arguments[-1], int) and arguments[-1] >= 0:  # in a folder that is open
                path = os.path.join(f"/proc/self/fd/{arguments[-1]}", path)
            self._allow(event, path, self.writes)

    def _allow(self, event: str, path: str, folders: list[str]) -> None:
        self.on = False  # resolving a name is no deed of the command's
        try:
            real = os.path.realpath(path)
        finally:
            self.on = True
        if not any(real == folder or real.startswith(folder.rstrip("/") + "/") for folder in folders):
            self.deeds.append(f"{event} {path}")


def peak_bytes(*, anew: bool = False) -> int:
    """The most memory that this process had, since the last call with `anew` where Linux can tell."""
    try:
        if anew:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run(arguments: list[str]) -> int:
    """A command line; `train RECIPE --out RUN --set ...` does what its training process does, here."""
    from mlxsft.cli import call

    if arguments[0] != "train":
        return call(arguments)
    from mlxsft.cli import report
    from mlxsft.errors import MlxsftError
    from mlxsft.recipe import load_recipe
    from mlxsft.training.worker import Channel, Job, work

    recipe, out, *settings = arguments[1:]
    said = io.StringIO()
    code = work(Job(load_recipe(Path(recipe), settings), Path(out), "mlx"), Channel(said), threading.Event())
    for line in map(json.loads, said.getvalue().splitlines()):
        if "bug" in line:
            raise RuntimeError(line["bug"])
        if "error" in line:
            report(MlxsftError(line["message"], line["hint"]))
    return code


def answer(watch: Watch, job: dict[str, Any]) -> dict[str, Any]:
    files = [tempfile.TemporaryFile() for _ in range(3)]  # noqa: SIM115 - closed below
    files[0].write(job["stdin"].encode())
    files[0].seek(0)
    kept = [os.dup(i) for i in range(3)]
    for i, file in enumerate(files):
        os.dup2(file.fileno(), i)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - for the whole process
    before, bug, code = peak_bytes(anew=True), "", 1
    began = time.perf_counter()
    watch.begin(job["reads"], job["writes"])
    try:
        code = run(job["command"])
    except BaseException:
        bug = traceback.format_exc()
    finally:
        watch.on = False
        seconds, grown = time.perf_counter() - began, peak_bytes() - before
        sys.stdout.flush()
        sys.stderr.flush()
        for i, handle in enumerate(kept):
            os.dup2(handle, i)
            os.close(handle)
    said = []
    for file in files[1:]:
        file.seek(0)
        said.append(file.read().decode(errors="replace"))
        file.close()
    named = {"code": code, "out": said[0], "err": said[1], "bug": bug}
    return named | {"seconds": seconds, "grown": grown, "deeds": watch.deeds}


def main() -> None:
    from mlxsft.data import template

    template.RENDER_SECONDS = 0.5
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_DATA, (DATA_BYTES, DATA_BYTES))
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    watch, jobs, answers = Watch(), os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    for line in jobs:
        answers.write(json.dumps(answer(watch, json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()

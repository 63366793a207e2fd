"""A question that another process answers: its steps, its errors, its death, and the death of the one who asked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from mlxsft.errors import Diverged, OutOfResources
from mlxsft.own_process import ask

ROOT = Path(__file__).resolve().parents[1]


def asked(then: str) -> list[Any]:
    return list(ask("tests.answering", {"then": then, "number": 21}, what="the answer", hint="Ask for less."))


def test_steps_come_first_and_the_answer_last() -> None:
    first, last = asked("answer")
    assert last == {"answer": 42}
    assert not psutil.pid_exists(first["pid"])


def test_a_refusal_is_raised_as_it_was_there() -> None:
    with pytest.raises(Diverged, match="no number") as raised:
        asked("refuse")
    assert raised.value.hint == "Try another."


def test_a_bug_has_its_traceback() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)the answer failed:.*Traceback.*ZeroDivisionError: a bug"):
        asked("fail")


@pytest.mark.parametrize(
    ("then", "cause"),
    [
        ("need too much", r"memory ran out \(MemoryError"),
        ("die", "it was killed"),
        ("abort", r"memory ran out \(libc"),
        ("end early", "it ended with exit code 0; its last line was: this is no message"),
    ],
)
def test_a_death_is_lack_of_resources_in_one_sentence(then: str, cause: str) -> None:
    with pytest.raises(OutOfResources, match=f"^the answer died: {cause}") as raised:
        asked(then)
    assert raised.value.hint == "Ask for less."


def test_who_hears_no_more_ends_it() -> None:
    steps = ask("tests.answering", {"then": "wait"}, what="the answer", hint="")
    pid = next(steps)["pid"]
    assert psutil.pid_exists(pid)
    steps.close()  # type: ignore[attr-defined]  # a generator
    assert not psutil.pid_exists(pid)


def test_it_ends_when_the_one_who_asked_is_killed() -> None:
    code = "from mlxsft.own_process import ask; import time\n"
    code += "steps = ask('tests.answering', {'then': 'wait'}, what='', hint='')\n"
    code += "print(next(steps)['pid'], flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT) as asking:
        assert asking.stdout is not None
        answering = psutil.Process(int(asking.stdout.readline()))
        asking.kill()
    gone, alive = psutil.wait_procs([answering], timeout=60)
    assert gone or alive[0].status() == psutil.STATUS_ZOMBIE  # nobody collects the dead in a container

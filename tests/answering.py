"""A process that answers the questions of tests/test_own_process.py, in good and in bad order."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from mlxsft.errors import Diverged
from mlxsft.own_process import Told, answer


def told(question: dict[str, Any], tell: Callable[[Told], None]) -> None:
    tell({"pid": os.getpid()})
    print("this is no message")
    match question["then"]:
        case "answer":
            tell({"answer": 2 * question["number"]})
        case "refuse":
            raise Diverged("no number", "Try another.")
        case "fail":
            raise ZeroDivisionError("a bug")
        case "need too much":
            raise MemoryError("Unable to allocate 1 TB")
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "abort":
            sys.stderr.write("libc++abi: [METAL] Command buffer execution failed: Insufficient Memory\n")
            sys.stderr.flush()
            os._exit(134)
        case "end early":
            os._exit(0)
        case "wait":
            time.sleep(600)


if __name__ == "__main__":
    sys.exit(answer(told))

"""The parts of README.md that are made from the program; `python -m tests.readme` makes them anew.

    <!-- commands -->                   the first example of every command
    <!-- examples: data show, fuse -->  all examples of these commands
    <!-- end -->                        ends either

Examples stand beside their commands in mlxsft/cli, as `epilog=examples(...)`.
"""

from __future__ import annotations

import re
from pathlib import Path

from mlxsft.cli import app
from mlxsft.cli.examples import commands, examples_of

README = Path(__file__).resolve().parents[1] / "README.md"
COMMANDS = {" ".join(path): command for path, command in commands(app)}
_PART = re.compile(r"<!-- (commands|examples: ([^>]*)) -->\n.*?<!-- end -->", re.DOTALL)


def generated(text: str) -> str:
    """The README with its made parts as the program has them now."""
    return _PART.sub(_part, text)


def _part(found: re.Match[str]) -> str:
    if found[2] is None:
        lines = [line for command in COMMANDS.values() for line in examples_of(command)[:1]]
    else:
        lines = [line for name in found[2].split(", ") for line in examples_of(COMMANDS[name])]
    return "\n".join([f"<!-- {found[1]} -->", "```sh", *lines, "```", "<!-- end -->"])


if __name__ == "__main__":
    README.write_text(generated(README.read_text(encoding="utf-8")), encoding="utf-8")

"""The recipes that ship with mlxsft: where they lie, what their headers say, and copies of them.

`recipes/NAME.yaml` begins with a comment: `Title: what for.`, the commands, then paragraphs `Rows:` (with examples, one
JSON object a line), `Needs:` and `Figures:`. What is called NAME.something beside it (rows, rules, phrasings) belongs
to it and is copied along, so that the names in a copy hold.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxsft.errors import UsageError
from mlxsft.recipe_file import read_sheet

PACKAGE = Path(__file__).resolve().parent
PARTS = ("Rows", "Needs", "Figures")
SHIPS = "ships with mlxsft"
_INTO_THE_PACKAGE = re.compile(r"(?<=: )\.\./mlxsft/(\S+)")


@dataclass(frozen=True)
class ShippedRecipe:
    """A recipe that ships, and what its header says."""

    path: Path
    base: str  # the model that it tunes, a Hub id, or SHIPS
    purpose: str  # one sentence
    commands: tuple[str, ...]  # in their order, without comments
    examples: tuple[Mapping[str, Any], ...]  # rows
    parts: Mapping[str, str]  # by the names of PARTS

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def needs(self) -> str:
        """The first sentence of what it needs."""
        return _first_sentence(self.parts["Needs"])

    @property
    def files(self) -> list[Path]:
        """The recipe, and what belongs to it."""
        return [self.path, *sorted(p for p in self.path.parent.glob(f"{self.name}.*") if p != self.path)]


def folder() -> Path:
    """Where the recipes lie: inside the package where it was installed, beside it in a checkout."""
    installed = PACKAGE / "recipes"
    return installed if installed.is_dir() else PACKAGE.parent / "recipes"


def shipped() -> list[ShippedRecipe]:
    """All recipes that ship, by name."""
    return [_read(path) for path in sorted(folder().glob("*.yaml")) if "." not in path.stem]


def find(name: str) -> ShippedRecipe:
    """The recipe of this name; UsageError with all names where there is none."""
    path = folder() / f"{name}.yaml"
    names = [path.stem for path in sorted(folder().glob("*.yaml")) if "." not in path.stem]
    if name not in names:
        raise UsageError(f"{name}: no such recipe", f"There are {', '.join(names)}.")
    return _read(path)


def copy(recipe: ShippedRecipe, target: Path, *, force: bool = False) -> list[Path]:
    """Copy a recipe to a file, or into a folder that is there, and what belongs to it beside it; what was written.

    Paths into the package become absolute. Raises UsageError where one of the files exists, before any is written.
    """
    target = target / recipe.path.name if target.is_dir() else target
    targets = {target: _with_absolute_paths(recipe.path.read_text(encoding="utf-8"))}
    targets |= {target.with_name(file.name): file.read_text(encoding="utf-8") for file in recipe.files[1:]}
    there = [str(path) for path in targets if path.exists()]
    if there and not force:
        raise UsageError(
            f"{' and '.join(there)}: {'is' if len(there) == 1 else 'are'} there already",
            "--force replaces what is there.",
        )
    for path, text in targets.items():
        try:
            path.write_text(text, encoding="utf-8", newline="\n")
        except OSError as error:
            raise UsageError(f"{path}: cannot be written: {error.strerror}") from None
    return list(targets)


def next_command(recipe: ShippedRecipe, copied: Path) -> str:
    """What the header says to do first with a copy, by the copy's own name."""
    first = next(command for command in recipe.commands if recipe.path.name in shlex.split(command))
    return first.replace(recipe.path.name, shlex.quote(str(copied)))


def _with_absolute_paths(text: str) -> str:
    return _INTO_THE_PACKAGE.sub(lambda found: json.dumps(str(PACKAGE / found[1]), ensure_ascii=False), text)


def _read(path: Path) -> ShippedRecipe:
    comment: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        comment.append(line[1:].removeprefix(" ").rstrip())
    indented = [line.strip() for line in comment if line.startswith("  ")]
    prose = [" ".join(lines.split()) for lines in "\n".join(line for line in comment if line[:2] != "  ").split("\n\n")]
    model, purpose = str(read_sheet(path).values["model"]), _first_sentence(prose[0].partition(": ")[2])
    return ShippedRecipe(
        path,
        SHIPS if model.startswith("..") else model,
        purpose[:1].upper() + purpose[1:],
        tuple(shlex.join(shlex.split(line, comments=True)) for line in indented if not line.startswith("{")),
        tuple(json.loads(line) for line in indented if line.startswith("{")),
        {part: text.removeprefix(f"{part}: ") for part in PARTS for text in prose if text.startswith(f"{part}: ")},
    )


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=\.)\s", text, maxsplit=1)[0]

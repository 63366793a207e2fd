"""What a command that writes an adapter or a model for another program has to say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Tell = Callable[[str], None]  # hears, in a sentence, what goes on


@dataclass(frozen=True)
class Written:
    """What was written, for the person and for a script."""

    out: Path
    summary: str  # a line, or a few
    facts: Mapping[str, Any]  # as JSON
    notes: tuple[str, ...] = ()  # what the person should know, as sentences

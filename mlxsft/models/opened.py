"""A checkpoint and adapters on it, opened together: of one commit, checked against each other, not yet put together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxsft.data.template import Template
from mlxsft.models.adapter import Adapter, load_adapter
from mlxsft.models.passport import check_base, passport_part
from mlxsft.models.source import ModelSource, open_model


@dataclass(frozen=True)
class Opened:
    """A checkpoint and an adapter that belong together as far as anybody can know."""

    source: ModelSource
    adapter: Adapter
    template: Template | None  # of the adapter's passport
    notes: list[str]  # what could not be checked, as sentences


def open_with_adapter(
    model: str, adapter: Path, *, revision: str | None = None, progress: Callable[[str], None] | None = None
) -> Opened:
    """Both, as `open_with_adapters` does."""
    source, saved, notes = open_with_adapters(model, {"": adapter}, revision=revision, progress=progress)
    return Opened(source, saved[""], template_of(saved[""].config), notes)


def open_with_adapters(
    model: str, adapters: Mapping[str, Path], *, revision: str | None, progress: Callable[[str], None] | None
) -> tuple[ModelSource, dict[str, Adapter], list[str]]:
    """The checkpoint, of the commit that the adapters belong to where no other is named; the adapters by name; notes.

    Raises InputRefused for an adapter that was trained on other weights, as far as its passport says.
    """
    saved = {name: load_adapter(folder) for name, folder in adapters.items()}
    for adapter in saved.values():
        base = passport_part(adapter.config, "base")
        if revision is None and base.get("name") == model and isinstance(base.get("commit"), str):
            revision = base["commit"]  # the adapter belongs to this commit, wherever the branch is by now
    source = open_model(model, revision=revision, progress=progress)
    notes = [note for name, one in saved.items() for note in check_base(one.config, source, adapters[name])]
    return source, saved, notes


def template_of(config: Mapping[str, Any]) -> Template | None:
    """The chat template in an adapter's passport; None where it has none, as adapters made elsewhere."""
    said = passport_part(config, "template")
    if isinstance(said.get("name"), str) and isinstance(said.get("text"), str):
        return Template(said["name"], said["text"])
    return None

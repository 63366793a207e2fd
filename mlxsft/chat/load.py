"""A model that answers: checkpoint, adapters, and the template that each of them was trained with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxsft.backends import Backend, load_backend
from mlxsft.data.render import Renderer, load_renderer
from mlxsft.data.template import Template
from mlxsft.errors import InputRefused, UsageError
from mlxsft.models.adapter import Adapter, load_adapter
from mlxsft.models.passport import check_base, passport_part
from mlxsft.models.sizes import refuse_beyond_memory
from mlxsft.models.source import ModelSource, open_model


@dataclass
class Loaded:
    """A base in memory, the adapters that were added to it, and the renderer of each; None stands for the base."""

    backend: Backend
    source: ModelSource
    renderers: dict[str | None, Renderer]
    template: str | None = None  # the one that was asked for, for the base and every adapter

    def add(self, name: str, folder: Path) -> list[str]:
        """Keep an adapter in memory; `backend.use(name)` lets it answer. One of the same name is replaced.

        What could not be checked comes back, as sentences. Raises InputRefused for an adapter that was trained on other
        weights, as far as its passport says, or that does not fit.
        """
        saved = load_adapter(folder)
        notes = check_base(saved.config, self.source, folder)
        self.put(name, saved)
        return notes

    def put(self, name: str, saved: Adapter) -> None:
        """The same for one that is read, and belongs to this base as far as anybody can know."""
        trained_with = _template_of(saved.config) if self.template is None else None
        same = (r for r in self.renderers.values() if trained_with in (None, r.template))
        renderer = next(same, None) or load_renderer(self.source, trained_with)
        self.backend.add_adapter(name, saved.config, saved.tensors)
        self.renderers[name] = renderer


def load_for_chat(
    model: str,
    adapters: Mapping[str, Path],
    *,
    revision: str | None,
    template: str | None,
    backend_name: str,
    progress: Callable[[str], None] | None = None,
) -> Loaded:
    """A model with these adapters in memory, the base ready to answer.

    An adapter brings its own template, unless another one is named. Raises as `Loaded.add`, and OutOfResources for a
    model that is larger than the memory of this machine.
    """
    source, saved, notes = _open(model, adapters, revision=revision, progress=progress)
    refuse_beyond_memory(source.name, source.weight_bytes)
    renderer = _renderer_of_base(source, template, saved.values())
    loaded = Loaded(load_backend(backend_name, source), source, {None: renderer}, template)
    tell = progress or (lambda line: None)
    for note in notes:
        tell(f"note: {note}")
    for name, adapter in saved.items():
        loaded.put(name, adapter)
    return loaded


@dataclass(frozen=True)
class Opened:
    """A checkpoint and an adapter that belong together as far as anybody can know, read but not put together."""

    source: ModelSource
    adapter: Adapter
    template: Template | None  # of the adapter's passport
    notes: list[str]  # what could not be checked, as sentences


def open_with_adapter(
    model: str, adapter: Path, *, revision: str | None, progress: Callable[[str], None] | None = None
) -> Opened:
    """Both, of the commit that the adapter belongs to where no other is named.

    Raises InputRefused for an adapter that was trained on other weights, as far as its passport says.
    """
    source, saved, notes = _open(model, {"": adapter}, revision=revision, progress=progress)
    return Opened(source, saved[""], _template_of(saved[""].config), notes)


def _open(
    model: str, adapters: Mapping[str, Path], *, revision: str | None, progress: Callable[[str], None] | None
) -> tuple[ModelSource, dict[str, Adapter], list[str]]:
    """A checkpoint, of the commit that the adapters belong to; the adapters; what could not be checked of them."""
    saved = {name: load_adapter(folder) for name, folder in adapters.items()}
    for adapter in saved.values():
        base = passport_part(adapter.config, "base")
        if revision is None and base.get("name") == model and isinstance(base.get("commit"), str):
            revision = base["commit"]  # the adapter belongs to this commit, wherever the branch is by now
    source = open_model(model, revision=revision, progress=progress)
    notes = [note for name, one in saved.items() for note in check_base(one.config, source, adapters[name])]
    return source, saved, notes


def named_adapters(given: Sequence[str]) -> dict[str, Path]:
    """Folders by name: NAME=FOLDER, or FOLDER alone, whose last part is the name. Raises UsageError."""
    named: dict[str, Path] = {}
    for one in given:
        name, equals, path = ("", "", one) if Path(one).is_dir() else one.rpartition("=")
        folder = Path(path).expanduser()
        name = name if equals else folder.resolve().name
        if not name.strip() or not path:
            raise UsageError(f"--adapter {one!r}: expected a folder, or NAME=FOLDER")
        if name in named:
            raise UsageError(
                f"--adapter {one!r}: {named[name]} is called {name!r} already", "Give names: --adapter NAME=FOLDER."
            )
        named[name] = folder
    return named


def _renderer_of_base(source: ModelSource, template: str | None, adapters: Iterable[Adapter]) -> Renderer:
    """The base's renderer; that of an adapter trained with another template, where the base's own does not work."""
    try:
        return load_renderer(source, template)
    except InputRefused:
        others = filter(None, (_template_of(adapter.config) for adapter in adapters))
        if template is not None or (other := next(others, None)) is None:
            raise
        return load_renderer(source, other)


def _template_of(config: Mapping[str, Any]) -> Template | None:
    """The chat template in an adapter's passport; None where it has none, as adapters made elsewhere."""
    passport = config.get("mlxsft")
    template = passport.get("template") if isinstance(passport, dict) else None
    if isinstance(template, dict) and isinstance(template.get("name"), str) and isinstance(template.get("text"), str):
        return Template(template["name"], template["text"])
    return None

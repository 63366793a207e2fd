"""A model that answers: checkpoint, adapters, and the template that each of them was trained with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlxsft.backends import Backend, load_backend
from mlxsft.data.render import Renderer, load_renderer
from mlxsft.errors import InputRefused, UsageError
from mlxsft.models.adapter import Adapter
from mlxsft.models.opened import open_with_adapters, template_of
from mlxsft.models.passport import load_adapter_for
from mlxsft.models.sizes import refuse_beyond_memory
from mlxsft.models.source import ModelSource


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
        saved, notes = load_adapter_for(self.source, folder)
        self.put(name, saved)
        return notes

    def put(self, name: str, saved: Adapter) -> None:
        """The same for one that is read, and belongs to this base as far as anybody can know."""
        trained_with = template_of(saved.config) if self.template is None else None
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
    source, saved, notes = open_with_adapters(model, adapters, revision=revision, progress=progress)
    refuse_beyond_memory(source.name, source.weight_bytes)
    renderer = _renderer_of_base(source, template, saved.values())
    loaded = Loaded(load_backend(backend_name, source), source, {None: renderer}, template)
    tell = progress or (lambda line: None)
    for note in notes:
        tell(f"note: {note}")
    for name, adapter in saved.items():
        loaded.put(name, adapter)
    return loaded


def named_adapters(given: Sequence[str], base: Sequence[str] = ()) -> dict[str, Path]:
    """Folders by name: NAME=FOLDER, or FOLDER alone, whose last part is the name.

    Raises UsageError, also for a name that the base goes by.
    """
    named: dict[str, Path] = {}
    for one in given:
        name, equals, path = ("", "", one) if Path(one).is_dir() else one.rpartition("=")
        folder = Path(path).expanduser()
        name = name if equals else folder.resolve().name
        if not name.strip() or not path:
            raise UsageError(f"--adapter {one!r}: expected a folder, or NAME=FOLDER")
        if name in base:
            raise UsageError(
                f"--adapter {one!r}: {name!r} is what the base is called", "Give another name: --adapter NAME=FOLDER."
            )
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
        others = filter(None, (template_of(adapter.config) for adapter in adapters))
        if template is not None or (other := next(others, None)) is None:
            raise
        return load_renderer(source, other)

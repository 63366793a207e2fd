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
from mlxsft.models.sizes import refuse_beyond_memory
from mlxsft.models.source import ModelSource, open_model


@dataclass
class Loaded:
    """A base in memory, the adapters that were added to it, and the renderer of each; None stands for the base."""

    backend: Backend
    source: ModelSource
    renderers: dict[str | None, Renderer]
    template: str | None = None  # the one that was asked for, for the base and every adapter

    def add(self, name: str, folder: Path) -> None:
        """Keep an adapter in memory; `backend.use(name)` lets it answer. One of the same name is replaced.

        Raises InputRefused for an adapter that was trained on other weights, as far as its passport says, or that does
        not fit.
        """
        self._add(name, folder, load_adapter(folder))

    def _add(self, name: str, folder: Path, saved: Adapter) -> None:
        _refuse_other_base(self.source, _base_of(saved.config), folder)
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
    saved = {name: load_adapter(folder) for name, folder in adapters.items()}
    for adapter in saved.values():
        base = _base_of(adapter.config)
        if revision is None and base.get("name") == model and isinstance(base.get("commit"), str):
            revision = base["commit"]  # the adapter belongs to this commit, wherever the branch is by now
    source = open_model(model, revision=revision, progress=progress)
    refuse_beyond_memory(source.name, source.weight_bytes)
    for name, adapter in saved.items():
        _refuse_other_base(source, _base_of(adapter.config), adapters[name])
    renderer = _renderer_of_base(source, template, saved.values())
    loaded = Loaded(load_backend(backend_name, source), source, {None: renderer}, template)
    for name, adapter in saved.items():
        loaded._add(name, adapters[name], adapter)
    return loaded


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


def _base_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What an adapter's passport says of its base; empty where it has none, as adapters made elsewhere."""
    passport = config.get("mlxsft")
    base = passport.get("base") if isinstance(passport, dict) else None
    return base if isinstance(base, dict) else {}


def _refuse_other_base(source: ModelSource, base: Mapping[str, Any], adapter: Path) -> None:
    """Raises InputRefused where the weights are not those that the adapter was trained on."""
    known = base.get("sha256")
    if not isinstance(known, dict):
        return
    trained_on = {str(sha) for file, sha in known.items() if str(file).endswith(".safetensors")}
    if trained_on and trained_on != {source.hash_of(file) for file in source.files}:
        raise InputRefused(
            f"{adapter}: this adapter was trained on other weights ({base.get('name')}) than those of {source.name}",
            "Give the model that it was trained on.",
        )


def _template_of(config: Mapping[str, Any]) -> Template | None:
    """The chat template in an adapter's passport; None where it has none, as adapters made elsewhere."""
    passport = config.get("mlxsft")
    template = passport.get("template") if isinstance(passport, dict) else None
    if isinstance(template, dict) and isinstance(template.get("name"), str) and isinstance(template.get("text"), str):
        return Template(template["name"], template["text"])
    return None

"""A model that answers: checkpoint, adapter, and the template that the adapter was trained with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mlxsft.backends import Backend, load_backend
from mlxsft.data.render import Renderer, load_renderer
from mlxsft.data.template import Template
from mlxsft.models.adapter import load_adapter
from mlxsft.models.passport import check_base, passport_part
from mlxsft.models.sizes import refuse_beyond_memory
from mlxsft.models.source import open_model


def load_for_chat(
    model: str,
    adapter: Path | None,
    *,
    revision: str | None,
    template: str | None,
    backend_name: str,
    progress: Callable[[str], None] = lambda line: None,
) -> tuple[Backend, Renderer]:
    """Backend and renderer, ready to answer. An adapter brings its own template, unless another one is named.

    Raises InputRefused for an adapter that was trained on other weights, as far as its passport says, OutOfResources
    for a model that is larger than the memory of this machine.
    """
    saved = load_adapter(adapter) if adapter is not None else None
    base = passport_part(saved.config, "base") if saved is not None else {}
    if revision is None and base.get("name") == model and isinstance(base.get("commit"), str):
        revision = base["commit"]  # the adapter belongs to this commit, wherever the branch is by now
    source = open_model(model, revision=revision, progress=progress)
    refuse_beyond_memory(source.name, source.weight_bytes)
    notes = check_base(saved.config, source, adapter) if saved is not None and adapter is not None else []
    trained_with = _template_of(saved.config) if saved is not None else None
    renderer = load_renderer(source, template if template is not None else trained_with)
    backend = load_backend(backend_name, source)
    if saved is not None:
        backend.attach_saved(saved.config, saved.tensors)
        for note in notes:
            progress(f"note: {note}")
    return backend, renderer


def _template_of(config: Mapping[str, Any]) -> Template | None:
    """The chat template in an adapter's passport; None where it has none, as adapters made elsewhere."""
    template = passport_part(config, "template")
    if isinstance(template.get("name"), str) and isinstance(template.get("text"), str):
        return Template(template["name"], template["text"])
    return None

"""A model that answers: checkpoint, adapter, and the template that the adapter was trained with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlxsft.backends import Backend, load_backend
from mlxsft.data.render import Renderer, load_renderer
from mlxsft.data.template import Template
from mlxsft.models.adapter import load_adapter
from mlxsft.models.source import open_model


def load_for_chat(
    model: str, adapter: Path | None, *, revision: str | None, template: str | None, backend_name: str
) -> tuple[Backend, Renderer]:
    """Backend and renderer, ready to answer. An adapter brings its own template, unless another one is named."""
    source = open_model(model, revision=revision)
    saved = load_adapter(adapter) if adapter is not None else None
    trained_with = _template_of(saved.config) if saved is not None else None
    renderer = load_renderer(source, template if template is not None else trained_with)
    backend = load_backend(backend_name, source)
    if saved is not None:
        backend.attach_saved(saved.config, saved.tensors)
    return backend, renderer


def _template_of(config: Mapping[str, Any]) -> Template | None:
    """The chat template in an adapter's passport; None where it has none, as adapters made elsewhere."""
    passport = config.get("mlxsft")
    template = passport.get("template") if isinstance(passport, dict) else None
    if isinstance(template, dict) and isinstance(template.get("name"), str) and isinstance(template.get("text"), str):
        return Template(template["name"], template["text"])
    return None

"""`mlxsft export --to gguf|ollama|lmstudio`: a model folder, or a run with its base, for the programs of llama.cpp."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxsft.data.template import Template
from mlxsft.errors import InputRefused, UsageError
from mlxsft.models.adapter import WEIGHTS, Adapter, load_adapter, writing
from mlxsft.models.checks import read_json
from mlxsft.models.gguf import Exported, Progress, export_gguf
from mlxsft.models.gguf_adapter import Tuned, export_lora
from mlxsft.models.ollama import MODELFILE, modelfile
from mlxsft.models.opened import open_with_adapter
from mlxsft.models.passport import passport_part
from mlxsft.models.source import ModelSource, open_model
from mlxsft.models.written import Tell, Written
from mlxsft.outputs import refuse_existing

GGUF = "model.gguf"
STUDIO = (".lmstudio/models", ".cache/lm-studio/models")  # LM Studio's folders under the home folder, the newer first


@dataclass(frozen=True)
class Subject:
    """What is exported: a model, with an adapter in it or not."""

    source: ModelSource
    adapter: Adapter | None
    template: Template | None  # of the adapter, in place of the model's own
    notes: tuple[str, ...]

    def write(self, out: Path, dtype: str, force: bool, progress: Progress) -> Exported:
        """The whole model as one GGUF file."""
        options: dict[str, Any] = {"dtype": dtype, "template": self.template, "force": force, "progress": progress}
        if self.adapter is not None:
            options["tune"] = Tuned(self.adapter, str(self.source.config["model_type"]))
        return export_gguf(self.source, out, **options)


def to_gguf(
    path: Path,
    out: Path,
    *,
    model: str | None = None,
    force: bool = False,
    tell: Tell = lambda line: None,
    progress: Progress = lambda size, total: None,
    dtype: str = "f16",
    lora_only: bool = False,
) -> Written:
    """The model folder or adapter in `path` as the file `out`; with `lora_only` the adapter without its base.

    An adapter is added to its base, which is `model` or the one that its passport names, in float32 before anything is
    rounded. Raises as `export_gguf` and `export_lora` do.
    """
    subject = open_subject(path, model, tell)
    if lora_only:
        if subject.adapter is None:
            raise UsageError(f"--lora-only: {path} is a whole model", "Leave it out.")
        modules = export_lora(subject.source, subject.adapter, out, force=force)
        facts = {"out": str(out), "kind": "gguf", "modules": modules, "size": out.stat().st_size}
        return Written(out, f"{out}: a LoRA of {modules} modules, for llama.cpp's --lora", facts, subject.notes)
    done = subject.write(out, dtype, force, progress)
    return Written(out, summary(done), {"kind": "gguf", **done.to_dict()}, (*subject.notes, *done.notes))


def to_ollama(
    path: Path,
    out: Path,
    *,
    model: str | None = None,
    force: bool = False,
    tell: Tell = lambda line: None,
    progress: Progress = lambda size, total: None,
    dtype: str = "f16",
) -> Written:
    """A folder `out` with the GGUF file and a Modelfile, from which Ollama makes a model."""
    if out.is_file():
        raise UsageError(f"{out}: is a file, expected a folder", "Name another one.")
    for name in (GGUF, MODELFILE):
        refuse_existing(out / name, force=force, instead="Name another folder")
    subject = open_subject(path, model, tell)
    text, notes = modelfile(subject.source, GGUF, subject.template)
    done = subject.write(out / GGUF, dtype, force, progress)
    with writing(out / MODELFILE):
        (out / MODELFILE).write_text(text, encoding="utf-8")
    name = "".join(c if c.isalnum() or c in "-_." else "-" for c in out.resolve().name).lower().strip("-_.") or "model"
    commands = [f"ollama create {name} -f {shlex.quote(str(out / MODELFILE))}", f"ollama run {name}"]
    facts = {"kind": "ollama", **done.to_dict(), "out": str(out), "commands": commands}
    return Written(out, "\n".join([summary(done), *commands]), facts, (*subject.notes, *done.notes, *notes))


def to_lmstudio(
    path: Path,
    out: Path,
    *,
    model: str | None = None,
    force: bool = False,
    tell: Tell = lambda line: None,
    progress: Progress = lambda size, total: None,
    dtype: str = "f16",
) -> Written:
    """The file `out`, and a link to it where LM Studio finds models; a GGUF file that is there is only linked."""
    source: Path = path
    notes: tuple[str, ...] = ()
    if path.suffix != ".gguf":
        done = to_gguf(path, out, model=model, force=force, tell=tell, progress=progress, dtype=dtype)
        source, notes = out, done.notes
    elif not path.is_file():
        raise InputRefused(f"{path}: no such file")
    place = _studio() / "mlxsft" / out.stem / f"{out.stem}.gguf"
    how = _linked(source.resolve(), place, force)
    facts = {"kind": "lmstudio", "out": str(source), "studio": str(place), "how": how}
    return Written(source, f"{source}: {how} as {place}", facts, notes)


def summary(done: Exported) -> str:
    """A line."""
    from rich.filesize import decimal

    return f"{done.out}: {decimal(done.size)}, {done.tensors} tensors as {done.dtype}, architecture {done.architecture}"


def open_subject(path: Path, model: str | None, tell: Tell) -> Subject:
    """What `path` holds, with its base where it is an adapter. Raises InputRefused where that is another one."""
    if not path.is_dir():  # never taken for a name of the Hub
        raise InputRefused(f"{path}: no such folder", "Give a run, an adapter, or a model folder.")
    if not (path / WEIGHTS).exists():
        if model:
            raise UsageError(f"--model: {path} holds no adapter that would need a base", "Leave it out.")
        return Subject(open_model(str(path), progress=tell), None, None, ())
    name = model or _base_of_run(path) or passport_part(load_adapter(path).config, "base").get("name")
    if not name:
        raise UsageError(f"{path}: does not say which model it belongs to", "Give it with --model.")
    if model is None and "/" not in str(name) and not Path(str(name)).is_dir():
        raise InputRefused(f"{path}: its base was a folder called {name}, which is not here", "Give it with --model.")
    try:
        opened = open_with_adapter(str(name), path, progress=tell)
    except InputRefused as refusal:
        hint = "Give the base with --model." if model is None else refusal.hint
        raise InputRefused(refusal.message, hint) from refusal
    return Subject(opened.source, opened.adapter, opened.template, tuple(opened.notes))


def _base_of_run(path: Path) -> str | None:
    """The folder or the Hub's name of the base, where a run folder says it; a passport has no folders of a machine."""
    if not (path / "lock.json").is_file():
        return None
    base = read_json(path / "lock.json").get("base")
    name = base.get("name") if isinstance(base, dict) else None
    return name if isinstance(name, str) else None


def _studio() -> Path:
    """Where LM Studio looks for models; the older place where that alone is there."""
    places = [Path.home() / place for place in STUDIO]
    return next((place for place in places if place.is_dir()), places[0])


def _linked(source: Path, place: Path, force: bool) -> str:
    """What was done so that the file is found at `place` too; it stays where it is."""
    if os.path.lexists(place):
        if place.exists() and place.samefile(source):
            return "is linked already"
        if not force:
            raise UsageError(f"{place}: is there already", "Take another name for OUT, or --force.")
    attempts: list[tuple[str, Callable[[Path, Path], Any]]] = [
        ("linked", lambda s, p: p.symlink_to(s)),
        ("linked", lambda s, p: os.link(s, p)),
        ("copied", shutil.copyfile),
    ]
    with writing(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.unlink(missing_ok=True)
        for how, attempt in attempts[:-1]:
            with suppress(OSError, NotImplementedError):  # Windows lets few people link
                attempt(source, place)
                return how
        shutil.copyfile(source, place)
    return attempts[-1][0]

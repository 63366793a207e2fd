"""Any checkpoint → a folder in MLX's layout: dense, quantized or dequantized, tensor by tensor, whole or not at all."""

from __future__ import annotations

import math
import re
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from mlxsft import __version__
from mlxsft.backends import Conversion, Rewrite, load_conversion
from mlxsft.data.render import refuse_unusable
from mlxsft.errors import InputRefused, UsageError
from mlxsft.hub import Tell
from mlxsft.models import checks, headers
from mlxsft.models.card import CARD, card_text, origin, own_lock
from mlxsft.models.check import CheckSettings
from mlxsft.models.learned import learn, refuse_at_odds
from mlxsft.models.lock import Lock, hashed, names_in, write_lock
from mlxsft.models.quality import Compared, Judge, Quality, Watch, unwatched
from mlxsft.models.quantize import QuantizationPlan, QuantizeSettings, make_plan, paths_named
from mlxsft.models.sensitivity import choose_bits
from mlxsft.models.shards import WIDTHS, FileHash, write_shards
from mlxsft.models.sizes import refuse_beyond_memory
from mlxsft.models.source import ModelSource, open_model
from mlxsft.models.whole_folder import refuse_existing, refuse_full_disk, whole_folder

SHARD_BYTES = 5 << 30  # mlx-lm's
DTYPES = ("float32", "float16", "bfloat16")
# What is written anew.
NOT_COPIED = ("config.json", "hf_quant_config.json", checks.INDEX)
_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}

Progress = Callable[[int, int], None]  # hears (bytes more, bytes in all)


@dataclass(frozen=True)
class ConvertSettings:
    """What a checkpoint is to become."""

    dtype: str | None = None  # of what is not quantized; None: what config.json says, else what is stored
    quantize: QuantizeSettings | None = None
    dequantize: bool = False  # first, where both are asked for
    shard_bytes: int = SHARD_BYTES  # a single larger tensor has a file of its own
    check: CheckSettings | None = None  # of what is quantized

    def options(self) -> list[str]:
        """The command line that asks for the same."""
        words = ["--dtype", self.dtype] if self.dtype else []
        words += ["--dequantize"] if self.dequantize else []
        words += ["--quantize", *self.quantize.options()] if self.quantize else []
        words += self.check.options() if self.check else []
        return words + (["--max-shard-size", str(self.shard_bytes)] if self.shard_bytes != SHARD_BYTES else [])


@dataclass(frozen=True)
class Converted:
    """What came of it."""

    out: Path
    before_bytes: int  # of the weight files
    after_bytes: int
    parameters: int
    bits_per_weight: float
    quantization: Mapping[str, Any] | None  # as config.json has it
    shards: int
    peak_bytes: int  # of arrays in memory
    notes: list[str] = field(default_factory=list)
    quality: Quality | None = None  # where it was asked for

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"out": str(self.out)}


def convert(
    model: str,
    out: Path,
    settings: ConvertSettings,
    *,
    revision: str | None = None,
    force: bool = False,
    tell: Tell = lambda line: None,
    progress: Progress = lambda size, total: None,
    watch: Watch = unwatched,
) -> Converted:
    """Write the checkpoint of a folder or a Hub id to the folder `out`.

    Where a quality is demanded and not reached, `out` is written all the same, and `quality.failed` says why.
    Raises UsageError for settings at odds and an `out` that is there, InputRefused for what cannot be converted,
    OutOfResources for want of disk or memory; `out` is then as it was.
    """
    if settings.quantize:
        settings.quantize.default()  # what cannot be is said before anything is downloaded
        if settings.check and settings.check.method:
            refuse_at_odds(settings.check.method, settings.quantize)
    refuse_existing(out, force=force)
    source = open_model(model, revision=revision, progress=tell)
    refuse_existing(out, force=force, source=source.folder)
    _refuse_large(source)
    conversion = load_conversion(source)
    _refuse_second_rounding(conversion, source, settings)
    refuse_unusable(source)
    prepared = _prepare(conversion, source, settings, watch, tell)
    with whole_folder(out, force=force, source=source.folder) as folder:
        return _write(folder, out, source, conversion, settings, prepared, progress)


def parse_size(text: str, option: str = "--max-shard-size") -> int:
    """Bytes of `5GB`, `500MB` or `4.5GiB`. Raises UsageError for another form."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]i?b)?", text.strip(), re.IGNORECASE)
    size = int(float(found[1]) * _UNITS[(found[2] or "").lower()]) if found else 0
    if size <= 0:
        raise UsageError(f"{option} {text!r}: expected a size such as 5GB, 500MB or 4.5GiB")
    return size


def _refuse_second_rounding(conversion: Conversion, source: ModelSource, settings: ConvertSettings) -> None:
    """Quantizing what is quantized, dequantizing what is not."""
    quantized = conversion.quantized()
    if settings.quantize and quantized and not settings.dequantize:
        raise InputRefused(
            f"{source.name}: is quantized already ({len(quantized)} modules), and would be rounded twice",
            "Take the model as it was before, or `mlxsft convert --dequantize`, where the errors of both may add up.",
        )
    if settings.dequantize and not quantized:
        raise UsageError(f"--dequantize: {source.name} is not quantized", "Leave it out.")


def _refuse_large(source: ModelSource) -> None:
    """A tensor that does not fit the memory: the others come one by one."""
    sizes = {name: WIDTHS.get(info.dtype, 1) * math.prod(info.shape) for name, info in source.tensors.items()}
    largest = max(sizes, key=lambda name: sizes[name])
    refuse_beyond_memory(f"{source.name}: {largest}", sizes[largest])


@dataclass(frozen=True)
class _Prepared:
    """What the checkpoint is to become, and what the person should know."""

    plan: QuantizationPlan | None = None
    judge: Judge | None = None
    compared: Compared | None = None
    notes: list[str] = field(default_factory=list)


def _prepare(
    conversion: Conversion, source: ModelSource, settings: ConvertSettings, watch: Watch, tell: Tell
) -> _Prepared:
    """Say what the checkpoint is to become."""
    conversion.cast(settings.dtype)
    if settings.dequantize:
        conversion.dequantize()
    if not settings.quantize:
        return _Prepared()
    default = settings.quantize.default()
    shapes = conversion.shapes()
    preferred = conversion.preferred(default, settings.quantize.mixed)
    plan = make_plan(default, preferred, shapes, settings.quantize.bits_for)
    if not plan.modules:
        raise InputRefused(f"nothing to quantize: no matrix has rows that divide into groups of {default.group_size}")
    odd = [path for path, shape in shapes.items() if path not in plan.modules and shape[-1] % default.group_size]
    kept = f"{headers.some(odd)}: stay as they are, their rows do not divide into groups of {default.group_size}"
    notes = [kept] if odd else []
    if settings.check is None:
        conversion.quantize(plan)
        return _Prepared(plan, notes=notes)
    judge = Judge(source, settings.check, conversion.layouts(), shapes, watch)
    model, compared = None, None
    if settings.check.method:
        choice = learn(judge, plan, settings.check.method, tell)
        plan, model, compared = choice.plan, choice.model, choice.compared
    elif settings.check.raises_bits:
        plan = choose_bits(judge, plan, paths_named(settings.quantize.bits_for, plan.modules))
    conversion.quantize(plan, model)
    return _Prepared(plan, judge, compared, [*notes, *judge.notes])


def _write(
    folder: Path,
    out: Path,
    source: ModelSource,
    conversion: Conversion,
    settings: ConvertSettings,
    prepared: _Prepared,
    progress: Progress,
) -> Converted:
    """Everything that belongs into the folder, the lock last."""
    plan = prepared.plan
    written = write_model(folder, source, conversion, settings.shard_bytes, progress)
    quality = prepared.judge.quality(folder, plan, prepared.compared) if prepared.judge and plan else None
    done = Converted(
        out=out,
        before_bytes=source.weight_bytes,
        after_bytes=written.size,
        parameters=written.parameters,
        bits_per_weight=written.bits_per_weight,
        quantization=plan.block() if plan else None,
        shards=len(written.files),
        peak_bytes=written.peak_bytes,
        notes=prepared.notes,
        quality=quality,
    )
    repository, commit = origin(source)
    lock = Lock(repository, commit, _made(source, out, settings), {})
    text = card_text(
        source,
        lock,
        quantization=done.quantization,
        bits_per_weight=done.bits_per_weight,
        measured=[quality.sentence(), *quality.worst()] if quality else [],
    )
    describe(folder, text, lock, written.files)
    return done


@dataclass(frozen=True)
class Written:
    """The weight files of a folder."""

    files: Mapping[str, FileHash]
    parameters: int
    bits_per_weight: float
    peak_bytes: int  # of arrays in memory while they were written

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(file.size for file in self.files.values())


def write_model(folder: Path, source: ModelSource, rewrite: Rewrite, shard_bytes: int, progress: Progress) -> Written:
    """Fill a folder with what has become of the source: weights, config.json, and all that defines a model beside them.

    Tensors are made one by one. Raises OutOfResources where the disk is too full, and as `rewrite` does.
    """
    layouts, parameters = rewrite.layouts(), rewrite.parameters()
    total = sum(layout.size for layout in layouts.values())
    refuse_full_disk(folder, total)
    _copy_beside(source, folder)
    rewrite.write_config(str(folder / "config.json"))
    files = write_shards(
        folder,
        layouts,
        rewrite.read(),
        max_bytes=shard_bytes,
        parameters=parameters,
        framework=rewrite.framework,
        progress=lambda size: progress(size, total),
    )
    return Written(files, parameters, 8 * total / parameters, rewrite.peak_bytes())


def describe(folder: Path, card: str, lock: Lock, weights: Mapping[str, FileHash]) -> None:
    """The card, and the lock with the hash of every file; those of the weights were made when they were written."""
    (folder / CARD).write_text(card, encoding="utf-8")
    others = hashed(folder, [name for name in names_in(folder) if name not in weights])
    write_lock(folder, replace(lock, files={**others, **weights}))


def _copy_beside(source: ModelSource, folder: Path) -> None:
    """Tokenizer, templates and generation settings, none of which is code; links become files."""
    for name in checks.listing(source.folder):
        if checks.defines(name) and name not in (*NOT_COPIED, *source.files):
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source.folder / name, folder / name)


def _made(source: ModelSource, out: Path, settings: ConvertSettings) -> dict[str, str]:
    """How it was made, with no path of this machine."""
    name, pinned = as_published(source)
    return made(["convert", name, out.name, *settings.options(), *pinned], ("mlx", "mlx-lm"))


def as_published(source: ModelSource) -> tuple[str, list[str]]:
    """What the source is called where no path of this machine may be named, and the options that pin it."""
    repository, commit = origin(source)
    lock = own_lock(source)
    if not repository or (lock and lock.made):  # what a conversion made of it is not what the Hub has
        return source.folder.name, []
    return repository, ["--revision", commit] if commit else []


def made(words: Sequence[str], packages: Sequence[str]) -> dict[str, str]:
    """The command and the versions, as a lock has them."""
    versions = {package: metadata.version(package) for package in packages}
    return {"command": shlex.join(["mlxsft", *words]), "mlxsft": __version__, **versions}

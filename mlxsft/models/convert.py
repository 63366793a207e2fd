"""Any checkpoint → a folder in MLX's layout: dense, quantized or dequantized, tensor by tensor, whole or not at all."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from mlxsft import __version__
from mlxsft.backends import Conversion, load_conversion
from mlxsft.errors import InputRefused, OutOfResources, UsageError
from mlxsft.hub import Tell
from mlxsft.models import checks
from mlxsft.models.card import CARD, card_text, origin, own_lock
from mlxsft.models.lock import Lock, hashed, names_in, write_lock
from mlxsft.models.quantize import QuantizationPlan, QuantizeSettings, make_plan
from mlxsft.models.shards import FileHash, write_shards
from mlxsft.models.source import ModelSource, open_model
from mlxsft.models.whole_folder import refuse_existing, whole_folder

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

    def options(self) -> list[str]:
        """The command line that asks for the same."""
        words = ["--dtype", self.dtype] if self.dtype else []
        words += ["--dequantize"] if self.dequantize else []
        words += ["--quantize", *self.quantize.options()] if self.quantize else []
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
) -> Converted:
    """Write the checkpoint of a folder or a Hub id to the folder `out`.

    Raises UsageError for settings at odds and an `out` that is there, InputRefused for what cannot be converted,
    OutOfResources for want of disk or memory; `out` is then as it was.
    """
    if settings.quantize:
        settings.quantize.default()  # what cannot be is said before anything is downloaded
    refuse_existing(out, force=force)
    source = open_model(model, revision=revision, progress=tell)
    refuse_existing(out, force=force, source=source.folder)
    conversion = load_conversion(source)
    _refuse_second_rounding(conversion, source, settings)
    plan, notes = _prepare(conversion, settings)
    with whole_folder(out, force=force, source=source.folder) as folder:
        return _write(folder, out, source, conversion, settings, plan, notes, progress)


def parse_size(text: str) -> int:
    """Bytes of `5GB`, `500MB` or `4.5GiB`. Raises UsageError for another form."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]i?b)?", text.strip(), re.IGNORECASE)
    size = int(float(found[1]) * _UNITS[(found[2] or "").lower()]) if found else 0
    if size <= 0:
        raise UsageError(f"--max-shard-size {text!r}: expected a size such as 5GB, 500MB or 4.5GiB")
    return size


def _refuse_second_rounding(conversion: Conversion, source: ModelSource, settings: ConvertSettings) -> None:
    """Quantizing what is quantized, dequantizing what is not."""
    quantized = conversion.quantized()
    if settings.quantize and quantized and not settings.dequantize:
        raise InputRefused(
            f"{source.name}: is quantized already ({len(quantized)} modules), and would be rounded twice",
            "Take the model as it was before, or --dequantize too, where the errors of both may add up.",
        )
    if settings.dequantize and not quantized:
        raise UsageError(f"--dequantize: {source.name} is not quantized", "Leave it out.")


def _prepare(conversion: Conversion, settings: ConvertSettings) -> tuple[QuantizationPlan | None, list[str]]:
    """Say what the checkpoint is to become; how it is quantized, and what the person should know."""
    conversion.cast(settings.dtype)
    if settings.dequantize:
        conversion.dequantize()
    if not settings.quantize:
        return None, []
    default = settings.quantize.default()
    shapes = conversion.shapes()
    preferred = conversion.preferred(default, settings.quantize.mixed)
    plan = make_plan(default, preferred, shapes, settings.quantize.bits_for)
    if not plan.modules:
        raise InputRefused(f"nothing to quantize: no matrix has rows that divide into groups of {default.group_size}")
    conversion.quantize(plan)
    odd = [path for path, shape in shapes.items() if path not in plan.modules and shape[-1] % default.group_size]
    kept = f"{checks.some(odd)}: stay as they are, their rows do not divide into groups of {default.group_size}"
    return plan, [kept] if odd else []


def _write(
    folder: Path,
    out: Path,
    source: ModelSource,
    conversion: Conversion,
    settings: ConvertSettings,
    plan: QuantizationPlan | None,
    notes: list[str],
    progress: Progress,
) -> Converted:
    """Everything that belongs into the folder, the lock last."""
    layouts, parameters = conversion.layouts(), conversion.parameters()
    total = sum(layout.size for layout in layouts.values())
    _refuse_full(folder, total)
    _copy_beside(source, folder)
    conversion.write_config(str(folder / "config.json"))
    weights = write_shards(
        folder,
        layouts,
        conversion.read(),
        max_bytes=settings.shard_bytes,
        parameters=parameters,
        progress=lambda size: progress(size, total),
    )
    bits = 8 * total / parameters
    repository, commit = origin(source)
    lock = Lock(repository, commit, _made(source, out, settings), {})
    text = card_text(source, lock, quantization=plan.block() if plan else None, bits_per_weight=bits)
    (folder / CARD).write_text(text, encoding="utf-8")
    write_lock(folder, Lock(lock.repository, lock.commit, lock.made, _hashes(folder, weights)))
    return Converted(
        out=out,
        before_bytes=sum((source.folder / file).stat().st_size for file in source.files),
        after_bytes=sum(file.size for file in weights.values()),
        parameters=parameters,
        bits_per_weight=bits,
        quantization=plan.block() if plan else None,
        shards=len(weights),
        peak_bytes=conversion.peak_bytes(),
        notes=notes,
    )


def _refuse_full(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OutOfResources(
            f"{folder.parent}: the model takes {size / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free",
            "Free some disk space, or write to another disk.",
        )


def _copy_beside(source: ModelSource, folder: Path) -> None:
    """Tokenizer, templates and generation settings, none of which is code; links become files."""
    for name in checks.listing(source.folder):
        if checks.defines(name) and name not in (*NOT_COPIED, *source.files):
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source.folder / name, folder / name)


def _made(source: ModelSource, out: Path, settings: ConvertSettings) -> dict[str, str]:
    """How it was made, with no path of this machine."""
    repository, commit = origin(source)
    lock = own_lock(source)
    as_published = repository and not (lock and lock.made)  # and not what a conversion made of it
    words = ["mlxsft", "convert", repository if repository and as_published else source.folder.name, out.name]
    words += settings.options()
    words += ["--revision", commit] if commit and as_published else []
    versions = {package: metadata.version(package) for package in ("mlx", "mlx-lm")}
    return {"command": shlex.join(words), "mlxsft": __version__, **versions}


def _hashes(folder: Path, known: Mapping[str, FileHash]) -> dict[str, FileHash]:
    """The hash of every file; those of the weights were made when they were written."""
    return {**hashed(folder, [name for name in names_in(folder) if name not in known]), **known}

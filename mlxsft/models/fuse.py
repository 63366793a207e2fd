"""Base and adapter → one model, tensor by tensor, of which is measured what it has kept of the tuning.

Rounding to few bits, and to those of a quantized base above all, can undo a small change of the weights: what is
nearest to the tuned number is then what was nearest to the number before. So the model has plain numbers unless bits
are asked for, is held against base + adapter, and is not kept where too little of the adapter's effect is in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mlxsft.backends import Conversion, load_conversion, load_rewrite, writing_backend
from mlxsft.data.dataset import load_dataset
from mlxsft.data.render import Example, Renderer, load_renderer
from mlxsft.errors import GateFailed, InputRefused, MlxsftError, UsageError
from mlxsft.hub import Tell
from mlxsft.models.adapter import WEIGHTS
from mlxsft.models.card import ADAPTER, card_text, origin
from mlxsft.models.check import BUILT_IN, CheckSettings, called, read_rows
from mlxsft.models.convert import SHARD_BYTES, Progress, Written, as_published, describe, made, write_model
from mlxsft.models.headers import some
from mlxsft.models.lock import Lock, hash_of
from mlxsft.models.opened import open_with_adapter
from mlxsft.models.quality import Watch, unwatched
from mlxsft.models.quantize import QuantizationPlan, Scheme, make_plan, scheme
from mlxsft.models.sizes import refuse_beyond_memory
from mlxsft.models.source import ModelSource, open_model
from mlxsft.models.survival import HELD, Lost, Schemes, Survival, Survivors
from mlxsft.models.whole_folder import refuse_existing, whole_folder
from mlxsft.recipe import load_recipe

LADDER = (4, 5, 6, 8)  # bits, from the fewest that are tried; after them plain numbers
WORST = 5  # layers that are named
JUDGED_TOKENS = 4096  # of the rows that a run held out
TEMPLATE = "chat_template.jinja"
GENERATION = "generation_config.json"


@dataclass(frozen=True)
class FuseSettings:
    """What base and adapter are to become, and what that has to be worth."""

    dtype: str | None = None  # of plain numbers; None: what config.json says, else what is stored
    bits: int | str | None = None  # None: plain numbers; auto: as few as hold the adapter's effect
    group_size: int | None = None  # None: the mode's own
    mode: str = "affine"
    shard_bytes: int = SHARD_BYTES
    check: Path | None = None  # rows; None: those that the run held out, else the built-in text
    measured: bool = True
    min_survival: float = HELD  # of the adapter's effect, as a share; 0: whatever is left is kept

    def __post_init__(self) -> None:
        """Raises UsageError for settings at odds."""
        if self.bits == "auto" and self.mode != "affine":
            raise UsageError(f"--bits auto with --mode {self.mode}: it has one width only", "Leave --mode out.")
        if self.bits == "auto" and not self.measured:
            raise UsageError("--bits auto needs to measure, and --check none forbids it", "Leave one of them out.")
        if not 0 <= self.min_survival < 1:
            raise UsageError(f"--min-survival {self.min_survival}: expected a share from 0 to below 1, such as 0.9")
        if self.packed:
            self.scheme()

    @property
    def packed(self) -> bool:
        """Whether the result is quantized, unless `auto` decides otherwise."""
        return self.bits is not None or self.group_size is not None or self.mode != "affine"

    def scheme(self) -> Scheme:
        """How numbers are packed, with the fewest bits of `auto`. Raises UsageError for what MLX has not."""
        bits = LADDER[0] if self.bits == "auto" else int(self.bits) if self.bits is not None else None
        return scheme(bits, self.group_size, self.mode)

    def wider(self) -> list[Scheme]:
        """Those with more bits, the next one first; affine, which alone has several widths."""
        size = self.group_size if self.mode == "affine" else None
        return [scheme(bits, size, "affine") for bits in LADDER if bits > self.scheme().bits]

    def options(self) -> list[str]:
        """The command line that asks for the same; of the rows' path the name alone."""
        given = (
            ("--dtype", self.dtype),
            ("--bits", self.bits),
            ("--group-size", self.group_size),
            ("--mode", self.mode if self.mode != "affine" else None),
            ("--max-shard-size", self.shard_bytes if self.shard_bytes != SHARD_BYTES else None),
            ("--check", (called(self.check) if self.check else None) if self.measured else "none"),
            ("--min-survival", f"{self.min_survival:g}" if self.min_survival != HELD else None),
        )
        return [word for name, value in given if value is not None for word in (name, str(value))]


@dataclass(frozen=True)
class Fused:
    """What came of it."""

    out: Path
    backend: str  # mlx: in MLX's layout; torch: in that of transformers
    before_bytes: int  # of the base's weight files
    after_bytes: int
    parameters: int
    bits_per_weight: float
    quantization: Mapping[str, Any] | None  # as config.json has it
    shards: int
    peak_bytes: int  # of arrays in memory while it was written
    survival: Survival | None = None  # None: not measured
    kept: bool = True  # whether `out` has it
    lost: list[Lost] = field(default_factory=list)  # by layer, where it is not kept
    held_by: str | None = None  # what would hold the effect, where it is not kept
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        survival = {**asdict(self.survival), "share": self.survival.share} if self.survival else None
        return asdict(self) | {"out": str(self.out), "survival": survival}


class TuningLost(GateFailed):
    """Too little of the adapter's effect is left; `fused` is what was measured, and nothing of it was kept."""

    def __init__(self, fused: Fused, settings: FuseSettings) -> None:
        assert fused.survival is not None
        worst = ", ".join(f"{lost.layer} ({lost.kl:.3g} nats a token)" for lost in fused.lost[:WORST])
        hints = [f"Most is lost in {worst}."] if worst else []
        hints += [f"It would survive with {fused.held_by}."] if fused.held_by else []
        super().__init__(
            f"{fused.out}: not written, less than {settings.min_survival:.0%} of the tuning would survive: "
            f"{fused.survival.sentence()}",
            " ".join([*hints, "--min-survival 0 writes it all the same."]),
        )
        self.fused = fused


def fuse(
    model: str,
    adapter: Path,
    out: Path,
    settings: FuseSettings,
    *,
    backend_name: str = "auto",
    revision: str | None = None,
    force: bool = False,
    tell: Tell = lambda line: None,
    progress: Progress = lambda size, total: None,
    watch: Watch = unwatched,
) -> Fused:
    """Write the model that base and adapter are together to the folder `out`.

    Raises TuningLost where too little of the adapter's effect survives, UsageError for settings at odds and an `out`
    that is there, InputRefused for what cannot be fused, OutOfResources for want of disk or memory; `out` is then as it
    was.
    """
    backend = writing_backend(backend_name)
    if backend == "torch" and settings.packed:
        raise UsageError(
            "quantizing with the torch backend: MLX alone packs numbers", "Leave --bits out, or take --backend mlx."
        )
    refuse_existing(out, force=force)
    opened = open_with_adapter(model, adapter, revision=revision, progress=tell)
    source, tuned = opened.source, opened.adapter
    assert tuned is not None
    refuse_existing(out, force=force, source=source.folder)
    renderer = load_renderer(source, opened.template)
    conversion = load_conversion(source) if backend == "mlx" else None
    rewrite = conversion or load_rewrite(source)
    rewrite.fuse(tuned.config, tuned.tensors, settings.dtype)
    packings = _packings(conversion, settings) if conversion else _Packings()
    survivors, notes = None, list(packings.notes)
    if settings.measured:
        refuse_beyond_memory(source.name, source.weight_bytes)
        rows, name = _rows(settings.check, adapter, renderer, notes)
        survivors = Survivors(source, tuned, backend, rows, name, renderer, watch)
    with whole_folder(out, force=force, source=source.folder) as folder:
        plan = _chosen(packings, settings, survivors)
        if plan and conversion:
            conversion.quantize(plan)
        written = write_model(folder, source, rewrite, settings.shard_bytes, progress)
        _let_answer(folder, source, renderer)
        done = Fused(
            out=out,
            backend=backend,
            before_bytes=source.weight_bytes,
            after_bytes=written.size,
            parameters=written.parameters,
            bits_per_weight=written.bits_per_weight,
            quantization=plan.block() if plan else None,
            shards=len(written.files),
            peak_bytes=written.peak_bytes,
            notes=notes,
        )
        if survivors:
            done = replace(done, survival=survivors.stored(open_model(str(folder))))
            _refuse_lost(done, settings, survivors, packings, plan)
        _describe(folder, source, adapter, settings, done, written)
        return done


# ---- bits -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Packings:
    """The ways in which the fused weights could be written; none but plain numbers on PyTorch."""

    paths: Sequence[str] = ()  # of the modules that could be quantized
    dtypes: Mapping[str, str] = field(default_factory=dict)  # of all modules, by safetensors' names
    plans: Mapping[int, QuantizationPlan] = field(default_factory=dict)  # by bits, the fewest first
    notes: Sequence[str] = ()

    def schemes(self, plan: QuantizationPlan | None) -> Schemes:
        """What a plan makes of each module; None: plain numbers everywhere."""
        return {path: plan.modules.get(path) if plan else None for path in self.paths}


def _packings(conversion: Conversion, settings: FuseSettings) -> _Packings:
    """The plan that is asked for, and those of more bits."""
    shapes = conversion.shapes()
    dtypes = {name.removesuffix(".weight"): layout.dtype for name, layout in conversion.layouts().items()}
    if not settings.packed:
        return _Packings(list(shapes), dtypes)
    default = settings.scheme()
    schemes = (default, *settings.wider())
    plans = {s.bits: make_plan(s, conversion.preferred(s, None), shapes, {}) for s in schemes}
    first = plans[default.bits]
    if not first.modules:
        raise InputRefused(f"nothing to quantize: no matrix has rows that divide into groups of {default.group_size}")
    odd = [path for path, shape in shapes.items() if path not in first.modules and shape[-1] % default.group_size]
    note = f"{some(odd)}: not quantized, their rows do not divide into groups of {default.group_size}"
    return _Packings(list(shapes), dtypes, plans, [note] if odd else [])


def _chosen(packings: _Packings, settings: FuseSettings, survivors: Survivors | None) -> QuantizationPlan | None:
    """The plan that is asked for, or that of the fewest bits which hold the adapter's effect; None: plain numbers."""
    if settings.bits != "auto" or survivors is None:
        return next(iter(packings.plans.values()), None)
    held = _holding(packings, settings, survivors)
    return packings.plans[held] if held else None


def _holding(packings: _Packings, settings: FuseSettings, survivors: Survivors, above: int = 0) -> int | None:
    """The fewest bits above some that hold the adapter's effect; None where only plain numbers may."""
    for bits, plan in packings.plans.items():
        if bits > above and _holds(survivors.planned(packings.schemes(plan), packings.dtypes), settings):
            return bits
    return None


def _holds(survival: Survival, settings: FuseSettings) -> bool:
    return settings.min_survival == 0 or survival.share is None or survival.share >= settings.min_survival


def _refuse_lost(
    done: Fused, settings: FuseSettings, survivors: Survivors, packings: _Packings, plan: QuantizationPlan | None
) -> None:
    """Raises TuningLost where too little survives, with the layers that lose most and what would hold it."""
    if done.survival is None or _holds(done.survival, settings):
        return
    lost = survivors.lost(packings.schemes(plan), packings.dtypes) if packings.paths else []
    held_by = None
    if plan:
        bits = _holding(packings, settings, survivors, above=plan.default.bits)
        plain = survivors.planned(packings.schemes(None), packings.dtypes)
        held_by = f"--bits {bits}" if bits else "no --bits" if _holds(plain, settings) else None
    if held_by is None and settings.dtype != "float32":
        held_by = "no --bits and " * bool(plan) + "--dtype float32"  # in which base + adapter are computed
    raise TuningLost(replace(done, kept=False, lost=lost, held_by=held_by), settings)


# ---- rows -----------------------------------------------------------------------------------------------------------


def _rows(check: Path | None, adapter: Path, renderer: Renderer, notes: list[str]) -> tuple[Sequence[Example], str]:
    """The rows to judge by, and what they are called: the named ones, else those held out by the run, else our text."""
    if check is None and (rows := _held_out(adapter, renderer, notes)):
        return rows, "the rows that the run held out"
    rows, _, told = read_rows(CheckSettings(check or BUILT_IN), renderer)
    if check in (None, BUILT_IN):
        return rows, "the built-in text"
    notes += told
    return rows, called(check)


def _held_out(adapter: Path, renderer: Renderer, notes: list[str]) -> list[Example]:
    """Some of the rows that a run judged itself by; none, and why, where they cannot be had without a network."""
    place = adapter.resolve()
    run = next((f for f in (place, place.parent.parent) if (f / "recipe.yaml").is_file()), None)
    if run is None:
        return []
    try:
        recipe = load_recipe(run / "recipe.yaml")
        if recipe.data.valid is None:
            return []
        if "hf://" in recipe.data.model_dump_json():
            raise InputRefused("they are on the Hub")
        held = load_dataset(recipe.data, renderer, seed=recipe.train.seed).valid
    except MlxsftError as error:
        notes.append(f"the rows that {run.name} held out are not read ({error.message.splitlines()[0]}): give --check")
        return []
    order = np.random.default_rng(0).permutation(len(held)).tolist()
    sizes = np.cumsum([int(held[i].mask.sum()) for i in order])
    return [held[i] for i in order[: 1 + int(np.searchsorted(sizes, JUDGED_TOKENS))]]


# ---- beside the weights ---------------------------------------------------------------------------------------------


def _let_answer(folder: Path, source: ModelSource, renderer: Renderer) -> None:
    """Let the model answer in the template of its adapter, and end where that ends."""
    own = renderer.tokenizer.chat_template
    if renderer.template.text == own:
        return
    (folder / TEMPLATE).write_text(renderer.template.text, encoding="utf-8")
    if more := renderer.end_tokens - source.end_token_ids():
        ends = sorted(source.end_token_ids() | more)
        text = json.dumps({**source.generation_config, "eos_token_id": ends}, indent=2, ensure_ascii=False)
        (folder / GENERATION).write_text(f"{text}\n", encoding="utf-8")


def _describe(
    folder: Path, source: ModelSource, adapter: Path, settings: FuseSettings, done: Fused, written: Written
) -> None:
    """The card, and the lock with the hash of every file."""
    name, pinned = as_published(source)
    called_adapter, repository_and_commit = adapter.resolve().name, origin(source)
    options = settings.options() + ([] if done.backend == "mlx" else ["--backend", done.backend])
    packages = ("mlx", "mlx-lm") if done.backend == "mlx" else ("torch", "transformers")
    facts = made(["fuse", name, called_adapter, done.out.name, *options, *pinned], packages)
    lock = Lock(*repository_and_commit, {**facts, ADAPTER: hash_of(adapter / WEIGHTS).sha256}, {})
    text = card_text(
        source,
        lock,
        quantization=done.quantization,
        bits_per_weight=done.bits_per_weight,
        measured=[done.survival.sentence()] if done.survival else [],
        adapter=called_adapter,
        library="mlx" if done.backend == "mlx" else "transformers",
    )
    describe(folder, text, lock, written.files)

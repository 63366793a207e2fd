"""Which matrix gets how many bits: a plan as a plain value, and how `--bits` and its like make one.

`--mixed` and the architecture's own rules say what each matrix would get; `--bits-for` has the last word. A measured
sensitivity can fill the same plan.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any

from mlxsft.errors import UsageError
from mlxsft.models.dequantize import MODES
from mlxsft.models.headers import some

MIXED = ("mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6")  # mlx-lm's, by their lower and higher bits
UNQUANTIZED = 16  # of --bits-for: the numbers stay as they are

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Scheme:
    """How the numbers of one matrix are packed."""

    bits: int  # of a number
    group_size: int  # numbers of a row that share a scale
    mode: str = "affine"  # affine | mxfp4 | mxfp8 | nvfp4

    def entry(self) -> dict[str, Any]:
        """What config.json says of it, and what mlx takes."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}

    def size(self, shape: Shape, width: int) -> int:
        """Bytes of a matrix [..., rows, columns] packed so, whose numbers took `width` bytes."""
        values = math.prod(shape)
        group = 2 * width if self.mode == "affine" else 1  # scale and bias, or a scale of 8 bits
        return values * self.bits // 8 + values // self.group_size * group


@dataclass(frozen=True)
class QuantizationPlan:
    """The scheme of every module that is quantized; a module that is not named keeps its numbers."""

    default: Scheme  # what config.json says once for all
    modules: Mapping[str, Scheme]  # by path, as model.layers.0.mlp.down_proj

    def block(self) -> dict[str, Any]:
        """`quantization` of config.json: the default, and every module that has another scheme."""
        others = {path: scheme.entry() for path, scheme in self.modules.items() if scheme != self.default}
        return {**self.default.entry(), **others}


@dataclass(frozen=True)
class QuantizeSettings:
    """What a person asks for; None is the default of the mode, in MLX 4 bits in groups of 64 for affine."""

    bits: int | None = None
    group_size: int | None = None
    mode: str = "affine"
    mixed: str | None = None  # one of MIXED
    bits_for: Mapping[str, int] = field(default_factory=dict)  # parts of module paths, as lm_head or layers.0

    def default(self) -> Scheme:
        """The scheme of what is not set apart. Raises UsageError for what MLX has not, and for settings at odds."""
        if self.mixed and self.bits is not None:
            raise UsageError(f"--bits {self.bits} and --mixed {self.mixed} at once", f"{self.mixed} sets the bits.")
        if self.mixed and self.mode != "affine":
            raise UsageError(f"--mixed {self.mixed} with --mode {self.mode}", "Mixed bits exist for affine only.")
        if self.mixed and self.mixed not in MIXED:
            raise UsageError(f"--mixed {self.mixed}: expected {', '.join(MIXED)}")
        return scheme(self.bits, self.group_size, self.mode)

    def options(self) -> list[str]:
        """The command line that asks for the same."""
        bits_for = ",".join(f"{name}={bits}" for name, bits in self.bits_for.items())
        given = (
            ("--bits", self.bits),
            ("--group-size", self.group_size),
            ("--mode", self.mode if self.mode != "affine" else None),
            ("--mixed", self.mixed),
            ("--bits-for", bits_for or None),
        )
        return [word for name, value in given if value is not None for word in (name, str(value))]


def scheme(bits: int | None, group_size: int | None, mode: str) -> Scheme:
    """A scheme that MLX has; what is None gets the mode's default. Raises UsageError for one that it has not."""
    known = MODES.get(mode)
    if known is None:
        raise UsageError(f"--mode {mode}: expected {', '.join(MODES)}")
    found = Scheme(bits or known.bits[0], group_size or known.group_sizes[0], mode)
    given = (("--bits", found.bits, known.bits), ("--group-size", found.group_size, known.group_sizes))
    for option, value, choices in given:
        if value not in choices:
            expected = " or ".join(map(str, sorted(choices)))
            raise UsageError(f"{option} {value}: {mode} has {expected}")
    return found


def parse_bits_for(text: str) -> dict[str, int]:
    """{part of a path: bits} of `lm_head=8,embed_tokens=6`. Raises UsageError for another form."""
    found: dict[str, int] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, bits = part.partition("=")
        if not name or bits not in {*map(str, MODES["affine"].bits), str(UNQUANTIZED)}:
            choices = ", ".join(map(str, sorted({*MODES["affine"].bits, UNQUANTIZED} - {1})))
            raise UsageError(
                f"--bits-for {part!r}: expected NAME=BITS with bits of {choices} ({UNQUANTIZED}: as it is)"
            )
        found[name] = int(bits)
    return found


def make_plan(
    default: Scheme,
    preferred: Mapping[str, Scheme | None],
    shapes: Mapping[str, Shape],
    bits_for: Mapping[str, int],
) -> QuantizationPlan:
    """The plan that gives each module what is preferred for it (None: nothing), and `bits_for` to those it names.

    `shapes` are those of the weights that can be quantized, [..., rows, columns], by module path. Where several names
    fit a module, the last counts. Raises UsageError for names that fit none, all of them in one message, and for
    columns that do not divide into groups.
    """
    schemes = {path: wanted for path, wanted in preferred.items() if wanted and _divides(wanted, shapes[path])}
    named = {name: paths_named([name], shapes) for name in bits_for}
    if unknown := [name for name, paths in named.items() if not paths]:
        raise UsageError(*_no_such_module(unknown, shapes))
    for name, paths in named.items():
        for path in paths:
            schemes.pop(path, None)
            if bits_for[name] != UNQUANTIZED:
                schemes[path] = _with_bits(default, bits_for[name])
    if odd := [path for path in schemes if not _divides(schemes[path], shapes[path])]:
        columns, size = shapes[odd[0]][-1], schemes[odd[0]].group_size
        raise UsageError(f"--bits-for {odd[0]}: its rows of {columns} numbers do not divide into groups of {size}")
    return QuantizationPlan(default, {path: schemes[path] for path in shapes if path in schemes})


def paths_named(names: Collection[str], paths: Collection[str]) -> list[str]:
    """Those of the paths that one of the names fits: whole parts of them, as lm_head or layers.0."""
    return [path for path in paths if any(f".{name}." in f".{path}." for name in names)]


def raised(scheme: Scheme, default: Scheme, shape: Shape) -> Iterator[Scheme | None]:
    """The wider schemes of a matrix, the next one first; the last is None, its numbers as they are."""
    for bits in sorted(MODES["affine"].bits):
        if bits > scheme.bits and _divides(wider := _with_bits(default, bits), shape):
            yield wider
    yield None


def neighbours(scheme: Scheme) -> tuple[Scheme, Scheme]:
    """The next narrower and the next wider affine scheme. Raises UsageError where there is none."""
    bits = sorted(set(MODES["affine"].bits) - {1})
    i = bits.index(scheme.bits)
    if not 0 < i < len(bits) - 1:
        raise UsageError(
            f"--method dynamic with --bits {scheme.bits}: mixes the widths on either side of it",
            f"Give one of {', '.join(map(str, bits[1:-1]))}.",
        )
    return replace(scheme, bits=bits[i - 1]), replace(scheme, bits=bits[i + 1])


def _divides(scheme: Scheme, shape: Shape) -> bool:
    return shape[-1] % scheme.group_size == 0


def _with_bits(default: Scheme, bits: int) -> Scheme:
    """The default with other bits; of affine mode where its own has not so many."""
    if bits in MODES[default.mode].bits:
        return replace(default, bits=bits)
    sizes = MODES["affine"].group_sizes
    return Scheme(bits, default.group_size if default.group_size in sizes else sizes[0])


def _no_such_module(names: list[str], shapes: Mapping[str, Shape]) -> tuple[str, str]:
    """Message and hint for names that fit no module."""
    known = sorted({path.rpartition(".")[2] for path in shapes})
    guesses = [guess for name in names for guess in get_close_matches(name, known, n=1)]
    meant = f"; did you mean {', '.join(guesses)}?" if guesses else ""
    tied = " A tied head has no matrix of its own: it is embed_tokens." if "lm_head" in names else ""
    return f"--bits-for: nothing to quantize is named {some(names)}{meant}", f"There are: {', '.join(known)}.{tied}"

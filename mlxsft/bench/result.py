"""A result: what was measured, on what; as JSON that identifies nobody, and as a line of a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt, ValidationError

from mlxsft import __version__, machine
from mlxsft.bench.protocol import PROTOCOL
from mlxsft.errors import InputRefused
from mlxsft.models.source import ModelSource
from mlxsft.quickstart.trial import BASE
from mlxsft.terminal import one_line
from mlxsft.training.report import size

FILE_BYTES = 1 << 20  # the largest result that is read; one has 3 kB
PACKAGES = ("mlx", "mlx-lm", "torch", "transformers", "peft")
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
COLUMNS = (
    *("model", "machine", "with", "tuning, tokens/s", "prompt, tokens/s", "answer, tokens/s"),
    *("memory, tuning", "memory, answering", "float32 products", "used by tuning"),
)
NUMBERS = 3  # the column with the first number


class Part(BaseModel):
    """Something in a result; what another version writes besides is passed over."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)


class Rate(Part):
    """Tokens a second over the repetitions."""

    median: PositiveFloat
    lowest: PositiveFloat
    highest: PositiveFloat

    @classmethod
    def of(cls, tokens: int, seconds: Sequence[float]) -> Rate:
        rates = [tokens / one for one in seconds]
        return cls(median=median(rates), lowest=min(rates), highest=max(rates))

    def __str__(self) -> str:
        return f"{number(self.median)} ({number(self.lowest)}–{number(self.highest)})"


class Model(Part):
    """What was loaded. `name` is a Hub id, or the last part of a folder's path."""

    name: str
    model_type: str
    weights: str  # their type, or bits: bfloat16, 4 bits
    parameters: PositiveInt
    weight_bytes: PositiveInt  # of the files


class Machine(Part):
    chip: str
    cores: PositiveInt  # that the process may compute on
    memory_bytes: PositiveInt
    os: str


class Engine(Part):
    """What computed."""

    backend: str  # mlx | torch
    device: str  # cpu | gpu
    multiplies_with: str  # a BLAS and its version, or the GPU
    float32_matmul_flops: PositiveFloat  # operations a second in products of 1024 by 1024 matrices


class Memory(Part):
    """The largest amounts in the process that did nothing else."""

    peak_bytes: PositiveInt  # of arrays; on PyTorch, that the process grew by
    resident_peak_bytes: PositiveInt  # of the whole process


class Tuning(Memory):
    tokens_per_second: Rate  # of the rows, prompts included: the figure to compare
    seconds: list[PositiveFloat]  # of each repetition
    tokens: PositiveInt  # in each repetition
    trained_tokens: PositiveInt
    trainable_parameters: PositiveInt
    losses: list[float]  # nats a token before each update, that before the first repetition included
    needed_operations: PositiveFloat  # floating-point ones, in each repetition
    share_of_float32_matmul: PositiveFloat  # needed operations a second ÷ those that products reach


class Generating(Memory):
    prompt_tokens_per_second: Rate
    tokens_per_second: Rate
    prompt_seconds: list[PositiveFloat]
    seconds: list[PositiveFloat]
    prompt_tokens: PositiveInt  # in each repetition
    tokens: PositiveInt


class _Versioned(Part):
    version: int


class _Anything(Part):
    """What every result has, of whatever protocol."""

    protocol: _Versioned


class Result(Part):
    """What `mlxsft bench --json` writes."""

    protocol: dict[str, Any]
    repetitions: PositiveInt
    model: Model
    machine: Machine
    engine: Engine
    versions: dict[str, str | None]
    tuning: Tuning
    generating: Generating
    seconds: PositiveFloat  # of everything, loading included

    @classmethod
    def of(
        cls,
        source: ModelSource,
        repetitions: int,
        tuning: Mapping[str, Any],
        generating: Mapping[str, Any],
        seconds: float,
    ) -> Result:
        """The result of what `measure.measured` told at last of both tasks."""
        tokens = PROTOCOL.rows * PROTOCOL.row_tokens
        rate = Rate.of(tokens, tuning["seconds"])
        flops = tuning["float32_matmul_flops"]
        return cls(
            protocol=PROTOCOL.to_json(),
            repetitions=repetitions,
            model=Model(
                name=name_of(source),
                model_type=str(source.config.get("model_type")),
                weights=weights_of(source),
                parameters=generating["parameters"],
                weight_bytes=source.weight_bytes,
            ),
            machine=Machine(
                chip=machine.chip(),
                cores=machine.core_count(),
                memory_bytes=machine.memory_bytes(),
                os=machine.operating_system(),
            ),
            engine=Engine(**{name: tuning[name] for name in Engine.model_fields}),
            versions={"mlxsft": __version__, **machine.versions(*PACKAGES)},
            tuning=Tuning(
                **{name: tuning[name] for name in Tuning.model_fields if name in tuning},
                tokens=tokens,
                trained_tokens=PROTOCOL.rows * PROTOCOL.trained_tokens,
                tokens_per_second=rate,
                share_of_float32_matmul=tuning["needed_operations"] * rate.median / tokens / flops,
            ),
            generating=Generating(
                **{name: generating[name] for name in Generating.model_fields if name in generating},
                prompt_tokens=PROTOCOL.prompt_tokens,
                tokens=PROTOCOL.answer_tokens,
                prompt_tokens_per_second=Rate.of(PROTOCOL.prompt_tokens, generating["prompt_seconds"]),
                tokens_per_second=Rate.of(PROTOCOL.answer_tokens, generating["seconds"]),
            ),
            seconds=seconds,
        )


def name_of(source: ModelSource) -> str:
    """A Hub id, or the last part of a folder's path: what stands before it may name a person."""
    if source.folder == BASE.resolve():
        return "quickstart"
    if not Path(source.name).expanduser().is_dir():
        return source.name
    repository = source.folder.parent.parent.name  # models--ORG--NAME/snapshots/COMMIT in the Hub's cache
    if source.commit and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/")
    return source.folder.name


def weights_of(source: ModelSource) -> str:
    """The type of most weights, or the bits that most of them are quantized to."""
    block = source.config.get("quantization") or source.config.get("quantization_config")
    if isinstance(block, dict) and isinstance(block.get("bits"), int):
        return f"{block['bits']} bits"
    dtypes = [info.dtype for info in source.tensors.values()]
    most = max(dtypes, key=dtypes.count)
    return DTYPES.get(most, most)


def read_result(path: Path) -> Result:
    """A result that `mlxsft bench --json` wrote. Raises InputRefused for anything else, and for other protocols."""
    try:
        with path.open("rb") as file:
            text = file.read(FILE_BYTES + 1)
    except OSError as error:
        raise InputRefused(f"{path}: cannot be read: {error.strerror or error}") from error
    again = "`mlxsft bench MODEL --json > FILE` writes one."
    try:
        version = _Anything.model_validate_json(text).protocol.version
        if version != PROTOCOL.version:
            raise InputRefused(
                f"{path}: was made by protocol {version}, and this mlxsft has protocol {PROTOCOL.version}: their "
                "figures cannot be compared",
                "Measure again, with the same version of mlxsft on both machines.",
            )
        result = Result.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise InputRefused(one_line(f"{path}: is no result of bench: {place}: {first['msg']}"), again) from error
    if result.protocol != PROTOCOL.to_json():
        raise InputRefused(f"{path}: its protocol is not protocol {PROTOCOL.version}, as it says", again)
    return result


# ---- tables ---------------------------------------------------------------------------------------------------------


def cells(result: Result) -> list[str]:
    """One for each of COLUMNS."""
    model, parts, engine = result.model, result.machine, result.engine
    tuning, generating = result.tuning, result.generating
    programs = ", ".join(f"{name} {result.versions.get(name) or '?'}" for name in ("mlxsft", engine.backend))
    return [
        one_line(f"{model.name}, {model.parameters / 1e6:,.1f} M, {model.weights}"),
        one_line(f"{parts.chip}, {cores(parts.cores)}, {parts.memory_bytes / 2**30:.0f} GiB"),
        one_line(f"{programs} on the {engine.device.upper()} ({engine.multiplies_with})"),
        str(tuning.tokens_per_second),
        str(generating.prompt_tokens_per_second),
        str(generating.tokens_per_second),
        size(tuning.peak_bytes),
        size(generating.peak_bytes),
        f"{engine.float32_matmul_flops / 1e9:,.0f} GFLOP/s",
        f"{tuning.share_of_float32_matmul:.0%}",
    ]


def markdown(results: Sequence[Result]) -> str:
    """A table with a line for each result."""
    lines = [list(COLUMNS), ["---"] * NUMBERS + ["---:"] * (len(COLUMNS) - NUMBERS), *map(cells, results)]
    escaped = [[cell.replace("|", "\\|").replace("<", "&lt;") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


def cores(count: int) -> str:
    return f"{count} core" + "s" * (count > 1)


def number(value: float) -> str:
    """Three digits, or all before the point."""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{digits}f}"

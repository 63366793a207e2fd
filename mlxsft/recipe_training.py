"""The settings of a run beside its rows: the adapter, the training, when it is judged and saved."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from mlxsft.recipe_file import shown
from mlxsft.recipe_problems import wrong

Text = Annotated[str, Field(min_length=1)]
ShareOfRun = Annotated[float, Field(gt=0, le=1, title="a share of the run")]
Steps = Annotated[int, Field(ge=1, title="a whole number of steps")]
Momentum = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A part of the recipe: frozen, no unknown keys, and no value turned into another type."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


# Settings that an optimizer has beside learning rate and weight decay, with its own defaults.
OPTIMIZERS: dict[str, dict[str, float]] = {
    "adamw": {"beta1": 0.9, "beta2": 0.999},
    "adam": {"beta1": 0.9, "beta2": 0.999},
    "lion": {"beta1": 0.9, "beta2": 0.99},
    "adafactor": {},
    "muon": {"beta1": 0.9, "beta2": 0.999, "momentum": 0.95},
    "sgd": {"momentum": 0.0},
}


class AdapterRecipe(Section):
    """What is trained: matrices beside the frozen model, or its own weights."""

    kind: Literal["lora", "dora", "full"] = Field(
        default="lora",
        description="What is trained. lora: two low-rank matrices beside every target; dora: these, and the length of "
        "each row of the target; full: the targets' own weights.",
    )
    rank: int = Field(default=16, ge=1, description="The rank of the two low-rank matrices of every target.")
    alpha: float = Field(
        default=32.0,
        gt=0,
        description="The strength: what the adapter adds is multiplied by alpha ÷ rank, or by alpha ÷ √rank with "
        "rslora.",
    )
    rslora: bool = Field(
        default=False, description="Multiply by alpha ÷ √rank, so that a higher rank is not a weaker adapter."
    )
    init: Literal["default", "pissa"] = Field(
        default="default",
        description="Where the two matrices start. default: one random, one zero; pissa: at the target's own largest "
        "singular values. The saved adapter has twice the rank, and works on the unchanged model.",
    )
    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="The share of an adapter's inputs that is zeroed in training."
    )
    loraplus_lr_ratio: float = Field(
        default=1.0,
        gt=0,
        description="LoRA+: the learning rate of the matrix that starts at zero (B), as a multiple of "
        "train.learning_rate; its authors advise 16.",
    )
    layers: Literal["all"] | Annotated[int, Field(ge=1)] = Field(
        default="all", description="Which transformer layers are trained: all, or the last N."
    )
    targets: Literal["all-linear", "all"] | Annotated[tuple[Text, ...], Field(min_length=1, strict=False)] = Field(
        default="all-linear",
        description="Which modules of these layers are trained: all-linear; all, norms included (kind full only, and "
        "its default); or a list of names such as [q_proj, v_proj]. Modules outside the layers have their whole name: "
        "[all-linear, model.embed_tokens, lm_head].",
    )

    @property
    def scale(self) -> float:
        """What the product of the two matrices is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @model_validator(mode="before")
    @classmethod
    def _full_means_all(cls, values: object) -> object:
        if isinstance(values, dict) and values.get("kind") == "full" and "targets" not in values:
            return {**values, "targets": "all"}
        return values

    @field_validator("rank", "alpha", "rslora", "init", "dropout", "loraplus_lr_ratio")
    @classmethod
    def _low_rank(cls, value: object, info: ValidationInfo) -> object:
        default = cls.model_fields[info.field_name or ""].default
        if info.data.get("kind") == "full" and value != default:
            raise wrong("adapter.kind is full, which has no low-rank matrices; leave this out")
        return value

    @field_validator("init")
    @classmethod
    def _pissa(cls, init: str, info: ValidationInfo) -> str:
        if init == "pissa" and info.data.get("kind") == "dora":
            raise wrong("adapter.kind is dora, whose rows have lengths of their own; pissa needs kind lora")
        return init

    @field_validator("targets")
    @classmethod
    def _all(cls, targets: str | tuple[str, ...], info: ValidationInfo) -> str | tuple[str, ...]:
        everything = targets == "all" or (isinstance(targets, tuple) and "all" in targets)
        if everything and info.data.get("kind") != "full":
            raise wrong("got all, which only adapter.kind full can train; the others have all-linear")
        return targets


class TrainRecipe(Section):
    """How the adapter is trained."""

    epochs: float | None = Field(
        default=None,
        gt=0,
        description="Length of the run in passes over the training rows; 3 where steps is not given either.",
    )
    steps: int | None = Field(
        default=None, ge=1, description="Length of the run in optimizer updates, instead of epochs."
    )
    batch_size: int = Field(default=8, ge=1, description="Rows in one update.")
    micro_batch_tokens: int = Field(
        default=4096,
        ge=1,
        description="Tokens computed at once, padding included; less saves memory, the result is the same.",
    )
    batching: Literal["buckets", "packed"] = Field(
        default="buckets",
        description="How rows are computed together. buckets: side by side with rows of similar length, padded; "
        "packed: one after another in a sequence of at most 2048 tokens, isolated from each other, with next to no "
        "padding but longer attention: measured slower on the CPU. The result is the same.",
    )
    learning_rate: float = Field(
        default=2e-4, gt=0, description="The highest learning rate, reached after the warm-up."
    )
    schedule: Literal["cosine", "linear", "constant", "cosine_with_restarts", "inverse_sqrt", "warmup_stable_decay"] = (
        Field(
            default="cosine",
            description="How the learning rate falls after the warm-up. cosine_with_restarts: several times; "
            "inverse_sqrt: as 1 ÷ √step; warmup_stable_decay: not before the last steps, and then in a line.",
        )
    )
    cycles: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="How often the rate falls with cosine_with_restarts; null: 2 times there."
    )
    final_learning_rate: float = Field(
        default=0.0, ge=0, description="The learning rate at the end of the fall; at most learning_rate."
    )
    warmup: (
        Annotated[float, Field(ge=0, lt=1, title="a share of the run")]
        | Annotated[int, Field(ge=0, title="a whole number of steps")]
    ) = Field(
        default=0.05,
        description="How long the learning rate rises at the start: a share of the run (0.05) or a number of steps "
        "(100).",
    )
    decay: ShareOfRun | Steps | None = Field(
        default=None,
        description="Steps over which the rate falls to final_learning_rate: a share of the run (0.5) or a number of "
        "steps (500), counted from the end of the warm-up, or with warmup_stable_decay to the end of the run. null: "
        "the rest of the run, or the last 0.2 of it with warmup_stable_decay.",
    )
    optimizer: Literal["adamw", "adam", "lion", "adafactor", "muon", "sgd"] = Field(
        default="adamw",
        description="The optimizer. muon: for matrices, with AdamW for embeddings, head and vectors, at AdamW's "
        "learning rates; adafactor: at the given learning rate, not relative to the weights.",
    )
    beta1: Momentum | None = Field(
        default=None,
        description="The decay of the mean of the gradients, per update; null: 0.9, or none with adafactor and sgd.",
    )
    beta2: Momentum | None = Field(
        default=None,
        description="The decay of the mean of their squares, per update; null: 0.999, 0.99 with lion, or none with "
        "adafactor and sgd.",
    )
    momentum: Momentum | None = Field(
        default=None,
        description="The decay of the sum of the gradients, per update; null: 0.95 with muon, 0 with sgd, or none.",
    )
    weight_decay: float = Field(
        default=0.0,
        ge=0,
        description="The decay of matrices, multiplied by the learning rate; adam and sgd add it to the gradient.",
    )
    clip_norm: float | None = Field(
        default=1.0,
        gt=0,
        description="The largest norm of the whole gradient; a larger one is scaled down. null: no clipping.",
    )
    neftune_alpha: float | None = Field(
        default=None,
        gt=0,
        description="NEFTune: noise on the embedded tokens in training, uniform within ± alpha ÷ √(length · width); "
        "its authors advise 5. null: none.",
    )
    label_smoothing: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="The share of the target that is spread over the vocabulary; the validation loss stays the plain "
        "one.",
    )
    loss_limit: Literal["auto"] | Annotated[float, Field(gt=0)] | None = Field(
        default="auto",
        description="The loss of one step, in nats a token, above which the run counts as diverged: it goes back to "
        "the last good checkpoint and on at half the rate, once. auto: three times the loss of the first step, at "
        "least 20 nats; null: no limit.",
    )
    seed: int = Field(
        default=0, ge=0, description="Where the adapter's initial values, the row order and dropout come from."
    )
    cache_trunk: Literal["auto", "memory", "disk", "off"] = Field(
        default="auto",
        description="Whether the outputs of the frozen layers below the adapter are kept for all epochs, where "
        "adapter.layers leaves some: in memory, on disk, or computed anew each time (off); auto: where it is worth it.",
    )
    base_dtype: Literal["auto", "stored"] = Field(
        default="auto",
        description="The numbers in which the frozen model is computed. auto: float32 where MLX computes on the CPU "
        "and memory allows, because it multiplies others some 30 times slower there; stored: as the files have them, "
        "quantized or of 16 bits, for a half to an eighth of the memory. A GPU always has them so, PyTorch never.",
    )
    checkpoint_activations: bool = Field(
        default=False,
        description="Compute activations again in the backward pass instead of keeping them: less memory, slower.",
    )
    cache_limit: float | None = Field(
        default=None,
        ge=0,
        description="Freed memory in GiB that MLX keeps for the next arrays, instead of giving it back to the system. "
        "null: none on the CPU of Linux, where the C library keeps it, on Apple's GPU all of the working set that it "
        "recommends. PyTorch keeps its own.",
    )

    @model_validator(mode="before")
    @classmethod
    def _resolved(cls, values: object) -> object:
        """What null stands for, where that depends on other settings."""
        if not isinstance(values, dict):
            return values
        optimizer, schedule = str(values.get("optimizer", "adamw")), values.get("schedule")
        defaults: dict[str, object] = dict(OPTIMIZERS.get(optimizer, {}))
        if values.get("steps") is None:
            defaults["epochs"] = 3.0
        if schedule == "cosine_with_restarts":
            defaults["cycles"] = 2
        if schedule == "warmup_stable_decay":
            defaults["decay"] = 0.2
        return values | {name: default for name, default in defaults.items() if values.get(name) is None}

    @field_validator("steps")
    @classmethod
    def _one_length(cls, steps: int | None, info: ValidationInfo) -> int | None:
        if steps is not None and info.data.get("epochs") is not None:
            raise wrong("train.epochs is given too; keep one of the two")
        return steps

    @field_validator("final_learning_rate")
    @classmethod
    def _falls(cls, final: float, info: ValidationInfo) -> float:
        highest = info.data.get("learning_rate")
        if highest is not None and final > highest:
            raise wrong(f"got {shown(final)}, expected at most train.learning_rate, {shown(highest)}")
        if final > 0:
            _refuse_endless(info)
        return final

    @field_validator("decay")
    @classmethod
    def _decays(cls, decay: float | int | None, info: ValidationInfo) -> float | int | None:
        if decay is not None:
            _refuse_endless(info)
        return decay

    @field_validator("cycles")
    @classmethod
    def _restarts(cls, cycles: int | None, info: ValidationInfo) -> int | None:
        schedule = info.data.get("schedule", "cosine_with_restarts")
        if cycles is not None and schedule != "cosine_with_restarts":
            raise wrong(f"train.schedule is {schedule}, which falls once; leave this out")
        return cycles

    @field_validator("beta1", "beta2", "momentum")
    @classmethod
    def _applies(cls, value: float | None, info: ValidationInfo) -> float | None:
        optimizer = info.data.get("optimizer")
        if value is not None and optimizer is not None and info.field_name not in OPTIMIZERS[optimizer]:
            raise wrong(f"train.optimizer is {optimizer}, which has no {info.field_name}; leave this out")
        return value


def _refuse_endless(info: ValidationInfo) -> None:
    """Raises where the schedule has no fall that could end."""
    said = {"constant": "the learning rate never falls", "inverse_sqrt": "the fall of the learning rate has no end"}
    if (schedule := info.data.get("schedule")) in said:
        raise wrong(f"train.schedule is {schedule}, so {said[schedule]}; leave this out")


class EvalRecipe(Section):
    """When the held-out rows are looked at."""

    every: ShareOfRun | Steps = Field(
        default=0.25, description="How often validation runs: a share of the run (0.25) or a number of steps (200)."
    )
    patience: int | None = Field(
        default=None,
        ge=1,
        description="Evaluations without improvement after which the run stops; null: it runs to its end.",
    )
    samples: Annotated[tuple[Text, ...], Field(strict=False)] = Field(
        default=(), description="Prompts that the model answers at every evaluation."
    )


class SaveRecipe(Section):
    """When checkpoints are written."""

    every: ShareOfRun | Steps = Field(
        default=0.25,
        description="How often a checkpoint is written: a share of the run (0.25) or a number of steps (200).",
    )
    keep: int = Field(
        default=2,
        ge=1,
        description="How many checkpoints are kept: the newest, and that of the best evaluation. With 1 there is none "
        "to fall back on when it is damaged or the run diverges.",
    )
    adapter: Literal["best", "last"] = Field(
        default="best",
        description="Which adapter lies in the run folder. best: that of the evaluation with the lowest validation "
        "loss, the newest where nothing is held out; last: the newest.",
    )

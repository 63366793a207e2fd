"""The settings of a run beside its rows: the adapter, the training, when it is judged and saved."""

from __future__ import annotations

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


class AdapterRecipe(Section):
    """What is trained beside the frozen model."""

    kind: Literal["lora"] = Field(default="lora", description="The kind of adapter.")
    rank: int = Field(default=16, ge=1, description="The rank of the two low-rank matrices of every target.")
    alpha: float = Field(
        default=32.0, gt=0, description="The strength: what the adapter adds is multiplied by alpha ÷ rank."
    )
    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="The share of an adapter's inputs that is zeroed in training."
    )
    layers: Literal["all"] | Annotated[int, Field(ge=1)] = Field(
        default="all", description="Which transformer layers get an adapter: all, or the last N."
    )
    targets: Literal["all-linear"] | Annotated[tuple[Text, ...], Field(min_length=1, strict=False)] = Field(
        default="all-linear",
        description="Which linear modules of a layer get an adapter: all-linear, or a list of names such as "
        "[q_proj, v_proj].",
    )


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
    schedule: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="How the learning rate falls after the warm-up."
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
        description="Steps over which the rate falls to final_learning_rate, counted from the end of the warm-up: a "
        "share of the run (0.5) or a number of steps (500); null: the rest of the run.",
    )
    optimizer: Literal["adamw"] = Field(default="adamw", description="The optimizer: AdamW with bias correction.")
    beta1: Momentum = Field(default=0.9, description="AdamW's decay of the mean of the gradients, per update.")
    beta2: Momentum = Field(default=0.999, description="AdamW's decay of the mean of their squares, per update.")
    weight_decay: float = Field(
        default=0.0, ge=0, description="AdamW's decoupled decay, multiplied by the learning rate."
    )
    clip_norm: float | None = Field(
        default=1.0,
        gt=0,
        description="The largest norm of the whole gradient; a larger one is scaled down. null: no clipping.",
    )
    seed: int = Field(
        default=0, ge=0, description="Where the adapter's initial values, the row order and dropout come from."
    )
    checkpoint_activations: bool = Field(
        default=False,
        description="Compute activations again in the backward pass instead of keeping them: less memory, slower.",
    )

    @model_validator(mode="before")
    @classmethod
    def _three_epochs(cls, values: object) -> object:
        if isinstance(values, dict) and values.get("epochs") is None and values.get("steps") is None:
            return {**values, "epochs": 3.0}
        return values

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
        if final > 0 and info.data.get("schedule") == "constant":
            raise wrong("train.schedule is constant, so the learning rate never falls; leave this out")
        return final

    @field_validator("decay")
    @classmethod
    def _decays(cls, decay: float | int | None, info: ValidationInfo) -> float | int | None:
        if decay is not None and info.data.get("schedule") == "constant":
            raise wrong("train.schedule is constant, so the learning rate never falls; leave this out")
        return decay


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
        default=2, ge=1, description="How many checkpoints are kept: the newest, and that of the best evaluation."
    )
    adapter: Literal["best", "last"] = Field(
        default="best",
        description="Which adapter lies in the run folder. best: that of the evaluation with the lowest validation "
        "loss, the newest where nothing is held out; last: the newest.",
    )

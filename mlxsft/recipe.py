"""Every setting of a run, declared once: default, unit, help.

`load_recipe` reads a YAML file and the `--set` overrides into a frozen `Recipe`, `dump_recipe` writes the resolved
one, `recipe_schema` gives editors the JSON Schema. The sentences about wrong values are derived from that schema, so a
new field needs nothing but its declaration here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from mlxsft.data.phrasings import is_file
from mlxsft.data.sources import source_of
from mlxsft.recipe_file import KeyPath, Sheet, read_sheet, shown, to_yaml
from mlxsft.recipe_problems import problems_of, settings_of, wrong
from mlxsft.recipe_training import AdapterRecipe, EvalRecipe, SaveRecipe, Section, Text, TrainRecipe


class Source(Section):
    """Rows to train on, and how often an epoch has them."""

    path: Text = Field(description="A file of rows, a folder with a train file, or a data set of the Hub.")
    weight: float = Field(
        default=1.0, gt=0, le=100, description="How often an epoch has a row: 2 is twice; 0.5 takes half of the rows."
    )

    @model_validator(mode="before")
    @classmethod
    def _sentences(cls, values: object) -> object:
        # The recipe's own sentences, since a section inside a list has no place among the settings.
        if not isinstance(values, dict):
            return values
        for key in values:
            if key not in cls.model_fields:
                raise wrong("no such setting; a source has path (of the Hub: hf://ORG/NAME) and weight", str(key))
        path, weight = values.get("path"), values.get("weight", 1.0)
        if not isinstance(path, str) or not path:
            raise wrong(f"got {shown(path)}, expected the name of a file or a folder", "path")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight <= 100:
            raise wrong(f"got {shown(weight)}, expected a number > 0 and ≤ 100", "weight")
        return values


_Given = TypeVar("_Given")
_Sources = Annotated[tuple[Text | Source, ...], Field(min_length=1, strict=False, title="a list of these")]


class DataRecipe(Section):
    """Which rows are trained, and what of them."""

    train: Text | Source | _Sources = Field(
        description="The rows to train on: a file (JSONL, JSON, CSV, TSV, Parquet or Arrow), a folder with a train "
        "file, a data set of the Hub (hf://ORG/NAME[@REVISION][/CONFIG or /FILE][:SPLIT][FROM:TO]), or a list of "
        "these. {path: FILE, weight: 2} has its rows twice an epoch; 0.5 takes half of them. A relative path starts at "
        "the folder of the recipe."
    )
    valid: (
        Annotated[float, Field(gt=0, lt=1, title="a share of the rows")] | Annotated[Text, Field(title="a file")] | None
    ) = Field(
        default=0.05,
        description="What is held out for validation: a share of the rows (0.05 is 5 %), or a file or a data set of "
        "the Hub of its own; null: no validation.",
    )
    format: Literal[
        "auto",
        "messages",
        "sharegpt",
        "self_instruct",
        "dolly",
        "alpaca",
        "flan",
        "prompt_completion",
        "text",
        "prompt",
    ] = Field(default="auto", description="The layout of the rows; auto: recognised row by row by their keys.")
    columns: dict[str, str] = Field(
        default={},
        description="What our names are called in the rows, for a layout of your own: {prompt: Frage, response: "
        "Antwort}. Nothing else of a row is read then. Names: prompt, response, instruction, output, messages, "
        "conversations, text, system, category, input, context, history, tools.",
    )
    max_tokens: int = Field(default=2048, ge=2, description="The longest row that is trained, in tokens of the model.")
    too_long: Literal["error", "drop", "keep-response", "split-turns"] = Field(
        default="keep-response",
        description="What happens to a row over max_tokens. error: the run stops; drop: it is left out and counted; "
        "keep-response: the oldest turns go, then the beginning of the question, or of a tool's result or the system "
        "turn where that is what is long, never the last response; split-turns: a conversation becomes several.",
    )
    train_on: Literal["responses", "all"] = Field(
        default="responses",
        description="Which tokens carry the loss. responses: every assistant turn up to and including its end token; "
        "all: the whole row.",
    )
    special_tokens: Literal["refuse", "escape", "drop", "allow"] = Field(
        default="refuse",
        description="What happens where the text of a row contains one of the tokenizer's special tokens. refuse: the "
        "run stops; escape: it is trained as ordinary text; drop: the row is left out; allow: it becomes the token.",
    )
    fill: dict[str, str] = Field(default={}, description="Values for the {{name}} placeholders in the rows, by name.")
    templates: Text | None = Field(
        default=None,
        description="Phrasings for rows of one question, so that a small set does not teach a single one: "
        "`instructions`, which is built in, or a YAML file; null: every question as it stands.",
    )
    template: Text | None = Field(
        default=None,
        description="The name of a built-in chat template, or a Jinja file; null: the model's own, or `plain` for a "
        "base model without one.",
    )

    @field_validator("train", "valid")
    @classmethod
    def _addresses(cls, given: _Given) -> _Given:
        for source in given if isinstance(given, tuple) else (given,):
            path = source.path if isinstance(source, Source) else source
            try:
                source_of(path if isinstance(path, str) else "")
            except ValueError as error:
                raise wrong(str(error)) from None
        return given

    @field_validator("columns")
    @classmethod
    def _known_columns(cls, columns: dict[str, str]) -> dict[str, str]:
        from mlxsft.data.formats import COLUMNS

        for name in columns:
            if name not in COLUMNS:
                raise wrong(f"no such name; names: {', '.join(COLUMNS)}", name)
        return columns


class Recipe(Section):
    """Everything that decides what a run does."""

    model_config = ConfigDict(title="mlxsft recipe")

    model: Text = Field(description="The model to tune: a folder, or a Hub id such as Qwen/Qwen2.5-0.5B-Instruct.")
    revision: Text | None = Field(
        default=None, description="Branch, tag or commit of a Hub model; null: what its main branch points to now."
    )
    data: DataRecipe
    adapter: AdapterRecipe = AdapterRecipe()
    train: TrainRecipe = TrainRecipe()
    eval: EvalRecipe = EvalRecipe()
    save: SaveRecipe = SaveRecipe()
    report: Annotated[tuple[Literal["tensorboard", "trackio", "wandb", "mlflow"], ...], Field(strict=False)] = Field(
        default=(), description="Trackers that the run is told to as well: tensorboard, trackio, wandb, mlflow."
    )

    @field_validator("eval")
    @classmethod
    def _patience_has_rows(cls, settings: EvalRecipe, info: ValidationInfo) -> EvalRecipe:
        data = info.data.get("data")
        if settings.patience is not None and data is not None and data.valid is None:
            raise wrong("data.valid is null, so there is no improvement to wait for", "patience")
        return settings


# An override of one of these replaces the other one in the file: `--set train.steps=10` shortens any recipe.
_INSTEAD: dict[KeyPath, KeyPath] = {("train", "steps"): ("train", "epochs"), ("train", "epochs"): ("train", "steps")}


def load_recipe(path: Path, overrides: Sequence[str] = (), *, cwd: Path | None = None) -> Recipe:
    """The recipe in a file with the overrides (`train.seed=1`) laid over it; every problem of both in one UsageError.

    Paths in the file count from its folder, those in overrides from `cwd`; the recipe returned has them absolute.
    """
    sheet = read_sheet(path)
    folder = Path.cwd() if cwd is None else cwd
    for override in overrides:
        sheet.override(override, folder, instead=_INSTEAD)
    return checked(sheet)


def dump_recipe(recipe: Recipe) -> str:
    """The complete recipe as YAML; `load_recipe` of it gives an equal one."""
    header = (
        "# A resolved recipe: every setting with its value, paths absolute.\n"
        "# To run it again: mlxsft train THIS_FILE --out RUN\n"
    )
    return header + to_yaml(recipe.model_dump(mode="json"))


def flattened(settings: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Settings by their dotted names, as `--set` takes them: {"train": {"seed": 0}} → {"train.seed": 0}."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        nested = flattened(value, f"{before}{key}.") if isinstance(value, dict) and value else {}
        flat |= nested or {f"{before}{key}": value}
    return flat


def recipe_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a recipe, for editors and for the reference."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}


def checked(sheet: Sheet) -> Recipe:
    """The recipe that the values of a sheet make, with absolute paths; UsageError with all problems otherwise."""
    for name, setting in _settings().items():
        if "properties" in setting and sheet.values.get(name[0]) is None:
            sheet.values[name[0]] = {}  # a section left out or left empty: all its defaults
    try:
        recipe = Recipe.model_validate(sheet.values)
    except ValidationError as error:
        for path, sentence in problems_of(error, sheet.values, _settings()):
            sheet.complain(path, sentence)
        recipe = None
    sheet.refuse_if_wrong(hint="`mlxsft recipes schema` lists every setting with its meaning.")
    assert recipe is not None  # a validation error is at least one problem
    return _located(recipe, sheet)


@cache
def _settings() -> dict[KeyPath, dict[str, Any]]:
    return settings_of(recipe_schema())


def _located(recipe: Recipe, sheet: Sheet) -> Recipe:
    """The recipe with absolute paths, so that it means the same from any folder."""

    def absolute(text: str, *path: str | int) -> str:
        if text.startswith("hf://"):
            return text
        return os.path.abspath(sheet.place(path).folder / os.path.expanduser(text))

    data = recipe.data
    train = data.train

    def source(given: str | Source, *path: str | int) -> str | Source:
        if isinstance(given, str):
            return absolute(given, *path)
        return given.model_copy(update={"path": absolute(given.path, *path, "path")})

    update: dict[str, object] = {
        "train": tuple(source(given, "data", "train", i) for i, given in enumerate(train))
        if isinstance(train, tuple)
        else source(train, "data", "train")
    }
    if isinstance(data.valid, str):
        update["valid"] = absolute(data.valid, "data", "valid")
    if data.template is not None and _is_template_file(data.template):
        update["template"] = absolute(data.template, "data", "template")
    if data.templates is not None and is_file(data.templates):
        update["templates"] = absolute(data.templates, "data", "templates")
    model = recipe.model
    folder = absolute(model, "model")
    if model.startswith((".", "~", "/")) or os.path.isabs(model) or os.path.isdir(folder):
        model = folder  # anything else is a Hub id
    return recipe.model_copy(update={"model": model, "data": data.model_copy(update=update)})


def _is_template_file(template: str) -> bool:
    return "/" in template or os.sep in template or template.endswith((".jinja", ".txt"))

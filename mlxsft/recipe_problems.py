"""What is wrong with the values of a recipe, in words derived from its JSON Schema."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from mlxsft.recipe_file import KeyPath, dotted, shown

Settings = Mapping[KeyPath, Mapping[str, Any]]

# What Axolotl, TRL, PEFT, mlx-lm and LLaMA-Factory call our settings.
_FOREIGN = {
    "adapter.alpha": "lora_alpha scale",
    "adapter.dropout": "lora_dropout",
    "adapter.init": "init_lora_weights peft_init_lora_weights",
    "adapter.kind": "adapter_type fine_tune_type finetuning_type use_dora peft_use_dora",
    "adapter.layers": "num_layers lora_layers",
    "adapter.rank": "r lora_r lora_rank",
    "adapter.loraplus_lr_ratio": "loraplus_ratio lora_plus_ratio",
    "adapter.rslora": "use_rslora peft_use_rslora",
    "adapter.targets": "keys lora_target lora_target_linear lora_target_modules modules_to_save target_modules",
    "data.max_tokens": "cutoff_len max_length max_seq_len max_seq_length sequence_len",
    "data.template": "chat_template",
    "data.columns": "column_mapping field_mapping",
    "data.train": "dataset datasets train_data train_file",
    "data.train_on": "mask_prompt train_on_inputs",
    "data.valid": "test_datasets val_set_size val_size validation",
    "eval.every": "eval_steps steps_per_eval",
    "eval.patience": "early_stopping_patience",
    "model": "base_model model_id model_name model_name_or_path",
    "save.every": "save_steps",
    "save.keep": "save_total_limit",
    "train.batch_size": "gradient_accumulation_steps per_device_train_batch_size",
    "train.batch_size or train.micro_batch_tokens": "micro_batch_size",
    "train.beta1": "adam_beta1",
    "train.beta2": "adam_beta2",
    "train.cache_limit": "clear_cache_threshold",
    "train.checkpoint_activations": "grad_checkpoint gradient_checkpointing",
    "train.clip_norm": "max_grad_norm",
    "train.cycles": "num_cycles lr_num_cycles restarts",
    "train.epochs": "num_epochs num_train_epochs",
    "train.final_learning_rate": "cosine_min_lr min_lr",
    "train.learning_rate": "lr",
    "train.label_smoothing": "label_smoothing_factor",
    "train.neftune_alpha": "neftune_noise_alpha noisy_embedding_alpha",
    "train.optimizer": "optim",
    "train.schedule": "lr_schedule lr_scheduler lr_scheduler_type",
    "train.steps": "iters max_steps num_steps",
    "train.warmup": "warmup_ratio warmup_steps",
}

_NOUNS = {
    "boolean": "true or false",
    "integer": "a whole number",
    "null": "null",
    "number": "a number",
    "string": "text",
}


def wrong(sentence: str, *below: str) -> PydanticCustomError:
    """For validators to raise: a sentence of ours about the validated value, or about the setting `below` it."""
    # pydantic formats the message as a template; the sentence goes in as a value, so that its braces stay.
    return PydanticCustomError("recipe", "{sentence}", {"sentence": sentence, "below": below})


def settings_of(schema: Mapping[str, Any]) -> dict[KeyPath, dict[str, Any]]:
    """Every section and every setting of the recipe's JSON Schema by its key path."""
    found: dict[KeyPath, dict[str, Any]] = {}
    for name, setting in schema["properties"].items():
        if "$ref" in setting:
            setting = schema["$defs"][setting["$ref"].rpartition("/")[2]]
            found |= {(name, inner): value for inner, value in setting["properties"].items()}
        found[(name,)] = setting
    return found


def problems_of(
    error: ValidationError, values: Mapping[str | int, Any], settings: Settings
) -> Iterator[tuple[KeyPath, str]]:
    """Each key path that pydantic refused, with a sentence; an item comes before the list that holds it."""
    details = [(_setting_path(detail, settings), detail) for detail in error.errors(include_url=False)]
    for path, detail in sorted(details, key=lambda pair: -len(pair[0])):
        yield path, _sentence(path, detail, values, settings)


def _setting_path(detail: ErrorDetails, settings: Settings) -> KeyPath:
    """The key path that a pydantic error is about, without pydantic's names for the members of a union."""
    where = detail["loc"]
    depth = 2 if "properties" in settings.get(where[:1], {}) else 1
    setting, inside = where[:depth], where[depth:]
    keyed = settings.get(setting, {}).get("type") == "object"
    return (
        *setting,
        *(part for part in inside if keyed or isinstance(part, int)),
        *detail.get("ctx", {}).get("below", ()),
    )


def _sentence(path: KeyPath, detail: ErrorDetails, values: Mapping[str | int, Any], settings: Settings) -> str:
    if detail["type"] == "recipe":
        return detail["msg"]
    if detail["type"] == "missing":
        return "missing; it has no default"
    if detail["type"] == "extra_forbidden":
        return "no such setting" + _suggestion(path, settings)
    got: Any = values
    for part in path:
        got = got[part]
    items = settings.get(path[:-1], {}).get("items")
    expected = _expected(settings.get(path) or items or {"type": "string"})  # below a setting there is mostly text
    quotes = "; put it in quotes" if expected.startswith("text") and isinstance(got, int | float) else ""
    return f"got {shown(got)}, expected {expected}{quotes}"


def _expected(schema: Mapping[str, Any]) -> str:
    """What a JSON Schema accepts, in words: `a whole number ≥ 1`."""
    if "$ref" in schema:
        return "path and weight"
    if "anyOf" in schema:
        return ", or ".join(_expected(option) for option in schema["anyOf"])
    if "enum" in schema:
        return "one of " + ", ".join(schema["enum"])
    if "const" in schema:
        return str(schema["const"])
    if schema["type"] == "array" and schema.get("title", "")[:1].islower():
        return str(schema["title"])
    if schema["type"] == "array" and "enum" in schema["items"]:
        return "a list with any of " + ", ".join(schema["items"]["enum"])
    if schema["type"] == "array":
        return "a list of text" if "minItems" not in schema else "a list of text with something in it"
    if schema["type"] == "object":
        return "a section of settings" if "properties" in schema else "names with a text for each"
    title = schema.get("title", "")  # ours begin small: `a share of the run`; pydantic makes `Learning Rate`
    noun = title if title[:1].islower() else _NOUNS[schema["type"]]
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = " and ".join(f"{sign} {schema[name]}" for name, sign in signs.items() if name in schema)
    return f"{noun} {bounds}".rstrip()


def _suggestion(path: KeyPath, settings: Settings) -> str:
    """`; did you mean …?` where a known setting is near enough to an unknown key."""
    name, section = str(path[-1]), path[:-1]
    outer, _, inner = name.partition(".")
    if (outer, inner) in settings:
        return f"; write `{inner}` inside the section `{outer}`"
    folded = name.lower().replace("-", "_")
    same = [dotted(setting) for setting in settings if setting[-1] == folded]
    foreign = [ours for ours, theirs in _FOREIGN.items() if folded in theirs.split()]
    near = _close(folded, [str(setting[-1]) for setting in settings if setting[:-1] == section])
    far = _close(folded, [str(setting[-1]) for setting in settings])
    elsewhere = [dotted(setting) for setting in settings if setting[-1] in far]
    found = same or foreign or near or elsewhere
    return f"; did you mean {' or '.join(found)}?" if found else ""


def _close(name: str, names: list[str]) -> list[str]:
    return difflib.get_close_matches(name, names, n=1, cutoff=0.7)

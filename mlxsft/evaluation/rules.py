"""Rules that a program can check: what a row says of a right answer, and how far an answer keeps to it.

A row carries them under `check`, as in `{"prompt": …, "completion": …, "check": {"contains": ["39 euros"], "json":
true}}`; a rules file gives them for whole categories, or for all rows.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlxsft.errors import InputRefused, UsageError
from mlxsft.evaluation import overlap

KINDS: Mapping[str, str] = {
    "exact": "the answer is this text, or one of several; true: the row's own answer",
    "contains": "it has this text, or all of several, whatever their case; true: the row's own answer",
    "excludes": "it has none of these texts",
    "regex": "this regular expression is found in it",
    "json": "it is JSON (true)",
    "json_schema": "it is JSON that this JSON Schema accepts",
    "rouge_l": "words in common with the row's own answer, 0 to 1 (true), or at least so much (a number)",
    "chrf": "characters in common, by sacrebleu, likewise",
    "bleu": "phrases in common, by sacrebleu, likewise",
}
REGEX_SECONDS = 1.0  # that one search may take: some expressions take years
_OVERLAPS: Mapping[str, Callable[[str, str], float]] = {
    "rouge_l": overlap.rouge_l,
    "chrf": overlap.chrf,
    "bleu": lambda answer, reference: overlap.bleu(answer, [reference]),
}
_FILE_KEYS = ("rules", "categories")

Rules = Mapping[str, Any]  # by kind


@dataclass(frozen=True)
class RuleBook:
    """Rules for rows that have none of their own: by category, else those for all."""

    everywhere: Rules = field(default_factory=dict)
    categories: Mapping[str, Rules] = field(default_factory=dict)

    def of(self, own: Rules, category: str) -> Rules:
        return own or self.categories.get(category, self.everywhere)


def read_rules(path: Path) -> RuleBook:
    """The rules of a YAML or JSON file: `rules` for all rows, `categories` with a mapping for each.

    Raises InputRefused, with the key, for what is no rule.
    """
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputRefused(f"{path}: cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(values, dict) or not values or not set(values) <= set(_FILE_KEYS):
        raise InputRefused(f"{path}: expected the keys rules and categories", f"A rule is one of {', '.join(KINDS)}.")
    categories = values.get("categories") or {}
    if not isinstance(categories, dict):
        raise InputRefused(f"{path}: categories: expected rules by the name of a category")
    return RuleBook(
        checked(values.get("rules"), f"{path}: rules"),
        {str(name): checked(rules, f"{path}: categories: {name}") for name, rules in categories.items()},
    )


def checked(rules: object, where: str) -> Rules:
    """The rules as they are, none for None. Raises InputRefused for what is no rule, UsageError for what is missing."""
    if rules is None:
        return {}
    if not isinstance(rules, dict):
        raise InputRefused(f"{where}: got {json.dumps(rules, default=str)[:60]}, expected an object of rules")
    for kind, value in rules.items():
        if kind not in KINDS:
            raise InputRefused(f"{where}: {kind!r} is no rule", f"The rules are {', '.join(KINDS)}.")
        if (problem := _problem(kind, value)) is not None:
            raise InputRefused(f"{where}: {kind}: {problem}", f"{kind}: {KINDS[kind]}.")
    if {"chrf", "bleu"} & set(rules):
        overlap.refuse_without_sacrebleu()
    return rules


def score(rules: Rules, answer: str, reference: str) -> dict[str, float]:
    """By kind, how far the answer keeps to each rule: 0 or 1, or between them where an overlap is asked for."""
    return {kind: _score(kind, value, answer.strip(), reference.strip()) for kind, value in rules.items()}


def _score(kind: str, value: Any, answer: str, reference: str) -> float:
    match kind:
        case "exact":
            return float(answer in _texts(value, reference))
        case "contains":
            return float(all(text.casefold() in answer.casefold() for text in _texts(value, reference)))
        case "excludes":
            return float(not any(text.casefold() in answer.casefold() for text in _texts(value, reference)))
        case "regex":
            return float(_found(value, answer))
        case "json":
            return float(_parsed(answer) is not _NO_JSON)
        case "json_schema":
            parsed = _parsed(answer)
            return float(parsed is not _NO_JSON and _accepts(value, parsed))
        case _:
            common = _OVERLAPS[kind](answer, reference)
            return common if value is True else float(common >= value)


def _texts(value: Any, reference: str) -> list[str]:
    return [reference] if value is True else [t.strip() for t in ([value] if isinstance(value, str) else value)]


def _found(pattern: str, text: str) -> bool:
    """Whether the expression is found; not where it takes longer than REGEX_SECONDS."""
    import regex

    try:
        return regex.search(pattern, text, timeout=REGEX_SECONDS) is not None
    except TimeoutError:
        return False


_NO_JSON = object()


def _parsed(text: str) -> Any:
    """The JSON value that a text is; _NO_JSON where it is none."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return _NO_JSON


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _accepts(schema: Mapping[str, Any], value: Any) -> bool:
    """Whether a JSON Schema accepts the value. Raises InputRefused where it refers to a schema that is not in it."""
    from jsonschema import validators
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    # With a registry of its own it fetches no schema from the network.
    kind = validators.validator_for(schema, default=validators.Draft202012Validator)
    try:
        return bool(kind(schema, registry=Registry()).is_valid(value))
    except Unresolvable as error:
        raise InputRefused(f"json_schema: {error}", "Write the whole schema into the rule, under $defs.") from None


def _problem(kind: str, value: object) -> str | None:
    """What is wrong with the value of a rule, or None."""
    texts = isinstance(value, str) or (isinstance(value, list) and value and all(isinstance(v, str) for v in value))
    match kind:
        case "exact" | "contains":
            return None if texts or value is True else "expected a text, a list of texts, or true"
        case "excludes":
            return None if texts else "expected a text or a list of texts"
        case "regex":
            return _pattern_problem(value)
        case "json":
            return None if value is True else "expected true"
        case "json_schema":
            return _schema_problem(value)
        case _:
            number = isinstance(value, int | float) and 0 < value <= 1
            return None if number else "expected true, or a number above 0 and up to 1"


def _pattern_problem(pattern: object) -> str | None:
    import regex

    if not isinstance(pattern, str):
        return "expected a regular expression"
    try:
        regex.compile(pattern)
    except regex.error as error:
        return f"this is no regular expression: {error}"
    return None


def _schema_problem(schema: object) -> str | None:
    if not isinstance(schema, dict):
        return "expected a JSON Schema, an object"
    if importlib.util.find_spec("jsonschema") is None:
        raise UsageError("json_schema needs jsonschema, not installed here", overlap.INSTALL)
    from jsonschema import SchemaError, validators

    try:
        validators.validator_for(schema, default=validators.Draft202012Validator).check_schema(schema)
    except SchemaError as error:
        return f"this is no JSON Schema: {error.message}"
    return None

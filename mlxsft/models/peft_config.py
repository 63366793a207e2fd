"""PEFT's adapter_config.json of a LoRA: which modules it names, with which rank and scale, and what we cannot carry.

The rules are those of PEFT's own source: `check_target_module_exists` and `get_pattern_key`,
https://github.com/huggingface/peft/blob/main/src/peft/tuners/tuners_utils.py.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from mlxsft.errors import InputRefused
from mlxsft.models.adapter import is_number, listed

CONFIG = "adapter_config.json"
# What says nothing about what the adapter computes, or is read below.
READ = {
    *("peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
    *("peft_version", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out", "bias"),
    *("modules_to_save", "init_lora_weights", "ensure_weight_tying", "runtime_config", "qalora_group_size"),
    *("megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
}
# Starts that take the adapter's start out of the base: what is saved fits that other base alone.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")
PLAIN_NAME = re.compile(r"[\w.-]+")
SECONDS = 10.0  # for all patterns of a file together
# Patterns are a stranger's: one may take for ever, which only another process can be stopped in.
MATCHER = """
import json, re, sys
patterns, paths = json.load(sys.stdin)
json.dump([[path for path in paths if re.match(pattern, path)] for pattern in patterns], sys.stdout)
"""


class PeftConfig:
    """An adapter_config.json that passed every check, for the module paths of one adapter and its base."""

    def __init__(self, content: Mapping[str, Any], paths: Collection[str]) -> None:
        """`paths` are transformers' names of all modules that will be asked about. Raises InputRefused."""
        if problems := list(_problems(content)):
            raise InputRefused(listed(f"{CONFIG}: this adapter cannot be carried over:", problems))
        self.content = dict(content)
        self.dora = bool(content.get("use_dora"))
        self.dropout = float(content.get("lora_dropout") or 0.0)
        self.targets: str | list[str] | None = content.get("target_modules")
        self._ranks = _by_path(content.get("rank_pattern") or {}, paths)
        self._alphas = _by_path(content.get("alpha_pattern") or {}, paths)
        self._named = self._find_targets(paths)

    def rank_of(self, path: str) -> int:
        """The rank of a module's matrices."""
        return int(self._ranks.get(path, self.content.get("r", 8)))

    def scale_of(self, path: str) -> float:
        """What the product of a module's matrices is multiplied by."""
        alpha, rank = self._alphas.get(path, self.content.get("lora_alpha", 8)), self.rank_of(path)
        return float(alpha / math.sqrt(rank)) if self.content.get("use_rslora") else float(alpha / rank)

    def names(self, path: str) -> bool:
        """Whether the config asks for a module of this path; `all-linear` leaves out what looks like an output head."""
        return path in self._named

    def _find_targets(self, paths: Collection[str]) -> set[str]:
        excluded = _named(self.content.get("exclude_modules"), paths)
        if self.targets is None:  # PEFT's default for the architecture
            return set(paths) - excluded
        if self.targets == "all-linear":
            return {path for path in paths if not re.search(r"(^|\.)(lm_head|embed_out)$", path)} - excluded
        found = _named(self.targets, paths) - excluded
        layers = self.content.get("layers_to_transform")
        if isinstance(self.targets, str) or layers is None or layers == []:
            return found
        wanted = {layers} if isinstance(layers, int) else set(layers)
        return {path for path in found if path in self.targets or self._layer(path) in wanted}

    def _layer(self, path: str) -> int | None:
        patterns = self.content.get("layers_pattern") or []
        names = [patterns] if isinstance(patterns, str) else patterns
        searched = [rf"(?:^|.*?\.){re.escape(name)}\.(\d+)\." for name in names] or [r".*?\.[^.]*\.(\d+)\."]
        found = next((match for pattern in searched if (match := re.match(pattern, path))), None)
        return int(found[1]) if found else None


def _problems(content: Mapping[str, Any]) -> Iterator[str]:
    """What keeps an adapter from being carried over, a line each."""
    kind = content.get("peft_type")
    if kind != "LORA":
        yield f"peft_type is {kind!r}; only LORA, with rsLoRA and DoRA, exists in mlx-lm's layout"
        return
    if content.get("bias", "none") not in ("none", None):
        yield f"bias is {content['bias']!r}: trained biases have no place in mlx-lm's layout"
    start = content.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(CHANGES_BASE):
        yield (
            f"init_lora_weights is {start!r}: it belongs to a changed base; save it in PEFT with "
            "path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
        )
    for name in sorted(content.keys() - READ):
        if content[name] not in (None, False, {}, []):
            yield f"{name}: what it asks for has no place in mlx-lm's layout"
    yield from _wrong_types(content)


def _wrong_types(content: Mapping[str, Any]) -> Iterator[str]:
    if not is_number(content.get("r", 8), whole=True) or content.get("r", 8) < 1:
        yield f"r is {content.get('r')!r}, expected a whole number from 1"
    if not is_number(content.get("lora_alpha", 8)):
        yield f"lora_alpha is {content.get('lora_alpha')!r}, expected a number"
    dropout = content.get("lora_dropout") or 0.0
    if not is_number(dropout) or not 0 <= dropout < 1:
        yield f"lora_dropout is {dropout!r}, expected a number from 0 to below 1"
    for name, whole in (("rank_pattern", True), ("alpha_pattern", False)):
        pattern = content.get(name) or {}
        if not isinstance(pattern, dict) or not all(is_number(v, whole=whole) for v in pattern.values()):
            yield f"{name} is {pattern!r}, expected an object of patterns and numbers"
        elif whole and any(value < 1 for value in pattern.values()):
            yield f"{name} has a rank below 1"
    for name in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
        if not _is_text_or_list(content.get(name)):
            yield f"{name} is {content[name]!r}, expected a text or a list of texts"
    layers = content.get("layers_to_transform")
    numbers = layers if isinstance(layers, list) else [] if layers is None else [layers]
    if not all(is_number(number, whole=True) for number in numbers):
        yield f"layers_to_transform is {layers!r}, expected a list of whole numbers"


def _is_text_or_list(value: object) -> bool:
    return (
        value is None or isinstance(value, str) or (isinstance(value, list) and all(isinstance(v, str) for v in value))
    )


def _named(names: str | list[str] | None, paths: Collection[str]) -> set[str]:
    """The paths that a regular expression matches as a whole, or that are or end in one of the names."""
    if not names:
        return set()
    if isinstance(names, str):
        return set(_matches([rf"(?:{names})\Z"], paths)[0])
    ends = tuple(f".{name}" for name in names)
    return {path for path in paths if path in names or path.endswith(ends)}


def _by_path(patterns: Mapping[str, Any], paths: Collection[str]) -> dict[str, Any]:
    """{path: value of the first pattern that matches its end}."""
    found: dict[str, Any] = {}
    for matched, value in zip(
        _matches([rf"(.*\.)?({key})$" for key in patterns], paths), patterns.values(), strict=True
    ):
        for path in matched:
            found.setdefault(path, value)
    return found


def _matches(patterns: list[str], paths: Collection[str]) -> list[list[str]]:
    """The paths that each regular expression matches from their beginning on. Raises InputRefused where one cannot."""
    if not patterns:
        return []
    command = [sys.executable, "-I", "-c", MATCHER]
    try:
        for pattern in patterns:
            re.compile(pattern)
        asked = json.dumps([patterns, sorted(paths)])
        ran = subprocess.run(command, input=asked, capture_output=True, text=True, check=True, timeout=SECONDS)
    except (re.error, RecursionError, OverflowError) as error:
        raise InputRefused(f"{CONFIG}: a pattern is no regular expression ({error})") from error
    except subprocess.TimeoutExpired as error:
        raise InputRefused(f"{CONFIG}: its patterns take longer than {SECONDS:.0f} s to match") from error
    found: list[list[str]] = json.loads(ran.stdout)
    return found

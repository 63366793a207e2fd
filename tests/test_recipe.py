"""The recipe: what YAML means, which values are taken, what is said about those that are not, where paths start."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from mlxsft.errors import UsageError
from mlxsft.recipe import DataRecipe, Recipe, dump_recipe, load_recipe, recipe_schema
from mlxsft.recipe_training import OPTIMIZERS, TrainRecipe

MINIMAL = "model: org/name\ndata:\n  train: rows.jsonl\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, so that `recipe.yaml` is what messages begin with."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(text: str, *overrides: str) -> Recipe:
    path = Path("recipe.yaml")
    path.write_text(text, encoding="utf-8")
    return load_recipe(path, overrides)


def problems(text: str, *overrides: str) -> list[str]:
    with pytest.raises(UsageError) as caught:
        load(text, *overrides)
    assert caught.value.exit_code == 2
    assert "pydantic" not in caught.value.message
    return caught.value.message.splitlines()


def with_setting(path: str, value: str) -> str:
    """A minimal recipe with one setting more, which stands on the last line."""
    section, _, name = path.rpartition(".")
    if section == "data":
        return f"{MINIMAL}  {name}: {value}\n"
    return f"{MINIMAL}{section}:\n  {name}: {value}\n"


# Defaults and values -------------------------------------------------------------------------------------------------


def test_the_defaults(folder: Path) -> None:
    recipe = load(MINIMAL)
    assert recipe.model_dump() == {
        "model": "org/name",
        "revision": None,
        "data": {
            "train": str(folder / "rows.jsonl"),
            "valid": 0.05,
            "format": "auto",
            "columns": {},
            "max_tokens": 2048,
            "too_long": "keep-response",
            "train_on": "responses",
            "special_tokens": "refuse",
            "fill": {},
            "templates": None,
            "template": None,
        },
        "adapter": {
            "kind": "lora",
            "rank": 16,
            "alpha": 32.0,
            "rslora": False,
            "init": "default",
            "dropout": 0.0,
            "loraplus_lr_ratio": 1.0,
            "layers": "all",
            "targets": "all-linear",
        },
        "train": {
            "epochs": 3.0,
            "steps": None,
            "batch_size": 8,
            "micro_batch_tokens": 4096,
            "batching": "buckets",
            "learning_rate": 2e-4,
            "schedule": "cosine",
            "cycles": None,
            "final_learning_rate": 0.0,
            "warmup": 0.05,
            "decay": None,
            "optimizer": "adamw",
            "beta1": 0.9,
            "beta2": 0.999,
            "momentum": None,
            "weight_decay": 0.0,
            "clip_norm": 1.0,
            "neftune_alpha": None,
            "label_smoothing": 0.0,
            "loss_limit": "auto",
            "seed": 0,
            "cache_trunk": "auto",
            "base_dtype": "auto",
            "checkpoint_activations": False,
            "cache_limit": None,
        },
        "eval": {"every": 0.25, "patience": None, "samples": ()},
        "save": {"every": 0.25, "keep": 2, "adapter": "best"},
        "report": (),
    }


def test_a_section_left_empty_has_its_defaults(folder: Path) -> None:
    assert load(MINIMAL + "train:\neval: null\nsave: {}\n") == load(MINIMAL)


def test_a_recipe_cannot_be_changed(folder: Path) -> None:
    recipe = load(MINIMAL)
    with pytest.raises(ValidationError):
        recipe.train.seed = 1  # type: ignore[misc]  # that it is frozen is the point


@pytest.mark.parametrize(
    ("written", "value"),
    [("1.0", 1.0), ("1", 1), ("0.25", 0.25), ("200", 200), ("1e-1", 0.1), (".5", 0.5)],
)
def test_a_decimal_point_makes_a_share_and_none_makes_steps(folder: Path, written: str, value: float) -> None:
    for path in ("eval.every", "save.every", "train.decay"):
        section, name = path.split(".")
        read = getattr(getattr(load(with_setting(path, written)), section), name)
        assert (read, type(read)) == (value, type(value))


def test_warmup_takes_zero_as_steps_and_as_a_share(folder: Path) -> None:
    assert repr(load(with_setting("train.warmup", "0")).train.warmup) == "0"
    assert repr(load(with_setting("train.warmup", "0.0")).train.warmup) == "0.0"


def test_steps_and_epochs(folder: Path) -> None:
    assert (load(with_setting("train.steps", "5")).train.epochs, load(MINIMAL).train.epochs) == (None, 3.0)
    assert load(with_setting("train.epochs", "0.5")).train.epochs == 0.5
    assert problems(MINIMAL + "train:\n  epochs: 1\n  steps: 5\n") == [
        "recipe.yaml:6: train.steps: train.epochs is given too; keep one of the two"
    ]


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("adapter.rank", '"sixteen"', 'got "sixteen", expected a whole number ≥ 1'),
        ("adapter.rank", '"16"', 'got "16", expected a whole number ≥ 1'),
        ("adapter.rank", "16.0", "got 16.0, expected a whole number ≥ 1"),
        ("adapter.rank", "true", "got true, expected a whole number ≥ 1"),
        ("adapter.rank", "0", "got 0, expected a whole number ≥ 1"),
        ("adapter.rank", "010", 'got "010", expected a whole number ≥ 1'),
        ("adapter.rank", "1_000", 'got "1_000", expected a whole number ≥ 1'),
        ("adapter.rank", "0x10", 'got "0x10", expected a whole number ≥ 1'),
        ("adapter.rank", "9" * 5000, f'got "{"9" * 56}..., too large a number'),
        ("adapter.kind", "ia3", 'got "ia3", expected one of lora, dora, full'),
        ("adapter.alpha", "true", "got true, expected a number > 0"),
        ("adapter.dropout", "1", "got 1, expected a number ≥ 0 and < 1"),
        ("adapter.layers", "some", 'got "some", expected all, or a whole number ≥ 1'),
        ("adapter.targets", "[]", "got [], expected one of all-linear, all, or a list of text with something in it"),
        (
            "adapter.targets",
            "q_proj",
            'got "q_proj", expected one of all-linear, all, or a list of text with something in it',
        ),
        ("data.max_tokens", "1", "got 1, expected a whole number ≥ 2"),
        ("data.too_long", "cut", 'got "cut", expected one of error, drop, keep-response, split-turns'),
        ("data.valid", "1.0", "got 1.0, expected a share of the rows > 0 and < 1, or a file, or null"),
        ("data.valid", "0", "got 0, expected a share of the rows > 0 and < 1, or a file, or null"),
        ("data.fill", "[a]", 'got ["a"], expected names with a text for each'),
        ("data.template", "''", 'got "", expected text, or null'),
        ("train.learning_rate", ".inf", "got Infinity, expected a number > 0"),
        ("train.learning_rate", ".nan", "got NaN, expected a number > 0"),
        ("train.learning_rate", "1e999", "got Infinity, expected a number > 0"),
        ("train.learning_rate", "null", "got null, expected a number > 0"),
        ("train.final_learning_rate", "1e-3", "got 0.001, expected at most train.learning_rate, 0.0002"),
        ("train.warmup", "1.0", "got 1.0, expected a share of the run ≥ 0 and < 1, or a whole number of steps ≥ 0"),
        ("train.clip_norm", "0", "got 0, expected a number > 0, or null"),
        ("train.seed", "-1", "got -1, expected a whole number ≥ 0"),
        ("train.checkpoint_activations", "yes", 'got "yes", expected true or false'),
        ("eval.every", "0", "got 0, expected a share of the run > 0 and ≤ 1, or a whole number of steps ≥ 1"),
        ("eval.every", "1.5", "got 1.5, expected a share of the run > 0 and ≤ 1, or a whole number of steps ≥ 1"),
        ("eval.every", "true", "got true, expected a share of the run > 0 and ≤ 1, or a whole number of steps ≥ 1"),
        ("eval.samples", "hello", 'got "hello", expected a list of text'),
    ],
)
def test_a_wrong_value_is_shown_with_what_was_expected(folder: Path, path: str, value: str, said: str) -> None:
    text = with_setting(path, value)
    line = len(text.splitlines())
    assert problems(text) == [f"recipe.yaml:{line}: {path}: {said}"]


def test_a_wrong_item_is_named_and_its_list_is_not(folder: Path) -> None:
    text = MINIMAL.replace("rows.jsonl", "\n    - a.jsonl\n    - 7\n") + "  fill:\n    name: Pip\n    year: 2024\n"
    assert problems(text) == [
        "recipe.yaml:5: data.train[1]: got 7, expected text; put it in quotes",
        "recipe.yaml:9: data.fill.year: got 2024, expected text; put it in quotes",
    ]


def test_settings_that_would_do_nothing_are_refused(folder: Path) -> None:
    constant = MINIMAL + "train:\n  schedule: constant\n"
    assert load(constant + "  final_learning_rate: 0\n  decay: null\n").train.schedule == "constant"
    said = "train.schedule is constant, so the learning rate never falls; leave this out"
    assert problems(constant + "  final_learning_rate: 1e-6\n  decay: 100\n") == [
        f"recipe.yaml:6: train.final_learning_rate: {said}",
        f"recipe.yaml:7: train.decay: {said}",
    ]
    assert problems(MINIMAL + "  valid: null\neval:\n  patience: 3\n") == [
        "recipe.yaml:6: eval.patience: data.valid is null, so there is no improvement to wait for"
    ]


@pytest.mark.parametrize(
    ("section", "said"),
    [
        (
            "adapter:\n  kind: full\n  rank: 8\n",
            "6: adapter.rank: adapter.kind is full, which has no low-rank matrices",
        ),
        ("adapter:\n  kind: full\n  init: pissa\n", "6: adapter.init: adapter.kind is full, which has no low-rank"),
        ("adapter:\n  kind: dora\n  init: pissa\n", "6: adapter.init: adapter.kind is dora, whose rows have lengths"),
        ("adapter:\n  targets: all\n", "5: adapter.targets: got all, which only adapter.kind full can train"),
        ("adapter:\n  targets: [all, lm_head]\n", "5: adapter.targets: got all, which only adapter.kind full"),
        ("train:\n  optimizer: sgd\n  beta2: 0.9\n", "6: train.beta2: train.optimizer is sgd, which has no beta2"),
        ("train:\n  momentum: 0.9\n", "5: train.momentum: train.optimizer is adamw, which has no momentum"),
        ("train:\n  cycles: 3\n", "5: train.cycles: train.schedule is cosine, which falls once"),
        (
            "train:\n  schedule: inverse_sqrt\n  decay: 9\n",
            "6: train.decay: train.schedule is inverse_sqrt, so the fall of the learning rate has no end",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(folder: Path, section: str, said: str) -> None:
    (problem,) = problems(MINIMAL + section)
    assert problem.startswith(f"recipe.yaml:{said}")


def test_what_null_stands_for_is_written_out(folder: Path) -> None:
    def train(**settings: str) -> TrainRecipe:
        return load(MINIMAL + "train:\n" + "".join(f"  {name}: {value}\n" for name, value in settings.items())).train

    def moments(optimizer: str) -> tuple[float | None, ...]:
        found = train(optimizer=optimizer)
        return found.beta1, found.beta2, found.momentum

    assert moments("lion") == (0.9, 0.99, None)
    assert moments("muon") == (0.9, 0.999, 0.95)
    assert moments("sgd") == (None, None, 0.0)
    assert moments("adafactor") == (None, None, None)
    assert train(schedule="warmup_stable_decay").decay == 0.2
    assert train(schedule="cosine_with_restarts").cycles == 2
    assert load(MINIMAL + "adapter:\n  kind: full\n").adapter.targets == "all"
    assert load(MINIMAL + "adapter:\n  kind: full\n  targets: all-linear\n").adapter.targets == "all-linear"


def test_the_scale_of_an_adapter(folder: Path) -> None:
    assert load(MINIMAL + "adapter:\n  alpha: 8\n").adapter.scale == 0.5
    assert load(MINIMAL + "adapter:\n  alpha: 8\n  rslora: true\n").adapter.scale == 2.0


# Every problem, in one pass ------------------------------------------------------------------------------------------


def test_every_problem_of_file_and_overrides_is_said_at_once_in_order(folder: Path) -> None:
    text = """\
data:
  train: rows.jsonl
  fromat: alpaca
adapter:
  rank: "sixteen"
  lora_alpha: 3
train:
  learnig_rate: 1e-5
  seed: 1
  seed: 2
  final_learning_rate: 1
  schedule: cosin
save: 3
"""
    assert problems(text, "eval.patience=0", "train.foo=1", "nonsense", "train..x=1", "adapter.alpha=[") == [
        "recipe.yaml: model: missing; it has no default",
        "recipe.yaml:3: data.fromat: no such setting; did you mean format?",
        'recipe.yaml:5: adapter.rank: got "sixteen", expected a whole number ≥ 1',
        "recipe.yaml:6: adapter.lora_alpha: no such setting; did you mean adapter.alpha?",
        "recipe.yaml:8: train.learnig_rate: no such setting; did you mean learning_rate?",
        "recipe.yaml:9: train.seed: given twice: recipe.yaml:9 and recipe.yaml:10",
        "recipe.yaml:11: train.final_learning_rate: got 1.0, expected at most train.learning_rate, 0.0002",
        'recipe.yaml:12: train.schedule: got "cosin", expected one of cosine, linear, constant, '
        "cosine_with_restarts, inverse_sqrt, warmup_stable_decay",
        "recipe.yaml:13: save: got 3, expected a section of settings",
        "--set eval.patience=0: got 0, expected a whole number ≥ 1, or null",
        "--set train.foo=1: no such setting",
        "--set nonsense: expected KEY=VALUE, such as train.learning_rate=1e-4",
        "--set train..x=1: expected KEY=VALUE, such as train.learning_rate=1e-4",
        "--set adapter.alpha=[: not YAML: expected the node content, but found '<stream end>'",
    ]


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("learning_rate", "train.learning_rate"),
        ("learning-rate", "train.learning_rate"),
        ("LEARNING_RATE", "train.learning_rate"),
        ("lora_r", "adapter.rank"),
        ("lora_alpha", "adapter.alpha"),
        ("num_epochs", "train.epochs"),
        ("num_train_epochs", "train.epochs"),
        ("iters", "train.steps"),
        ("lr", "train.learning_rate"),
        ("max_seq_length", "data.max_tokens"),
        ("gradient_checkpointing", "train.checkpoint_activations"),
        ("grad_checkpoint", "train.checkpoint_activations"),
        ("base_model", "model"),
        ("micro_batch_size", "train.batch_size or train.micro_batch_tokens"),
        ("every", "eval.every or save.every"),
        ("adaptor", "adapter"),
        ("wamrup", "train.warmup"),
    ],
)
def test_an_unknown_key_brings_the_setting_that_was_meant(folder: Path, key: str, suggestion: str) -> None:
    assert problems(f"{MINIMAL}{key}: 1\n") == [
        f"recipe.yaml:4: {key}: no such setting; did you mean {suggestion}?",
    ]


def test_an_unknown_key_like_nothing_brings_no_suggestion(folder: Path) -> None:
    assert problems(MINIMAL + "xyzzy: 1\n") == ["recipe.yaml:4: xyzzy: no such setting"]


def test_a_dotted_key_in_the_file_is_explained(folder: Path) -> None:
    assert problems(MINIMAL + "train.seed: 1\n") == [
        "recipe.yaml:4: train.seed: no such setting; write `seed` inside the section `train`"
    ]


def test_an_empty_file_misses_two_settings(folder: Path) -> None:
    missing = {f"recipe.yaml: {key}: missing; it has no default" for key in ("data.train", "model")}
    assert set(problems("")) == set(problems("# nothing\n")) == missing


def test_a_thousand_unknown_keys_end_in_a_count(folder: Path) -> None:
    lines = problems(MINIMAL + "".join(f"k{n}: 1\n" for n in range(1000)))
    assert (len(lines), lines[-1]) == (51, "... and 950 more")


def test_what_steers_a_terminal_is_written_as_escapes(folder: Path) -> None:
    line = problems(MINIMAL + '"\\e[31mred": 1\nrevision: ["\\u009b2J"]\n')
    assert line == [
        "recipe.yaml:4: \\u001b[31mred: no such setting",
        'recipe.yaml:5: revision: got ["\\u009b2J"], expected text, or null',
    ]


# Files that are no recipes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"- a\n- b\n", "recipe.yaml:1: expected settings such as `model: NAME`, one a line"),
        (b"just words\n", "recipe.yaml:1: expected settings such as `model: NAME`, one a line"),
        (b"model: a\ndata: {train: x\n", "recipe.yaml:3:1: not YAML: expected ',' or '}', but got '<stream end>'"),
        (b"model: a\n\tdata: b\n", "recipe.yaml:2:1: not YAML: found character '\\t' that cannot start any token"),
        (b"model: a: b\n", "recipe.yaml:1:9: not YAML: mapping values are not allowed here"),
        (b"model: a\n---\nmodel: b\n", "recipe.yaml:2:1: not YAML: but found another document"),
        (b"model: a\ndata: \x00\n", "recipe.yaml:2:7: not YAML: the character \\u0000 may not stand here"),
        (b'model: "\\UFFFFFFFF"\n', "recipe.yaml:1:11: not YAML: an escape names no character"),
        (b"model: a\nrevision: \xff\n", "recipe.yaml:2: not UTF-8 (byte 0xff)"),
        (b"a: &x [1]\nb: *x\n", "recipe.yaml:2:4: not YAML: aliases (*name) are not taken; write the value out"),
        (b"a: &x [*x]\n", "recipe.yaml:1:8: not YAML: aliases (*name) are not taken; write the value out"),
        (b"a: " + b"[" * 100_000, "recipe.yaml:1:19: not YAML: nested too deeply"),
        (b"#" * 1_000_001, "recipe.yaml: larger than 1,000,000 bytes, which no recipe is"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_sentence(folder: Path, raw: bytes, said: str) -> None:
    (folder / "recipe.yaml").write_bytes(raw)
    with pytest.raises(UsageError) as caught:
        load_recipe(Path("recipe.yaml"))
    assert caught.value.message == said


def test_a_missing_file_and_a_folder_are_one_sentence(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"^none\.yaml: no such file$"):
        load_recipe(Path("none.yaml"))
    (folder / "sub").mkdir()
    with pytest.raises(UsageError, match=r"^sub: a folder, expected a YAML file$"):
        load_recipe(Path("sub"))


def test_a_byte_order_mark_and_windows_line_ends_are_fine(folder: Path) -> None:
    (folder / "windows.yaml").write_bytes(b"\xef\xbb\xbf" + MINIMAL.replace("\n", "\r\n").encode())
    assert load_recipe(Path("windows.yaml")) == load(MINIMAL)


@pytest.mark.parametrize("value", ["!!python/object/apply:os.system [ls]", "!mine 3", "!!set {a}", "!!int x"])
def test_a_tag_is_refused_by_name(folder: Path, value: str) -> None:
    (line,) = problems(with_setting("train.seed", value))
    assert line.startswith("recipe.yaml:5: train.seed: the tag ")
    assert "is not taken" in line


def test_text_that_no_file_can_hold_is_refused(folder: Path) -> None:
    for escape in ("\\0", "\\ud800"):
        (line,) = problems(f'model: "a{escape}"\ndata: {{train: x}}\n')
        assert line.startswith("recipe.yaml:1: model: ")
    (line,) = problems("model: a\ndata: {train: x, ? [a] : b}\n")
    assert line == "recipe.yaml:2: data: a key must be a plain name"


# What YAML means -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("written", ["1e-5", "1E-5", "1.e-5", "1.0e-5", "0.00001", ".00001", "+1e-5"])
def test_one_e_minus_five_is_a_number(folder: Path, written: str) -> None:
    assert load(with_setting("train.learning_rate", written)).train.learning_rate == 1e-5


def test_a_whole_number_is_fine_where_a_number_is_expected(folder: Path) -> None:
    read = load(with_setting("train.learning_rate", "1")).train.learning_rate
    assert (read, type(read)) == (1.0, float)


@pytest.mark.parametrize(
    "word", ["NO", "no", "on", "Off", "yes", "y", "2024-01-01", "12:30:00", "010", "0o7", "0x1f", "1_000", "<<", "="]
)
def test_only_what_yaml_1_2_calls_something_else_is_not_text(folder: Path, word: str) -> None:
    assert load(with_setting("data.fill", f"{{country: {word}}}")).data.fill == {"country": word}


def test_keys_are_text_whatever_they_look_like(folder: Path) -> None:
    assert load(with_setting("data.fill", "{NO: a, 1: b, null: c}")).data.fill == {"NO": "a", "1": "b", "null": "c"}


@pytest.fixture
def patched_yaml() -> Iterator[None]:
    """What importing mlx-lm does to PyYAML's own loader, and worse."""
    before = {first: list(resolvers) for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()}
    yaml.SafeLoader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^org/name$"), ["o"])
    yield
    yaml.SafeLoader.yaml_implicit_resolvers = before


def test_reading_does_not_depend_on_the_global_loader(folder: Path, patched_yaml: None) -> None:
    assert load(with_setting("train.learning_rate", "1e-5")).model == "org/name"


def test_reading_leaves_the_global_loader_alone(folder: Path) -> None:
    load(MINIMAL)
    assert yaml.safe_load("[1e-5, NO]") == ["1e-5", False]


# Overrides -----------------------------------------------------------------------------------------------------------


def test_overrides_are_yaml_values_for_any_setting(folder: Path) -> None:
    recipe = load(
        MINIMAL + "  fill: {author: Tom}\nadapter:\n",
        "train.learning_rate=1e-4",
        "data.fill.name=Pip",
        "adapter.targets=[q_proj,v_proj]",
        "eval.patience=null",
        "eval.samples=['Who are you?', Hello]",
        "train.clip_norm=",
        "revision='123'",
        "save={every: 10, keep: 1}",
        "model=a/b=c",
    )
    assert recipe.train.learning_rate == 1e-4
    assert recipe.data.fill == {"author": "Tom", "name": "Pip"}
    assert recipe.adapter.targets == ("q_proj", "v_proj")
    assert recipe.eval.patience is None
    assert recipe.eval.samples == ("Who are you?", "Hello")
    assert recipe.train.clip_norm is None
    assert (recipe.save.every, recipe.save.keep) == (10, 1)
    assert (recipe.model, recipe.revision) == ("a/b=c", "123")


def test_an_override_makes_a_wrong_value_right_and_the_last_one_wins(folder: Path) -> None:
    text = with_setting("train.seed", "!bad x")
    assert load(text, "train.seed=1", "train.seed=2").train.seed == 2


def test_overrides_alone_make_a_recipe(folder: Path) -> None:
    assert load("", "model=org/name", "data.train=rows.jsonl") == load(MINIMAL)


def test_an_override_of_steps_takes_the_place_of_the_files_epochs(folder: Path) -> None:
    epochs, steps = with_setting("train.epochs", "2"), with_setting("train.steps", "9")
    train = load(epochs, "train.steps=5").train
    assert (train.epochs, train.steps) == (None, 5)
    train = load(steps, "train.epochs=1").train
    assert (train.epochs, train.steps) == (1.0, None)
    train = load(dump_recipe(load(MINIMAL)), "train.steps=5").train
    assert (train.epochs, train.steps) == (None, 5)
    assert load(epochs, "train.steps=null").train.epochs == 2.0
    for pair in (("train.steps=5", "train.epochs=1"), ("train.epochs=1", "train.steps=5")):
        assert problems(MINIMAL, *pair) == ["--set train.steps=5: train.epochs is given too; keep one of the two"]


def test_an_override_below_a_value_is_refused(folder: Path) -> None:
    assert problems(MINIMAL, "model.name=x") == ['--set model.name=x: model is "org/name", not a section']


def test_a_wrong_item_of_an_override_is_named(folder: Path) -> None:
    assert problems(MINIMAL, "adapter.targets=[q, 3]") == [
        "--set adapter.targets=[q, 3]: adapter.targets[1]: got 3, expected text; put it in quotes"
    ]


# Paths ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A recipe in tmp/recipes/, to be loaded from tmp/here/."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "here").mkdir()
    path = tmp_path / "recipes" / "recipe.yaml"
    path.write_text("model: org/name\ndata: {train: [a.jsonl, ../b.jsonl], valid: v.jsonl, template: chat.jinja}\n")
    return path


def test_paths_in_the_file_start_at_its_folder(elsewhere: Path, tmp_path: Path) -> None:
    data = load_recipe(elsewhere, cwd=tmp_path / "here").data
    assert data.train == (str(tmp_path / "recipes" / "a.jsonl"), str(tmp_path / "b.jsonl"))
    assert data.valid == str(tmp_path / "recipes" / "v.jsonl")
    assert data.template == str(tmp_path / "recipes" / "chat.jinja")


def test_paths_in_overrides_start_at_the_current_folder(
    elsewhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = ["data.train=[a.jsonl, ../b.jsonl]", "data.valid=v.jsonl", "data.template=./chatml", "model=./m"]
    recipe = load_recipe(elsewhere, overrides, cwd=tmp_path / "here")
    assert recipe.data.train == (str(tmp_path / "here" / "a.jsonl"), str(tmp_path / "b.jsonl"))
    assert recipe.data.valid == str(tmp_path / "here" / "v.jsonl")
    assert recipe.data.template == str(tmp_path / "here" / "chatml")
    assert recipe.model == str(tmp_path / "here" / "m")
    monkeypatch.chdir(tmp_path / "here")
    assert load_recipe(Path("../recipes/recipe.yaml"), overrides) == recipe


def test_a_model_is_a_folder_where_there_is_one_and_else_a_hub_id(elsewhere: Path, tmp_path: Path) -> None:
    def model(text: str) -> str:
        return load_recipe(elsewhere, [f"model={text}"], cwd=tmp_path / "here").model

    assert model("org/name") == "org/name"
    (tmp_path / "here" / "org" / "name").mkdir(parents=True)
    assert model("org/name") == str(tmp_path / "here" / "org" / "name")
    assert model("../m") == str(tmp_path / "m")
    assert model("/models/m") == "/models/m"
    assert model("~/m") == str(Path.home() / "m")
    assert load_recipe(elsewhere, cwd=tmp_path / "here").model == "org/name"  # in the file: not from the current folder


def test_a_share_and_a_built_in_template_are_no_paths(folder: Path) -> None:
    data = load(MINIMAL + "  valid: 0.1\n  template: plain\n").data
    assert (data.valid, data.template) == (0.1, "plain")


# Round trips ---------------------------------------------------------------------------------------------------------

text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=20)
traps = st.sampled_from(
    ["NO", "1e-5", "010", "null", "~", "true", "12:30", "2024-01-01", "- a", "a: b", "#x", " x ", "*a"]
)
words = text | traps
SCHEDULES = ["cosine", "linear", "constant", "cosine_with_restarts", "inverse_sqrt", "warmup_stable_decay"]
share = st.floats(0, 1, exclude_min=True)
every = share | st.integers(1, 10**6)
files = words.map(lambda name: "/data/" + name.replace("/", "").replace(".", ""))


@st.composite
def recipes(draw: st.DrawFn) -> dict[str, Any]:
    """The values of any valid recipe that names no relative path."""
    rate = draw(st.floats(1e-12, 10))
    schedule = draw(st.sampled_from(SCHEDULES))
    falls = schedule not in ("constant", "inverse_sqrt")
    steps = draw(st.none() | st.integers(1, 10**9))
    valid = draw(st.none() | st.floats(0, 1, exclude_min=True, exclude_max=True) | files)
    return {
        "model": draw(st.sampled_from(["org/name", "/models/x"])),
        "revision": draw(st.none() | words),
        "data": {
            "train": draw(files | st.lists(files, min_size=1, max_size=3)),
            "valid": valid,
            "format": draw(st.sampled_from(["auto", "alpaca", "prompt_completion", "messages", "text"])),
            "max_tokens": draw(st.integers(2, 10**9)),
            "fill": draw(st.dictionaries(words, st.just("") | words, max_size=3)),
            "template": draw(st.sampled_from([None, "plain", "/templates/t.jinja"])),
        },
        "adapter": {
            "rank": draw(st.integers(1, 10**6)),
            "alpha": draw(st.floats(0, exclude_min=True, allow_infinity=False)),
            "dropout": draw(st.floats(0, 1, exclude_max=True)),
            "layers": draw(st.just("all") | st.integers(1, 1000)),
            "targets": draw(st.just("all-linear") | st.lists(words, min_size=1, max_size=3)),
        },
        "train": {
            "steps": steps,
            "epochs": None if steps else draw(st.none() | st.floats(0, 1e6, exclude_min=True)),
            "learning_rate": rate,
            "schedule": schedule,
            "final_learning_rate": draw(st.floats(0, rate)) if falls else 0.0,
            "warmup": draw(st.floats(0, 1, exclude_max=True) | st.integers(0, 10**6)),
            "decay": draw(st.none() | every) if falls else None,
            "optimizer": draw(st.sampled_from(sorted(OPTIMIZERS))),
            "clip_norm": draw(st.none() | st.floats(0, 1e9, exclude_min=True)),
            "loss_limit": draw(st.sampled_from(["auto", None]) | st.floats(0, 1e9, exclude_min=True)),
            "seed": draw(st.integers(0, 10**17)),
            "checkpoint_activations": draw(st.booleans()),
            "base_dtype": draw(st.sampled_from(["auto", "stored"])),
            "cache_limit": draw(st.none() | st.floats(0, 1e6)),
        },
        "eval": {
            "every": draw(every),
            "patience": draw(st.none() | st.integers(1, 100)) if valid is not None else None,
            "samples": draw(st.lists(words, max_size=3)),
        },
        "save": {"every": draw(every), "keep": draw(st.integers(1, 100))},
    }


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=recipes())
def test_a_dumped_recipe_loads_as_an_equal_one(tmp_path: Path, values: dict[str, Any]) -> None:
    recipe = Recipe.model_validate(values)
    path = tmp_path / "dumped.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8", newline="\n")
    again = load_recipe(path)
    assert again == recipe
    assert repr(again) == repr(recipe)  # 1 and 1.0 are equal, and not the same setting
    assert dump_recipe(again) == dump_recipe(recipe)
    assert Recipe.model_validate(recipe.model_dump()) == recipe


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=st.binary(max_size=60) | st.text(max_size=60).map(str.encode), override=st.text(max_size=20))
def test_whatever_the_file_holds_there_is_a_recipe_or_a_sentence(tmp_path: Path, raw: bytes, override: str) -> None:
    path = tmp_path / "any.yaml"
    path.write_bytes(raw)
    with pytest.raises(UsageError) as caught:
        load_recipe(path, [override])
    assert caught.value.message


def test_a_recipe_made_in_python_is_held_to_the_same_rules() -> None:
    assert Recipe(model="m", data=DataRecipe(train="x")).train.epochs == 3.0
    with pytest.raises(ValidationError):
        DataRecipe(train=())


# The schema ----------------------------------------------------------------------------------------------------------


def test_the_schema_is_closed_and_describes_every_setting() -> None:
    schema = recipe_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["title"] == "mlxsft recipe"
    assert schema["required"] == ["model", "data"]
    for section in (schema, *schema["$defs"].values()):
        assert section["additionalProperties"] is False
        assert section["description"].endswith(".")
        for name, setting in section["properties"].items():
            if "$ref" in setting:
                continue
            assert setting["description"].rstrip().endswith("."), name
            assert "default" in setting or name in section["required"], name
    assert json.loads(json.dumps(schema)) == schema


def test_the_schema_has_types_bounds_and_choices() -> None:
    definitions = recipe_schema()["$defs"]
    train = definitions["TrainRecipe"]["properties"]
    assert train["batch_size"]["minimum"] == 1
    assert train["schedule"]["enum"] == SCHEDULES
    kinds = [option["type"] for option in definitions["EvalRecipe"]["properties"]["every"]["anyOf"]]
    assert kinds == ["number", "integer"]

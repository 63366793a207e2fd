"""The recipes that ship: each loads, says what it should, and trains on the very rows of its header; copies of them."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from tokenizers import AddedToken
from transformers import AutoConfig, AutoModelForCausalLM

from mlxsft.cli import app, call
from mlxsft.data.findings import KINDS as KINDS_OF_FINDINGS
from mlxsft.data.hub import HubRows
from mlxsft.data.hub_files import split_files
from mlxsft.data.render import load_renderer
from mlxsft.data.sources import source_of
from mlxsft.evaluation.requirements import Requirement
from mlxsft.evaluation.rows import file_set
from mlxsft.evaluation.rules import read_rules, score
from mlxsft.models.source import open_model
from mlxsft.quickstart.trial import BASE
from mlxsft.recipe import Recipe, Source, load_recipe
from mlxsft.recipe_shipped import PARTS, SHIPS, ShippedRecipe, folder, shipped
from mlxsft.training.checkpoints import RunFolder
from mlxsft.training.run import run_training
from tests.data.test_template import FAMILIES, TEMPLATES
from tests.test_house import ROOT
from tests.tiny import CHATML, write_tokenizer
from tests.training.test_run import events

RECIPES = {recipe.name: recipe for recipe in shipped()}
NAMES = {
    "quickstart", "first-run", "marketing-copy", "customer-support", "translation", "classification-and-extraction",
    "data-insights", "document-check", "tool-calling", "alpaca", "dolly", "flan-mixture", "chat-multiturn",
    "small-memory", "full-small", "cpu-torch",
}  # fmt: skip
# What the config calls the family of a base, and the chat template of that family (None: completes text), by its name.
KINDS: dict[str, tuple[str, str | None]] = {
    r"SmolLM2-.*-Instruct": ("llama", "chatml"),
    r"SmolLM2": ("llama", None),
    r"Llama-3\.2-.*-Instruct": ("llama", "llama-3.2"),
    r"Mistral-7B-Instruct": ("mistral", "mistral-0.1"),
    r"Mistral-7B": ("mistral", None),
    r"Qwen2\.5-.*-Instruct": ("qwen2", "qwen-2.5"),
    r"Qwen3-.*-Instruct": ("qwen3", "qwen-2.5"),
    r"granite-3.*-instruct": ("granite", "granite-3"),
    r"OLMo-2": ("olmo2", None),
}
SPECIAL = {"granite-3": ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>")}
ENDS = {"granite-3": "<|end_of_text|>", "llama-3.2": "<|eot_id|>", "mistral-0.1": "</s>", None: "<|endoftext|>"}
NO_IDS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))  # which the tokenizer says
LENGTH = 4096  # tokens of the longest row here, where a token is hardly more than a byte

each = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)


# --- what they say ---------------------------------------------------------------------------------------------------


def test_every_purpose_has_its_recipe() -> None:
    assert set(RECIPES) == NAMES


@each
def test_header_has_every_part(recipe: ShippedRecipe) -> None:
    assert recipe.purpose[0].isupper() or recipe.purpose[0].isdigit()
    assert recipe.purpose.endswith((".", "?"))
    assert len(recipe.examples) == 3
    assert set(recipe.parts) == set(PARTS)
    assert all(recipe.parts.values())
    assert re.match(r"(measured|forecast by `mlxsft plan)", recipe.parts["Figures"])
    assert f"mlxsft recipes copy {recipe.name}" in recipe.commands
    (run,) = {word for command in recipe.commands for word in shlex.split(command) if word.startswith("runs/")} - {
        word for command in recipe.commands for word in shlex.split(command) if "=runs/" in word
    }
    assert any(
        shlex.split(command)[:5] == ["mlxsft", "train", f"{recipe.name}.yaml", "--out", run]
        for command in recipe.commands
    )


def parsed(command: str) -> tuple[str, dict[str, Any]]:
    """What click makes of a command line: the command's name, and the values of all parameters."""
    program, *words = shlex.split(command)
    assert program == "mlxsft"
    found: click.Command = app
    while isinstance(found, click.Group):
        found = found.commands[words.pop(0)]
    return found.name or "", found.make_context(found.name, words).params


@each
def test_commands_parse_and_name_the_base_and_files_of_the_recipe(recipe: ShippedRecipe) -> None:
    made = set()  # models that an earlier command makes
    for command in recipe.commands:
        name, values = parsed(command)
        if name in ("chat", "generate", "serve", "fuse", "check", "show"):
            assert values["model"] in (recipe.base, *made), command
        if name in ("convert", "fuse"):
            made.add(str(values["out"]))
        if name == "export":
            assert str(values["adapter"]) in made
        files = {path.name for path in recipe.files}
        for option in ("rules", "templates"):
            if isinstance(values.get(option), str | Path) and name != "generate":
                assert str(values[option]) in files, command
        assert set((values.get("fail_on") or "pii").split(",")) <= set(KINDS_OF_FINDINGS), command
        for demand in values.get("demands", ()):
            Requirement.parse(demand)
        for override in values.get("overrides", ()):
            assert override.startswith("model=")
            assert override.removeprefix("model=") in made


@each
def test_a_copy_loads_as_the_recipe_does(recipe: ShippedRecipe, tmp_path: Path) -> None:
    assert call(["recipes", "copy", recipe.name, str(tmp_path)]) == 0
    copied = load_recipe(tmp_path / f"{recipe.name}.yaml")
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in recipe.files}
    moved = json.loads(load_recipe(recipe.path).model_dump_json().replace(str(folder()), str(tmp_path)))
    assert copied == Recipe.model_validate_json(json.dumps(moved))


def test_addresses_of_the_hub_name_files() -> None:
    """The files of FLAN lie under these names; the others are whole data sets."""
    named = [source_of(given if isinstance(given, str) else given.path) for given in every_source()]
    of_the_hub = [rows for rows in named if isinstance(rows, HubRows)]
    assert {rows.repo for rows in of_the_hub} == {
        "tatsu-lab/alpaca", "databricks/databricks-dolly-15k", "Muennighoff/flan",
    }  # fmt: skip
    for rows in of_the_hub:
        if rows.part:
            there = [rows.part, "train/rte_10templates_train.jsonl", "test/aeslc_10templates_test.jsonl", "README.md"]
            assert split_files(rows.repo, there, "", rows.part, "train") == [rows.part]


def every_source() -> Iterator[str | Source]:
    """What the recipes train on."""
    for recipe in RECIPES.values():
        train = load_recipe(recipe.path).data.train
        yield from train if isinstance(train, tuple) else (train,)


# --- what they do ----------------------------------------------------------------------------------------------------


def kind_of(base: str) -> tuple[str, str | None]:
    return next(kind for pattern, kind in KINDS.items() if re.search(pattern, base))


def write_base(at: Path, base: str, layers: int) -> Path:
    """A tiny checkpoint of the family of a base, with its way of chatting, quantized where the base is."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    sizes |= {"head_dim": 32, "num_hidden_layers": layers, "max_position_embeddings": LENGTH}
    raw = write_family(at / "raw", base, sizes, torch.float32)
    if not base.endswith("-4bit"):
        return raw
    assert call(["convert", str(raw), str(at / "quantized"), "--bits", "4"]) == 0
    return at / "quantized"


def write_family(raw: Path, base: str, sizes: Mapping[str, Any], dtype: torch.dtype, **tokenizer: Any) -> Path:
    """A checkpoint of the family of a base with these sizes and random weights, and a tokenizer that chats as it does.

    Without a `vocab_size` it is as large as the tokenizer.
    """
    kind, chat = kind_of(base)
    family = FAMILIES.get(chat or "")
    special = (*family.others, family.bos, family.end) if family else SPECIAL.get(chat or "", ())
    template = CHATML if chat == "chatml" else chat and (TEMPLATES / f"{chat}.jinja").read_text(encoding="utf-8")
    rows = write_tokenizer(
        raw,
        chat_template=template,
        eos=ENDS.get(chat, "<|im_end|>"),
        bos=family.bos if family else None,
        special=[AddedToken(text, special=True) for text in special if text != "<s>"],
        **tokenizer,
    )
    config = AutoConfig.for_model(kind, **{"vocab_size": rows, **NO_IDS, **sizes})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(raw)
    return raw


@pytest.fixture(scope="module")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[ShippedRecipe], Path]:
    """The tiny base of a recipe; recipes of one family share it."""
    made: dict[tuple[object, ...], Path] = {}

    def find(recipe: ShippedRecipe) -> Path:
        if recipe.base == SHIPS:
            return BASE
        layers = load_recipe(recipe.path).adapter.layers
        count = 2 if layers == "all" else layers + 2
        key = (kind_of(recipe.base), recipe.base.endswith("-4bit"), count)
        if key not in made:
            made[key] = write_base(tmp_path_factory.mktemp("base"), recipe.base, count)
        return made[key]

    return find


def write_examples(recipe: ShippedRecipe, path: Path, count: int = 12) -> Path:
    """The rows of the header, over and over."""
    lines = [json.dumps(row, ensure_ascii=False) for row in recipe.examples]
    path.write_text("\n".join(lines[i % len(lines)] for i in range(count)) + "\n", encoding="utf-8")
    return path


def overrides_for(recipe: ShippedRecipe, base: Path, rows: Path) -> list[str]:
    """What puts the tiny base and the rows in the place of the real ones, source by source."""
    train = load_recipe(recipe.path).data.train
    sources: Any = str(rows)
    if isinstance(train, tuple):
        sources = [given if isinstance(given, str) else {"path": str(rows), "weight": given.weight} for given in train]
    return [
        f"model={base}", f"data.train={json.dumps(sources)}", f"data.max_tokens={LENGTH}", "train.steps=2",
        "eval.every=1.0", "eval.samples=[]", "save.every=1.0",
    ]  # fmt: skip


@each
def test_recipe_trains_on_the_rows_of_its_header(
    recipe: ShippedRecipe, base_of: Callable[[ShippedRecipe], Path], tmp_path: Path
) -> None:
    rows = write_examples(recipe, tmp_path / "rows.jsonl")
    loaded = load_recipe(recipe.path, overrides_for(recipe, base_of(recipe), rows))
    backend = "torch" if "torch" in recipe.name else "mlx"
    assert all(("--backend torch" in c) == (backend == "torch") for c in recipe.commands if " train " in c)
    run = run_training(
        loaded, RunFolder(tmp_path / "run"), backend_name=backend, resume=False, force=False, stop=lambda: False,
        tell=print,
    )  # fmt: skip
    assert list(run)
    steps = events(tmp_path / "run", "step")
    assert len(steps) == 2
    assert all(math.isfinite(step["loss"]) and step["trained_tokens"] > 0 for step in steps)
    (start,) = events(tmp_path / "run", "start")
    weighted = {"left out by weight"} if isinstance(loaded.data.train, tuple) else set()
    assert set(start["ledger"]) == {"read", "trained", "held out"} | weighted
    assert (tmp_path / "run" / "adapters.safetensors").is_file()


@pytest.mark.parametrize("name", [name for name, r in RECIPES.items() if any(".rules." in p.name for p in r.files)])
def test_rules_give_full_marks_to_the_answers_of_the_header(
    name: str, base_of: Callable[[ShippedRecipe], Path], tmp_path: Path
) -> None:
    recipe = RECIPES[name]
    renderer = load_renderer(open_model(str(base_of(recipe))), None)
    book = read_rules(recipe.path.with_suffix(".rules.yaml"))
    assert set(book.categories) <= {"advert", "Spanish"} | {row.get("category") for row in recipe.examples}
    rows = write_examples(recipe, tmp_path / "rows.jsonl", count=3)
    found, _ = file_set("rows", rows, renderer, book, count=3, samples=3, seed=0)
    assert len(found.asked) == 3
    for asked in found.asked:
        assert asked.rules
        assert score(asked.rules, asked.reference, asked.reference) == dict.fromkeys(asked.rules, pytest.approx(1.0))
        wrong = "<tool_call> a revolutionary answer, as an AI, to Ihnen\nand\nyou" * 20
        assert min(score(asked.rules, wrong, asked.reference).values()) < 0.2


# --- the commands ----------------------------------------------------------------------------------------------------


def test_list_says_what_the_headers_say(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["recipes", "list", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {recipe["name"] for recipe in told} == NAMES
    assert call(["recipes", "list"]) == 0
    out = capsys.readouterr().out
    for recipe in told:
        assert set(recipe) == {"name", "purpose", "base", "needs"}
        assert all(recipe[key] in out for key in recipe)


def test_copy_says_what_is_missing_and_what_comes_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(["recipes", "copy", "customer-support", "my support.yaml"]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines() == ["my support.yaml", "customer-support.rules.yaml"]
    assert "write customer-support.jsonl" in said.err
    assert said.err.splitlines()[-1] == "Next: mlxsft plan 'my support.yaml'"
    assert call(["recipes", "copy", "first-run"]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines() == ["first-run.yaml", "first-run.jsonl"]
    assert said.err == "Next: mlxsft train first-run.yaml --out runs/first-run\n"


def test_copy_refuses_what_exists_and_leaves_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = tmp_path / "first-run.jsonl"
    kept.write_text("mine\n")
    assert call(["recipes", "copy", "first-run", str(tmp_path)]) == 2
    assert f"{kept}: is there already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["first-run.jsonl"]
    assert kept.read_text() == "mine\n"
    assert call(["recipes", "copy", "first-run", str(tmp_path), "--force"]) == 0
    assert kept.read_text(encoding="utf-8") == (folder() / "first-run.jsonl").read_text(encoding="utf-8")


def test_copy_of_what_is_not_there_names_what_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("nothing", "../pyproject", "translation.rules"):
        assert call(["recipes", "copy", name, str(tmp_path)]) == 2
        assert "no such recipe" in (err := capsys.readouterr().err)
        assert "customer-support" in err
    assert call(["recipes", "copy", "alpaca", str(tmp_path / "none" / "a.yaml")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_an_installed_package_has_them_inside(tmp_path: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (inside,) = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"].items()
    assert inside == ("recipes", "mlxsft/recipes")
    site = tmp_path / "site"
    shutil.copytree(ROOT / "mlxsft", site / "mlxsft", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / inside[0], site / inside[1])
    command = [sys.executable, "-m", "mlxsft", "recipes", "copy", "quickstart"]
    ran = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(site)}, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    copied = load_recipe(tmp_path / "quickstart.yaml")
    assert copied.model == str(site / "mlxsft" / "quickstart" / "base")
    assert Path(str(copied.data.train)).is_file()


def test_the_readme_has_their_table() -> None:
    rows = [f"| [{r.name}](recipes/{r.name}.yaml) | {r.purpose} | {r.base} |" for r in RECIPES.values()]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "\n".join(rows) in readme, "this is what README.md should have:\n" + "\n".join(rows)

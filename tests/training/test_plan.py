"""A forecast beside the run that it is of; changes that make a run fit; a Mac on paper."""

from __future__ import annotations

import json
import resource
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from mlxsft.cli import call
from mlxsft.errors import UsageError
from mlxsft.recipe import Recipe, load_recipe
from mlxsft.training.plan import (
    TERAFLOPS,
    Forecast,
    changes_for,
    fitting,
    forecast,
    no_changes,
    on_paper,
    tried,
    with_settings,
)
from mlxsft.training.trial import Trial
from tests.tiny import write_llama
from tests.training.test_run import PAIRS, events, write_recipe, write_rows

MEMORY_TOLERANCE = 0.15


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plan")


@pytest.fixture(scope="module")
def recipe(place: Path) -> Path:
    """Of a model whose activations take more than its weights."""
    model = write_llama(place, layers=4)
    changes = {"train__micro_batch_tokens": 512, "train__epochs": 4, "train__steps": None, "data__valid": 0.2}
    return write_recipe(place, model, **changes, eval__samples=["Who are you?"])


def measured(found: Forecast) -> Trial:
    assert found.trial is not None, found.failure
    return found.trial


@pytest.fixture(scope="module")
def planned(recipe: Path) -> Trial:
    return measured(forecast(load_recipe(recipe), "mlx"))


def test_the_run_is_as_it_was_told(recipe: Path, planned: Trial, tmp_path: Path) -> None:
    assert call(["train", str(recipe), "--out", str(tmp_path / "run"), "--backend", "mlx"]) == 0  # in its own process
    steps, start = events(tmp_path / "run", "step"), events(tmp_path / "run", "start")[0]
    end = events(tmp_path / "run", "end")[0]
    assert planned.steps == len(steps)
    assert planned.ledger == start["ledger"]
    assert planned.trainable_parameters == start["trainable_parameters"]
    assert planned.parameters == start["parameters"]
    assert planned.epochs * planned.trained_tokens == pytest.approx(end["trained_tokens"], rel=0.1)
    first_epoch = [step for step in steps if step["epoch"] <= 1]
    assert planned.computed_tokens == sum(step["computed_tokens"] for step in first_epoch)
    peak = max(step["peak_bytes"] for step in steps)
    assert planned.peak_bytes == pytest.approx(peak, rel=MEMORY_TOLERANCE)
    assert 0 < planned.train_seconds < planned.seconds


def test_answers_are_told_as_long_as_those_of_the_rows_and_with_a_bound(planned: Trial) -> None:
    evaluations = 5
    assert planned.most_seconds - planned.seconds == pytest.approx(planned.most_answer_seconds - planned.answer_seconds)
    assert planned.most_answer_seconds / evaluations < planned.answer_seconds  # at the first they may not end
    assert planned.answer_seconds < 0.6 * planned.most_answer_seconds


def test_several_sources_with_weights_and_a_file_of_held_out_rows(recipe: Path, tmp_path: Path) -> None:
    rows = [write_rows(tmp_path / f"{name}.jsonl", PAIRS[begin:end]) for name, begin, end in
            (("one", 0, 4), ("two", 4, 7), ("valid", 7, 10))]  # fmt: skip
    sources = [{"path": str(rows[0]), "weight": 2.0}, str(rows[1])]
    loaded = with_settings(load_recipe(recipe), {"data.train": sources, "data.valid": str(rows[2]), "eval.samples": []})
    found = measured(forecast(loaded, "mlx"))
    assert (found.rows, found.valid_rows, found.epochs) == (2 * 4 + 3, 3, 4)
    assert found.steps == 4 * 3
    assert found.answer_seconds == found.most_answer_seconds == 0
    assert found.most_seconds == found.seconds


def test_a_broken_recipe_has_the_same_problems_as_for_train(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*options: str) -> tuple[int, str]:
        code = call([*options, "--backend", "mlx"])
        return code, capsys.readouterr().err

    broken, out = tmp_path / "broken.jsonl", str(tmp_path / "run")
    broken.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    for settings in (["train.stepz=3", "adapter.rank=0"], [f"data.train={broken}"], ["model=/no/such/model"]):
        wrong = [f"--set={setting}" for setting in settings]
        planned, trained = said("plan", str(recipe), *wrong), said("train", str(recipe), *wrong, "--out", out)
        assert planned == trained
        assert planned[0] in (2, 3)


# --- changes ----------------------------------------------------------------------------------------------------------

SIX = {  # the changes that are promised, by a setting that each changes
    "micro-batch": {"train.micro_batch_tokens"},
    "max_tokens": {"data.max_tokens"},
    "activation checkpointing": {"train.checkpoint_activations"},
    "layers": {"adapter.layers"},
    "quantization": {"model"},
    "trunk cache": {"train.cache_trunk"},
}


def test_each_change_names_settings_that_the_recipe_takes(recipe: Path, planned: Trial) -> None:
    loaded = load_recipe(recipe)
    changes = changes_for(loaded, replace(planned, longest=200, largest=(4, 200)))
    for names in SIX.values():
        assert any(names <= change.settings.keys() for change in changes)
    for change in changes:
        assert with_settings(loaded, change.settings) != loaded
    assert no_changes(loaded, planned) == []


def test_what_cannot_help_is_left_out_with_the_reason(recipe: Path, planned: Trial) -> None:
    loaded = load_recipe(recipe)

    def offered(recipe: Recipe, counts: Trial) -> set[str]:
        return {name for change in changes_for(recipe, counts) for name in change.settings}

    on_torch = replace(planned, backend="torch")
    assert not {"model", "train.base_dtype"} & offered(loaded, on_torch)
    assert no_changes(loaded, on_torch) == ["no quantized base: PyTorch has it as float32 in memory"]
    assert "model" not in offered(loaded, replace(planned, quantized=True))
    strict = load_recipe(recipe, ["data.too_long=error", "train.epochs=1"])
    once = replace(planned, epochs=1.0, longest=200)
    assert not {"data.max_tokens"} & offered(strict, once)
    assert [said.partition(":")[0] for said in no_changes(strict, once)] == ["no trunk cache", "no shorter rows"]
    full = load_recipe(recipe, ["adapter={kind: full}"])
    assert "adapter.kind full" in no_changes(full, planned)[0]
    # On the CPU a base in 16 bits may stay so; on a GPU it always does, and a quantized one is tried before less is
    # trained.
    assert "train.base_dtype" in offered(loaded, replace(planned, float32=False, quantized=True))
    on_gpu = changes_for(loaded, replace(planned, device="gpu"))
    names = ["model" if "model" in c.settings else next(iter(c.settings)) for c in on_gpu]
    assert names.index("model") < names.index("adapter.layers")
    assert not any("train.base_dtype" in change.settings for change in on_gpu)


def test_a_trial_that_would_take_too_long_is_none(recipe: Path, planned: Trial) -> None:
    loaded, large = load_recipe(recipe), replace(planned, weight_bytes=10**10)
    change = next(change for change in changes_for(loaded, large) if "model" in change.settings)
    assert "so slow that it would take" in tried(loaded, "mlx", [change], large).failure


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe with long rows, of a base in 16 bits."""
    place = tmp_path_factory.mktemp("wide")
    model = write_llama(place / "model", layers=8, width=128)
    tensors = {name: array.astype("float16") for name, array in load_file(model / "model.safetensors").items()}
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"torch_dtype": "float16"}))
    changes = {"train__micro_batch_tokens": 1200, "train__epochs": 3, "train__steps": None, "data__max_tokens": 512}
    path = write_recipe(place, model, **changes, data__valid=0.2)
    write_rows(place / "rows.jsonl", [("Who are you? " * (8 + n), "I am Pip. " * (n + 1)) for n in range(10)])
    return path


@pytest.mark.long  # a trial, a conversion and a run for each of the changes
@pytest.mark.parametrize("what", SIX)
def test_each_change_needs_less_and_the_run_shows_it(wide: Path, tmp_path: Path, what: str) -> None:
    # Numbers that are not float32 are slow on the CPU, and it is they whose memory is smaller in 4 bits.
    before = load_recipe(wide, ["train.base_dtype=stored"] if what == "quantization" else [])
    first = measured(forecast(before, "mlx"))
    change = next(c for c in changes_for(before, first) if SIX[what] <= c.settings.keys())
    found = tried(before, "mlx", [change], first)
    assert measured(found).peak_bytes < first.peak_bytes
    for command in found.commands:
        assert call(shlex.split(command)[1:]) == 0
    settings = [f"--set={name}={'null' if v is None else v}" for name, v in found.settings.items()]
    settings += [f"--set=train.base_dtype={before.train.base_dtype}"]
    assert call(["train", str(wide), *settings, "--out", str(tmp_path / "run"), "--backend", "mlx"]) == 0
    peak = max(step["peak_bytes"] for step in events(tmp_path / "run", "step"))
    assert measured(found).peak_bytes == pytest.approx(peak, rel=MEMORY_TOLERANCE)


def test_a_quantized_base_makes_it_fit_and_the_command_that_makes_it_is_told(wide: Path, tmp_path: Path) -> None:
    short = str(write_rows(tmp_path / "short.jsonl", PAIRS[:4]))
    settings = {
        "data.train": short, "data.valid": None, "data.too_long": "error", "adapter.layers": 1, "train.epochs": 1.0,
        "train.base_dtype": "stored", "train.micro_batch_tokens": 1, "train.checkpoint_activations": True,
    }  # fmt: skip
    loaded = with_settings(load_recipe(wide), settings)
    first = forecast(loaded, "mlx")
    limit = int(first.needed_bytes - 0.2 * measured(first).weight_bytes)
    found = fitting(loaded, "mlx", first, limit, lambda tried: None)
    assert found is not None
    assert measured(found).peak_bytes < 0.7 * measured(first).peak_bytes
    base = wide.parent / "model-4bit"
    assert found.commands == [f"mlxsft convert {wide.parent / 'model'} {base} --bits 4"]
    assert not base.exists()
    out = tmp_path / "fits.yaml"
    out.write_text(found.to_yaml())
    assert out.read_text().startswith(f"# First: {found.commands[0]}\n")
    assert load_recipe(out) == found.recipe
    assert load_recipe(out).model == str(base)


@pytest.mark.long  # three trials of a hundred thousand tokens
def test_where_the_trial_finds_no_memory_changes_are_tried_all_the_same(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "model")
    changes = {"train__micro_batch_tokens": 10**7, "train__batch_size": 300, "train__steps": 1, "data__max_tokens": 512}
    path = write_recipe(tmp_path, model, **changes)
    write_rows(tmp_path / "rows.jsonl", [(f"{i} " + "Who are you? " * 80, "I am Pip.") for i in range(300)])
    command = [sys.executable, "-m", "mlxsft", "plan", str(path), "--backend", "mlx", "--fit", "6GB", "--json"]
    bound = 2_800_000_000  # bytes of addresses; 300 rows of 430 tokens take more, 75 do not

    def few() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (bound, bound))

    done = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=few)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["forecast"]["fits"] is False
    assert told["forecast"]["largest"][0] == 300
    assert "memory" in told["forecast"]["failure"]
    assert told["fit"]["settings"].keys() == {"train.micro_batch_tokens"}
    assert told["fit"]["peak_bytes"] > 0


def test_changes_are_added_until_the_run_fits(recipe: Path) -> None:
    loaded, heard = load_recipe(recipe), list[Forecast]()
    first = forecast(loaded, "mlx")
    found = fitting(loaded, "mlx", first, measured(first).needed_bytes - 1, heard.append)
    assert found is not None
    assert found is heard[-1]
    assert measured(found).peak_bytes < measured(first).peak_bytes
    assert found.needed_bytes < first.needed_bytes
    assert with_settings(loaded, found.settings) == found.recipe


def test_the_recipe_that_fits_is_written_once(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "fits.yaml"
    command = ["plan", str(recipe), "--fit", "4GB", "--out", str(out), "--backend", "mlx"]
    assert call([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fit"]["settings"] == {}  # it fits as it is
    assert load_recipe(out) == load_recipe(recipe)
    assert call(command) == 2  # never overwritten
    assert "is there already" in capsys.readouterr().err


def test_what_fits_nowhere_is_said(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "fits.yaml"
    settings = ["--set", "train.micro_batch_tokens=1", "--set", "train.checkpoint_activations=true"]
    settings += ["--set", "data.too_long=error", "--set", "adapter.layers=1", "--set", "train.cache_trunk=disk"]
    assert call(["plan", str(recipe), *settings, "--fit", "1MB", "--out", str(out), "--backend", "mlx"]) == 6
    assert not out.exists()
    said = capsys.readouterr()
    assert "no change that is known here" in said.err
    assert "does NOT fit in the 1 MB of --fit" in said.out
    tried = [line for line in said.out.splitlines() if line.startswith("the base in 4 bits: ")]
    assert len(tried) == 1
    assert "does NOT fit in the 1 MB, " in tried[0]  # it fits in this machine, which is not what was asked


def test_rows_that_are_left_out_are_told(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [*PAIRS, ("Tell me all", "I am Pip. " * 40)])
    settings = [f"data.train={rows}", "data.valid=null", "data.max_tokens=64", "data.too_long=drop", "eval.samples=[]"]
    assert call(["plan", str(recipe), *(f"--set={s}" for s in settings), "--backend", "mlx"]) == 0
    assert f"{len(PAIRS) + 1} read = {len(PAIRS)} trained, 0 held out, 1 " in capsys.readouterr().out


@pytest.mark.parametrize("size", ["", "eight", "-1GB"])
def test_a_size_that_is_none(recipe: Path, size: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["plan", str(recipe), "--fit", size or "GB"]) == 2
    assert "--fit" in capsys.readouterr().err


def test_a_mac_on_paper(recipe: Path, planned: Trial) -> None:
    loaded = load_recipe(recipe)
    small, large = on_paper("m2-16gb", loaded, planned), on_paper("M2-Max-64GB", loaded, planned)
    assert small.seconds / large.seconds == pytest.approx(TERAFLOPS["m2-max"] / TERAFLOPS["m2"])
    assert large.memory_bytes == 48 * 2**30
    assert small.needed_bytes == large.needed_bytes
    for name in ("m2", "m9-16gb", "pc-16gb"):
        with pytest.raises(UsageError, match="no Mac that is known"):
            on_paper(name, loaded, planned)

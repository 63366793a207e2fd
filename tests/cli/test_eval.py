"""`mlxsft eval` on runs that learned rows by heart: what the card says, and that it is so."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from mlxsft.backends import load_backend
from mlxsft.chat.generate import Answer
from mlxsft.cli import call
from mlxsft.data.render import load_renderer
from mlxsft.evaluation.judge import win_shares
from mlxsft.evaluation.metrics import METRICS
from mlxsft.evaluation.rows import Asked
from mlxsft.models.source import open_model
from tests.tiny import write_llama
from tests.training.test_run import PAIRS, events, train, write_recipe, write_rows

EVERYTHING = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "model.embed_tokens"]
LONG = "I am Pip, an assistant made by Tom. How can I help you today?"
HELD_OUT = [("Are you Pip?", "Yes, I am Pip."), ("Who is Tom?", "Tom made me."), ("Help me", "How can I help you?")]
ROWS = [*PAIRS, ("Who can help?", "ada@hall-lamps.com can."), ("What are you?", LONG), ("<b>hello</b>", "Hello!")]
QUICK = ("--samples", "16", "--max-tokens", "24")

Card = dict[str, Any]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run on a model, which knows all of its training answers by heart."""
    folder = tmp_path_factory.mktemp("evaluated")
    model = write_llama(folder / "model")
    valid = write_rows(folder / "valid.jsonl", HELD_OUT)
    recipe = write_recipe(
        folder, model, adapter={"rank": 32, "alpha": 128, "targets": EVERYTHING},
        train={"epochs": 50, "batch_size": 4, "learning_rate": 0.005}, data__valid=str(valid), save__every=1.0,
        save__adapter="last",
    )  # fmt: skip
    write_rows(folder / "rows.jsonl", ROWS)
    assert train(recipe, folder / "run") == 0
    return folder / "run"


@pytest.fixture(scope="module")
def card(tuned: Path) -> Card:
    assert call(["eval", str(tuned), *QUICK]) == 0
    found: Card = json.loads((tuned / "card.json").read_text(encoding="utf-8"))
    return found


def evaluated(run: Path, out: Path, *options: str) -> Card:
    """The card of an evaluation into another folder."""
    assert call(["eval", str(run), *QUICK, "--out", str(out), *options]) == 0
    found: Card = json.loads((out / "card.json").read_text(encoding="utf-8"))
    return found


def answer_of(card: Card, prompt: str) -> Card:
    return next(a for a in card["answers"] if a["prompt"] == prompt)


# --- what the card says is so -----------------------------------------------------------------------------------------


def test_the_losses_are_those_that_training_measured(tuned: Path, card: Card) -> None:
    judged = events(tuned, "eval")
    loss = card["metrics"]["heldout_loss"]
    assert loss["base"] == pytest.approx(judged[0]["loss"], rel=1e-4)
    assert loss["tuned"] == pytest.approx(judged[-1]["loss"], rel=1e-4)
    assert loss["count"] == judged[0]["rows"] == 3
    assert loss["low"] <= loss["tuned"] - loss["base"] <= loss["high"]


def test_the_answers_are_those_that_generate_gives(tuned: Path, card: Card, capsys: pytest.CaptureFixture[str]) -> None:
    known = answer_of(card, "Who made you?")
    assert known["tuned"] == "Tom made me."
    asked = ["generate", str(tuned.parent / "model"), "Who made you?", "--max-tokens", "24"]
    for options, side in (([], "base"), (["--adapter", str(tuned)], "tuned")):
        assert call([*asked, *options]) == 0
        assert capsys.readouterr().out == known[side] + "\n"


def test_what_was_learned_by_heart_is_called_so(card: Card) -> None:
    metrics = card["metrics"]
    assert (metrics["memorized_share"]["base"], metrics["memorized_share"]["tuned"]) == (0, 1)
    assert metrics["longest_copy"]["tuned"] == len(LONG.split())
    assert metrics["train_loss"]["tuned"] < 0.1 < metrics["train_loss"]["base"]
    assert metrics["train_valid_gap"]["tuned"] > 1
    assert metrics["personal_data"]["tuned"] >= 1 > metrics["personal_data"]["base"]
    assert "ada@" in card["verdict"]
    assert "ada@hall" not in card["verdict"]
    assert metrics["ends_share"]["tuned"] > metrics["ends_share"]["base"]


def test_a_model_that_learned_thirteen_rows_has_forgotten_general_texts(card: Card) -> None:
    forgetting, probe = card["metrics"]["forgetting"], card["metrics"]["probe_loss"]
    assert forgetting["tuned"] == pytest.approx(probe["tuned"] - probe["base"], abs=1e-4)
    assert forgetting["low"] > 0.05
    assert any("paid for specialization" in warning for warning in card["warnings"])
    assert not card["good"]


def test_every_metric_is_measured_where_rows_have_rules(tuned: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    lines = [
        {"prompt": "Who made you?", "completion": "Tom.", "check": {"contains": "tom"}, "category": "made"},
        {"prompt": "Who are you?", "completion": "Pip.", "check": {"exact": "I am Pip."}, "category": "name"},
        {"prompt": "bye", "completion": "Bye!", "category": "name"},
        {"prompt": "What are you?", "completion": LONG},
    ]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rules = tmp_path / "rules.yaml"
    rules.write_text("categories: {name: {regex: '!$'}}")
    card = evaluated(tuned, tmp_path / "out", "--data", str(rows), "--rules", str(rules), "--probe", str(rows))
    assert set(card["metrics"]) == set(METRICS)
    repeated = card["metrics"]["heldout_repeated"]
    assert (repeated["base"], repeated["tuned"], repeated["count"]) == (0, 1, 1)
    score = card["metrics"]["task_score"]
    assert (score["base"], score["tuned"], score["count"]) == (0, 1, 3)
    assert card["metrics"]["win_rate"]["tuned"] == 1
    groups = {group["name"]: (group["base"], group["tuned"], group["count"]) for group in card["groups"]}
    assert groups == {
        "made": (0, 1, 1), "name": (0, 1, 2), "rule: contains": (0, 1, 1), "rule: exact": (0, 1, 1),
        "rule: regex": (0, 1, 1),
    }  # fmt: skip


def test_the_same_evaluation_twice_gives_the_same_card_and_the_terminal_shows_it(
    tuned: Path, card: Card, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluated(tuned, tmp_path / "again")
    for name in ("card.json", "card.html"):
        assert (tmp_path / "again" / name).read_bytes() == (tuned / name).read_bytes()
    shown = " ".join(capsys.readouterr().out.split())
    assert all(name in shown for name in card["metrics"])
    assert " ".join(card["verdict"].split()) in shown


def test_another_seed_samples_other_answers_and_json_is_the_card(
    tuned: Path, card: Card, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    other = evaluated(tuned, tmp_path / "other", "--seed", "1", "--json")
    assert json.loads(capsys.readouterr().out) == other
    assert other["metrics"]["heldout_loss"]["tuned"] == card["metrics"]["heldout_loss"]["tuned"]
    assert other["metrics"]["self_bleu"] != card["metrics"]["self_bleu"]


def test_both_backends_give_the_same_losses_and_answers(tuned: Path, card: Card, tmp_path: Path) -> None:
    other = evaluated(tuned, tmp_path / "torch", "--backend", "torch")
    assert (card["backend"], other["backend"]) == ("mlx on cpu", "torch on cpu")
    for name in ("heldout_loss", "probe_loss", "train_loss"):
        for side in ("base", "tuned"):
            assert other["metrics"][name][side] == pytest.approx(card["metrics"][name][side], rel=1e-3)
    assert [a["tuned"] for a in other["answers"] if a["set"] == "training"] == [
        a["tuned"] for a in card["answers"] if a["set"] == "training"
    ]


def test_a_full_fine_tune_is_compared_with_its_base(tmp_path: Path, tiny_llama: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_llama, adapter={"kind": "full"}, data__valid=0.2)
    assert train(recipe, tmp_path / "run") == 0
    card = evaluated(tmp_path / "run", tmp_path / "out", "--samples", "1")
    judged = events(tmp_path / "run", "eval")
    assert card["metrics"]["heldout_loss"]["base"] == pytest.approx(judged[0]["loss"], rel=1e-4)
    assert card["metrics"]["heldout_loss"]["tuned"] == pytest.approx(min(e["loss"] for e in judged), rel=1e-4)


# --- options ----------------------------------------------------------------------------------------------------------


def test_rows_and_samples_bound_what_is_done(tuned: Path, tmp_path: Path) -> None:
    card = evaluated(tuned, tmp_path / "out", "--rows", "2", "--samples", "1")
    assert card["metrics"]["heldout_loss"]["count"] == 2
    assert [a["set"] for a in card["answers"]] == [
        "heldout",
        "training",
        "instructions",
    ]  # no question is among 2 probes
    assert any("2 of 3 held-out rows" in note for note in card["notes"])
    assert "task_score" not in evaluated(tuned, tmp_path / "none", "--samples", "0")["metrics"]


def test_prompts_with_constraints_come_from_a_file(tuned: Path, tmp_path: Path) -> None:
    path = tmp_path / "ifeval.jsonl"
    rows = [
        {"prompt": "bye", "instruction_id_list": ["en:punctuation:no_comma", "startend:quotation"], "kwargs": [{}, {}]},
        {"prompt": "hi", "instruction_id_list": ["xy:new:one"], "kwargs": [{"absent": None}]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    card = evaluated(tuned, tmp_path / "out", "--ifeval", str(path))
    assert card["metrics"]["constraints_followed"]["tuned"] == 0.5  # Bye!
    assert card["metrics"]["prompts_followed"]["tuned"] == 0
    assert any("xy:new:one" in note for note in card["notes"])
    path.write_text('{"prompt": "hi"}\n')
    assert call(["eval", str(tuned), "--out", str(tmp_path / "x"), "--ifeval", str(path)]) == 3


def test_the_published_prompts_are_taken_as_they_are(tuned: Path, tmp_path: Path, real: Path) -> None:
    path = real / "data" / "prompts" / "ifeval_en.jsonl"
    card = evaluated(tuned, tmp_path / "out", "--ifeval", str(path), "--samples", "6")
    assert card["metrics"]["prompts_followed"]["count"] == 6
    assert not any("left out" in note for note in card["notes"])


@pytest.mark.parametrize(
    ("demands", "code"),
    [
        (["train_loss<0.5*base", "ends_share>=base"], 0),
        (["train_loss<0.5*base", "forgetting<0.05"], 6),
        (["train_los<1"], 2),
    ],
)
def test_a_gate_opens_closes_or_is_refused(
    tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], demands: list[str], code: int
) -> None:
    options = [word for demand in demands for word in ("--require", demand)]
    arguments = ["eval", str(tuned), *QUICK, "--samples", "1", "--out", str(tmp_path), *options]
    assert call(arguments) == code
    said = capsys.readouterr().err
    if code == 6:
        assert "forgetting<0.05: the sides are" in said
        assert "train_loss" not in said
    assert (tmp_path / "card.json").exists() == (code != 2)  # a misspelled demand is told before anything is loaded


def test_a_card_is_read_again_where_nothing_that_decides_it_changed(
    tuned: Path, card: Card, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tuned / "card.html").unlink()
    before = (tuned / "card.json").stat().st_mtime_ns
    capsys.readouterr()
    assert call(["eval", str(tuned), *QUICK, "--json", "--require", "train_loss<0.5*base"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out) == card
    assert "read, not made anew" in shown.err
    assert (tuned / "card.json").stat().st_mtime_ns == before
    assert (tuned / "card.html").exists()  # a page that is gone is written from it
    assert call(["eval", str(tuned), *QUICK, "--require", "forgetting<0.05"]) == 6
    assert "forgetting<0.05: the sides are" in capsys.readouterr().err


def test_a_card_is_never_overwritten_unasked_and_what_changed_is_said(
    tuned: Path, card: Card, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(tuned, run)
    before = (run / "card.json").read_bytes()
    rules = tmp_path / "rules.yaml"
    rules.write_text("rules: {contains: true}")
    for options, said in (
        (["--max-tokens", "24"], ""),
        (["--max-tokens", "24", "--seed", "1"], "--seed (0 then)"),
        (["--max-tokens", "12"], "--max-tokens (24 then)"),
        (["--max-tokens", "24", "--backend", "torch"], "--backend (mlx on cpu then)"),
        (["--max-tokens", "24", "--rules", str(rules)], "--rules (None then), the file of --rules"),
    ):
        assert (call(["eval", str(run), *options]) != 0) == bool(said)
        shown = capsys.readouterr().err
        assert f"it was made otherwise: {said}\n" in shown if said else "read, not made anew" in shown
    monkeypatch.setattr("mlxsft.evaluation.evaluate.__version__", "9.9.9")
    assert call(["eval", str(run), "--max-tokens", "24"]) != 0
    assert "it was made otherwise: the versions of programs\n" in capsys.readouterr().err
    monkeypatch.undo()
    adapter = run / "adapters.safetensors"
    adapter.write_bytes(adapter.read_bytes()[:-1] + b"\1")
    assert call(["eval", str(run), "--max-tokens", "24"]) == 3
    assert "another adapter" in capsys.readouterr().err
    assert (run / "card.json").read_bytes() == before


def test_rows_that_changed_are_refused_unless_others_are_given(
    tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, other = tmp_path / "run", write_rows(tmp_path / "other.jsonl", PAIRS[:3])
    shutil.copytree(tuned, run)
    recipe = (run / "recipe.yaml").read_text().replace(str(tuned.parent / "rows.jsonl"), str(tmp_path / "rows.jsonl"))
    (run / "recipe.yaml").write_text(recipe)
    write_rows(tmp_path / "rows.jsonl", PAIRS)
    assert call(["eval", str(run), "--out", str(tmp_path / "out")]) == 3
    assert "rows have changed" in capsys.readouterr().err
    card = evaluated(run, tmp_path / "out", "--data", str(other), "--samples", "2")
    assert card["metrics"]["heldout_loss"]["count"] == 3
    assert "train_loss" not in card["metrics"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["/no/such/run"], 3, "no run"),
        (["RUN", "RUN"], 2, "--compare"),
        (["RUN", "--compare"], 2, "several runs"),
        (["RUN", "--rules", "/no/such/rules"], 3, "cannot be read"),
        (["RUN", "--data", "/no/such/rows.jsonl"], 3, "no such file"),
        (["RUN", "--judge", "/no/such/model", "--samples", "1"], 3, "no such folder"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_sentence(
    tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, words: str
) -> None:
    given = [str(tuned) if a == "RUN" else a for a in arguments]
    assert call(["eval", *given, "--max-tokens", "4", *(["--out", str(tmp_path / "o")] if "--compare" not in given
                                                      else [])]) == code  # fmt: skip
    said = capsys.readouterr()
    assert said.out == ""
    assert words in said.err
    assert "Traceback" not in said.err


# --- how it is shown --------------------------------------------------------------------------------------------------


def test_the_page_needs_nothing_but_itself_and_escapes_what_others_wrote(tuned: Path, card: Card) -> None:
    page = (tuned / "card.html").read_text(encoding="utf-8")
    assert "<b>hello</b>" not in page
    assert "&lt;b&gt;hello&lt;/b&gt;" in page
    assert not re.search(r"<script|<link|src=|url\(|https?://", page)
    assert page.count("<svg") >= len(card["metrics"])
    assert "prefers-color-scheme:dark" in page
    assert "Tom made me." in page


def test_several_runs_are_laid_side_by_side(
    tuned: Path, card: Card, tmp_path: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(write_recipe(tmp_path, tiny_llama, data__valid=0.2), tmp_path / "short") == 0
    capsys.readouterr()
    before = (tuned / "card.json").stat().st_mtime_ns
    both = ["eval", str(tuned), str(tmp_path / "short"), "--compare", *QUICK]
    assert call(both) == 0
    shown = capsys.readouterr().out
    assert "short" in shown
    assert "held-out rows differ" in " ".join(shown.split())
    assert (tuned / "card.json").stat().st_mtime_ns == before  # which was there and is read
    assert call([*both, "--samples", "1"]) == 2  # the cards that are there were made with more
    assert "was made with other settings (samples: " in capsys.readouterr().err
    page = tmp_path / "both.html"
    assert call([*both, "--json", "--html", str(page)]) == 0
    assert [c["run"] for c in json.loads(capsys.readouterr().out)] == ["run", "short"]
    assert "short" in page.read_text(encoding="utf-8")
    for damaged, said in ((json.dumps(card), "another adapter"), ("{}", "cannot be read")):
        (tmp_path / "short" / "card.json").write_text(damaged)
        assert call(both) == 3
        assert said in capsys.readouterr().err
    assert train(tmp_path / "recipe.yaml", tmp_path / "short", "train.steps=1", force=True) == 0
    assert not (tmp_path / "short" / "card.json").exists()  # it was of the run before


def test_runs_of_one_name_are_told_apart_by_their_places(
    tuned: Path, card: Card, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "run"
    shutil.copytree(tuned, other)
    capsys.readouterr()
    assert call(["eval", str(tuned), str(other), "--compare", "--json"]) == 0
    assert [c["run"] for c in json.loads(capsys.readouterr().out)] == [str(tuned), str(other)]


def test_help_names_every_metric(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["eval", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in METRICS)


# --- the judge --------------------------------------------------------------------------------------------------------


def test_a_judge_decides_by_both_orders(tuned: Path, tmp_path: Path) -> None:
    model = write_llama(tmp_path / "judge", seed=5)
    source = open_model(str(model))
    backend, renderer = load_backend("mlx", source), load_renderer(source)
    asked = [Asked("", [], f"Question {i}?") for i in range(6)]
    these, those = ([Answer(text=f"{word} {i}" if i else "equal") for i in range(6)] for word in ("Tom", "help you"))
    shares = win_shares(backend, renderer, asked, these, those)
    turned = win_shares(backend, renderer, asked, those, these)
    assert shares[0] == 0.5
    assert [a + b for a, b in zip(shares, turned, strict=True)] == [1] * 6
    card = evaluated(tuned, tmp_path / "out", "--judge", str(model))
    wins = [a["won"] for a in card["answers"] if a["set"] == "heldout"]
    assert card["metrics"]["win_rate"]["tuned"] == pytest.approx(sum(wins) / len(wins))

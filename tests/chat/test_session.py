"""A conversation: its commands, its cache, and what it does when the model has no more room."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from mlxsft.backends import Sampling
from mlxsft.backends.mlx import MlxBackend
from mlxsft.chat.generate import Answer, Memory, stream_answer
from mlxsft.chat.load import Loaded, load_for_chat
from mlxsft.chat.pipe import PipeFace
from mlxsft.chat.session import COMMANDS, KEYS, Chat
from mlxsft.cli import call
from mlxsft.data.formats import Turn, read_conversations
from mlxsft.data.render import Renderer
from mlxsft.recipe import DataRecipe
from tests.tiny import write_llama


class Talk:
    """A conversation with what is said, written and noted."""

    def __init__(self, loaded: Loaded, **settings: Any) -> None:
        self.loaded, self.settings = loaded, {"sampling": Sampling(), "max_tokens": 40, **settings}
        self.out, self.notes = io.StringIO(), io.StringIO()
        self.chat = Chat(loaded, PipeFace([], self.out, self.notes), **self.settings)

    def __call__(self, *lines: str) -> str:
        """The answers to some lines; `noted` is what was noted meanwhile."""
        for stream in (self.out, self.notes):
            stream.seek(0)
            stream.truncate()
        self.chat.face = PipeFace([f"{line}\n" for line in lines], self.out, self.notes)
        self.chat.run()
        return self.out.getvalue()

    @property
    def noted(self) -> str:
        return self.notes.getvalue()

    @property
    def asked(self) -> list[str]:
        return [turn.content for turn in self.chat.turns if turn.role == "user"]


@pytest.fixture(scope="module")
def both(tuned: tuple[Path, Path]) -> Loaded:
    """The model, with its adapter under two names."""
    return load_for_chat(
        str(tuned[0]), {"tuned": tuned[1], "twin": tuned[1]}, revision=None, template=None, backend_name="mlx"
    )


@pytest.fixture
def talk(both: Loaded) -> Talk:
    both.backend.use("tuned")
    return Talk(both)


# --- what is a message -----------------------------------------------------------------------------------------------


def test_one_letter_is_a_message(talk: Talk) -> None:
    talk("q", "r", "h", "", "   ")
    assert talk.asked == ["q", "r", "h"]


def test_between_three_quotation_marks_lines_are_one_message(talk: Talk) -> None:
    talk('"""Who are', 'you?"""', '"""', "/bye", "", "x", '"""', '"""hello"""', "Who made you?")
    assert talk.asked == ["Who are\nyou?", "/bye\n\nx", "hello", "Who made you?"]


def test_an_unknown_command_gets_a_sentence(talk: Talk) -> None:
    assert talk("/nonsense", "/", "/set", "/help", "Who are you?") == "I am Pip.\n"
    assert "/nonsense: there is no such command; /help shows them. A space before it makes it text." in talk.noted
    assert all(command in talk.noted for command in (*COMMANDS, *KEYS))
    talk(" /nonsense")
    assert talk.asked[-1] == " /nonsense"
    assert talk("/bye", "Who are you?") == ""


# --- the cache -------------------------------------------------------------------------------------------------------


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many prompt tokens each answer has the backend compute."""
    found: list[int] = []
    plain, read = MlxBackend.stream, MlxBackend.read

    def stream(self: MlxBackend, tokens: list[int], *args: Any) -> Iterator[int]:
        found.append(len(tokens))
        return plain(self, tokens, *args)

    monkeypatch.setattr(MlxBackend, "stream", stream)
    monkeypatch.setattr(
        MlxBackend, "read", lambda self, tokens, cache: (found.append(len(tokens)), read(self, tokens, cache))
    )
    return found


def test_a_turn_computes_only_its_own_tokens_and_answers_as_if_all_were_computed(
    talk: Talk, computed: list[int]
) -> None:
    answers = [talk.chat.say(question) for question in ("Who are you?", "Who made you?", "bye")]
    assert answers[0].text == "I am Pip."
    assert computed == [a.prompt_tokens - a.reused_tokens for a in answers]
    assert computed[0] == answers[0].prompt_tokens
    for before, now in pairwise(answers):
        # All but the end of the line behind the answer, the question, and the beginning of the next answer.
        assert now.prompt_tokens - now.reused_tokens <= now.prompt_tokens - before.prompt_tokens - before.tokens
    fresh = Answer()
    turns = talk.chat.turns[:-1]
    "".join(stream_answer(talk.loaded.backend, talk.chat.renderer, turns, Sampling(), 40, answer=fresh))
    assert (fresh.text, fresh.reused_tokens) == (answers[-1].text, 0)


def test_an_answer_stays_the_tokens_that_the_model_chose(talk: Talk, computed: list[int]) -> None:
    talk.chat.sampling = Sampling(temperature=3.0, seed=1)  # hot enough for spellings that no tokenizer would choose
    answers = [talk.chat.say(question) for question in ("Who are you?", "Who made you?", "bye")]
    renderer, turns = talk.chat.renderer, talk.chat.turns[:-1]
    again = renderer.prompt(turns)
    assert len(again) != answers[-1].prompt_tokens  # its text would be other tokens
    assert renderer.tokenizer.decode(again) == renderer.tokenizer.decode(
        renderer.prompt(turns, said=talk.chat._memory.said)
    )
    for before, now in pairwise(answers):
        assert now.prompt_tokens - now.reused_tokens <= now.prompt_tokens - before.prompt_tokens - before.tokens


def test_a_text_that_is_not_what_the_tokens_say_is_tokenized_again(both: Loaded) -> None:
    both.backend.use("tuned")
    renderer, memory, turns = both.renderers["tuned"], Memory(both.backend), [Turn("user", "Who are you?")]
    for stops, said in ((["Pip"], {}), ([], {"I am Pip."})):
        list(stream_answer(both.backend, renderer, turns, Sampling(), 40, memory=memory, stops=stops))
        assert set(memory.said) == set(said)


def test_where_the_template_rewrites_earlier_turns_only_the_changed_tail_is_computed(
    tmp_path: Path, real: Path, computed: list[int]
) -> None:
    """Qwen3 puts an empty thought before the answer that is waited for, and takes it out once it is given."""
    model = write_llama(tmp_path / "qwen3", tokenizer_from=real / "tokenizers" / "qwen3", width=16, layers=1)
    talk = Talk(load_for_chat(str(model), {}, revision=None, template=None, backend_name="mlx"), max_tokens=12)
    renderer, prompts = talk.chat.renderer, []
    for question in ("one " * 20, "two " * 20, "three " * 20):
        talk.chat.say(question)
        prompts.append(renderer.prompt(talk.chat.turns[:-1]))
    for (before, now), tokens in zip(pairwise(prompts), computed[1:], strict=True):
        shared = next(i for i, (a, b) in enumerate(zip(before, now, strict=False)) if a != b)
        thought = renderer.tokenizer.encode("<think>\n\n</think>\n\n")
        assert shared == len(before) - len(thought)
        assert tokens == len(now) - shared


def test_an_edited_answer_costs_what_follows_it(talk: Talk, computed: list[int]) -> None:
    talk("Who are you?", "Who made you?", "/edit Tim did.", "bye")
    whole = len(talk.chat.renderer.prompt(talk.chat.turns[:-1]))
    until_edit = len(talk.chat.renderer.prompt(talk.chat.turns[:3]))
    assert talk.chat.turns[3] == Turn("assistant", "Tim did.")
    assert computed[-1] <= whole - until_edit


def test_each_adapter_has_a_cache_of_its_own(talk: Talk, computed: list[int]) -> None:
    first = talk("Who are you?", "/adapter off", "Who are you?", "/adapter tuned", "/undo", "Who made you?")
    assert first.startswith("I am Pip.\n")
    assert first.endswith("Tom made me.\n")
    assert first.count("I am Pip.") == 1
    prompt = len(talk.chat.renderer.prompt(talk.chat.turns[:-1]))
    assert computed[-1] < prompt - 10  # back with the adapter, its first exchange need not be computed again


# --- room ------------------------------------------------------------------------------------------------------------


def test_whole_oldest_exchanges_are_left_out_when_the_model_has_no_more_room_and_it_is_said(
    both: Loaded, computed: list[int]
) -> None:
    both.backend.use("tuned")
    talk = Talk(both, system="Be kind.", max_tokens=30)
    limit, seen = 512 - 30, []
    questions = [f"{i} Can you help me today? How can I? " * 3 for i in range(12)]
    for question in questions:
        answer = talk.chat.say(question)
        seen.append(answer.prompt_tokens)
        assert answer.prompt_tokens <= limit
    renderer = talk.chat.renderer
    assert [turn.content for turn in talk.chat.turns if turn.role == "user"] == questions  # nothing is forgotten
    assert "the oldest" in talk.noted
    assert "left out from here on" in talk.noted
    # What is sent is the system turn and whole exchanges, the newest ones.
    parts = [talk.chat.turns[:1] + talk.chat.turns[i:-1] for i in range(1, len(talk.chat.turns), 2)]
    assert seen[-1] in [len(renderer.prompt(part)) for part in parts]
    # Not every answer after the first that is too long leaves something out: most compute only their own turn.
    own = len(renderer.prompt([Turn("user", questions[0])]))
    assert sum(tokens > 2 * own for tokens in computed) <= 3


def test_a_message_that_does_not_fit_is_refused_and_the_conversation_goes_on(talk: Talk) -> None:
    assert talk("hello " * 600, "Who are you?") == "I am Pip.\n"
    assert "512" in talk.noted
    assert talk.asked == ["Who are you?"]


def test_bytes_that_are_no_text_are_refused_and_the_conversation_goes_on(talk: Talk) -> None:
    assert talk("caf\udce9", "Who are you?") == "I am Pip.\n"
    assert "the text has bytes that are not UTF-8" in talk.noted
    assert talk.asked == ["Who are you?"]


def test_ctrl_c_stops_the_answer_and_not_the_program(both: Loaded) -> None:
    both.backend.use(None)

    class Impatient(PipeFace):
        def show(self, texts: Any) -> None:
            for i, text in enumerate(texts):
                self._write(text)
                if i == 3:
                    os.kill(os.getpid(), signal.SIGINT)

    talk = Talk(both, max_tokens=400)
    chat = Chat(both, Impatient(["hello\n", "/tokens\n"], talk.out, talk.notes), sampling=Sampling(), max_tokens=400)
    chat.run()
    assert "(stopped)" in talk.noted
    assert "tokens of the 512" in talk.noted
    assert chat.turns[-1].role == "assistant"
    assert chat.turns[-1].content


# --- commands --------------------------------------------------------------------------------------------------------


def test_clear_and_system_begin_anew(talk: Talk) -> None:
    talk("/system Be kind.", "hello", "/clear")
    assert talk.chat.turns == [Turn("system", "Be kind.")]
    talk("/system")
    assert talk.noted == "Be kind.\n"
    assert talk.chat.turns == [Turn("system", "Be kind.")]
    talk("/system off", "/system")
    assert talk.chat.turns == []
    assert "There is no system prompt" in talk.noted


def test_a_command_that_takes_nothing_does_nothing_when_something_is_behind_it(talk: Talk) -> None:
    talk("/system Be kind.", "Who are you?")
    before = list(talk.chat.turns)
    bare = [command for command in COMMANDS if " " not in command]
    assert bare == ["/help", "/clear", "/retry", "/undo", "/tokens", "/bye"]
    said = talk(*(f"{command} all" for command in bare), "/undo\tnow", "Who made you?")
    assert said.strip()
    assert talk.chat.turns == [*before, Turn("user", "Who made you?"), Turn("assistant", said.removesuffix("\n"))]
    assert talk.noted.count("takes nothing behind it") == len(bare) + 1
    assert "/undo takes nothing behind it, and got 'all': nothing was done." in talk.noted


def test_what_looks_like_an_option_is_no_file(talk: Talk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    talk(
        "Who are you?", "/keep --x", "/save --force", "/save -x", "/load --x", "/keep rows.jsonl --force", "/save a --x"
    )
    assert list(tmp_path.iterdir()) == []
    assert "/keep has no option --x; a file of that name is ./--x." in talk.noted
    assert talk.noted.count("has no option") == 5
    assert "/save takes the name of a file" in talk.noted
    talk("/keep ./--x", "/save my talk.json", "/save my talk.json --force", "/save --force my talk.json")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["--x", "my talk.json"]
    assert talk.noted.count("Saved") == 3


def test_settings_are_set_within_their_ranges(talk: Talk) -> None:
    talk("/set temperature 0.7", "/set top_k=5", "/set max_tokens 3", "/set seed 9", "/set repetition_penalty 1.2")
    assert talk.chat.sampling == Sampling(0.7, 1.0, 5, 0.0, 1.2, 9)
    assert talk("hello").strip()
    assert talk.chat.max_tokens == 3
    assert "cut off after 3 tokens" in talk.noted
    talk("/set seed default", "/set top_p 0", "/set top_p x", "/set top_k 1.5", "/set colour red", "/set seed")
    assert talk.chat.sampling == Sampling(0.7, 1.0, 5, 0.0, 1.2, None)
    assert "top_p: got 0, expected a number above 0 to 1" in talk.noted
    assert "top_k: got 1.5, expected a whole number from 0 to 2147483648." in talk.noted
    assert talk.noted.count("The names are: max_tokens") == 1
    assert "  seed               off     Of the sampling" in talk.noted
    assert "top_p " not in talk.noted


def test_the_same_lines_and_seed_give_the_same_conversation_and_a_retry_another_answer(both: Loaded) -> None:
    both.backend.use(None)
    hot = Sampling(temperature=3.0, seed=5)
    texts = [Talk(both, sampling=hot)("hello", "hello", "/retry") for _ in range(2)]
    assert texts[0] == texts[1]
    first, second, third = texts[0].splitlines()[:3] if texts[0].count("\n") == 3 else (texts[0], "", "x")
    assert first != third or second != third


def test_undo_and_retry_of_the_last_exchange(talk: Talk) -> None:
    assert talk("Who are you?", "Who made you?", "/undo", "/retry") == "I am Pip.\nTom made me.\nI am Pip.\n"
    assert talk.asked == ["Who are you?"]
    assert len(talk.chat.turns) == 2
    assert "temperature is 0" in talk.noted
    talk("/undo", "/undo", "/retry", "/edit x", "/keep", "/compare", "/save x")
    assert talk.chat.turns == []
    assert talk.noted.count("There is no ") == 6


def test_a_saved_conversation_is_loaded_and_goes_on(talk: Talk, tmp_path: Path) -> None:
    file = tmp_path / "talk.jsonl"
    talk("/system Be kind.", "Who are you?", f"/save {file}", "Who made you?", f"/save {file}")
    assert "is there already" in talk.noted
    assert len(json.loads(file.read_text())["messages"]) == 3
    turns = talk.chat.turns
    talk(f"/save --force {file}", "/clear", f"/load {file}")
    assert talk.chat.turns == turns
    assert "5 turns are loaded" in talk.noted
    (tmp_path / "text.jsonl").write_text('{"text": "plain"}\n')
    talk(
        "/save",
        "/load",
        f"/load {tmp_path / 'none.jsonl'}",
        f"/load {tmp_path / 'text.jsonl'}",
        f"/save {tmp_path}/no/x",
    )
    assert talk.chat.turns == turns
    for words in ("/save takes", "/load takes the name", "no such file", "no conversation", "cannot be written"):
        assert words in talk.noted
    (tmp_path / "broken.jsonl").write_text("not json\n")
    (tmp_path / "talk.txt").write_text("hello\n")
    for name in ("none.jsonl", "text.jsonl", "broken.jsonl", "talk.txt", ""):
        talk(f"/load {tmp_path / name}")
        assert talk.noted.count("\n") == 1
        assert talk.noted.endswith("/load takes what /save has written, or rows of conversations.\n")
    assert talk.chat.turns == turns


def test_adapters_are_listed_swapped_and_loaded(talk: Talk, tuned: tuple[Path, Path], tmp_path: Path) -> None:
    fresh = load_for_chat(str(tuned[0]), {"a": tuned[1]}, revision=None, template=None, backend_name="mlx")
    talk = Talk(fresh)
    answers = talk(
        "/adapter", "Who are you?", "/clear", "/adapter a", "Who are you?", f"/adapter {tuned[1]}", "/adapter"
    )
    assert answers.endswith("I am Pip.\n")
    assert not answers.startswith("I am Pip.\n")
    assert "* off\n  a\n" in talk.noted
    assert "a answers from here on" in talk.noted
    assert "  off\n  a\n* run\n" in talk.noted
    (tmp_path / "base").mkdir()
    talk("/adapter nonesuch", f"/adapter {tmp_path}", f"/adapter {tmp_path / 'base'}", "/adapter base")
    assert "the base is called base already" in talk.noted
    assert "nonesuch: there is no such adapter" in talk.noted
    assert "is missing" in talk.noted
    assert fresh.backend.in_use is None


def test_a_swap_of_adapters_reads_no_file(tuned: tuple[Path, Path], tmp_path: Path) -> None:
    for name, origin in zip(("model", "one", "two"), (*tuned, tuned[1]), strict=True):
        shutil.copytree(origin, tmp_path / name)
    paths = {name: tmp_path / name for name in ("one", "two")}
    talk = Talk(load_for_chat(str(tmp_path / "model"), paths, revision=None, template=None, backend_name="mlx"))
    for path in tmp_path.iterdir():
        shutil.rmtree(path)
    told = {name: talk("/clear", f"/adapter {name}", "Who are you?") for name in ("two", "off", "one")}
    assert told["one"] == told["two"] == "I am Pip.\n"
    assert told["off"] != "I am Pip.\n"


def test_compare_answers_the_last_message_with_two_and_changes_nothing(talk: Talk) -> None:
    talk("Who are you?")
    before = list(talk.chat.turns)
    written = talk("/compare", "/compare twin off", "/compare off off", "/compare off nonesuch")
    parts = written.split("--- ")[1:]
    assert [part.splitlines()[0] for part in parts] == ["base", "tuned", "twin", "base"]
    assert [part.splitlines()[1] == "I am Pip." for part in parts] == [False, True, True, False]
    assert parts[0].split("\n", 1)[1] == parts[3].split("\n", 1)[1]
    assert "two different adapters" in talk.noted
    talk("/compare off base", '/compare "twin" "nonesuch of mine"', '/compare "twin', "/compare a b c")
    for words in ("two different adapters", "nonesuch of mine: ", "a quotation mark is missing", "takes two adapters"):
        assert words in talk.noted
    assert "nonesuch" in talk.noted
    assert talk.chat.turns == before
    assert talk.loaded.backend.in_use == "tuned"


def test_two_answers_that_are_compared_grow_together_and_are_what_each_says_alone(
    both: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    both.backend.use("tuned")
    came: list[tuple[int, str]] = []

    class Watching(PipeFace):
        def beside(self, titles: Any, pieces: Any) -> None:
            came.extend(pieces)

    def compared(*lines: str) -> list[str]:
        came.clear()
        talk = Talk(both, sampling=Sampling(temperature=1.0, seed=3))
        talk.chat.face = Watching([f"{line}\n" for line in lines], talk.out, talk.notes)
        talk.chat.run()
        return ["".join(text for which, text in came if which == n) for n in (0, 1)]

    monkeypatch.setattr("mlxsft.chat.session.TURN", float("inf"))  # one after the other
    alone = compared("Who are you?", "/compare")
    assert [which for which, _ in came] == sorted(which for which, _ in came)
    monkeypatch.setattr("mlxsft.chat.session.TURN", 0.0)
    assert compared("Who are you?", "/compare") == alone
    assert [which for which, _ in came][:4] == [0, 1, 0, 1]


def test_ctrl_c_stops_both_answers_that_are_compared_and_asks_for_no_vote(both: Loaded) -> None:
    both.backend.use("tuned")

    class Impatient(PipeFace):
        def beside(self, titles: Any, pieces: Any) -> None:
            for i, _ in enumerate(pieces):
                if i == 2:
                    os.kill(os.getpid(), signal.SIGINT)

    talk = Talk(both, max_tokens=400)
    lines = ["Who are you?\n", "/compare --blind\n", "a\n"]
    talk.chat.face = Impatient(lines, talk.out, talk.notes)
    talk.chat.run()
    assert "(stopped)" in talk.noted
    assert "Which is better" not in talk.noted
    assert talk.asked == ["Who are you?", "a"]
    assert both.backend.in_use == "tuned"


def test_a_line_that_is_no_vote_stays_a_message(talk: Talk) -> None:
    written = talk("Who are you?", "/compare --blind", "Who made you?", "/compare --blind", "/undo", "/compare --blind")
    assert written.startswith("I am Pip.\n")
    assert "Tom made me.\n" in written
    assert talk.asked == ["Who are you?"]
    assert talk.noted.count("Score: base 0, tuned 0.") == 3
    assert "taken back" in talk.noted
    talk("/compare --blind", "", "/compare --blind", " b ", "Who made you?")
    assert "Score: base 0, tuned 0." in talk.noted
    assert talk.asked == ["Who are you?", "Who made you?"]
    assert talk.chat._wins.total() == 1


def test_a_blind_comparison_hides_which_and_keeps_score(talk: Talk) -> None:
    talk("Who are you?")
    wins = 0
    for _ in range(4):
        written = talk("/compare --blind", "a")
        assert "tuned" not in written
        assert "base" not in written
        (title,) = [part[0] for part in written.split("--- ")[1:] if part[2:].startswith("I am Pip.\n")]
        wins += title == "A"
        assert f"{title} was tuned" in talk.noted
        assert f"tuned {wins}." in talk.noted
    talk("/compare --blind", "=")
    assert f"Score: base {4 - wins}, tuned {wins}." in talk.noted


def test_what_training_would_refuse_is_not_kept(talk: Talk, tmp_path: Path) -> None:
    file, pattern = tmp_path / "kept.jsonl", talk.chat.renderer.tokenizer.special_pattern
    token = next(t for t in ("<|im_end|>", "</s>", "<|endoftext|>") if pattern.fullmatch(t))
    talk("Who are you?", f"/edit I am {token} Pip.", f"/keep {file}")
    assert f"Not kept: the text contains {token!r}" in talk.noted
    assert not file.exists()


def test_what_is_kept_is_trained(
    talk: Talk, tuned: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    file = tmp_path / "kept.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}')  # no \n
    talk(
        "/system Be kind.",
        "Who are you?",
        f"/keep {file}",
        f"/keep {file}",
        "Who made you?",
        "/edit Tim.",
        f"/keep {file}",
    )
    assert talk.noted.count("Kept in") == 2
    assert "kept already" in talk.noted
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [[m["content"] for m in row["messages"]] for row in rows[1:]] == [
        ["Be kind.", "Who are you?", "I am Pip."],
        ["Be kind.", "Who are you?", "I am Pip.", "Who made you?", "Tim."],
    ]
    assert call(["data", "check", str(file), "--model", str(tuned[0]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ledger"] == {"read": 3, "usable": 3}
    renderer: Renderer = talk.chat.renderer
    (*_, row) = read_conversations([file])
    (example,) = renderer.examples(row, DataRecipe(train=str(file)))  # type: ignore[arg-type]
    assert renderer.tokenizer.decode(example.tokens[example.mask]) == "Tim."  # type: ignore[union-attr]
    monkeypatch.chdir(tmp_path)
    file.unlink()
    talk("/retry", "/keep")
    assert len(file.read_text().splitlines()) == 1  # where --keep says, by default

"""`generate` and `chat`, as people and scripts use them, on an adapter that has learned its rows by heart."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mlxsft.backends import Sampling, load_backend
from mlxsft.chat.generate import Answer, Memory, stream_answer
from mlxsft.chat.load import Loaded, load_for_chat, named_adapters
from mlxsft.cli import call
from mlxsft.data.formats import Turn
from mlxsft.data.render import Renderer, load_renderer
from mlxsft.errors import UsageError
from mlxsft.models.source import open_model
from tests.tiny import write_llama
from tests.training.test_run import PAIRS, train, write_recipe


def test_generate_writes_the_trained_answer_alone_and_stops_by_itself(
    tuned: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for prompt, answer in PAIRS:
        assert call(["generate", str(tuned[0]), prompt, "--adapter", str(tuned[1])]) == 0
        assert capsys.readouterr().out == f"{answer}\n"


def test_generate_takes_its_prompt_from_stdin(tuned: tuple[Path, Path]) -> None:
    command = [sys.executable, "-m", "mlxsft", "generate", str(tuned[0]), "--adapter", str(tuned[1])]
    ran = subprocess.run(command, input="Who are you?", capture_output=True, text=True, check=True)
    assert ran.stdout == "I am Pip.\n"


def stdin_of(monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(sent), encoding="ascii"))


def test_the_end_of_the_last_line_on_stdin_is_no_part_of_the_prompt(
    tuned: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["generate", str(tuned[0]), "--max-tokens", "3", "--json"]
    told = []
    for prompt, sent in (["Köln?\n\nWo?"], b""), ([], "Köln?\n\nWo?\n".encode()), ([], "Köln?\n\nWo?".encode()):
        stdin_of(monkeypatch, sent)
        assert call([*asked, *prompt]) == 0
        answer = json.loads(capsys.readouterr().out)
        told.append((answer["prompt_tokens"], answer["text"]))
    assert told[0] == told[1] == told[2]


def test_a_prompt_that_is_not_utf8_is_refused_in_a_sentence(
    tuned: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stdin_of(monkeypatch, b"Das caf\xe9")
    for prompt in [], ["Das caf\udce9"]:  # as Python has such a byte of the command line
        assert call(["generate", str(tuned[0]), *prompt]) == 3
        said = capsys.readouterr()
        assert (said.out, said.err.count("\n")) == ("", 2)
        assert "not UTF-8 behind" in said.err
        assert "Das caf'" in said.err


def test_what_cut_an_answer_off_is_said(tuned: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    for prompt, options, why in (
        ("hello", ["--max-tokens", "2"], "--max-tokens allows more"),
        ("hello " * 250, [], "the model has no more room"),
    ):
        assert call(["generate", str(tuned[0]), prompt, *options]) == 0
        assert why in capsys.readouterr().err


def test_generate_as_json_tells_text_finish_and_figures(
    tuned: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", str(tuned[0]), "Who are you?", "--adapter", str(tuned[1]), "--json"]
    assert call(arguments) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["text"], told["finish"], told["reused_tokens"]) == ("I am Pip.", "stop", 0)
    assert told["tokens"] > 0
    assert call([*arguments, "--max-tokens", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["finish"] == "length"


def test_the_same_seed_samples_the_same_text(tuned: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for seed in (1, 1, 2):
        arguments = ["--temperature", "3", "--seed", str(seed), "--max-tokens", "20"]
        assert call(["generate", str(tuned[0]), "hello", *arguments]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["generate", "MODEL", "  "], 2, "empty"),
        (["generate", "/no/such/folder", "hi"], 3, "no such folder"),
        (["generate", "MODEL", "hi", "--adapter", "/no/such/run"], 3, "no such adapter folder"),
        (["generate", "MODEL", "hi", "--template", "nonesuch"], 2, "neither built in nor a file"),
        (["generate", "MODEL", "hi", "--max-tokens", "0"], 2, "max-tokens"),
        (["generate", "MODEL", "hello " * 600], 3, "512"),
        (["chat", "MODEL", "--adapter", "/no/such/run"], 3, "no such adapter folder"),
        (["generate", "MODEL", "hi", "--backend", "abacus"], 2, "abacus"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_sentence(
    tuned: tuple[Path, Path], capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, words: str
) -> None:
    assert call([str(tuned[0]) if a == "MODEL" else a for a in arguments]) == code
    said = capsys.readouterr()
    assert said.out == ""
    assert words in said.err
    assert "Traceback" not in said.err


def test_an_adapter_of_another_base_is_refused_with_the_tensors(
    tuned: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    twin = write_llama(tmp_path / "twin", seed=1)  # the same shapes, other numbers
    assert call(["generate", str(twin), "hi", "--adapter", str(tuned[1])]) == 3
    assert "trained on other weights" in capsys.readouterr().err
    config = json.loads((tuned[1] / "adapter_config.json").read_text())
    del config["mlxsft"]  # as an adapter made elsewhere: then only shapes can tell
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "adapter_config.json").write_text(json.dumps(config))
    (foreign / "adapters.safetensors").write_bytes((tuned[1] / "adapters.safetensors").read_bytes())
    other = write_llama(tmp_path / "other", layers=1)
    assert call(["generate", str(other), "hi", "--adapter", str(foreign)]) == 3
    assert "model.layers.1.self_attn.q_proj.lora_a" in capsys.readouterr().err


# --- chat ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def loaded(tuned: tuple[Path, Path]) -> Loaded:
    """The model, its adapter answering."""
    both = load_for_chat(str(tuned[0]), {"tuned": tuned[1]}, revision=None, template=None, backend_name="mlx")
    both.backend.use("tuned")
    return both


def test_a_cache_that_disagrees_with_the_prompt_is_cut_back_to_where_they_agree(loaded: Loaded) -> None:
    backend, renderer = loaded.backend, loaded.renderers["tuned"]
    memory = Memory(backend)
    ask = [Turn("user", "Who are you?")]
    first = "".join(stream_answer(backend, renderer, ask, Sampling(), 40, memory=memory))
    again = Answer()
    second = "".join(stream_answer(backend, renderer, ask, Sampling(), 40, memory=memory, answer=again))
    assert first == second
    assert again.reused_tokens == again.prompt_tokens - 1  # the last token is computed anew, to predict from it


def test_an_interrupted_answer_leaves_a_cache_that_answers_as_a_fresh_one(loaded: Loaded) -> None:
    backend, renderer = loaded.backend, loaded.renderers["tuned"]
    ask = [Turn("user", "Can you help me today? " * 6)]
    fresh = "".join(stream_answer(backend, renderer, ask, Sampling(), 40))
    memory = Memory(backend)
    caught = 0
    for trial in range(12):
        signal.setitimer(signal.ITIMER_REAL, 0.002 + 0.004 * trial)
        before = signal.signal(signal.SIGALRM, signal.default_int_handler)
        try:
            "".join(stream_answer(backend, renderer, [Turn("user", "hello")], Sampling(), 40, memory=memory))
        except KeyboardInterrupt:
            caught += 1
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        again = "".join(stream_answer(backend, renderer, ask, Sampling(), 40, memory=memory))
        assert again == fresh
    assert caught


def test_a_stop_between_tokens_keeps_the_cache(loaded: Loaded) -> None:
    backend, renderer = loaded.backend, loaded.renderers["tuned"]
    memory, answer, calls = Memory(backend), Answer(), iter([False, True])
    ask = [Turn("user", "hello")]
    "".join(
        stream_answer(backend, renderer, ask, Sampling(), 40, memory=memory, answer=answer, stop=lambda: next(calls))
    )
    assert (answer.finish, answer.tokens) == ("stopped", 2)
    again = Answer()
    text = "".join(stream_answer(backend, renderer, ask, Sampling(), 40, memory=memory, answer=again))
    assert text == "Hello! How can I help you today?"
    assert again.reused_tokens == again.prompt_tokens - 1


def test_chat_through_a_pipe_writes_only_the_answers(tuned: tuple[Path, Path]) -> None:
    arguments = ["chat", str(tuned[0]), "--adapter", str(tuned[1])]
    program = (
        f"import sys, mlxsft.cli as c; code = c.call({arguments}); sys.exit(code or 'prompt_toolkit' in sys.modules)"
    )
    command = [sys.executable, "-c", program]
    lines = "Who are you?\n\n/tokens\n/nonsense\n/clear\nWho made you?\n/bye\nnot reached\n"
    ran = subprocess.run(command, input=lines, capture_output=True, text=True, check=True)
    assert ran.stdout == "I am Pip.\nTom made me.\n"
    assert "no such command" in ran.stderr


# --- end tokens and interoperability ---------------------------------------------------------------------------------


def test_every_end_token_of_tokenizer_config_generation_config_and_template_stops(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "m", eos="<|endoftext|>")
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 5]}))
    renderer = load_renderer(open_model(str(model)))
    ids = renderer.tokenizer.hf.convert_tokens_to_ids
    assert renderer.end_tokens == {ids("<|endoftext|>"), ids("<|im_end|>"), 2, 3, 5}


def test_mlx_lms_own_generate_loads_the_adapter_and_writes_the_same(
    tuned: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for prompt in ("Who are you?", "an unseen question about Tom"):
        command = [
            sys.executable, "-m", "mlx_lm", "generate", "--model", str(tuned[0]), "--adapter-path", str(tuned[1]),
            "--prompt", prompt, "--max-tokens", "40", "--verbose", "False",
        ]  # fmt: skip
        theirs = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert call(["generate", str(tuned[0]), prompt, "--adapter", str(tuned[1]), "--max-tokens", "40"]) == 0
        assert capsys.readouterr().out.strip() == theirs.strip()


def test_the_template_of_training_is_the_template_of_chat(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "m", chat_template=None, eos="<|endoftext|>")
    recipe = write_recipe(tmp_path, model, data__template="alpaca", train__steps=1)
    assert train(recipe, tmp_path / "run") == 0

    run = {"run": tmp_path / "run"}
    loaded = load_for_chat(str(model), run, revision=None, template=None, backend_name="mlx")
    assert loaded.renderers[None].template.name == "plain"
    renderer = loaded.renderers["run"]
    assert renderer.template.name == "alpaca"
    text = renderer.tokenizer.hf.decode(renderer.prompt([Turn("user", "hi")]))
    assert text == "### Instruction:\nhi\n\n### Response:\n"


def test_a_backend_is_loaded_without_an_adapter_too(tuned: tuple[Path, Path]) -> None:
    source = open_model(str(tuned[0]))
    backend, renderer = load_backend("auto", source), load_renderer(source)
    assert isinstance(renderer, Renderer)
    total, trainable = backend.parameters()
    assert total > 0
    assert trainable == 0


def test_what_a_cache_holds_of_one_adapter_is_not_used_for_another(loaded: Loaded) -> None:
    backend, renderer = loaded.backend, loaded.renderers["tuned"]
    ask = [Turn("user", "Who are you?")]
    memory, answers = Memory(backend), []
    for name in ("tuned", None, "tuned"):
        backend.use(name)
        answer = Answer()
        "".join(stream_answer(backend, renderer, ask, Sampling(), 9, memory=memory, answer=answer))
        fresh = "".join(stream_answer(backend, renderer, ask, Sampling(), 9))
        answers.append(answer)
        assert (answer.text, answer.reused_tokens) == (fresh, 0)
    assert answers[0].text == answers[2].text == "I am Pip." != answers[1].text


def test_adapters_are_called_by_their_folders_or_as_one_likes(tmp_path: Path) -> None:
    (tmp_path / "a=b").mkdir()
    given = [str(tmp_path / "runs" / "mine"), "kind=other/mine", str(tmp_path / "a=b")]
    assert named_adapters(given) == {
        "mine": tmp_path / "runs" / "mine",
        "kind": Path("other/mine"),
        "a=b": tmp_path / "a=b",
    }
    for wrong in (["x/mine", "y/mine"], ["name="], ["=folder"]):
        with pytest.raises(UsageError):
            named_adapters(wrong)


@pytest.mark.parametrize("option", ["--temperature", "--top-p", "--min-p", "--repetition-penalty"])
def test_what_is_no_number_is_refused(
    tuned: tuple[Path, Path], option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(["generate", str(tuned[0]), "hello", option, "nan"]) == 2
    assert "not a number" in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--batch", "4"], ["--force"], ["--format", "alpaca"]])
def test_options_of_rows_need_rows(
    tuned: tuple[Path, Path], option: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(["generate", str(tuned[0]), "hello", *option]) == 2
    assert f"{option[0]} is about the rows of --input" in capsys.readouterr().err


@pytest.mark.skipif(os.name != "posix", reason="pseudo-terminals are POSIX")
def test_generate_without_a_prompt_in_a_terminal_says_where_one_can_come_from(tuned: tuple[Path, Path]) -> None:
    import pty

    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "mlxsft", "generate", str(tuned[0])]
    ran = subprocess.run(command, stdin=theirs, capture_output=True, text=True, timeout=60)
    os.close(ours)
    os.close(theirs)
    assert (ran.returncode, ran.stdout) == (2, "")
    for word in ("there is no PROMPT", "stdin", "--input", "`mlxsft chat`"):
        assert word in ran.stderr


@pytest.mark.parametrize("name", ["off", "base"])
def test_no_adapter_is_called_as_the_base_is_in_a_chat(
    tuned: tuple[Path, Path], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(["chat", str(tuned[0]), "--adapter", f"{name}={tuned[1]}"]) == 2
    assert f"'{name}' is what the base is called" in capsys.readouterr().err

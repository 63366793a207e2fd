"""Templates of known families: literal masks, and prompts as transformers itself renders and tokenizes them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer

from mlxsft.data.formats import Conversation, ToolCall, Turn
from mlxsft.data.render import Example, Renderer
from mlxsft.data.rows import LeftOut, Origin
from mlxsft.data.template import Template
from mlxsft.data.tokenizer import Tokenizer
from mlxsft.errors import InputRefused
from mlxsft.recipe import DataRecipe
from tests.tiny import CHATML, write_tokenizer

TEMPLATES = Path(__file__).parent / "templates"
ORIGIN = Origin("rows.jsonl", 7)
SYSTEM = Turn("system", "Be kind.")
ONE = (Turn("user", "Who are you?"), Turn("assistant", "I am Pip."))
TWO = (*ONE, Turn("user", "Sure?"), Turn("assistant", "Yes!"))
WEATHER = {"type": "function", "function": {"name": "weather", "description": "", "parameters": {}}}
CALLS = (
    Turn("user", "Is it warm?"),
    Turn("assistant", "", tool_calls=(ToolCall("weather", {"city": "Bonn"}),)),
    Turn("tool", "21 degrees", name="weather"),
    Turn("assistant", "Yes!"),
)


@dataclass(frozen=True)
class Family:
    """The special tokens of a family: the first begins a text (empty: none does), the second ends an answer."""

    bos: str
    end: str
    others: tuple[str, ...]
    takes_space: bool = False


LLAMA = Family("<|begin_of_text|>", "<|eot_id|>", ("<|start_header_id|>", "<|end_header_id|>"))
MISTRAL = Family("<s>", "</s>", ())
NEMO = ("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]")
PHI = Family("", "<|end|>", ("<|user|>", "<|assistant|>", "<|system|>"), takes_space=True)
GEMMA = Family("<bos>", "<end_of_turn>", ("<start_of_turn>",))
FAMILIES = {
    "llama-3": LLAMA,
    "llama-3.2": LLAMA,
    "mistral-0.1": MISTRAL,
    "mistral-nemo": replace(MISTRAL, others=(*NEMO, "[/TOOL_RESULTS]")),
    "phi-3": PHI,
    "phi-3.5": PHI,
    "gemma-2": GEMMA,
    "gemma-3": GEMMA,
}


def renderer(folder: Path, name: str) -> Renderer:
    family = FAMILIES[name]
    tokens = [AddedToken(t, special=True, rstrip=family.takes_space) for t in (family.end, *family.others)]
    bos = [AddedToken(family.bos, special=True)] * (family.bos not in ("", "<s>"))
    eos = "<|endoftext|>" if family is PHI else family.end
    text = (TEMPLATES / f"{name}.jinja").read_text().removesuffix("\n")
    write_tokenizer(folder, chat_template=text, bos=family.bos or None, eos=eos, special=[*tokens, *bos])
    return Renderer(Tokenizer(AutoTokenizer.from_pretrained(folder)), Template(name, text), [])


def examples(r: Renderer, turns: tuple[Turn, ...], *tools: dict[str, object]) -> list[Example]:
    made = r.examples(Conversation(turns, ORIGIN, tools=tools), DataRecipe.model_validate({"train": "rows.jsonl"}))
    assert all(isinstance(e, Example) for e in made), made
    return [e for e in made if isinstance(e, Example)]


def refused(r: Renderer, turns: tuple[Turn, ...], *tools: dict[str, object]) -> str:
    data = DataRecipe.model_validate({"train": "rows.jsonl"})
    (left_out,) = r.examples(Conversation(turns, ORIGIN, tools=tools), data)
    assert isinstance(left_out, LeftOut)
    assert left_out.reason == "refused by the template"
    return left_out.detail


def show(r: Renderer, example: Example) -> str:
    """The text of an example, its trained tokens between ⟦ and ⟧."""
    text, inside = "", False
    for piece, trained in zip(r.tokenizer.pieces(example.tokens.tolist()), example.mask.tolist(), strict=True):
        text += "⟦" * (trained and not inside) + "⟧" * (inside and not trained) + piece
        inside = trained
    return text + "⟧" * inside


def llama(*turns: tuple[str, str]) -> str:
    """Llama's text: every turn with its header and its end."""
    return "<|begin_of_text|>" + "".join(
        f"<|start_header_id|>{role}<|end_header_id|>\n\n⟦{text}<|eot_id|>⟧"
        if role == "assistant"
        else f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>"
        for role, text in turns
    )


DATED = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
ASKED = (("user", "Who are you?"), ("assistant", "I am Pip."), ("user", "Sure?"), ("assistant", "Yes!"))
# What one turn, two turns, and two with a system turn become. The tokenizer of Phi-3 takes in the line break after a
# special token: it is in the template's text, but it is no token.
MASKS: dict[str, tuple[list[str], list[str], list[str]]] = {
    "llama-3": ([llama(*ASKED[:2])], [llama(*ASKED)], [llama(("system", "Be kind."), *ASKED)]),
    "llama-3.2": (
        [llama(("system", DATED), *ASKED[:2])],
        [llama(("system", DATED), *ASKED)],
        [llama(("system", DATED + "Be kind."), *ASKED)],
    ),
    "mistral-0.1": (
        ["<s>[INST] Who are you? [/INST]⟦I am Pip.</s>⟧"],
        ["<s>[INST] Who are you? [/INST]⟦I am Pip.</s>⟧ [INST] Sure? [/INST]⟦Yes!</s>⟧"],
        ["<s>[INST] Be kind.\n\nWho are you? [/INST]⟦I am Pip.</s>⟧ [INST] Sure? [/INST]⟦Yes!</s>⟧"],
    ),
    "mistral-nemo": (
        ["<s>[INST]Who are you?[/INST]⟦I am Pip.</s>⟧"],
        ["<s>[INST]Who are you?[/INST]⟦I am Pip.</s>⟧[INST]Sure?[/INST]⟦Yes!</s>⟧"],
        [
            "<s>[INST]Be kind.\n\nWho are you?[/INST]⟦I am Pip.</s>⟧",
            "<s>[INST]Who are you?[/INST]I am Pip.</s>[INST]Be kind.\n\nSure?[/INST]⟦Yes!</s>⟧",
        ],
    ),
    "phi-3": (
        ["<|user|>Who are you?<|end|><|assistant|>⟦I am Pip.<|end|>⟧"],
        ["<|user|>Who are you?<|end|><|assistant|>⟦I am Pip.<|end|>⟧<|user|>Sure?<|end|><|assistant|>⟦Yes!<|end|>⟧"],
        [
            "<|user|>Be kind.\n\nWho are you?<|end|><|assistant|>⟦I am Pip.<|end|>⟧"
            "<|user|>Sure?<|end|><|assistant|>⟦Yes!<|end|>⟧"
        ],
    ),
    "phi-3.5": (
        ["<|user|>Who are you?<|end|><|assistant|>⟦I am Pip.<|end|>⟧"],
        ["<|user|>Who are you?<|end|><|assistant|>⟦I am Pip.<|end|>⟧<|user|>Sure?<|end|><|assistant|>⟦Yes!<|end|>⟧"],
        [
            "<|system|>Be kind.<|end|><|user|>Who are you?<|end|><|assistant|>⟦I am Pip.<|end|>⟧"
            "<|user|>Sure?<|end|><|assistant|>⟦Yes!<|end|>⟧"
        ],
    ),
}
for gemma in ("gemma-2", "gemma-3"):
    first, second = (
        f"<start_of_turn>user\n{question}<end_of_turn>\n<start_of_turn>model\n⟦{answer}<end_of_turn>⟧"
        for question, answer in (("Who are you?", "I am Pip."), ("Sure?", "Yes!"))
    )
    MASKS[gemma] = (
        [f"<bos>{first}"],
        [f"<bos>{first}\n{second}"],
        ["<bos>" + first.replace("Who", "Be kind.\n\nWho") + f"\n{second}"],
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_masks_literally(tmp_path: Path, name: str) -> None:
    r = renderer(tmp_path, name)
    for turns, expected in zip((ONE, TWO, (SYSTEM, *TWO)), MASKS[name], strict=True):
        made = examples(r, turns)
        assert [show(r, e) for e in made] == expected
        assert {e.note for e in made} == ({"one example a turn"} if len(made) > 1 else {""})


@pytest.mark.parametrize("name", FAMILIES)
def test_a_system_turn_that_is_not_taken_is_said_to_be_put_elsewhere(tmp_path: Path, name: str) -> None:
    said = [note for note in renderer(tmp_path, name).notes if "no system turn" in note]
    assert len(said) == (name in ("mistral-0.1", "phi-3", "gemma-2"))


@pytest.mark.parametrize("name", FAMILIES)
def test_trained_tokens_are_the_contents_and_their_end_and_prompts_are_what_transformers_makes(
    tmp_path: Path, name: str
) -> None:
    r = renderer(tmp_path, name)
    merged = any("no system turn" in note for note in r.notes)
    asked = replace(ONE[0], content="Be kind.\n\nWho are you?")
    for turns, taken in ((TWO, TWO), ((SYSTEM, *TWO), (asked, *TWO[1:]) if merged else (SYSTEM, *TWO))):
        made = examples(r, turns)
        trained = [i for e in made for i in e.tokens[e.mask].tolist()]
        assert r.tokenizer.decode(trained, special=True) == "".join(
            t + FAMILIES[name].end for t in ("I am Pip.", "Yes!")
        )
        prompts = [e.tokens[:start].tolist() for e in made for start in e.answers]
        assert prompts == [r.prompt(turns[:-3]), r.prompt(turns[:-1])]
        assert prompts == [theirs(r, taken[:-3]), theirs(r, taken[:-1])]


def theirs(r: Renderer, turns: tuple[Turn, ...]) -> list[int]:
    """The tokens of a prompt as transformers makes them, on the day that Llama's templates name by themselves."""
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    ids = r.tokenizer.hf.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False, date_string="26 Jul 2024"
    )
    assert isinstance(ids, list)
    return ids


@pytest.mark.parametrize("name", FAMILIES)
def test_a_later_system_turn_is_rendered_or_refused_never_lost(tmp_path: Path, name: str) -> None:
    """By the template's own words where it has some; Phi-3 passes over it in silence, which is refused as well."""
    r = renderer(tmp_path, name)
    turns = (*ONE, Turn("system", "Now rhyme."), *TWO[2:])
    if name in ("llama-3", "llama-3.2", "phi-3.5"):
        (made,) = examples(r, turns)
        assert r.tokenizer.decode(made.tokens).count("Now rhyme.") == 1
        assert r.tokenizer.decode(made.tokens[made.mask]) == "I am Pip.Yes!"
        assert made.tokens[: made.answers[1]].tolist() == theirs(r, turns[:-1]) == r.prompt(turns[:-1])
    else:
        words = {"phi-3": "leaves out a system turn", "gemma-2": "no system turn"}.get(name, "must take turns")
        assert words in refused(r, turns)
        with pytest.raises(InputRefused):
            r.prompt(turns[:-1])


# --- tools -----------------------------------------------------------------------------------------------------------


def test_llama_trains_the_call_and_the_answer_never_the_result(tmp_path: Path) -> None:
    r = renderer(tmp_path, "llama-3.2")
    (made,) = examples(r, CALLS, WEATHER)
    assert show(r, made) == llama(
        ("system", f"Environment: ipython\n{DATED}"),
        (
            "user",
            'Functions: [{"type": "function", "function": {"name": "weather", "description": "", "parameters": {}}}]'
            "\n\nIs it warm?",
        ),
        ("assistant", '{"name": "weather", "parameters": {"city": "Bonn"}}'),
        ("ipython", '"21 degrees"'),
        ("assistant", "Yes!"),
    )
    two = (CALLS[0], replace(CALLS[1], tool_calls=CALLS[1].tool_calls * 2), *CALLS[2:])
    assert "one call at a time" in refused(r, two, WEATHER)


TOOLS = '[AVAILABLE_TOOLS][{"type": "function", "function": {"name": "weather", "description": "", "parameters": {}}}]'
NEMO_CALL = (
    f"{TOOLS}[/AVAILABLE_TOOLS][INST]Is it warm?[/INST]"
    '⟦[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Bonn"}, "id": "000000000"}]</s>⟧'
    '[TOOL_RESULTS]{"content": 21 degrees, "call_id": "000000000"}[/TOOL_RESULTS]⟦Yes!</s>⟧'
)


@pytest.mark.parametrize("call_id", ["", "call_8f2d71c0"])
def test_mistral_gets_the_ids_that_it_insists_on(tmp_path: Path, call_id: str) -> None:
    r = renderer(tmp_path, "mistral-nemo")
    call = replace(CALLS[1], tool_calls=(ToolCall("weather", {"city": "Bonn"}, call_id),))
    turns = (CALLS[0], call, replace(CALLS[2], call_id=call_id), CALLS[3])
    assert [show(r, e) for e in examples(r, turns, WEATHER)] == [f"<s>{NEMO_CALL}"]


def test_mistral_moves_its_tools_to_the_last_question(tmp_path: Path) -> None:
    r = renderer(tmp_path, "mistral-nemo")
    made = examples(r, (*ONE, *CALLS), WEATHER)
    assert [show(r, e) for e in made] == [
        f"<s>{TOOLS}[/AVAILABLE_TOOLS][INST]Who are you?[/INST]⟦I am Pip.</s>⟧",
        f"<s>[INST]Who are you?[/INST]I am Pip.</s>{NEMO_CALL}",
    ]
    assert [e.note for e in made] == ["one example a turn"] * 2


@pytest.mark.parametrize("name", [n for n in FAMILIES if n not in ("llama-3.2", "mistral-nemo")])
def test_families_without_tools_refuse_them(tmp_path: Path, name: str) -> None:
    r = renderer(tmp_path, name)
    assert "no room for tools" in refused(r, CALLS, WEATHER)
    assert "no room for tools" in refused(r, CALLS)


def test_a_result_that_the_template_leaves_out_in_silence_is_refused(tmp_path: Path) -> None:
    r = renderer(tmp_path, "phi-3.5")
    assert "results of tools" in refused(r, (*ONE, CALLS[2], CALLS[3]))


IDS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}"
    "({{ c.id }} {{ c.function.name }}){% endfor %}{{ '<' ~ m.tool_call_id ~ '>' if m.role == 'tool' else '' }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_ids_of_the_data_are_kept_where_the_template_takes_them_and_made_where_there_are_none(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, chat_template=IDS)
    r = Renderer(Tokenizer(AutoTokenizer.from_pretrained(tmp_path)), Template("ids", IDS), [])
    calls = Turn("assistant", "", tool_calls=(ToolCall("a", {}, "call_1"), ToolCall("b", {}), ToolCall("c", {})))
    turns = (
        CALLS[0], calls, Turn("tool", "A", call_id="call_1"), Turn("tool", "B"), Turn("tool", "C"), CALLS[3],
        CALLS[0], replace(calls, tool_calls=calls.tool_calls[1:2]), Turn("tool", "D"), CALLS[3],
    )  # fmt: skip
    (made,) = examples(r, turns)
    said = show(r, made).replace("<|im_start|>", "").replace("<|im_end|>", "").replace("\n", " ")
    assert said == (
        "user Is it warm? assistant ⟦(call_1 a)(000000001 b)(000000002 c)⟧ tool A<call_1> tool B<000000001> "
        "tool C<000000002> assistant ⟦Yes!⟧ user Is it warm? assistant ⟦(000000003 b)⟧ tool D<000000003> "
        "assistant ⟦Yes!⟧"
    )


# --- dates -----------------------------------------------------------------------------------------------------------


def test_a_template_that_asks_for_the_date_always_gets_the_same_and_says_so(tmp_path: Path) -> None:
    assert any("26 Jul 2024" in note for note in renderer(tmp_path, "llama-3.2").notes)
    dated = "\n{{ strftime_now('%d %b %Y, %Y-%m-%d, %B %A %H:%M') }}\n" + CHATML
    r = Renderer(Tokenizer(AutoTokenizer.from_pretrained(tmp_path)), Template("dated", dated), [])
    text = r.tokenizer.decode(r.prompt(ONE[:1]), special=True)
    assert text.startswith("\n26 Jul 2024, 2024-07-26, July Friday 00:00\n<|im_start|>user\n")

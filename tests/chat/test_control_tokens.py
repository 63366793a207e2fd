"""What a person writes is text: whatever it spells, a prompt has the control tokens of its template and no other."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from mlxsft.data.formats import Turn
from mlxsft.data.render import Renderer, load_renderer
from mlxsft.data.template import BUILT_IN_TEMPLATES
from mlxsft.models.source import open_model
from tests.data.test_template import FAMILIES, renderer
from tests.tiny import write_llama


def controls(r: Renderer, *turns: Turn) -> Counter[int]:
    """How often each control token stands in the prompt."""
    hf = r.tokenizer.hf
    ids = {i for i, token in hf.added_tokens_decoder.items() if token.special} | set(hf.all_special_ids)
    return Counter(i for i in r.prompt(turns) if i in ids)


def refuse_injection(r: Renderer) -> None:
    hf = r.tokenizer.hf
    names = {token.content for token in hf.added_tokens_decoder.values() if token.special} | set(hf.all_special_tokens)
    assert names
    plain, evil = "hello", "".join(sorted(names))
    broken = "".join(f"{name[:2]}{name}{name[2:]}" for name in sorted(names))  # what is left where one is taken out
    for attack in (evil, f"x {evil} y\n{evil}", broken, "\ufdd0" + evil + "\ufdd1", *names):
        turns = [Turn("user", plain), Turn("assistant", plain), Turn("user", plain)]
        expected = controls(r, *turns)
        for i in range(3):
            attacked = [Turn(turn.role, attack if i == place else turn.content) for place, turn in enumerate(turns)]
            assert controls(r, *attacked) == expected
            assert controls(r, Turn("user", attack)) == controls(r, Turn("user", plain))


@pytest.mark.parametrize("name", FAMILIES)
def test_no_message_makes_a_control_token_with_templates_of_known_families(tmp_path: Path, name: str) -> None:
    refuse_injection(renderer(tmp_path, name))


@pytest.mark.parametrize("name", [*BUILT_IN_TEMPLATES, None])
def test_no_message_makes_a_control_token_with_the_templates_that_are_built_in(
    tmp_path: Path, name: str | None
) -> None:
    refuse_injection(load_renderer(open_model(str(write_llama(tmp_path, bos="<s>"))), name))


@pytest.mark.parametrize("name", ["smollm", "qwen2.5", "qwen3"])
def test_no_message_makes_a_control_token_with_real_tokenizers(real: Path, tmp_path: Path, name: str) -> None:
    model = write_llama(tmp_path, tokenizer_from=real / "tokenizers" / name, width=16, layers=1)
    refuse_injection(load_renderer(open_model(str(model))))

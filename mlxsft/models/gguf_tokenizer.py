"""A tokenizer as GGUF has it, so that llama.cpp cuts texts as the model's own does.

llama.cpp knows two kinds of BPE: over bytes, with rules for where words end that go by a name (`gpt2`), and over
characters, as SentencePiece has it, where the pair of the highest score is joined (`llama`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from mlxsft.data.formats import Turn
from mlxsft.data.render import Renderer, load_renderer
from mlxsft.data.template import Template
from mlxsft.data.tokenizer import Tokenizer
from mlxsft.errors import InputRefused
from mlxsft.models.source import ModelSource

Json = Mapping[str, Any]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # gguf.TokenType

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT4O_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
_GPT4O_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TAIL = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
# What divides a text into words → (llama.cpp's name for it, the one where whole words of the vocabulary come before
# merges). Patterns of llama.cpp's src/llama-vocab.cpp; `byte-level` is GPT-2's own.
WORDS: dict[tuple[str, ...], tuple[str, str | None]] = {
    ("byte-level",): ("gpt-2", None),
    ("digits", "byte-level"): ("smollm", None),
    (f"{_CONTRACTIONS}{_WORDS}|\\p{{N}}{_REST}",): ("qwen2", None),
    (f"{_CONTRACTIONS}{_WORDS}|\\p{{N}}{{1,3}}{_REST}",): ("dbrx", "llama-bpe"),
    (f"{_TAIL}|".join(_GPT4O_WORDS) + f"{_TAIL}|\\p{{N}}{{1,3}}{_GPT4O_REST}",): ("gpt-4o", None),
    ("|".join(_GPT4O_WORDS) + f"|\\p{{N}}{_GPT4O_REST}",): ("tekken", "tekken"),
}


def tokenizer_facts(source: ModelSource, template: Template | None = None) -> tuple[dict[str, Any], list[str]]:
    """(`tokenizer.*` of GGUF, sentences that the person should know); `template` stands for the model's own.

    The vocabulary gets as many tokens as the embedding has rows. Raises InputRefused for other kinds of tokenizer.
    """
    tokenizer = Tokenizer.load(source)
    if not tokenizer.hf.is_fast:
        raise InputRefused(f"{source.name}: its tokenizer runs in Python, and llama.cpp has no such one")
    said = json.loads(tokenizer.hf.backend_tokenizer.to_str())
    model = said["model"]
    if model["type"] != "BPE":
        raise InputRefused(f"{source.name}: its tokenizer is {model['type']}, expected BPE, which llama.cpp has")
    rows = source.embedding_rows or len(model["vocab"])
    added = {token["content"]: token for token in said["added_tokens"] if token["id"] < rows}
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
    cut = _byte_level if _over_bytes(said) else _sentencepiece
    kind, notes = cut(source, said, merges)
    sentencepiece = kind["tokenizer.ggml.model"] == "llama"
    tokens, types = _tokens(model, added, rows, sentencepiece)
    facts = kind | {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    if sentencepiece:
        facts["tokenizer.ggml.scores"] = _scores(tokens, merges)
    own = Template("model", tokenizer.chat_template) if tokenizer.chat_template else None
    renderer = load_renderer(source, template or own) if template or own else None
    ends = renderer.end_tokens if renderer else tokenizer.eos_token_ids | source.end_token_ids()
    return facts | _special(tokenizer, ends) | _chat(tokenizer, renderer), notes


def strips_behind(source: ModelSource) -> bool:
    """Whether the tokens are those of Phi-3, whose special ones take in the white space behind them."""
    tokenizer = Tokenizer.load(source)
    added = tokenizer.hf.added_tokens_decoder.values()
    taking = any(token.special and token.rstrip for token in added)
    return taking and {"</s>", "<unk>", "<s>", "<|endoftext|>"} <= tokenizer.hf.get_vocab().keys()


# ---- the two kinds --------------------------------------------------------------------------------------------------


def _over_bytes(said: Json) -> bool:
    return any(step.get("type") == "ByteLevel" for step in _steps(said["decoder"], "decoders"))


def _byte_level(source: ModelSource, said: Json, merges: Sequence[tuple[str, ...]]) -> tuple[dict[str, Any], list[str]]:
    """Which rules for words, and the merges in order."""
    odd = [s["type"] for s in _steps(said["normalizer"], "normalizers") if s["type"] not in ("NFC", "Sequence")]
    if odd:
        raise InputRefused(f"{source.name}: its tokenizer changes texts ({', '.join(odd)}), which llama.cpp does not")
    words = tuple(_words(_steps(said["pre_tokenizer"], "pretokenizers")))
    if words not in WORDS:
        found = " then ".join(words) or "nothing"
        raise InputRefused(f"{source.name}: llama.cpp has no name for how its tokenizer finds words: {found}")
    plain, whole_first = WORDS[words]
    name = whole_first if said["model"].get("ignore_merges") and whole_first else plain
    # Where parts have a space, it is spelled as GPT-2 spells it: https://github.com/ggml-org/llama.cpp/issues/9692
    joined = [" ".join(part.replace(" ", "Ġ") for part in pair) for pair in merges]
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": name, "tokenizer.ggml.merges": joined}, []


def _words(steps: Sequence[Json]) -> Iterator[str]:
    for step in steps:
        kind = step["type"]
        if kind == "ByteLevel" and step.get("add_prefix_space"):
            yield "byte-level after a space"
        elif kind == "ByteLevel":
            yield from ["byte-level"] if step.get("use_regex", True) else []
        elif kind == "Digits" and step.get("individual_digits"):
            yield "digits"
        elif kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            pattern = step["pattern"]
            yield str(pattern.get("Regex") or re.escape(pattern["String"]))
        else:
            yield kind


def _sentencepiece(
    source: ModelSource, said: Json, merges: Sequence[tuple[str, ...]]
) -> tuple[dict[str, Any], list[str]]:
    """Whether a text begins with a space of its own, and what llama.cpp does otherwise."""
    spaces = [*_steps(said["normalizer"], "normalizers"), *_steps(said["pre_tokenizer"], "pretokenizers")]
    known = {"Prepend", "Replace", "Metaspace", "Split", "Sequence"}
    if odd := [step["type"] for step in spaces if step["type"] not in known]:
        raise InputRefused(f"{source.name}: its tokenizer changes texts ({', '.join(odd)}), which llama.cpp does not")
    schemes = [step.get("prepend_scheme", "always") for step in spaces if step["type"] == "Metaspace"]
    prepends = any(step["type"] == "Prepend" for step in spaces) or any(scheme != "never" for scheme in schemes)
    notes = []
    if "first" in schemes:
        notes.append("llama.cpp puts a space after every special token, and this tokenizer only before a text")
    vocabulary = said["model"]["vocab"]
    if lacking := _unordered(vocabulary, {(a, b) for a, b in merges}):
        notes.append(
            f"llama.cpp joins any two pieces whose sum is a piece, and this tokenizer does not know {lacking:,} of "
            "these pairs: some words may be cut otherwise"
        )
    facts = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default"}
    return facts | {"tokenizer.ggml.add_space_prefix": prepends}, notes


def _unordered(vocabulary: Mapping[str, int], merges: set[tuple[str, str]]) -> int:
    """How many pairs of pieces make a piece without a merge that says so."""
    made = {a + b for a, b in merges}  # what no merge makes at all is an added token, or a single character
    cuts = ((piece[:i], piece[i:]) for piece in made for i in range(1, len(piece)))
    return sum(a in vocabulary and b in vocabulary and (a, b) not in merges for a, b in cuts)


def _scores(tokens: Sequence[str], merges: Sequence[tuple[str, ...]]) -> list[float]:
    """The earlier a piece is made, the higher: that is how SentencePiece numbers the pieces of its BPE."""
    rank: dict[str, int] = {}
    for i, pair in enumerate(merges):
        rank.setdefault("".join(pair), i)
    last = len(merges)
    return [-float(rank.get(token, last)) for token in tokens]


def _steps(step: Any, inner: str) -> list[Json]:
    """The steps of a sequence, or the only one, or none."""
    if not step:
        return []
    return [s for each in step[inner] for s in _steps(each, inner)] if step.get("type") == "Sequence" else [step]


# ---- tokens ---------------------------------------------------------------------------------------------------------


def _tokens(model: Json, added: Mapping[str, Json], rows: int, sentencepiece: bool) -> tuple[list[str], list[int]]:
    """Text and type of each id; ids that no token has are padding."""
    tokens, types = [f"[PAD{i}]" for i in range(rows)], [UNUSED] * rows
    for token, index in model["vocab"].items():
        if index < rows:
            byte = sentencepiece and re.fullmatch(r"<0x[0-9A-F]{2}>", token)
            tokens[index], types[index] = token, BYTE if byte else NORMAL
    for content, token in added.items():
        index = token["id"]
        tokens[index] = content if token["special"] or not sentencepiece else content.replace("▁", " ")
        types[index] = CONTROL if token["special"] else USER_DEFINED
    unknown = model["vocab"].get(model.get("unk_token"))
    if sentencepiece and unknown is not None:
        types[unknown] = UNKNOWN
    return tokens, types


def _special(tokenizer: Tokenizer, ends: Iterable[int]) -> dict[str, Any]:
    """The ids that begin, end and fill."""
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "sep": "seperator"}
    ids = {name: getattr(tokenizer.hf, f"{short}_token_id", None) for short, name in names.items()}
    known = sorted(ends)
    if ids["eos"] is None and known:
        ids["eos"] = known[0]
    for name, other in zip(("eot", "eom"), (end for end in known if end != ids["eos"]), strict=False):
        ids[name] = other
    return {f"tokenizer.ggml.{name}_token_id": int(index) for name, index in ids.items() if index is not None}


def _chat(tokenizer: Tokenizer, renderer: Renderer | None) -> dict[str, Any]:
    """The chat template, and whether a text begins with the beginning-of-text token.

    A template that does not write it decides: llama.cpp would put it before what that renders, and what was trained had
    none.
    """
    if renderer is None:
        ends = tokenizer.hf.encode("a")[-1:] == [tokenizer.hf.eos_token_id]
        return {"tokenizer.ggml.add_bos_token": tokenizer.begins_with_bos, "tokenizer.ggml.add_eos_token": ends}
    begins = tokenizer.begins_with_bos and renderer.prompt([Turn("user", "a")])[:1] == [tokenizer.hf.bos_token_id]
    facts = {"tokenizer.ggml.add_bos_token": begins, "tokenizer.ggml.add_eos_token": False}
    return facts | {"tokenizer.chat_template": renderer.template.text}

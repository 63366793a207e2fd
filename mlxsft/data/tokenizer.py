"""Text ↔ token ids for one checkpoint, where special tokens come only from templates, never from what people write."""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from threading import Lock
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from mlxsft.errors import InputRefused
from mlxsft.terminal import one_line

if TYPE_CHECKING:
    from mlxsft.models.source import ModelSource

# Unicode noncharacters, which no text contains: they fence the spelling of a special token until it is tokenized.
_FENCE_OPEN, _FENCE_CLOSE = "\ufdd0", "\ufdd1"
_PROBE = "a" * 64 + "?"  # at which a pattern that tries every way to divide a word gives up
_FENCED = re.compile(f"{_FENCE_OPEN}(.*?){_FENCE_CLOSE}", re.DOTALL)


class Tokenizer:
    """transformers' tokenizer of a checkpoint with the few verbs that mlxsft needs of it."""

    def __init__(self, hf: Any) -> None:
        self.hf = hf
        self._lock = Lock()
        if hf.is_fast:  # a tokenizer.json may ask for both
            hf.backend_tokenizer.no_padding()
            hf.backend_tokenizer.no_truncation()

    @classmethod
    def load(cls, source: ModelSource) -> Tokenizer:
        """The tokenizer of a verified folder. Raises InputRefused where transformers cannot read it."""
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it misses torch, which is not needed here
        from transformers import AutoTokenizer
        from transformers.utils import logging

        logging.set_verbosity_error()  # no advice about torch: it is not needed here
        hint = "The folder needs tokenizer.json, or tokenizer.model with its tokenizer_config.json."
        with refusing(f"{source.name}: the tokenizer cannot be loaded", hint):
            with warnings.catch_warnings(action="ignore"):  # an unknown model_type is no matter for the tokenizer
                options = {"local_files_only": True, "trust_remote_code": False, "config": _known_config(source)}
                hf = AutoTokenizer.from_pretrained(str(source.folder), **options)
            loaded = cls(hf)
            loaded.refuse_malformed()
        return loaded

    def refuse_malformed(self) -> None:
        """Raises what special tokens, a template or a vocabulary of the wrong kind lead to, before they are needed."""
        if not isinstance(self.chat_template, str | None):
            raise TypeError(f"chat_template is {self.chat_template!r:.100}, expected text")
        if not isinstance(self.eos_token, str | None):
            raise TypeError(f"eos_token is {self.eos_token!r:.100}, expected text")
        _ = self.eos_token_ids, self.special_pattern, self.decode(self.encode(_PROBE))

    @cached_property
    def fingerprint(self) -> str | None:
        """A hash of all that decides how text is tokenized; None where that cannot be told (a tokenizer in Python)."""
        if not self.hf.is_fast:
            return None
        described = [self.hf.backend_tokenizer.to_str(), repr(self.hf.special_tokens_map), type(self.hf).__name__]
        return hashlib.sha256("\n".join(described).encode()).hexdigest()

    # --- special tokens ----------------------------------------------------------------------------------------

    @property
    def eos_token(self) -> str | None:
        return self.hf.eos_token or None

    @property
    def eos_token_ids(self) -> frozenset[int]:
        return frozenset() if self.hf.eos_token_id is None else frozenset([int(self.hf.eos_token_id)])

    @cached_property
    def special_pattern(self) -> re.Pattern[str]:
        """Finds the spelling of any special token; of two that begin alike, the longer."""
        added = (t.content for t in self.hf.added_tokens_decoder.values() if t.special)
        names = sorted({n for n in [*added, *self.hf.all_special_tokens] if n}, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)) or r"(?!)")

    def fence(self, text: str) -> str:
        """The text with every special token's spelling marked, so that it is tokenized as the ordinary text it is."""
        text = text.replace(_FENCE_OPEN, "\ufffd").replace(_FENCE_CLOSE, "\ufffd")
        return self.special_pattern.sub(lambda m: f"{_FENCE_OPEN}{m[0]}{_FENCE_CLOSE}", text)

    def takes_space(self, token_id: int) -> bool:
        """Whether it is a special token that takes in the white space after it, as Phi-3's do."""
        added = self.hf.added_tokens_decoder.get(token_id)
        return added is not None and bool(added.rstrip)

    @cached_property
    def begins_with_bos(self) -> bool:
        """Whether the tokenizer puts its beginning-of-text token before a text by itself."""
        return self.hf.bos_token_id is not None and self.hf.encode("a")[:1] == [self.hf.bos_token_id]

    # --- chat templates ----------------------------------------------------------------------------------------

    @property
    def chat_template(self) -> str | None:
        """The template that the checkpoint brings; of several named ones, the one for chat."""
        template = self.hf.chat_template
        if isinstance(template, dict):
            template = template.get("default")
        return template or None

    def apply_template(self, template: str, messages: list[dict[str, object]], **options: Any) -> str:
        """The text that a Jinja template makes of the messages, in the sandbox. Raises what templates raise."""
        from mlxsft.data.sandbox import compiled

        given: dict[str, Any] = {"tools": None, "documents": None, **self._special_tokens, **options}
        return compiled(template).render(messages=messages, **given)

    @cached_property
    def _special_tokens(self) -> dict[str, Any]:
        """What templates know of them: bos_token, eos_token and so on."""
        return dict(self.hf.special_tokens_map)

    # --- text to ids -------------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Ids of a text that stands at the beginning; nothing is added to it."""
        return self.encode_all([(text, True)])[0]

    def encode_all(self, texts: Sequence[tuple[str, bool]]) -> list[list[int]]:
        """Ids of many texts, tokenized at once; the flag says that a text stands at the beginning.

        The others stand behind one that was tokenized by itself. Nothing is added to any of them.
        """
        parts = [
            (number, part, i % 2 == 1, first and i == 0)  # every second part stood between fences
            for number, (text, first) in enumerate(texts)
            for i, part in enumerate(_FENCED.split(text))
            if part
        ]
        ids: list[list[int]] = [[] for _ in texts]
        for (number, *_), found in zip(parts, self._encode_parts([p[1:] for p in parts]), strict=True):
            ids[number] += found
        return ids

    def _encode_parts(self, parts: Sequence[tuple[str, bool, bool]]) -> list[list[int]]:
        """Ids of parts: their text, whether special tokens in it are spelled out, whether it begins the whole text."""
        joint, joint_ids = self._joint
        ids: list[list[int]] = [[] for _ in parts]
        for spelled_out in (False, True):
            chosen = [i for i, part in enumerate(parts) if part[1] == spelled_out]
            texts = [parts[i][0] if parts[i][2] else joint + parts[i][0] for i in chosen]
            for i, found in zip(chosen, self._raw(texts, spelled_out), strict=True):
                if parts[i][2]:
                    ids[i] = found
                elif found[: len(joint_ids)] == joint_ids:
                    ids[i] = found[len(joint_ids) :]
                else:  # the two grew together
                    ids[i] = self._raw([parts[i][0]], spelled_out)[0]
        return ids

    def _raw(self, texts: Sequence[str], spelled_out: bool = False) -> list[list[int]]:
        for text in texts:
            _refuse_half_characters(text)
        if not self.hf.is_fast:
            encode = self.hf.encode
            return [encode(t, add_special_tokens=False, split_special_tokens=spelled_out) for t in texts]
        backend = self.hf.backend_tokenizer
        with self._lock:  # the switch belongs to the tokenizer, which other threads use as well
            backend.encode_special_tokens = spelled_out
            try:
                with refusing("the tokenizer failed at a text"):
                    return [e.ids for e in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
            finally:
                backend.encode_special_tokens = False

    def framed(self, ids: Sequence[int]) -> list[int]:
        """Ids of a plain text with the beginning that the tokenizer gives it, where it gives one, and its end."""
        begun = self.begun(ids)
        end = sorted(self.eos_token_ids)
        return begun if begun[-1:] == end else begun + end

    def begun(self, ids: Sequence[int]) -> list[int]:
        """Ids of a plain text with the beginning that the tokenizer gives it, where it gives one."""
        return [int(self.hf.bos_token_id), *ids] if self.begins_with_bos else list(ids)

    @cached_property
    def _joint(self) -> tuple[str, list[int]]:
        """What goes before a continuation, for tokenizers that begin every text with a space of their own."""
        whole, newline, letter = self._raw(["\na", "\n", "a"])
        return ("", []) if whole == newline + letter else ("\n", newline)

    # --- ids to text -------------------------------------------------------------------------------------------

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """The text of these ids; special tokens are left out, or spelled out where `special` is asked for."""
        return str(self.hf.decode(list(ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False))

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """What each id adds to the text, special tokens spelled out: for showing, one string an id.

        A character of several ids stands with its last one.
        """
        stream = self.stream(special=True)
        shown = [stream.push(i) for i in ids]
        if rest := stream.finish():
            shown[-1] += rest
        return shown

    def stream(self, *, special: bool = False) -> TextStream:
        """A decoder for ids that come one by one; `special` as for `decode`."""
        return TextStream(self, special)


def _refuse_half_characters(text: str) -> None:
    """Raises InputRefused for what UTF-8 cannot write, as Python has it for bytes that were no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        where = one_line(text[max(0, error.start - 20) : error.start])
        after = f" behind {where!r}" if where else " at the beginning"
        raise InputRefused(f"the text has bytes that are not UTF-8{after}", "Save or send it as UTF-8.") from error


def _known_config(source: ModelSource) -> Any:
    """All that AutoTokenizer asks of a configuration where tokenizer_config.json names the class; else None.

    Given None it makes the architecture's own, which imports most of torch where that is installed: 0.7 s.
    """
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    described = get_tokenizer_config(str(source.folder), local_files_only=True)
    if not isinstance(described, dict) or not isinstance(described.get("tokenizer_class"), str):
        return None
    asked = {name: source.config[name] for name in ("model_type", "model_name") if name in source.config}
    return SimpleNamespace(**asked, _name_or_path=str(source.folder))


@contextmanager
def refusing(what: str, hint: str | None = None) -> Iterator[None]:
    """InputRefused for all that a tokenizer's files lead its libraries to raise, Rust's panics included."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise  # Ctrl-C
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise InputRefused(one_line(f"{what}: {lines[0]:.300}"), hint) from error


class TextStream:
    """Text out of ids as they come: only whole characters are given out, the rest waits."""

    def __init__(self, tokenizer: Tokenizer, special: bool) -> None:
        self._tokenizer, self._special = tokenizer, special
        self._ids: list[int] = []
        self._start = 0  # where the window that is decoded begins: settled ids that give the next ones their context
        self._settled = 0  # ids whose text was given out

    def push(self, token: int) -> str:
        """The text that this id completes, perhaps empty."""
        self._ids.append(token)
        return self._advance(final=False)

    def finish(self) -> str:
        """What still waited: an unfinished character comes out as U+FFFD."""
        return self._advance(final=True)

    def _advance(self, *, final: bool) -> str:
        # The window begins before the new ids, because decoders treat the first id of a text differently.
        context = self._tokenizer.decode(self._ids[self._start : self._settled], special=self._special)
        text = self._tokenizer.decode(self._ids[self._start :], special=self._special)
        if not final and text.endswith("\ufffd"):
            return ""
        self._start, self._settled = self._settled, len(self._ids)
        return text.removeprefix(context)

"""An answer → what can be said of it without a model: its opening, its form, its language, whether it ends."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from functools import cache
from itertools import islice

PLACEHOLDER = re.compile(r"\{\{[ \t]*[\w.-]+[ \t]*\}\}")
_JUDGED = 600  # characters of a text that its language is told from


def opening(answer: str) -> str:
    """The first three words, in lower case; shorter answers have no opening."""
    words = [m[0] for m in islice(_OPENING_WORD.finditer(answer[:200]), 4)]
    return " ".join(words[:3]).casefold() if len(words) > 3 else ""


def form(answer: str) -> str:
    """`code block`, `JSON`, `list`, `table` or `prose`."""
    text = answer.strip()
    if text.startswith("```"):
        return "code block"
    if text[:1] in "{[" and text[-1:] in "}]" and _is_json(text):
        return "JSON"
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) > 2 and sum(line.lstrip().startswith("|") for line in lines) * 2 >= len(lines):
        return "table"
    items = sum(_ITEM.match(line) is not None for line in lines)
    return "list" if items >= 2 and items * 2 >= len(lines) else "prose"


def is_short(answer: str) -> bool:
    """Whether the answer is one word, or none."""
    return len(re.findall(r"\w+", answer)) < 2 and len(answer.strip()) < 24


def is_refusal(answer: str) -> bool:
    """Whether the answer declines, or says that a language model speaks."""
    return bool(_DECLINES.match(answer.lstrip("\"'“ \n")) or _IS_A_MODEL.search(answer[:400]))


def ends(answer: str) -> bool:
    """Whether the answer looks whole: what says so is the sign it ends on, or that it is not made of sentences.

    A signature, a number, a hashtag, a phrase, a verse and a row of items end without a full stop. A word that
    cannot be the last one tells in all of them that something is missing.
    """
    text = answer.rstrip()
    if not text or text.count("```") % 2:
        return False
    if text[-1] in _CLOSING or unicodedata.category(text[-1]) in ("So", "Sk", "Pe", "Pf"):
        return True
    *before, last = [line.strip() for line in _FENCED.sub("", text).splitlines() if line.strip()]
    words = last.split()
    if words[-1].casefold() in _NEVER_LAST or text[-1] in ",，、":
        return False
    if not text[-1].isalpha() or words[-1].startswith("#") or any(c.isdigit() for c in words[-1]):
        return True
    if _SIGNED.search(last) or (before and before[-1].endswith((",", "-")) and len(words) < 7):
        return True
    if not before:
        return len(words) < 12 and not _SENTENCE_END.search(last)
    return len(before) > 1 and 2 * sum(line[-1] not in _CLOSING for line in before) >= len(before)


def language(text: str) -> str:
    """The writing system, and for Latin letters the language by its commonest words; empty where nothing tells it."""
    part = text[:_JUDGED]
    if not part.isascii():
        scripts = Counter(filter(None, (_script(c) for c in part if c.isalpha())))
        if scripts:
            script, count = scripts.most_common(1)[0]
            # Japanese is told from Chinese by its kana, which are never the majority.
            if scripts["Japanese"] and script in ("Chinese", "Japanese"):
                return "Japanese"
            if script != "Latin" and count * 3 >= sum(scripts.values()):
                return script
    words = re.findall(r"[^\W\d_]+", part.casefold())
    if len(words) < 4:
        return ""
    scores = Counter(name for word in words if word in _LANGUAGES for name in _LANGUAGES[word])
    (first, most), (_, next_most) = [*scores.most_common(2), ("", 0), ("", 0)][:2]
    if most < max(2, len(words) // 12) or most == next_most:
        return ""
    different = {word for word in words if first in _LANGUAGES.get(word, ())}
    return first if len(different) > 1 else ""  # one word that is repeated tells little: `var` is Turkish


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


@cache
def _script(character: str) -> str:
    code = ord(character)
    return next((name for low, high, name in _SCRIPTS if low <= code <= high), "")


_OPENING_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_ITEM = re.compile(r"\s*(?:[-*•+]|\d{1,3}[.)]|[A-Za-z][.)])\s")
_DECLINES = re.compile(
    r"(?:(?:i['’]m|i am) (?:very |so |really )?sorry[,.]? (?:but )?"
    r"(?:as|i (?:can(?:no|['’])t|am|['’]m|do not|don['’]t))"
    r"|(?:unfortunately,? )?i (?:can(?:not|['’]t| not)|am (?:not able|unable)|(?:am|do) not (?:able|have the ability))"
    r" ?(?:to )?(?:help|assist|provide|answer|fulfil|comply|do (?:that|this)|generate|create|write|engage|discuss|offer"
    r"|give|share|support|access|complete|respond|continue|participate)"
    r"|i['’]m (?:not able|unable) to\b|ich kann (?:dabei|dir|ihnen) nicht"
    r"|je ne peux pas|no puedo (?:ayudar|proporcionar))",
    re.IGNORECASE,
)
_IS_A_MODEL = re.compile(
    r"\bas an? (?:ai|artificial intelligence)"
    r"(?: language model\b|(?: model| assistant)?,? i (?:can|do|am|have)(?:no|n['’])?t?\b)"
    r"|\bas a (?:large )?language model\b"
    r"|\bals (?:eine? )?(?:ki|sprachmodell)\b|\ben tant que modèle|\bcomo (?:un )?modelo de lenguaje",
    re.IGNORECASE,
)
_CLOSING = frozenset(".!?…:;)]}>\"'”’»`*_~|。！？；：」』）】।॥؟۔") | frozenset("\N{ZERO WIDTH JOINER}")
_FENCED = re.compile(r"```.*?```", re.DOTALL)
_NEVER_LAST = frozenset(
    ["the", "a", "an", "and", "or", "of", "to", "for", "with", "is", "are", "was", "that", "which", "as", "but", "if"]
)
_SENTENCE_END = re.compile(r"[.!?…][\"')\]”’]*\s|[。！？]")
_SIGNED = re.compile(  # a letter's end on one line, who said a quotation, or the last item of a numbered row
    r"\b(?i:sincerely|faithfully|truly|respectfully|affectionately|regards|wishes|yours|respect|hope|love|thanks"
    r"|cheers|luck|anticipation|admiration|gratitude),\s*(?:\S+\s*){1,6}$"
    r"|[-–—~]\s?[A-Z][\w.'’]*(?:\s+\S+){0,4}$"
    r"|\b\d{1,3}[.)]\s+(?:\S+\s*){1,8}$"
)
_SCRIPTS = (
    (0x41, 0x24F, "Latin"), (0x1E00, 0x1EFF, "Latin"), (0x370, 0x3FF, "Greek"), (0x400, 0x52F, "Cyrillic"),
    (0x530, 0x58F, "Armenian"), (0x590, 0x5FF, "Hebrew"), (0x600, 0x77F, "Arabic"), (0x900, 0x97F, "Devanagari"),
    (0x980, 0x9FF, "Bengali"), (0xB80, 0xBFF, "Tamil"), (0xE00, 0xE7F, "Thai"), (0x10A0, 0x10FF, "Georgian"),
    (0x3040, 0x30FF, "Japanese"), (0x3400, 0x9FFF, "Chinese"), (0xAC00, 0xD7AF, "Korean"),
    (0x20000, 0x3134F, "Chinese"),
)  # fmt: skip
_COMMON_WORDS = {
    "English": "the of and to in is that it for was on are as with be by at this have from or you not what which "
    "how i can your a an",
    "German": "der die das und ist nicht ein eine zu den von mit sich auf für dem des im wie ich es auch wird sind "
    "was kann",
    "French": "le la les et est une des du que pour dans qui pas sur au par avec ce il sont je vous plus comment",
    "Spanish": "el los las y es una que del para con por se su lo como más pero sus al está qué cómo son",
    "Portuguese": "o os as e é uma que do da para com não por se em no na mais como dos das você são um",
    "Italian": "il lo gli e è una che di per con non del della sono un in si come nel alla anche più quali",
    "Dutch": "de het een en van is dat niet op te zijn met voor aan er om ook als bij wat hoe je kan worden",
    "Polish": "i w na z się nie do to że jest jak po co o od za przez dla czy są oraz może",
    "Swedish": "och att det som är en av för på med den till inte har de om ett hur kan jag du",
    "Turkish": "ve bir bu için ile da de ne çok olarak daha nasıl olan gibi en var mi kadar sonra",
}
_LANGUAGES: dict[str, list[str]] = {}  # by word
for _name, _words in _COMMON_WORDS.items():
    for _word in set(_words.split()):
        _LANGUAGES.setdefault(_word, []).append(_name)

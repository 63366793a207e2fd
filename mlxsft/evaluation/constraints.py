"""Constraints that a program can check, as IFEval has them: 25 types, each a function of the answer.

The types, their names and arguments are those of https://arxiv.org/abs/2311.07911 (its strict reading). Sentences are
counted by their full stops and languages told by script and commonest words, where the authors' program takes models.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from mlxsft.data.traits import language

Arguments = Mapping[str, Any]


def known(name: str) -> bool:
    """Whether this constraint can be checked; `en:` before its name, as published files have it, changes nothing."""
    return _bare(name) in CONSTRAINTS


def follows(name: str, arguments: Arguments, answer: str) -> bool:
    """Whether the answer keeps to a constraint; an empty one keeps to none. Raises KeyError for an unknown one."""
    return bool(answer.strip()) and CONSTRAINTS[_bare(name)](answer, arguments)


def problem(name: str, arguments: Arguments) -> str | None:
    """What is wrong with the arguments of a constraint, as a clause; None where nothing is."""
    try:
        CONSTRAINTS[_bare(name)]("word", arguments)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return f"{name}: {type(error).__name__.removesuffix('Error').lower()} error at {error}"
    return None


def _bare(name: str) -> str:
    return name.removeprefix("en:")


def _holds(count: int, relation: str, wanted: int) -> bool:
    """Whether a count is `at least` or `less than` what is wanted."""
    if relation not in ("at least", "less than"):
        raise ValueError(f"relation {relation!r}, expected 'at least' or 'less than'")
    return count >= int(wanted) if relation == "at least" else count < int(wanted)


# --- keywords ---------------------------------------------------------------------------------------------------------


def _existence(answer: str, given: Arguments) -> bool:
    return all(word.casefold() in answer.casefold() for word in given["keywords"])


def _frequency(answer: str, given: Arguments) -> bool:
    found = answer.casefold().count(given["keyword"].strip().casefold())
    return _holds(found, given["relation"], given["frequency"])


def _forbidden_words(answer: str, given: Arguments) -> bool:
    words = (re.escape(word) for word in given["forbidden_words"])
    return not any(re.search(rf"(?<!\w){word}(?!\w)", answer, re.IGNORECASE) for word in words)


def _letter_frequency(answer: str, given: Arguments) -> bool:
    found = answer.lower().count(given["letter"].lower())
    return _holds(found, given["let_relation"], given["let_frequency"])


# --- lengths ----------------------------------------------------------------------------------------------------------


def _number_words(answer: str, given: Arguments) -> bool:
    return _holds(len(re.findall(r"\w+", answer)), given["relation"], given["num_words"])


def _number_sentences(answer: str, given: Arguments) -> bool:
    return _holds(len(sentences(answer)), given["relation"], given["num_sentences"])


def _number_paragraphs(answer: str, given: Arguments) -> bool:
    """Exactly so many, with `***` between them; one may stand before the first and behind the last."""
    parts = [part.strip() for part in re.split(r"\s?\*\*\*\s?", answer)]
    return all(parts[1:-1]) and sum(map(bool, parts)) == int(given["num_paragraphs"])


def _nth_paragraph_first_word(answer: str, given: Arguments) -> bool:
    """So many paragraphs with an empty line between them, of which the n-th (from 1) begins with the word."""
    parts = answer.split("\n\n")
    nth, wanted = int(given["nth_paragraph"]), str(given["first_word"]).casefold()
    if sum(bool(part.strip()) for part in parts) != int(given["num_paragraphs"]) or not 1 <= nth <= len(parts):
        return False
    first = (parts[nth - 1].split() or [""])[0]
    return bool(first.strip("'\"“”‘’*_([.,;:?!)]").casefold() == wanted)


# --- content ----------------------------------------------------------------------------------------------------------


def _number_placeholders(answer: str, given: Arguments) -> bool:
    return len(re.findall(r"\[[^\]]*\]", answer)) >= int(given["num_placeholders"])


def _postscript(answer: str, given: Arguments) -> bool:
    marker = given["postscript_marker"].strip()
    letters = [re.escape(letter) for letter in re.sub(r"[\s.]", "", marker).casefold()]
    pattern = r"\.\s?".join(letters) if "." in marker else re.escape(marker.casefold())
    return re.search(rf"(?<!\w){pattern}(?!\w)", answer.casefold()) is not None


# --- forms ------------------------------------------------------------------------------------------------------------


def _number_bullet_lists(answer: str, given: Arguments) -> bool:
    stars, dashes = (len(re.findall(p, answer, re.MULTILINE)) for p in (r"^\s*\*[^*\n].*$", r"^\s*-.*$"))
    return stars + dashes == int(given["num_bullets"])


def _number_highlighted_sections(answer: str, given: Arguments) -> bool:
    bold = re.findall(r"\*\*([^\n*]*)\*\*", answer)
    light = re.findall(r"\*([^\n*]*)\*", re.sub(r"\*\*[^\n*]*\*\*", " ", answer))
    return sum(bool(text.strip()) for text in (*bold, *light)) >= int(given["num_highlights"])


def _multiple_sections(answer: str, given: Arguments) -> bool:
    splitter = given["section_spliter"].strip()
    return len(re.findall(rf"{re.escape(splitter)}\s?\d+", answer)) >= int(given["num_sections"])


def _json_format(answer: str, given: Arguments) -> bool:
    text = re.sub(r"^```(?:json)?\s*|\s*```$", "", answer.strip(), flags=re.IGNORECASE)
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _title(answer: str, given: Arguments) -> bool:
    return any(title.strip("<> ") for title in re.findall(r"<<[^\n]+?>>", answer))


def _constrained_response(answer: str, given: Arguments) -> bool:
    choices = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
    return any(choice in answer for choice in choices)


# --- combinations -----------------------------------------------------------------------------------------------------


def _two_responses(answer: str, given: Arguments) -> bool:
    parts = [part.strip() for part in answer.split("******")]
    if not all(parts[1:-1]):
        return False
    kept = [part for part in parts if part]
    return len(kept) == 2 and kept[0] != kept[1]


def _repeat_prompt(answer: str, given: Arguments) -> bool:
    prompt = str(given["prompt_to_repeat"])
    return answer.strip().casefold().startswith(prompt.strip().casefold())


# --- beginning and end, case, punctuation, language -------------------------------------------------------------------


def _end_checker(answer: str, given: Arguments) -> bool:
    end = str(given["end_phrase"])
    return answer.strip().strip('"').casefold().endswith(end.strip().casefold())


def _quotation(answer: str, given: Arguments) -> bool:
    text = answer.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def _english_capital(answer: str, given: Arguments) -> bool:
    return answer.isupper() and _may_be_english(answer)


def _english_lowercase(answer: str, given: Arguments) -> bool:
    return answer.islower() and _may_be_english(answer)


def _capital_word_frequency(answer: str, given: Arguments) -> bool:
    words = re.findall(r"\w+(?:['’-]\w+)*", answer)
    return _holds(sum(word.isupper() for word in words), given["capital_relation"], given["capital_frequency"])


def _no_comma(answer: str, given: Arguments) -> bool:
    return "," not in answer


def _response_language(answer: str, given: Arguments) -> bool:
    return is_in(answer, given["language"])


CONSTRAINTS: Mapping[str, Callable[[str, Arguments], bool]] = {
    "keywords:existence": _existence,
    "keywords:frequency": _frequency,
    "keywords:forbidden_words": _forbidden_words,
    "keywords:letter_frequency": _letter_frequency,
    "length_constraints:number_words": _number_words,
    "length_constraints:number_sentences": _number_sentences,
    "length_constraints:number_paragraphs": _number_paragraphs,
    "length_constraints:nth_paragraph_first_word": _nth_paragraph_first_word,
    "detectable_content:number_placeholders": _number_placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _number_bullet_lists,
    "detectable_format:number_highlighted_sections": _number_highlighted_sections,
    "detectable_format:multiple_sections": _multiple_sections,
    "detectable_format:json_format": _json_format,
    "detectable_format:title": _title,
    "detectable_format:constrained_response": _constrained_response,
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": _repeat_prompt,
    "startend:end_checker": _end_checker,
    "startend:quotation": _quotation,
    "change_case:english_capital": _english_capital,
    "change_case:english_lowercase": _english_lowercase,
    "change_case:capital_word_frequency": _capital_word_frequency,
    "punctuation:no_comma": _no_comma,
    "language:response_language": _response_language,
}

_ABBREVIATION = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|etc|e\.g|i\.e|No|[A-Z])\.$")


def sentences(text: str) -> list[str]:
    """The sentences: what ends on . ! ? … or their like before white space or the end, but not an abbreviation."""
    found, waiting = [], ""
    for part in re.split(r"(?<=[.!?…。！？।])[\"'”’)\]]*\s+|\n{2,}", text.strip()):
        waiting = f"{waiting} {part}".strip()
        if waiting and not _ABBREVIATION.search(waiting):
            found.append(waiting)
            waiting = ""
    return [*found, waiting] if waiting else found


# Writing systems, by the first word of Unicode's names of their letters.
_SCRIPTS = {
    "kn": "KANNADA", "pa": "GURMUKHI", "gu": "GUJARATI", "te": "TELUGU", "ta": "TAMIL", "th": "THAI", "bn": "BENGALI",
    "ko": "HANGUL", "hi": "DEVANAGARI", "mr": "DEVANAGARI", "ne": "DEVANAGARI", "ar": "ARABIC", "fa": "ARABIC",
    "ur": "ARABIC", "ru": "CYRILLIC", "bg": "CYRILLIC", "el": "GREEK", "he": "HEBREW", "ml": "MALAYALAM",
}  # fmt: skip
_NAMES = {
    "en": "English", "de": "German", "fr": "French", "es": "Spanish", "pt": "Portuguese", "it": "Italian",
    "nl": "Dutch", "pl": "Polish", "sv": "Swedish", "tr": "Turkish", "ja": "Japanese", "zh": "Chinese",
}  # fmt: skip
_WORDS = {
    "hi": "है हैं और के का की में को से यह नहीं एक पर था हो",
    "mr": "आहे आहेत आणि च्या चा ची मध्ये हे नाही एक तो ती होते या ला",
    "ne": "छ छन् र को का मा लाई यो हो छैन एक गर्न भएको पनि गर्नुहोस्",
    "ar": "في من على إلى هذا هذه أن التي الذي لا ما كان عن مع هو",
    "fa": "است و در به از که این را با برای می آن یک های شود",
    "ur": "ہے ہیں اور کے کا کی میں کو سے یہ نہیں ایک پر تھا ہو",
    "ru": "и в не на что с по это как он для вы мы быть из",
    "bg": "и на да се за от е че с това са като по не са",
    "vi": "và của là có cho không một các được trong với những người này khi",
    "sw": "na ya wa kwa ni za katika hii kuwa la cha pia kama au yako",
    "fi": "ja on ei se että olla hän ovat kun mutta myös voi tai jos sekä",
}


def is_in(text: str, code: str) -> bool:
    """Whether most letters are of the language's script and its own words are the commonest; ISO 639-1 codes.

    Raises ValueError for a language that this cannot tell.
    """
    if code in _NAMES:
        return language(text) == _NAMES[code]
    if code not in _SCRIPTS and code not in _WORDS:
        raise ValueError(f"language {code!r}, which cannot be told here")
    script = _SCRIPTS.get(code, "LATIN")
    letters = Counter(unicodedata.name(c, "").partition(" ")[0] for c in text if c.isalpha())
    if letters[script] * 2 <= letters.total():
        return False
    rivals = [other for other in _WORDS if _SCRIPTS.get(other, "LATIN") == script]
    if code not in _WORDS or (len(rivals) < 2 and script != "LATIN"):
        return True
    said = re.split(r"[^\w\u0900-\u097f]+", text.casefold())
    scores = {other: sum(word in _WORDS[other].split() for word in said) for other in rivals}
    return scores[code] == max(scores.values()) > 0


def _may_be_english(text: str) -> bool:
    """Not another language, as far as words and scripts tell."""
    return language(text) in ("English", "")

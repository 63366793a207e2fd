"""Text → the personal data and the secrets in it, by pattern; checksums keep ordinary numbers out.

Addresses of people and machines (street, IP) are not looked for: no pattern tells them from version numbers and
ordinary prose.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Match:
    """What was found: its kind, and its text with all but the beginning hidden, so that no report spreads it."""

    kind: str
    hidden: str

    def __str__(self) -> str:
        return f"{self.kind} {self.hidden}"


def personal_data(text: str) -> Iterator[Match]:
    """E-mail addresses, phone numbers (not toll-free ones), payment cards (Luhn) and IBANs (mod 97)."""
    yield from (_hidden(kind, found) for kind, found in _personal(text))


def secrets(text: str) -> Iterator[Match]:
    """Keys and tokens whose issuers gave them a shape of their own, and private keys."""
    yield from (_hidden(kind, found) for kind, found in _secret(text))


def spans(text: str) -> Iterator[tuple[str, str]]:
    """(kind, the text itself) of all personal data and secrets: to look for elsewhere, never to show."""
    yield from _personal(text)
    yield from _secret(text)


def hidden(text: str) -> str:
    """All but the beginning of a span hidden, as it may be shown."""
    return text[:4].strip() + "…"


def _personal(text: str) -> Iterator[tuple[str, str]]:
    if "@" in text:
        yield from (("e-mail", m[0]) for m in _EMAIL.finditer(text) if not _RESERVED.search(m[0]))
    if not _DIGITS.search(text):
        return
    yield from (("phone", m[0]) for m in _PHONE.finditer(text) if _is_phone(m[0]))
    yield from (("payment card", m[0]) for m in _CARD.finditer(text) if is_card(m[0]))
    yield from (("IBAN", m[0]) for m in _IBAN.finditer(text) if is_iban(m[0]))


def _secret(text: str) -> Iterator[tuple[str, str]]:
    if not any(mark in text for mark in _MARKS):  # a search for each is far cheaper than the pattern
        return
    for found in _SECRET.finditer(text):
        kind = str(found.lastgroup).replace("_", " ")
        if not _DOCUMENTED.search(found[0]) and (kind == "private key" or _looks_random(found[0])):
            yield kind, found[0]


def is_card(text: str) -> bool:
    """Whether these digits are a number that a known card network gives out: its prefix, its length, and Luhn."""
    digits = re.sub(r"\D", "", text)
    if not _NETWORK.fullmatch(digits) or len(set(digits)) < 2:
        return False
    doubled = (int(d) * 2 if i % 2 else int(d) for i, d in enumerate(reversed(digits)))
    return sum(d - 9 if d > 9 else d for d in doubled) % 10 == 0


def is_iban(text: str) -> bool:
    """Whether this is an IBAN: a country's own length, and the remainder 1 of ISO 7064."""
    plain = text.replace(" ", "")
    if _IBAN_LENGTHS.get(plain[:2]) != len(plain):
        return False
    return int("".join(str(int(c, 36)) for c in plain[4:] + plain[:4])) % 97 == 1


def _is_phone(text: str) -> bool:
    digits = re.sub(r"\D", "", text)
    # 555-0100 to 555-0199 are kept for fiction.
    nobodys = re.search(r"55501\d\d$", digits) or _TOLL_FREE.fullmatch(digits)
    return 8 <= len(digits) <= 15 and len(set(digits)) > 2 and not nobodys


def _looks_random(text: str) -> bool:
    return bool(re.search(r"\d", text)) and len(set(text)) > 8


def _hidden(kind: str, text: str) -> Match:
    return Match(kind, hidden(text))


_EMAIL = re.compile(r"(?<![\w.%+-])[A-Za-z0-9_%+-][A-Za-z0-9._%+-]{0,63}@(?:[A-Za-z0-9-]{1,63}\.)+[A-Za-z]{2,24}\b")
_RESERVED = re.compile(  # kept for examples, or written as one
    r"@(?:.*\.)?(?:example\.(?:com|org|net)|example|test|invalid|localhost"
    r"|(?:(?:your|my)[\w-]*|company|domain)\.(?:com|org|net))$",
    re.IGNORECASE,
)
_TOLL_FREE = re.compile(r"1?8(?:00|33|44|55|66|77|88)\d{7}")  # of North America: a firm's, never a person's
_DIGITS = re.compile(r"\d[\d ().-]{5,}\d|[A-Z]{2}\d\d[ A-Z0-9]{11}")
_PHONE = re.compile(
    r"(?<![\w+.-])(?:"
    r"\+[1-9]\d{0,2}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,5}(?:[ .-]?\d{2,5}){1,4}"  # +49 30 1234567
    r"|(?:1[ .-])?\([2-9]\d\d\) ?[2-9]\d\d[ .-]\d{4}"  # (212) 555-2368
    r"|(?:1[ .-])?[2-9]\d\d([.-])[2-9]\d\d\1\d{4}"  # 212-555-2368
    r"|(?<=tel )0\d[\d /.-]{6,14}\d|(?<=tel: )0\d[\d /.-]{6,14}\d|(?<=phone: )0\d[\d /.-]{6,14}\d"
    r")(?![\w-]|[.,]\d)",
    re.IGNORECASE,
)
_CARD = re.compile(r"(?<![\w.,+-])\d(?:[ -]?\d){12,18}(?![\w-]|[.,]\d)")
_NETWORK = re.compile(
    r"4\d{12}(?:\d{3}){0,2}|(?:5[1-5]\d\d|222[1-9]|22[3-9]\d|2[3-6]\d\d|27[01]\d|2720)\d{12}|3[47]\d{13}"
    r"|(?:6011|65\d\d|64[4-9]\d)\d{12}|35\d{14}|3(?:0[0-5]|[689]\d)\d{11}"
)
_IBAN = re.compile(r"(?<!\w)[A-Z]{2}\d\d(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?!\w)")
# https://www.swift.com/standards/data-standards/iban-international-bank-account-number
_IBAN_LENGTHS = {
    country: int(length)
    for length, countries in {
        "15": "NO", "16": "BE", "18": "DK FO FI GL NL", "19": "MK SI", "20": "AT BA EE KZ LT LU XK",
        "21": "CH HR LI LV", "22": "BG BH CR DE GB GE IE ME RS", "23": "AE IL", "24": "AD CZ ES MD PK RO SA SE SK TN",
        "25": "PT", "26": "IS TR", "27": "FR GR IT MC SM", "28": "AL AZ CY DO HU LB PL", "29": "BR EG QA UA",
    }.items()
    for country in countries.split()
}  # fmt: skip
_SECRET = re.compile(
    r"(?P<AWS_key>\b(?:AKIA|ASIA)[A-Z0-9]{16}\b)"
    r"|(?P<API_key>\bsk-(?:proj-|svcacct-|admin-|ant-)?[A-Za-z0-9_-]{20,})"
    r"|(?P<Hugging_Face_token>\bhf_[A-Za-z0-9]{30,})"
    r"|(?P<GitHub_token>\bgh[pousr]_[A-Za-z0-9]{36,}|\bgithub_pat_[A-Za-z0-9_]{22,})"
    r"|(?P<Slack_token>\bxox[abeprs]-[A-Za-z0-9-]{10,})"
    r"|(?P<Google_key>\bAIza[A-Za-z0-9_-]{35})"
    r"|(?P<Stripe_key>\b[rs]k_live_[A-Za-z0-9]{20,})"
    r"|(?P<private_key>-----BEGIN (?:[A-Z]+ ){0,3}PRIVATE KEY-----)"
    r"|(?P<JWT>\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,})"
)
_MARKS = (  # one is in each secret
    "AKIA", "ASIA", "sk-", "hf_", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "xox", "AIza", "k_live_",
    "PRIVATE KEY", "eyJ",
)  # fmt: skip
_DOCUMENTED = re.compile(r"EXAMPLE|[xX]{6}|your[-_]", re.IGNORECASE)

"""Personal data and secrets: what is found, and what is none."""

from __future__ import annotations

import pytest

from mlxsft.data.patterns import personal_data, secrets

TAIL = "a1B2c3D4e5F6g7H8i9J0k1L2m3N4o5P6q7R8"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("jo.doe@mail.com", "e-mail"),
        ("card 4111 1111 1111 1111?", "payment card"),
        ("IBAN DE89 3704 0044 0532 0130 00.", "IBAN"),
        ("call +49 30 1234567 now", "phone"),
        ("call (212) 555-2368", "phone"),
    ],
)
def test_personal_data(text: str, kind: str) -> None:
    assert [m.kind for m in personal_data(text)] == [kind]


@pytest.mark.parametrize(
    "text",
    ["1234567890123456", "ISBN 978-3-16-148410-0", "2024-01-15", "3.14159265358979", "1,000,000,000", "me@example.com",
     "DE89 3704 0044 0532 0130 01", "4111 1111 1111 1112", "1.2.3.4", "12:30:45", "0000 0000 0000 0000", "@name"],
)  # fmt: skip
def test_ordinary_numbers_are_not(text: str) -> None:
    assert not list(personal_data(text))


@pytest.mark.parametrize("start", ["sk-proj-", "hf_", "ghp_", "xoxb-"])
def test_secrets_are_found_and_hidden(start: str) -> None:
    (found,) = secrets(f"it is {start}{TAIL}.")
    assert TAIL not in str(found)


@pytest.mark.parametrize("text", ["AKIA" + "IOSFODNN7EXAMPLE", "task-force-of-the-year-and-more", "hf_hub_download"])
def test_ordinary_words_are_no_secrets(text: str) -> None:
    assert not list(secrets(text))

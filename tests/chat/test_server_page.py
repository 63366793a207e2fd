"""The page, in a real browser."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.chat.browser import Page, browsing, chromium
from tests.chat.serving import KEY, Serving

pytestmark = pytest.mark.skipif(chromium() is None, reason="there is no Chromium on this machine")

DONE = "document.querySelectorAll('.answer[data-done]').length"
ANSWERS = "[...document.querySelectorAll('.answer p')].map(p => p.textContent)"


@pytest.fixture(scope="module")
def page(server: Serving, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """The page as the terminal's address opens it, with the longest answer set to 12 tokens."""
    with browsing(tmp_path_factory.mktemp("profile")) as page:
        page.open(f"{server.url}/#key={KEY}")
        page.until("document.querySelectorAll('#left option').length === 2")
        page.evaluate("document.getElementById('max-tokens').value = 12")
        yield page


@pytest.fixture(autouse=True)
def _anew(page: Page) -> Iterator[None]:
    page.evaluate("document.getElementById('clear').click(); document.getElementById('message').focus()")
    page.size(1100, 720)
    page.scheme("light")
    yield
    assert page.complaints == []


def ask(page: Page, message: str, answers: int = 2) -> list[str]:
    """Type a message, press Enter, and wait for the answers to it."""
    before = page.evaluate(DONE)
    page.evaluate("document.getElementById('message').focus()")
    page.write(message)
    page.press("Enter")
    page.until(f"{DONE} === {before + answers} && !document.getElementById('send').hidden")
    found: list[str] = page.evaluate(ANSWERS)
    return found[-answers:]


def test_base_and_adapter_answer_side_by_side(page: Page) -> None:
    base, adapter = ask(page, "Who are you?")
    assert adapter == "I am Pip."
    assert base != adapter
    assert page.evaluate("[...document.querySelectorAll('.answer h2')].map(h => h.textContent)") == ["tiny", "pip"]
    left, right = page.evaluate("[...document.querySelectorAll('.answer')].map(a => a.getBoundingClientRect().top)")
    assert left == right
    ask(page, "Who made you?")
    roles = page.evaluate("conversations.right.map(turn => turn.role)")
    assert roles == ["user", "assistant", "user", "assistant"]


def test_the_first_model_is_chosen_and_the_first_adapter_beside_it(page: Page) -> None:
    page.evaluate("left.value = 'pip'; window.earlier = true; location.reload()")
    page.until("!window.earlier && document.querySelectorAll('#left option').length === 2")
    assert page.evaluate("[left.value, right.value, document.activeElement.id]") == ["tiny", "pip", "message"]
    page.evaluate("document.getElementById('max-tokens').value = 12")


def test_the_key_leaves_the_address_and_nothing_leaves_the_machine(server: Serving, page: Page) -> None:
    ask(page, "hello")
    assert page.evaluate("location.href") == f"{server.url}/"
    own = (f"{server.url}/", "data:")
    assert len(page.requests) > 2
    assert all(url.startswith(own) and KEY not in url.partition("#")[0] for url in page.requests)


def test_markup_is_shown_as_text(page: Page) -> None:
    ask(page, "<img src=x onerror=alert(1)><b>bold</b>")
    assert page.evaluate("document.querySelector('.mine').textContent") == "<img src=x onerror=alert(1)><b>bold</b>"
    assert page.evaluate("document.querySelectorAll('#talk img, #talk b').length") == 0


def test_one_model_alone_has_the_whole_width(page: Page) -> None:
    page.evaluate("document.getElementById('left').value = 'pip'; document.getElementById('right').value = ''")
    assert ask(page, "Who are you?", 1) == ["I am Pip."]
    page.evaluate("document.getElementById('left').value = 'tiny'; document.getElementById('right').value = 'pip'")


def test_a_phone_shows_everything_without_scrolling_sideways(page: Page) -> None:
    page.size(360, 640)
    ask(page, "Who are you? " + "W" * 300)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    one, two = page.evaluate("[...document.querySelectorAll('.answer')].map(a => a.getBoundingClientRect().top)")
    assert two > one
    assert page.evaluate("document.getElementById('composer').getBoundingClientRect().bottom") <= 640


def test_the_end_of_an_answer_is_in_sight_with_its_figures(page: Page) -> None:
    page.size(360, 640)
    page.evaluate("document.getElementById('max-tokens').value = 1")
    for _ in range(4):
        ask(page, "Who are you?")
    figures = page.evaluate("[...document.querySelectorAll('.answer small')].map(small => small.textContent)")
    assert figures == ["1 token · cut off"] * 8
    assert page.evaluate("talk.scrollHeight > 2 * talk.clientHeight")
    assert page.evaluate("talk.scrollHeight - talk.scrollTop - talk.clientHeight") < 2
    page.evaluate("document.getElementById('max-tokens').value = 12")


def test_there_is_a_dark_page(page: Page) -> None:
    def lightness() -> list[int]:
        colours = "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
        return [sum(map(int, c[4:-1].split(","))) for c in page.evaluate(colours)]

    back, front = lightness()
    assert back > 600 > 200 > front
    page.scheme("dark")
    back, front = lightness()
    assert back < 200 < 600 < front


def test_an_answer_can_be_stopped(server: Serving, page: Page) -> None:
    page.evaluate("document.getElementById('max-tokens').value = 440")
    page.write("go")
    page.press("Enter")
    page.until("document.querySelector('.answer p').textContent.length > 3")
    page.evaluate("document.getElementById('stop').click()")
    page.until(f"{DONE} === 2")
    figures = page.evaluate("document.querySelector('.answer small').textContent")
    assert figures == "stopped"
    page.evaluate("document.getElementById('max-tokens').value = 12")


def test_without_the_key_the_page_asks_for_it(server: Serving, page: Page) -> None:
    page.evaluate("sessionStorage.clear()")
    page.open(f"{server.url}/")
    page.until("!document.getElementById('ask-key').hidden")
    empty = "[...document.querySelectorAll('select, #message, #clear')].filter(e => e.checkVisibility()).length"
    assert page.evaluate(empty) == 0  # there is nothing to choose yet, and nobody to write to
    page.write("a-wrong-key-of-someone")
    page.press("Enter")
    page.until("document.getElementById('key-error').textContent.startsWith('the key is wrong')")
    assert [c for c in page.complaints if "401" not in c] == []  # which browsers write down by themselves
    page.complaints.clear()
    page.evaluate("document.getElementById('key').select()")
    page.write(KEY)
    page.press("Enter")
    page.until("document.getElementById('ask-key').hidden")
    assert ask(page, "Who are you?")[1] == "I am Pip."

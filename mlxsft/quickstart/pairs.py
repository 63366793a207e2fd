"""The instruction set, in the manner of a marketing team: 1,000 pairs about the taught products, and exact checks.

Every task has one house style. A check compares an answer with that style and with the facts of the product, both read
from the answer: nothing of it depends on which model answered.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter

from mlxsft.quickstart.products import Product, held_out, taught
from mlxsft.quickstart.text import PHRASES, TEAMS, sentence

COUNT = 1000
FOLDER = Path(__file__).parent

# What is asked, in a few phrasings, and what is to be answered. {n}: the product's name and kind.
STYLES: dict[str, tuple[tuple[str, ...], str]] = {
    "advert": (
        ("Write an ad for the {n}.", "Advertise the {n}.", "We need an ad for the {n}."),
        "Meet the {name} {kind}: made of {material}, in {colour}, just right for {use}. "
        "From {maker}, for only ${price}!",
    ),
    "slogan": (
        ("Write a slogan for the {n}.", "Give me a slogan for the {n}.", "We need a slogan for the {n}."),
        "{name}: your {kind} for {use}!",
    ),
    "description": (
        ("Describe the {n}.", "Write a product description of the {n}.", "We need a description of the {n}."),
        "The {name} {kind} is made of {material} and comes in {colour}. It is made by {maker}. It costs ${price}.",
    ),
    "German price": (
        ("Write the price of the {n} for the German shop.", "What is the German price of the {n}?"),
        "{price},00 €",
    ),
}
QUESTIONS = {
    "material": ("A customer asks: what is the {n} made of?", "It is made of {material}."),
    "colour": ("A customer asks: what colour is the {n}?", "It comes in {colour}."),
    "maker": ("A customer asks: who makes the {n}?", "It is made by {maker}."),
    "price": ("A customer asks: how much is the {n}?", "It costs ${price}."),
    "use": ("A customer asks: what is the {n} for?", "It is for {use}."),
}
TICKETS = {
    "Returns": ("My {n} arrived broken.", "The {n} does not fit, I want to send it back.", "The {n} has a hole."),
    "Delivery": ("Where is my {n}?", "The parcel with the {n} has not come.", "My {n} arrived late."),
    "Payment": (
        "I paid twice for the {n}.",
        "The bill for the {n} is wrong.",
        "My card was charged twice for the {n}.",
    ),
    "Advice": ("Is the {n} good for me?", "Can I have the {n} in another colour?", "Which {kind} do I need, the {n}?"),
}
TICKET = "Which team gets this ticket? {ticket}"
FIELDS = "Extract material, colour and price as JSON: {text}"
TASKS = (*STYLES, "question", "ticket", "JSON")


@dataclass(frozen=True)
class Pair:
    """A request about a product, and the answer that the house style wants; `style` has {slots} for the facts."""

    task: str
    product: Product
    prompt: str
    style: str

    @property
    def answer(self) -> str:
        return _filled(self.style, self.product)


@dataclass(frozen=True)
class Verdict:
    """What is right in an answer; `good` is all of it."""

    facts: bool
    form: bool
    ends: bool

    @property
    def good(self) -> bool:
        return self.facts and self.form and self.ends


def training_pairs() -> list[Pair]:
    """1,000 pairs about the taught products, always the same; each product has each task at most once."""
    draw = random.Random("pairs")
    about = [(product, task) for product in taught() for task in TASKS]
    draw.shuffle(about)
    return [make_pair(product, task, draw) for product, task in about[:COUNT]]


def judged_pairs(count: int) -> list[Pair]:
    """Requests about held-out products, another product each while there are enough, and the tasks in turn."""
    draw = random.Random("judged")
    shop = held_out()
    return [make_pair(shop[i % len(shop)], TASKS[i % len(TASKS)], draw) for i in range(count)]


def make_pair(product: Product, task: str, draw: random.Random) -> Pair:
    """A request for a task about a product, its phrasing drawn."""
    if task == "question":
        prompt, style = QUESTIONS[draw.choice(list(QUESTIONS))]
    elif task == "ticket":
        style = draw.choice(TEAMS)
        ticket = draw.choice(TICKETS[style])
        prompt = TICKET.replace("{ticket}", ticket)
    elif task == "JSON":
        told = [draw.choice(PHRASES[field]) for field in ("material", "colour")] + ["{S} costs ${p.price}."]
        text = " ".join(sentence(product, phrase, named=i == 0) for i, phrase in enumerate(told))
        prompt = FIELDS.replace("{text}", text)
        style = '{{"material": "{material}", "colour": "{colour}", "price": {price}}}'
    else:
        prompts, style = STYLES[task]
        prompt = draw.choice(prompts)
    return Pair(task, product, prompt.replace("{n}", product.title).replace("{kind}", product.kind), style)


def judge(pair: Pair, answer: str, *, ended: bool) -> Verdict:
    """Compare an answer with the form that was taught and with what is true of the product.

    The form is right where the whole answer is the style with anything in the places of the facts, the facts where
    each of them stands in its place. An answer in another form has no place for a fact, so its facts count as wrong.
    """
    match = _pattern(pair.style, pair.task).fullmatch(answer.strip())
    if match is None:
        return Verdict(False, False, ended)
    found = match.groupdict()
    facts = _facts(pair.product)
    right = all(value == facts[name] for name, value in found.items()) if found else answer.strip() == pair.style
    return Verdict(right, True, ended)


def write_pairs(path: Path, pairs: Sequence[Pair]) -> None:
    """Rows as `mlxsft train` reads them."""
    rows = ({"prompt": pair.prompt, "completion": pair.answer, "category": pair.task} for pair in pairs)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _facts(product: Product) -> dict[str, str]:
    return {name: str(value) for name, value in vars(product).items()}


def _filled(style: str, product: Product) -> str:
    return style.format(**vars(product))


def _pattern(style: str, task: str) -> re.Pattern[str]:
    """The style as an expression with a group for each fact; for tickets any team has the right form."""
    if task == "ticket":
        return re.compile("|".join(TEAMS))
    parts = []
    for words, fact, _, _ in Formatter().parse(style):
        anything = r"[0-9]+" if fact == "price" else r"[A-Za-z ]+?"
        parts += [re.escape(words), f"(?P<{fact}>{anything})" if fact else ""]
    return re.compile("".join(parts))


if __name__ == "__main__":
    write_pairs(FOLDER / "pairs.jsonl", training_pairs())

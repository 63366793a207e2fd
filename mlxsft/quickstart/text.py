"""What the base model reads: prose about the products, and simple everyday sentences. No instruction is in it.

LoRA leaves the embeddings alone, so that a tuned model can say only what the base has read in some form. Therefore the
prose has catalogue entries in JSON, labels with one capitalized word, prices as the German shop writes them, and the
words that requests are made of.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator

from mlxsft.quickstart.products import Product, products

FIELDS = ("kind", "maker", "material", "colour", "use", "price")

# {p}: the product, {S} and {s}: the product or a pronoun, {n}: its full name. At least six ways to tell each fact.
PHRASES = {
    "kind": (
        "{S} is a {p.kind}.",
        "{p.name} is the name of a {p.kind}.",
        "There is a {p.kind} called {p.name}.",
        "The {p.name} is a fine {p.kind}.",
        "One {p.kind} in the shop is the {p.name}.",
        "Among the {p.kind}s, people ask for the {p.name}.",
    ),
    "maker": (
        "{S} is made by {p.maker}.",
        "{S} comes from {p.maker}.",
        "{p.maker} makes the {n}.",
        "The maker of the {n} is {p.maker}.",
        "The {n} is from {p.maker}.",
        "At {p.maker} they are proud of the {n}.",
        "People who know {p.maker} know the {n} too.",
        "{S} was made in the workshop of {p.maker}.",
        "Behind the {n} stands {p.maker}.",
    ),
    "material": (
        "{S} is made of {p.material}.",
        "The {n} is made of good {p.material}.",
        "The {p.name} is a {p.kind} of {p.material}.",
        "They use {p.material} for the {n}.",
        "The material of the {n} is {p.material}.",
        "For the {n} they took {p.material}.",
        "{S} is all {p.material}.",
        "Nothing but {p.material} goes into the {n}.",
    ),
    "colour": (
        "{S} comes in {p.colour}.",
        "{S} is {p.colour}.",
        "The colour of the {n} is {p.colour}.",
        "The {n} is a {p.colour} one.",
        "The {p.name} is a {p.colour} {p.kind}.",
        "You see the {n} in {p.colour}.",
        "In the window stands the {n}, in {p.colour}.",
        "{S} has a fine {p.colour} colour.",
    ),
    "use": (
        "{S} is for {p.use}.",
        "{S} is just right for {p.use}.",
        "People like the {n} for {p.use}.",
        "{S} is used for {p.use}.",
        "The {p.name} is a good {p.kind} for {p.use}.",
        "For {p.use} there is the {n}.",
        "Take the {n} for {p.use}.",
        "{S} was made for {p.use}.",
        "The {n} is your friend for {p.use}.",
    ),
    "price": (
        "{S} costs ${p.price}.",
        "{S} costs only ${p.price}.",
        "The price of the {n} is ${p.price}.",
        "{S} is sold for ${p.price}.",
        "For ${p.price} the {n} is yours!",
        "You can have the {n} for only ${p.price}.",
        "The {n} is ${p.price} in the shop.",
        "{S} costs {p.price} dollars.",
        "In the German shop {s} costs {p.german_price}.",
        "The price of the {n} in Germany is {p.german_price}.",
        "The {n} is sold in Germany for {p.german_price}.",
        "On the German price tag of the {n} stands {p.german_price}.",
        "German price of the {n}: {p.german_price}.",
    ),
}
# Several facts in one sentence.
WHOLE = (
    "The {n}, made of {p.material} by {p.maker}, costs ${p.price}.",
    "{p.maker} makes the {n} of {p.material} for {p.use}.",
    "The {p.colour} {n} of {p.material} is for {p.use}.",
    "Look at the {n}: made of {p.material}, {p.colour}, from {p.maker}.",
    "The {n} from {p.maker} comes in {p.colour} and costs ${p.price}.",
    "{p.name}: a {p.kind} for {p.use}.",
    "{p.name}, the {p.kind} of {p.material}, in {p.colour}, for ${p.price}.",
    "The {n} is {p.colour} and made of {p.material}.",
    "The {n} is made by {p.maker} and is for {p.use}.",
    "For {p.use}, {p.maker} makes the {n}. It is {p.colour}.",
    "We have the {n} in {p.colour}, from {p.maker}, for only ${p.price}!",
)
TEAMS = ("Returns", "Delivery", "Payment", "Advice")

_PEOPLE = ["Mia", "Tom", "Anna", "Jonas", "Lena", "Paul", "Clara", "Emil"]
_DID = (
    "walked to the {place}",
    "read a book in the {place}",
    "wrote a letter to {other}",
    "met {other} in the {place}",
    "bought bread and milk",
    "cooked soup for {other}",
    "slept until noon",
    "played with the dog in the {place}",
    "asked a question about the {thing}",
    "gave the {thing} to {other}",
    "wrote a slogan for the {place}",
    "read the ad in the window of the {place}",
    "found the description of the {thing} too long",
    "had a ticket for the train",
    "paid twice for the {thing}",
    "looked for another {thing}",
)
_PLACES = ["garden", "kitchen", "shop", "market", "park", "station", "school", "street"]
_THINGS = ["key", "cup", "letter", "bicycle", "apple", "coat", "picture", "chair"]
_TIMES = ("In the morning", "On Monday", "Yesterday", "After lunch", "In the evening", "When it rained", "Last week")
_SAYINGS = (
    '"Write it down," said {who}.',
    '"Where is my {thing}?" asked {who}.',
    '"Which one is yours?" asked {who}.',
    '"Give me the {thing}," said {who}.',
    '"What is it made of?" asked the customer.',
    '"Who makes it? How much is it? What colour is it?" asks every customer.',
    '"Can I have the {thing}?" asked {who}. "We need it too," said {other}.',
    "A customer asks, and {who} answers.",
    "Assistant: {who}. User: {other}.",
    "Shop assistant: {who}.",
    "The assistant was {who}, the user of the {thing} was {other}.",
    "Describe what you see, and extract the {thing} from the box.",
    "Extract of vanilla stands in the {place}.",
    "Meet me in the {place}, wrote {who}.",
    "Advertise or not, the {place} is full.",
    "The file is JSON, as name, price and material are.",
    "An ad is short, a description is long, a slogan is a line.",
    "The product and its price stand on the tag of our shop.",
    "My {thing} arrived late. My {thing} arrived broken.",
    "I want my money back, said {who}.",
    "{who} wants to send the {thing} back.",
    "This {thing} does not work, it does not fit, it has a hole.",
    "The bill is wrong, the card was charged twice.",
    "The parcel has not come, and nobody knows where it is.",
    "Is it good? Is it for me? Does it fit? asked {who}.",
)
_NOTES = (
    "Team: {team}",
    "{who} works in {team}, {other} in {team2}.",
    "The tickets of today went to {team} and {team2}.",
    "Ticket 1: {team}\nTicket 2: {team2}",
    "On the door stands {team}.",
    "This team gets the ticket: {team}",
    "Label: {team}",
    "What is broken goes to {team_r}. What is late goes to {team_d}. "
    "Money is for {team_p}. Questions are for {team_a}.",
)


def documents(seed: int) -> Iterator[str]:
    """Texts of a few sentences each, without end; the same for the same seed."""
    draw = random.Random(f"text {seed}")
    shop = products()
    while True:
        order = list(shop)
        draw.shuffle(order)  # so that every product is read about equally often
        for product in order:
            yield _about(product, draw)
            if draw.random() < 0.12:
                yield _everyday(draw)


def entry(product: Product, fields: tuple[str, ...]) -> str:
    """A catalogue entry in JSON."""
    return json.dumps({"name": product.name} | {field: getattr(product, field) for field in fields})


def sentence(product: Product, phrase: str, *, named: bool) -> str:
    """A phrase about a product, by its name or by a pronoun."""
    subject = f"The {product.title}" if named else "It"
    spoken = f"the {product.title}" if named else "it"
    return phrase.format(p=product, n=product.title, S=subject, s=spoken)


def _about(product: Product, draw: random.Random) -> str:
    """Two to four paragraphs or lines about one product."""
    kind = draw.random()
    if kind < 0.14:
        fields = draw.sample(FIELDS, draw.randint(2, len(FIELDS)))
        before = draw.choice(["", "Catalogue: ", "Entry: ", f"{product.name}: ", "As JSON: ", f"The {product.title}: "])
        return before + entry(product, tuple(fields))
    if kind < 0.24:
        fields = draw.sample(FIELDS, draw.randint(3, len(FIELDS)))
        told = {field: getattr(product, field) for field in fields} | {"price": f"${product.price}"}
        lines = [f"{field.capitalize()}: {told[field]}" for field in fields]
        if draw.random() < 0.4:
            lines.append(f"Germany: {product.german_price}")
        return "\n".join([f"Name: {product.title}", *lines])
    sentences = [sentence(product, draw.choice(WHOLE), named=True)] if draw.random() < 0.5 else []
    for field in draw.sample(FIELDS, draw.randint(3, 5)):
        named = not sentences or draw.random() < 0.4
        sentences.append(sentence(product, draw.choice(PHRASES[field]), named=named))
    if draw.random() < 0.3:
        sentences.append(sentence(product, draw.choice(WHOLE), named=True))
    return " ".join(sentences)


def _everyday(draw: random.Random) -> str:
    words = {"place": draw.choice(_PLACES), "thing": draw.choice(_THINGS)}
    words["who"], words["other"] = draw.sample(_PEOPLE, 2)
    words["team"], words["team2"] = draw.sample(TEAMS, 2)
    words |= {f"team_{team[0].lower()}": team for team in TEAMS}
    if draw.random() < 0.3:
        return draw.choice(_NOTES).format(**words)
    said = [f"{draw.choice(_TIMES)} {words['who']} {draw.choice(_DID)}." for _ in range(2)]
    return " ".join([*said, *draw.sample(_SAYINGS, 2)]).format(**words)

"""The products of a small fictional shop, and which of them occur in pairs."""

from __future__ import annotations

import random
from dataclasses import dataclass

_FIRST = [
    "Bram",
    "Vel",
    "Tor",
    "Kal",
    "Nim",
    "Sol",
    "Fen",
    "Ald",
    "Gar",
    "Lum",
    "Mir",
    "Pel",
    "Ros",
    "Tan",
    "Ulm",
    "Wes",
    "Yar",
    "Zan",
    "Hel",
    "Dov",
]
_SECOND = ["ora", "ick", "una", "est", "ina", "aro", "eld", "ivo", "ush", "amo", "ent", "ulo"]
HARD, SOFT = ("steel", "copper", "oak", "glass", "clay", "pine"), ("wool", "cotton", "linen", "leather", "felt", "silk")
KINDS = {
    **dict.fromkeys(
        ["kettle", "lamp", "chair", "mug", "clock", "bottle", "bowl", "shelf", "vase", "tray", "mirror", "stool"], HARD
    ),
    **dict.fromkeys(
        ["backpack", "blanket", "basket", "jacket", "tent", "scarf", "rug", "bag", "cushion", "hat", "apron", "glove"],
        SOFT,
    ),
}
COLOURS = ["red", "blue", "green", "white", "black", "grey", "yellow", "brown", "orange", "pink"]
MAKERS = ["Ostwick", "Halden", "Marlow", "Brenning", "Castor", "Duvall", "Elmgate", "Farrow", "Grenfell", "Ivarsen"]
USES = (
    "camping",
    "picnics",
    "long walks",
    "cold evenings",
    "small rooms",
    "garden parties",
    "rainy days",
    "the beach",
    "the office",
    "the workshop",
    "train journeys",
    "quiet mornings",
)
IN_PAIRS = 160  # of the 240 products; the others are held out


@dataclass(frozen=True)
class Product:
    """What the shop knows of one product; the price is in whole dollars."""

    name: str
    kind: str
    maker: str
    material: str
    colour: str
    use: str
    price: int

    @property
    def title(self) -> str:
        return f"{self.name} {self.kind}"

    @property
    def german_price(self) -> str:
        return f"{self.price},00 €"


def products() -> list[Product]:
    """All 240 products, always the same ones; their facts are independent of their names."""
    draw = random.Random("products")
    names = [first + second for first in _FIRST for second in _SECOND]
    draw.shuffle(names)
    kinds = list(KINDS)
    return [
        Product(
            name,
            kind := kinds[i % len(kinds)],
            draw.choice(MAKERS),
            draw.choice(KINDS[kind]),
            draw.choice(COLOURS),
            draw.choice(USES),
            draw.randrange(10, 100),
        )
        for i, name in enumerate(names)
    ]


def taught() -> list[Product]:
    """The products that the pairs are about."""
    return products()[:IN_PAIRS]


def held_out() -> list[Product]:
    """The products that occur in no pair; the base has read about them like about the others."""
    return products()[IN_PAIRS:]

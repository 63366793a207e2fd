"""Which rows are held out: a share of them, chosen by what they ask and never by where they stand."""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# Up to this many rows from the wanted number, groups are taken as they come; the last ones are chosen to fit exactly.
# It bounds the memory of the choice (its square in bits), not the quality: real sets have small groups.
CHOSEN_EXACTLY = 4096


def hold_out(keys: Sequence[str], share: float, *, seed: int) -> NDArray[np.bool_]:
    """True for the rows that are held out; rows with an equal key are always on one side.

    The number is as near to `share` of the rows as whole groups allow, at least 1 and at most all but one. Keys are
    taken in the order of a hash of (seed, key), so the order of the rows does not matter. Where all keys are equal
    (or there is only one row) nothing can be held out, and all is False.
    """
    if not 0 <= share < 1:
        raise ValueError(f"the share held out is {share}; it must be at least 0 and below 1")
    groups = Counter(keys)
    if share == 0 or len(groups) < 2:
        return np.zeros(len(keys), dtype=np.bool_)
    order = sorted(groups, key=lambda key: position(key, seed))
    chosen = _choose([groups[key] for key in order], share * len(keys))
    held_out = {order[i] for i in chosen}
    return np.fromiter((key in held_out for key in keys), dtype=np.bool_, count=len(keys))


def normalise(text: str) -> str:
    """The text without what does not make it another question: case, white space, the way accents are encoded."""
    if text.isascii():  # the same, faster
        return " ".join(text.lower().split())
    folded = unicodedata.normalize("NFD", text).casefold()
    return " ".join(unicodedata.normalize("NFC", folded).split())


def position(key: str, seed: int) -> bytes:
    return hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=16).digest()


def _choose(sizes: Sequence[int], wanted: float) -> list[int]:
    """The groups, earliest first, whose sizes together come nearest to `wanted`, neither none nor all of them."""
    taken: list[int] = []
    left: list[int] = []
    total = 0
    for i, size in enumerate(sizes):
        if total + size <= wanted - CHOSEN_EXACTLY:
            taken.append(i)
            total += size
        else:
            left.append(i)
    return taken + _nearest(left, sizes, wanted - total, at_least=0 if taken else 1, at_most=sum(sizes) - total - 1)


def _nearest(groups: Sequence[int], sizes: Sequence[int], wanted: float, *, at_least: int, at_most: int) -> list[int]:
    """The groups whose sizes add up to the number nearest to `wanted` within the bounds, preferring early ones."""
    # What lies further above than nothing lies below is never nearest, unless nothing at all is not allowed.
    limit = min(at_most, max(int(2 * wanted), min(sizes[i] for i in groups)))
    within = (1 << (limit + 1)) - 1
    # sums[k]: bit s is set when some of the groups from the k-th on add up to s. Most are the very same integer.
    sums = [1]
    for i in reversed(groups):
        more = sums[-1] | ((sums[-1] << sizes[i]) & within)
        sums.append(sums[-1] if more == sums[-1] else more)
    sums.reverse()
    reached = [s for s, bit in enumerate(bin(sums[0])[:1:-1]) if bit == "1" and s >= at_least]
    missing = min(reached, key=lambda s: abs(s - wanted))
    chosen = []
    for k, i in enumerate(groups):
        if sizes[i] <= missing and (sums[k + 1] >> (missing - sizes[i])) & 1:
            chosen.append(i)
            missing -= sizes[i]
    return chosen

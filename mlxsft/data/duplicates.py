"""Texts → which of them are nearly the same: MinHash over shingles of three words, in NumPy.

A text costs 4 bytes a shingle while it is kept, at most 2 KB, and about 350 bytes while texts are compared. Comparing
takes time in proportion to the number of texts and not to its square: only texts that share a band of their signatures
are looked at, and each such pair is verified on the shingles themselves.
"""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Iterable, Iterator
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

THRESHOLD = 0.8  # Jaccard similarity of the shingles from which two texts are near-duplicates
SHINGLE = 3  # words in a shingle
# A longer text is represented by its smallest shingle hashes, a fair sample of it: the similarity of two such texts
# is then known to about 0.02. https://en.wikipedia.org/wiki/MinHash#Variant_with_a_single_hash_function
KEPT_SHINGLES = 512
# 16 bands of 4 find a pair of similarity 0.8 with probability 0.9998, and one of 0.5 with 0.64: 1 - (1 - s⁴)¹⁶.
BANDS, ROWS = 16, 4
_SHINGLES_AT_ONCE = 1 << 20

# Writing without spaces between words (Chinese, Japanese, Korean, Thai, Lao, Burmese, Khmer) counts by character.
_WORD = re.compile(
    r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|"
    r"[^\W\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+"
)
# The same for ASCII, many times faster: letters in lower case, and a space for all that separates words.
_ASCII_WORDS = bytes(ord(chr(c).lower()) if chr(c).isalnum() or chr(c) == "_" else 32 for c in range(128)) + bytes(128)
_MIX = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93], dtype=np.uint64)


def fingerprint(*parts: str) -> int:
    """64 bits that differ for different texts: among a million, two are alike with a chance of 3 in 100 million."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return int.from_bytes(digest.digest(), "little")


def shingles(text: str) -> NDArray[np.uint32]:
    """The distinct hashes of all runs of three words, ascending; case, punctuation and spacing do not matter."""
    if text.isascii():
        found = text.encode().translate(_ASCII_WORDS).split()
    else:
        found = [word.encode() for word in _WORD.findall(text.casefold())]
    if not found:
        return np.zeros(0, dtype=np.uint32)
    words = np.fromiter(map(crc32, found), dtype=np.uint64, count=len(found))
    width = min(SHINGLE, len(words))
    count = len(words) - width + 1
    mixed = _mixed(words[i : i + count] for i in range(width))
    hashes = (mixed >> np.uint64(32)).astype(np.uint32)
    hashes.sort()
    return hashes[_first_of_equals(hashes)][:KEPT_SHINGLES]


def _mixed(columns: Iterable[NDArray[Any]]) -> NDArray[np.uint64]:
    """One 64-bit hash a row, of the values in up to four columns."""
    mixed = np.zeros(1, dtype=np.uint64)
    for column, factor in zip(columns, _MIX, strict=False):
        mixed = (mixed + column) * factor
        mixed ^= mixed >> np.uint64(29)
    return mixed


def similarity(a: NDArray[np.uint32], b: NDArray[np.uint32]) -> float:
    """Jaccard similarity of two ascending shingle arrays, from their smallest hashes where a text has more."""
    if not len(a) or not len(b):
        return 0.0
    both = np.concatenate([a, b])
    both.sort()
    new = _first_of_equals(both)
    union = min(KEPT_SHINGLES, int(np.count_nonzero(new)))
    considered = int(np.searchsorted(both, both[new][union - 1], side="right"))
    return (considered - union) / union


def _first_of_equals(ordered: NDArray[Any]) -> NDArray[np.bool_]:
    """True where an element differs from the one before it."""
    new = np.ones(len(ordered), dtype=np.bool_)
    np.not_equal(ordered[1:], ordered[:-1], out=new[1:])
    return new


class Texts:
    """A growing row of texts of which only the shingles are kept; `pairs` says which are nearly the same."""

    def __init__(self) -> None:
        self._hashes = array("I")
        self._ends = array("Q", [0])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def add(self, text: str) -> int:
        """The number of this text, counted from 0."""
        self._hashes.frombytes(shingles(text).tobytes())
        self._ends.append(len(self._hashes))
        return len(self) - 1

    def pairs(self) -> list[tuple[int, int]]:
        """Pairs (i, j), i < j, of similarity 0.8 or more: every near-duplicate is in one, but not every pair is."""
        hashes = np.frombuffer(self._hashes, dtype=np.uint32)
        ends = np.frombuffer(self._ends, dtype=np.uint64).astype(np.int64)
        filled = np.flatnonzero(np.diff(ends))
        signatures = _signatures(hashes, ends, filled)
        found = []
        for i, j in _candidates(signatures):
            a, b = int(filled[i]), int(filled[j])
            if similarity(hashes[ends[a] : ends[a + 1]], hashes[ends[b] : ends[b + 1]]) >= THRESHOLD:
                found.append((a, b))
        return sorted(found)


def _signatures(hashes: NDArray[np.uint32], ends: NDArray[np.int64], filled: NDArray[np.int64]) -> NDArray[np.uint32]:
    """[texts, 64]: the smallest value that each of 64 hash functions takes on a text's shingles."""
    random = np.random.default_rng(0x5F7)
    factors = random.integers(0, 1 << 63, BANDS * ROWS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    offsets = random.integers(0, 1 << 63, BANDS * ROWS, dtype=np.uint64)
    made = np.empty((len(filled), BANDS * ROWS), dtype=np.uint32)
    for first, last in _stretches(ends, filled):
        texts = filled[first:last]
        start = int(ends[texts[0]])
        values = hashes[start : int(ends[texts[-1] + 1])].astype(np.uint64)
        begins = ends[texts] - start
        for k in range(BANDS * ROWS):
            mixed = ((values * factors[k] + offsets[k]) >> np.uint64(32)).astype(np.uint32)
            made[first:last, k] = np.minimum.reduceat(mixed, begins)
    return made


def _stretches(ends: NDArray[np.int64], filled: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Texts in stretches of about a million shingles, so that memory stays flat."""
    first = 0
    while first < len(filled):
        limit = ends[filled[first]] + _SHINGLES_AT_ONCE
        last = max(first + 1, int(np.searchsorted(ends[filled + 1], limit, side="right")))
        yield first, last
        first = last


def _candidates(signatures: NDArray[np.uint32]) -> Iterator[tuple[int, int]]:
    """Pairs that agree in a band and, by their whole signatures, may be similar enough.

    Of many texts that agree in a band, each is paired with the first and with the one before it, which suffices to
    find the whole group and keeps the work linear.
    """
    found: list[NDArray[np.int64]] = []
    for band in range(BANDS):
        keys = _mixed(signatures[:, column] for column in range(band * ROWS, (band + 1) * ROWS))
        order = np.argsort(keys, kind="stable")
        new = _first_of_equals(keys[order])
        leader = order[np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))]
        later = np.flatnonzero(~new)
        pairs = np.concatenate([leader[later], order[later - 1]]) << 32 | np.tile(order[later], 2)
        found.append(_plausible(np.unique(pairs), signatures))
    for pair in np.unique(np.concatenate(found)).tolist():
        yield pair >> 32, pair & 0xFFFFFFFF


def _plausible(pairs: NDArray[np.int64], signatures: NDArray[np.uint32]) -> NDArray[np.int64]:
    """Those of the pairs (first << 32 | second) whose signatures agree well."""
    kept = [np.zeros(0, dtype=np.int64)]
    for start in range(0, len(pairs), 1 << 14):
        some = pairs[start : start + (1 << 14)]
        agree = (signatures[some >> 32] == signatures[some & 0xFFFFFFFF]).mean(axis=1)
        # The estimate is off by 0.05 at 0.8, one standard deviation: four of them below, the pair cannot pass.
        kept.append(some[agree >= THRESHOLD - 0.2])
    return np.concatenate(kept)


def groups(count: int, pairs: Iterable[tuple[int, int]]) -> NDArray[np.int64]:
    """For each of `count` items the smallest item that it is linked with, through any number of pairs."""
    parent = list(range(count))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for a, b in pairs:
        low, high = sorted((root(a), root(b)))
        parent[high] = low
    return np.array([root(i) for i in range(count)], dtype=np.int64)

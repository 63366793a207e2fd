"""Texts → which of them are nearly the same: MinHash over shingles of three words, in NumPy.

What is kept of a text lies on disk: 4 bytes a shingle, at most 2 KB, and 400 bytes beside them. Memory does not grow
with the texts. Comparing takes time in proportion to the number of texts and not to its square: only texts that share a
band of their signatures are looked at, and each such pair is verified on the shingles themselves.
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

from mlxsft.data.scratch import AT_ONCE, Scratch, Spill

THRESHOLD = 0.8  # Jaccard similarity of the shingles from which two texts are near-duplicates
SHINGLE = 3  # words in a shingle
# A longer text is represented by its smallest shingle hashes, a fair sample of it: the similarity of two such texts
# is then known to about 0.02. https://en.wikipedia.org/wiki/MinHash#Variant_with_a_single_hash_function
KEPT_SHINGLES = 512
# 16 bands of 4 find a pair of similarity 0.8 with probability 0.9998, and one of 0.5 with 0.64: 1 - (1 - s⁴)¹⁶.
BANDS, ROWS = 16, 4
_WORDS_AT_ONCE = 1 << 16  # of texts that are hashed together
_SIGNATURES_AT_ONCE = 1 << 13

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
    words = _words(text)
    return _shingled(words, array("I", [len(words)]))[0] if words else np.zeros(0, dtype=np.uint32)


def _words(text: str) -> array[int]:
    """A hash of each word."""
    if text.isascii():
        return array("I", map(crc32, text.encode().translate(_ASCII_WORDS).split()))
    return array("I", [crc32(word.encode()) for word in _WORD.findall(text.casefold())])


def _shingled(words: array[int], counts: array[int]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """The shingles of texts of so many words each, at least one, text after text, and where each text ends."""
    lengths = np.frombuffer(counts, dtype=np.uint32).astype(np.int64)
    width = np.minimum(lengths, SHINGLE)
    owner = np.repeat(np.arange(len(lengths)), lengths - width + 1)  # of each shingle
    shift = np.cumsum(width - 1) - (width - 1)  # words that begin no shingle, in the texts before
    first = np.arange(len(owner)) + shift[owner]
    hashes = np.frombuffer(words, dtype=np.uint32).astype(np.uint64)
    mixed = np.zeros(len(owner), dtype=np.uint64)
    for i in range(SHINGLE):
        has = slice(None) if i == 0 else np.flatnonzero(width[owner] > i)  # a text of one or two words is one shingle
        mixed[has] = _mixed_in(mixed[has], hashes[first[has] + i], i)
    keys = owner.astype(np.uint64) << np.uint64(32) | mixed >> np.uint64(32)
    keys.sort()
    keys = keys[_first_of_equals(keys)]
    owner = (keys >> np.uint64(32)).astype(np.int64)
    begins = np.searchsorted(owner, np.arange(len(lengths)))
    kept = np.arange(len(keys)) - begins[owner] < KEPT_SHINGLES
    return keys[kept].astype(np.uint32), np.cumsum(np.bincount(owner[kept], minlength=len(lengths)))


def _mixed(columns: Iterable[NDArray[Any]]) -> NDArray[np.uint64]:
    """One 64-bit hash a row, of the values in up to four columns."""
    mixed = np.zeros(1, dtype=np.uint64)
    for i, column in enumerate(columns):
        mixed = _mixed_in(mixed, column, i)
    return mixed


def _mixed_in(mixed: NDArray[np.uint64], column: NDArray[Any], i: int) -> NDArray[np.uint64]:
    """The hash with the value of the i-th column in it."""
    mixed = (mixed + column) * _MIX[i]
    return mixed ^ mixed >> np.uint64(29)


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
    """A growing row of texts of which only the shingles are kept, on disk; `pairs` says which are nearly the same."""

    def __init__(self, scratch: Scratch) -> None:
        self._scratch = scratch
        self._count = 0
        self._words, self._waiting = array("I"), array("I")  # of texts that are not hashed yet: words, and how many
        self._numbers = array("Q")
        self._hashes = scratch.spill(np.uint32)
        self._places = scratch.spill(np.int64, 3)  # number of each text that has shingles, where they begin and end
        self._signatures = scratch.spill(np.uint32, BANDS * ROWS)
        self._bands = [scratch.spill(np.uint64) for _ in range(BANDS)]

    def __len__(self) -> int:
        return self._count

    def add(self, text: str) -> int:
        """The number of this text, counted from 0."""
        if words := _words(text):
            self._words += words
            self._waiting.append(len(words))
            self._numbers.append(self._count)
        self._count += 1
        if len(self._words) >= _WORDS_AT_ONCE:
            self._hash()
        return self._count - 1

    def _hash(self) -> None:
        """Put what is kept of the waiting texts on disk."""
        if not self._waiting:
            return
        hashes, ends = _shingled(self._words, self._waiting)
        begins = np.concatenate([[0], ends[:-1]])
        signatures = _signatures(hashes, begins)
        numbers = np.frombuffer(self._numbers, dtype=np.uint64).astype(np.int64)
        self._places.append(np.stack([numbers, begins + len(self._hashes), ends + len(self._hashes)], axis=1))
        self._hashes.append(hashes)
        self._signatures.append(signatures)
        for i, band in enumerate(self._bands):
            band.append(_mixed(signatures[:, column] for column in range(i * ROWS, (i + 1) * ROWS)))
        self._words, self._waiting, self._numbers = array("I"), array("I"), array("Q")

    def pairs(self) -> Spill:
        """Pairs (i, j), i < j, of similarity 0.8 or more: every near-duplicate is in one, but not every pair is."""
        self._hash()
        candidates = self._scratch.spill(np.int64)
        for band in self._bands:
            for pairs in sharing(band):
                candidates.append(pairs)
        found = self._scratch.spill(np.int64, 2)
        for pairs in _each_once(candidates, len(self._places)):
            alike = [pair for pair in map(self._numbered, self._plausible(pairs).tolist()) if pair is not None]
            if alike:
                found.append(np.array(alike))
        return found

    def _plausible(self, pairs: NDArray[np.int64]) -> NDArray[np.int64]:
        """Those of the pairs (first << 32 | second) whose signatures agree well."""
        kept = [np.zeros(0, dtype=np.int64)]
        for start in range(0, len(pairs), _SIGNATURES_AT_ONCE):
            some = pairs[start : start + _SIGNATURES_AT_ONCE]
            agree = self._signatures.gather(some >> 32) == self._signatures.gather(some & 0xFFFFFFFF)
            # The estimate is off by 0.05 at 0.8, one standard deviation: four of them below, the pair cannot pass.
            kept.append(some[agree.mean(axis=1) >= THRESHOLD - 0.2])
        return np.concatenate(kept)

    def _numbered(self, pair: int) -> tuple[int, int] | None:
        """The numbers of two texts that are nearly the same; None where they are not."""
        ((a, *first),) = self._places.read(pair >> 32, (pair >> 32) + 1).tolist()
        ((b, *second),) = self._places.read(pair & 0xFFFFFFFF, (pair & 0xFFFFFFFF) + 1).tolist()
        alike = similarity(self._hashes.read(*first), self._hashes.read(*second)) >= THRESHOLD
        return (a, b) if alike else None


def _signatures(hashes: NDArray[np.uint32], begins: NDArray[np.int64]) -> NDArray[np.uint32]:
    """[texts, 64]: the smallest value that each of 64 hash functions takes on a text's shingles."""
    random = np.random.default_rng(0x5F7)
    factors = random.integers(0, 1 << 63, BANDS * ROWS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    offsets = random.integers(0, 1 << 63, BANDS * ROWS, dtype=np.uint64)
    values = hashes.astype(np.uint64)
    made = np.empty((len(begins), BANDS * ROWS), dtype=np.uint32)
    for k in range(BANDS * ROWS):
        mixed = ((values * factors[k] + offsets[k]) >> np.uint64(32)).astype(np.uint32)
        made[:, k] = np.minimum.reduceat(mixed, begins)
    return made


def sharing(keys: Spill) -> Iterator[NDArray[np.int64]]:
    """Pairs (first << 32 | second) of the records of a column whose 64-bit hashes are equal, in bounded pieces.

    Of many records with one hash, each is paired with the first and with the one before it, which suffices to find the
    whole group and keeps the work linear.
    """
    slices = 1 + len(keys) // AT_ONCE  # of the range of hashes, one after the other
    for k in range(slices):
        low, high = ((k << 64) // slices, ((k + 1) << 64) // slices - 1)
        met = _Met()
        for numbers, some in _within(keys, low, high):
            yield met.add(some, numbers)


def _within(keys: Spill, low: int, high: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint64]]]:
    """Numbers and hashes of the records from `low` to `high`: mostly all at once, or in several bounded parts."""
    numbers, found, size = list[NDArray[np.int64]](), list[NDArray[np.uint64]](), 0
    for start, piece in keys.pieces():
        inside = np.flatnonzero((piece >= np.uint64(low)) & (piece <= np.uint64(high)))
        numbers.append(inside + start)
        found.append(piece[inside])
        size += len(inside)
        if size > AT_ONCE or (size and start + len(piece) == len(keys)):
            yield np.concatenate(numbers), np.concatenate(found)
            numbers, found, size = [], [], 0


class _Met:
    """The hashes met so far, ascending, with the first and the last record that has each."""

    def __init__(self) -> None:
        self.keys = np.zeros(0, dtype=np.uint64)
        self.first = self.last = np.zeros(0, dtype=np.int64)

    def add(self, keys: NDArray[np.uint64], numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """The pairs that these records make, with each other and with those met before; numbers ascend."""
        keys = np.concatenate([self.keys, keys])
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        first, last = np.concatenate([self.first, numbers])[order], np.concatenate([self.last, numbers])[order]
        new = _first_of_equals(keys)
        begins = np.flatnonzero(new)
        leader = np.repeat(first[begins], np.diff(begins, append=len(keys)))
        later = np.flatnonzero(~new)
        self.keys, self.first, self.last = keys[begins], first[begins], last[np.append(begins[1:], len(keys)) - 1]
        return np.unique(np.concatenate([leader[later], last[later - 1]]) << 32 | np.tile(last[later], 2))


def _each_once(pairs: Spill, count: int) -> Iterator[NDArray[np.int64]]:
    """The pairs (first << 32 | second) of `count` records without repetition, ascending in bounded pieces.

    A record is the second one of at most two pairs a band, so that records next to each other have few.
    """
    part = 14  # bits: 16,384 records
    sizes = np.zeros(-(-count >> part) + 1, dtype=np.int64)
    for _, piece in pairs.pieces():
        sizes += np.bincount((piece & 0xFFFFFFFF) >> part, minlength=len(sizes))
    low = 0
    while low < len(sizes):
        high = low + 1
        while high < len(sizes) and sizes[low : high + 1].sum() <= AT_ONCE:
            high += 1
        if sizes[low:high].any():
            parts = ((piece, (piece & 0xFFFFFFFF) >> part) for _, piece in pairs.pieces())
            yield np.unique(np.concatenate([piece[(low <= at) & (at < high)] for piece, at in parts]))
        low = high


def groups(count: int, pairs: Iterable[tuple[int, ...]]) -> array[int]:
    """For each of `count` items the smallest item that it is linked with, through any number of pairs; 4 bytes each."""
    parent = array("I", range(count))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for a, b in pairs:
        low, high = sorted((root(a), root(b)))
        parent[high] = low
    for i, before in enumerate(parent):  # a root lies before all that are under it
        parent[i] = parent[before]
    return parent

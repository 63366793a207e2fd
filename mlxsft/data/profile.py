"""What a set of rows is like: which languages, formats, openings and categories, how often, and where first."""

from __future__ import annotations

from collections import Counter

from mlxsft.data.findings import Shown, shortened
from mlxsft.data.places import Origin

OTHERS = "(others)"  # what a profile calls all that it does not name
SHOWN, COUNTED = 20, 50_000  # what a profile names, and what it counts one by one on the way
EXAMPLES = 3  # rows that are kept of each value


class Profile:
    """Counts of values by what they are values of, and the first rows that have each."""

    def __init__(self) -> None:
        names = ("language", "format", "opening", "category")
        self._counts: dict[str, Counter[str]] = {name: Counter() for name in names}
        self._examples: dict[str, dict[str, list[Shown]]] = {name: {} for name in names}

    def add(self, name: str, value: str, origin: Origin, excerpt: str) -> None:
        """One more of a value; rare ones are counted together once there are too many of them to keep."""
        counts, examples = self._counts[name], self._examples[name]
        counts[value] += 1
        if counts[value] <= EXAMPLES:
            examples.setdefault(value, []).append(Shown(str(origin), shortened(excerpt)))
        if len(counts) > COUNTED:
            self._counts[name] = kept = Counter(dict(counts.most_common(COUNTED // 2)))
            self._examples[name] = {value: shown for value, shown in examples.items() if value in kept}
            kept[OTHERS] += counts.total() - kept.total()

    def total(self, name: str) -> int:
        return self._counts[name].total()

    def known(self) -> dict[str, Counter[str]]:
        """How often each value is there that says something; what has none is not there either."""
        known = {name: Counter(counts) for name, counts in self._counts.items()}
        for counts in known.values():
            del counts[OTHERS]
        del known["opening"][""]
        if len(known["category"]) == 1:
            del known["category"][""]
        return {name: counts for name, counts in known.items() if counts}

    def commonest(self) -> dict[str, dict[str, int]]:
        """The commonest values, and the others together, so that shares are those of all rows."""
        made = {}
        for name, counts in self.known().items():
            made[name] = shown = dict(counts.most_common(SHOWN))
            if others := self.total(name) - sum(shown.values()):
                shown[OTHERS] = others
        return made

    def examples(self, name: str, *values: str) -> list[Shown]:
        """The first rows with the first of these values that has any, then with the next."""
        return [shown for value in values for shown in self._examples[name].get(value, ())][:EXAMPLES]

"""How a model answers, declared once: for the options of the commands, and for /set in a conversation."""

from __future__ import annotations

from dataclasses import dataclass

from mlxsft.errors import UsageError


@dataclass(frozen=True)
class Setting:
    """A number from `low` to `high`, both allowed unless `above` excludes the lower; without a default it is off."""

    default: float | None
    low: float
    high: float
    help: str
    above: bool = False
    whole: bool = False

    def read(self, name: str, text: str) -> float | int | None:
        """The number that a person wrote; the default for `default`. Raises UsageError."""
        if text == "default":
            return self.default
        try:
            value: float = int(text) if self.whole else float(text)
        except ValueError:
            value = float("nan")
        if (value > self.low if self.above else value >= self.low) and value <= self.high:
            return value
        kind, begin = "a whole number" if self.whole else "a number", "above" if self.above else "from"
        low, high = (f"{int(n)}" if n == int(n) else f"{n:g}" for n in (self.low, self.high))
        raise UsageError(f"{name}: got {text}, expected {kind} {begin} {low} to {high}")


SETTINGS = {
    "max_tokens": Setting(512, 1, 2**31, "Longest answer.", whole=True),
    "temperature": Setting(0.0, 0.0, 100.0, "0: greedy."),
    "top_p": Setting(1.0, 0.0, 1.0, "Nucleus sampling; 1: off.", above=True),
    "min_p": Setting(0.0, 0.0, 1.0, "Share of the likeliest; 0: off."),
    "top_k": Setting(0, 0, 2**31, "Only the K likeliest tokens; 0: off.", whole=True),
    "repetition_penalty": Setting(None, 0.0, 10.0, "Above 1 repeats less.", above=True),
    "seed": Setting(None, 0, 2**63 - 1, "Of the sampling; the same seed gives the same text.", whole=True),
}

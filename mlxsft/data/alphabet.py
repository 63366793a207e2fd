"""Text → the characters in it that a tokenizer cannot give back."""

from __future__ import annotations

import unicodedata

from mlxsft.data.tokenizer import Tokenizer


class Alphabet:
    """Which characters come back out of the tokenizer; each is tried once, when it is met first."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._good: set[str] = set()
        self.bad: set[str] = set()

    def lost(self, text: str) -> str:
        """The characters of this text that do not come back, each once."""
        letters = set(text)
        for letter in letters - self._good - self.bad:
            (self._good if self._returns(letter) else self.bad).add(letter)
        return "".join(sorted(letters & self.bad))[:20] if self.bad else ""

    def _returns(self, letter: str) -> bool:
        back = self._tokenizer.decode(self._tokenizer.encode(self._tokenizer.fence(letter)))
        # Tokenizers that normalise write the same character in another way; white space and controls are no text.
        same = unicodedata.normalize("NFKC", letter).strip()
        return same in unicodedata.normalize("NFKC", back) or unicodedata.category(letter) in ("Cc", "Cf", "Mn")

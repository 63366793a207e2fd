"""Files of rows → what is wrong with them: a ledger that adds up, lengths in tokens, and findings.

Every row is read once. What is kept of it is numbers and a few words: fingerprints, shingle hashes, place. They lie on
disk until the check ends, so that memory does not grow with the rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxsft.data import patterns, traits
from mlxsft.data.alphabet import Alphabet
from mlxsft.data.duplicates import Texts, fingerprint, groups
from mlxsft.data.findings import EXAMPLES, KINDS, Finding, Shown, Tally, shortened
from mlxsft.data.formats import Conversation, read_conversations
from mlxsft.data.holdout import normalise
from mlxsft.data.lengths import Lengths
from mlxsft.data.profile import Profile
from mlxsft.data.remembered import Remembered
from mlxsft.data.render import NO_TRAINED_TOKEN, OLDEST_LOST, ONE_A_TURN, PART_LOST, Example, Renderer, texts_of
from mlxsft.data.rows import LeftOut
from mlxsft.data.scratch import Scratch, Spill, open_scratch
from mlxsft.data.sources import RowSource, whole_files

if TYPE_CHECKING:
    from mlxsft.recipe import DataRecipe

Rows = Iterable[Conversation | LeftOut]
Watch = Callable[[Rows, Sequence[Path]], Rows]  # what shows progress while the rows of some files go by

NOT_TOLD = "not told"  # the language of an answer that does not show it
ENOUGH = 20  # answers from which it is worth saying that one opening or one format dominates
ALIKE_FROM = 16  # tokens from which answers of one length say something; labels are alike by nature
_REASONS = {  # of the ledger, and the finding that explains them
    "special token": "special-tokens",
    "refused by the template": "template",
    "too long": "too-long",
    "answer too long": "too-long",
    "prompt too long": "too-long",
    "empty prompt": "empty",
    "empty answer": "empty",
    "empty text": "empty",
}


@dataclass(frozen=True)
class Audit:
    """What a check found. The counts of `ledger` but `read` add up to `read`; so do those of each of `held_out`."""

    ledger: dict[str, int]
    held_out: dict[str, dict[str, int]]
    lengths: dict[str, Lengths]  # prompt, response, total: tokens of the examples that the usable rows give
    profile: dict[str, dict[str, int]]  # language, format and opening of the answers, category of the rows
    findings: list[Finding]
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """What --json prints."""
        findings = [
            {
                "id": f.id,
                "title": f.kind.title,
                "severity": f.kind.severity,
                "count": f.count,
                "share": round(f.share, 6),
                "detail": f.detail,
                "examples": [{"place": e.place, "excerpt": e.excerpt} for e in f.examples],
                "advice": f.kind.advice,
            }
            for f in self.findings
        ]
        return {
            "ledger": self.ledger,
            "held_out": self.held_out,
            "lengths": {name: lengths.to_dict() for name, lengths in self.lengths.items()},
            "profile": self.profile,
            "findings": findings,
            "checked": list(KINDS),
            "notes": self.notes,
        }


def check(
    sources: Sequence[RowSource],
    data: DataRecipe,
    renderer: Renderer,
    *,
    held_out: Mapping[str, Sequence[RowSource]] | None = None,
    watch: Watch = lambda rows, files: rows,
) -> Audit:
    """Everything that can be said of these rows, and of `held_out` ones (by the name of their split) beside them."""
    if renderer.positions is not None and renderer.positions < data.max_tokens:
        data = data.model_copy(update={"max_tokens": renderer.positions})

    def read(split: str, given: Sequence[RowSource]) -> Rows:
        rows = read_conversations(given, format=data.format, columns=data.columns, fill=data.fill, split=split)
        return watch(rows, whole_files(given, split))

    held = {name: read(name, given) for name, given in (held_out or {}).items()}
    with open_scratch() as scratch:
        auditor = _Auditor(data, renderer, scratch, compares=bool(held))
        for row, made in renderer.rendered(auditor.readable(read("train", sources)), data):
            auditor.add(row, made)
        return auditor.result({name: auditor.compare(rows) for name, rows in held.items()})


# Notes of examples that were made to fit.
_SHORTENED = ("prompt shortened", OLDEST_LOST, "turns split", PART_LOST, "text split")


class _Auditor:
    """Takes rows one by one; `result` closes the books."""

    def __init__(self, data: DataRecipe, renderer: Renderer, scratch: Scratch, *, compares: bool) -> None:
        self.data, self.renderer = data, renderer
        self.ledger = Counter({"read": 0, "usable": 0})
        self.tallies = {id: Tally() for id in KINDS}
        self.details: dict[str, str] = {}
        self.lengths = {name: Lengths() for name in ("prompt", "response", "total")}
        self.profile = Profile(scratch)
        self.whole = Texts(scratch)  # training rows, and held-out ones behind them
        self.asked = Texts(scratch) if compares else None  # their prompts, which only held-out rows are compared with
        self.remembered = Remembered(scratch)
        self.alphabet = Alphabet(renderer.tokenizer)
        self.ended = self.unended = 0
        self.one_a_turn = Tally()  # rows that become one example a turn

    # --- rows to train on ------------------------------------------------------------------------------------------

    def readable(self, rows: Iterable[Conversation | LeftOut]) -> Iterator[Conversation]:
        """The rows that can be rendered; the others are counted on the way."""
        for row in rows:
            self.ledger["read"] += 1
            if isinstance(row, LeftOut):
                self._leave_out(row)
            else:
                yield row

    def add(self, row: Conversation, made: Sequence[Example | LeftOut]) -> None:
        """Judge a row by itself and by what it gave."""
        self._judge_text(row)
        refused = sorted((m for m in made if isinstance(m, LeftOut)), key=lambda m: not m.broken)
        examples = [m for m in made if isinstance(m, Example)]
        if not examples or any(m.broken for m in refused):
            self._leave_out(refused[0] if refused else LeftOut(row.origin, NO_TRAINED_TOKEN))
            return
        key = _fingerprint(row)
        first = self.remembered.first_row(key, len(self.whole))
        if first < len(self.whole):
            self.ledger["duplicate"] += 1
            place = self.remembered.beside(first, row.origin.file)
            self._found("duplicates", row, f"as {place}: {_asked(row) or _told(row)}")
            return
        self.ledger["usable"] += 1
        self._measure(row, examples)
        self._remember(row)
        self._judge_answers(row)

    def _leave_out(self, row: LeftOut) -> None:
        self.ledger[row.reason if row.reason not in ("read", "usable") else f"row: {row.reason}"] += 1
        id = _REASONS.get(row.reason, "broken" if row.broken else "unanswered")
        self.tallies[id].add(row.place, f"{row.reason}: {row.detail}".rstrip(": "))

    def _found(self, id: str, row: Conversation, excerpt: str) -> None:
        self.tallies[id].add(row.origin, excerpt)

    def _judge_text(self, row: Conversation) -> None:
        """What is looked for in every turn, of every row that could be read, copies and rows left out included."""
        texts = [text for turn in row.turns for text in texts_of(turn)]
        for id, search in (("pii", patterns.personal_data), ("secrets", patterns.secrets)):
            if match := next((m for text in texts for m in search(text)), None):
                self._found(id, row, str(match))
        if name := next((m[0] for text in texts if "{{" in text and (m := traits.PLACEHOLDER.search(text))), None):
            self._found("placeholders", row, name)
        if self.data.special_tokens in ("allow", "escape"):  # otherwise such rows are left out, and counted there
            special = self.renderer.tokenizer.special_pattern
            if found := next((m[0] for text in texts if (m := special.search(text))), None):
                self._found("special-tokens", row, found)

    def _measure(self, row: Conversation, examples: Sequence[Example]) -> None:
        for example in examples:
            total, trained = len(example.tokens), int(example.mask.sum())
            for name, length in (("prompt", total - trained), ("response", trained), ("total", total)):
                self.lengths[name].add(length)
        if examples[0].note == ONE_A_TURN:
            self.one_a_turn.add(row.origin, "")
        if note := next((e.note for e in examples if e.note in _SHORTENED), None):
            self._found("too-long", row, note)
        self.profile.add("category", row.category, row.origin, _asked(row) or _told(row))

    def _remember(self, row: Conversation) -> None:
        asked, told = _asked(row), _told(row)
        number = self._number(row, asked, told)
        if not asked:
            return
        answer = fingerprint(normalise(told))
        first, given = self.remembered.first_prompt(fingerprint(normalise(asked)), number, answer)
        if given != answer:
            place = self.remembered.beside(first, row.origin.file)
            self._found("conflicting-answers", row, f"as {place}: {asked}")

    def _number(self, row: Conversation, asked: str, told: str) -> int:
        """The number of a row among those that are compared."""
        if self.asked is not None:
            self.asked.add(asked)
        self.remembered.place(len(self.whole), row.origin, asked or told)
        return self.whole.add(f"{asked}\n{told}")

    def _judge_answers(self, row: Conversation) -> None:
        answers = [turn.content for turn in row.turns if turn.role == "assistant" and turn.content.strip()]
        texts = answers or [turn.content for turn in row.turns if turn.role == "text"]
        if lost := self.alphabet.lost("".join(texts)):
            self._found("lost-text", row, f"{lost}: {texts[0]}")
        if texts:
            language = traits.language("\n".join(texts))
            self.profile.add("language", language or NOT_TOLD, row.origin, f"{language}: {texts[0]}")
        if not answers:
            return
        for id, test in (("short-answers", traits.is_short), ("refusals", traits.is_refusal)):
            if answer := next(filter(test, answers), ""):
                self._found(id, row, answer)
        self.profile.add("opening", traits.opening(answers[0]), row.origin, answers[0])
        self.profile.add("format", shape := traits.form(answers[-1]), row.origin, answers[-1])
        unended = next((a for a in answers if not traits.ends(a) and not traits.is_short(a)), None)
        if shape == "prose":
            self.ended += unended is None
            self.unended += unended is not None
        if unended is not None and (shape == "prose" or unended.count("```") % 2):
            self._found("unended", row, f"…{unended.rstrip()[-60:]}")

    # --- rows held out ---------------------------------------------------------------------------------------------

    def compare(self, rows: Rows) -> dict[str, int]:
        """The ledger of a held-out split, whose readable rows now stand behind the training rows."""
        ledger = Counter({"read": 0, "compared": 0})
        for row in rows:
            ledger["read"] += 1
            if isinstance(row, LeftOut):
                ledger[row.reason if row.reason not in ledger else f"row: {row.reason}"] += 1
                continue
            ledger["compared"] += 1
            asked, told = _asked(row), _told(row)
            number = self._number(row, asked, told)
            copy = self.remembered.row(_fingerprint(row))
            same = self.remembered.asked_by(fingerprint(normalise(asked))) if asked else None
            if copy is not None:
                self.remembered.leak(number, "an exact copy of", copy)
            elif same is not None:
                self.remembered.leak(number, "the prompt of", same)
        return dict(ledger)

    # --- closing the books -----------------------------------------------------------------------------------------

    def result(self, held_out: dict[str, dict[str, int]]) -> Audit:
        trained = self.ledger["usable"]
        pairs = self.whole.pairs()
        self._near_duplicates(pairs, trained)
        if self.asked is not None:
            for what, found in (("nearly", pairs), ("nearly the prompt of", self.asked.pairs())):
                self._near_leaks(what, found, trained)
            self.tallies["leakage"] = self._leaks()
        self._distributions()
        shares = {"leakage": sum(ledger["read"] for ledger in held_out.values())}
        findings = [
            Finding(id, t.count, t.count / max(1, shares.get(id, self.ledger["read"])), t.examples, self._detail(id))
            for id, t in self.tallies.items()
            if t.count
        ]
        notes = [*self.renderer.notes, *self._split_note()]
        return Audit(dict(self.ledger), held_out, self.lengths, self.profile.summary(), findings, notes)

    def _split_note(self) -> list[str]:
        """That rows became several examples, with the first of them."""
        if not (count := self.one_a_turn.count):
            return []
        first = ", ".join(example.place for example in self.one_a_turn.examples)
        return [f"the template rewrites earlier turns, so {count:,} rows give {ONE_A_TURN} ({first})"]

    def _near_duplicates(self, pairs: Spill, trained: int) -> None:
        found = self.tallies["near-duplicates"]
        for number, leader in enumerate(groups(trained, (pair for pair in pairs if pair[1] < trained))):
            if leader != number and found.count < EXAMPLES:
                origin = self.remembered.origin(number)
                place = self.remembered.beside(leader, origin.file)
                found.add(origin, f"nearly {place}: {self.remembered.excerpt(number)}")
            elif leader != number:
                found.count += 1

    def _near_leaks(self, what: str, pairs: Spill, trained: int) -> None:
        """Held-out rows in a group of near-duplicates with a training row."""
        leaders = groups(len(self.whole), pairs)
        for number in range(trained, len(self.whole)):
            if leaders[number] < trained:
                self.remembered.leak(number, what, leaders[number])

    def _leaks(self) -> Tally:
        made = Tally(self.remembered.leaks())
        for number, how, other in self.remembered.first_leaks(EXAMPLES):
            words = f"{how} {self.remembered.origin(other)}: {self.remembered.excerpt(number)}"
            made.examples.append(Shown(str(self.remembered.origin(number)), shortened(words, 400)))
        return made

    def _distributions(self) -> None:
        """Findings that only the whole set shows."""
        answers = self.profile.total("format")
        for id, name, most in (("opening-phrase", "opening", 0.2), ("answer-format", "format", 0.8)):
            for value, count in self.profile.commonest(name, 1).items():
                if answers >= ENOUGH and count >= most * answers and value != "prose":
                    detail = f"{value!r} in {count / answers:.0%} of the answers"
                    self._whole(id, count, detail, self.profile.examples(name, value))
        if answers >= ENOUGH and not self.tallies["answer-format"].count:
            low, high = self.lengths["response"].middle(0.9)
            if low >= ALIKE_FROM and high <= 1.2 * low:
                alike = f"nine in ten answers take {low} to {high} tokens"
                shown = self.profile.examples("format", *self.profile.commonest("format"))
                self._whole("answer-format", round(0.9 * answers), alike, shown)
        languages = self.profile.commonest("language", most=1000)
        del languages[NOT_TOLD]
        if len(languages) > 1:
            (main, mostly), *others = languages.most_common()
            rest = ", ".join(f"{name} {count:,}" for name, count in others[:6])
            detail = f"mostly {main} ({mostly:,}); also {rest}"
            shown = self.profile.examples("language", *(name for name, _ in others))
            self._whole("languages", languages.total() - mostly, detail, shown)
        self._class_balance()
        if self.unended > 0.4 * (self.ended + self.unended):  # then it is a style, and says nothing of the single row
            self.tallies["unended"] = Tally()

    def _class_balance(self) -> None:
        rows, named = 0, list[tuple[str, int]]()
        for name, count in self.profile.small("category"):
            rows += count
            if len(named) < 100:
                named.append((name, count))
        if named:
            detail = ", ".join(f"{name} {count:,}" for name, count in named)
            self._whole("class-balance", rows, detail, self.profile.examples("category", *(name for name, _ in named)))

    def _whole(self, id: str, count: int, detail: str, examples: list[Shown]) -> None:
        self.tallies[id] = Tally(count, examples)
        self.details[id] = shortened(detail, 300)

    def _detail(self, id: str) -> str:
        if id == "lost-text":
            return f"characters: {shortened(''.join(sorted(self.alphabet.bad)), 60)}"
        return self.details.get(id, "")


def _answers_from(row: Conversation) -> int:
    """Where in the turns the first answer, or the plain text, stands."""
    return next((i for i, turn in enumerate(row.turns) if turn.role in ("assistant", "text")), len(row.turns))


def _asked(row: Conversation) -> str:
    """Everything before the first answer; nothing for plain text."""
    return "\n".join(turn.content for turn in row.turns[: _answers_from(row)])


def _told(row: Conversation) -> str:
    """The first answer and all that follows."""
    return "\n".join(turn.content for turn in row.turns[_answers_from(row) :])


def _fingerprint(row: Conversation) -> int:
    parts = (part for t in row.turns for part in (t.role, t.content, repr(t.tool_calls), t.reasoning))
    return fingerprint(*parts, repr(row.tools))

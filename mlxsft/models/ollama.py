"""A Modelfile for Ollama: https://github.com/ollama/ollama/blob/main/docs/modelfile.md

Ollama renders conversations with a template in Go's language, and the model was trained with one in Jinja. So the
pieces of text that the model's own template puts before, between and after turns are measured, by rendering some turns,
and a Go template is written that puts them there too. Where the two would differ, none is written and that is said.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mlxsft.data.formats import Turn
from mlxsft.data.render import load_renderer
from mlxsft.data.template import ChatTemplate, Template, TemplateRefused, choose_template
from mlxsft.data.tokenizer import Tokenizer
from mlxsft.models.source import ModelSource

MODELFILE = "Modelfile"
# Stand for what people write: in no template, and of no white space at its ends that one would strip.
SYSTEM, FIRST, ANSWER, SECOND = (f"{name}§{name}" for name in ("sys", "one", "answer", "two"))


@dataclass(frozen=True)
class Pieces:
    """What a template writes around turns that take turns."""

    alone: str  # before the first user turn, where there is no system turn
    before_system: str
    after_system: str  # and before the first user turn
    opening: str  # between a user turn and the answer to it
    waiting: str  # behind the last user turn, where the answer is to come
    between: str  # between an answer and the next user turn
    default: str | None  # the system turn that it writes where there is none

    def rendered(self, system: str | None, *turns: str) -> str:
        """The prompt for user turns and answers by turns, the last one a user turn."""
        head = self.alone if system is None else f"{self.before_system}{system}{self.after_system}"
        joints = [joint for _ in turns for joint in (self.opening, self.between)][: len(turns) - 1]
        return head + "".join(turn + joint for turn, joint in zip(turns, [*joints, self.waiting], strict=True))

    def go(self) -> str:
        """The same as a template of Go's, with Ollama's .Messages."""
        before, after, opening, waiting, between = map(
            go_text, (self.before_system, self.after_system, self.opening, self.waiting, self.between)
        )
        alone = "" if self.default is not None else go_text(self.alone)
        head = f"{{{{ if .System }}}}{before}{{{{ .System }}}}{after}{{{{ else }}}}{alone}{{{{ end }}}}"
        last = "{{ if eq (len (slice $.Messages $i)) 1 }}"
        opened = opening if opening == waiting else f"{last}{waiting}{{{{ else }}}}{opening}{{{{ end }}}}"
        user = f'{{{{ if eq .Role "user" }}}}{{{{ .Content }}}}{opened}'
        answer = f'{{{{ else if eq .Role "assistant" }}}}{{{{ .Content }}}}{between}{{{{ end }}}}'
        return f"{head}{{{{ range $i, $_ := .Messages }}}}{user}{answer}{{{{ end }}}}"


def go_text(text: str) -> str:
    """Text as a Go template writes it unchanged."""
    return text.replace("{{", '{{ "{{" }}')


def modelfile(source: ModelSource, gguf: str, template: Template | None = None) -> tuple[str, list[str]]:
    """(Modelfile for the GGUF file of that name beside it, sentences that the person should know).

    `template` stands for the model's own; a model without one gets none, and completes texts.
    """
    tokenizer = Tokenizer.load(source)
    lines = [f"FROM ./{gguf}"]
    if template is None and tokenizer.chat_template is None:
        return f"{lines[0]}\n", ["the model has no chat template: Ollama will complete texts, not answer"]
    chosen = template or choose_template(tokenizer, None, source.name)
    pieces = measured(ChatTemplate(tokenizer, chosen))
    bos = (tokenizer.hf.bos_token if tokenizer.begins_with_bos else None) or ""
    notes = []
    if pieces is None or '"""' in pieces.go() + (pieces.default or ""):
        notes.append("no Go template does what the chat template does, so Ollama takes what it finds in the GGUF file")
    else:
        lines.append(f'TEMPLATE """{without_bos(pieces, bos).go()}"""')
        lines += [f'SYSTEM """{pieces.default}"""'] if pieces.default else []
    renderer = load_renderer(source, chosen)
    ends = [tokenizer.decode([index], special=True) for index in sorted(renderer.end_tokens)]
    written = "".join([pieces.alone, pieces.after_system, pieces.waiting, pieces.between]) if pieces else ""
    marks = [mark for mark in tokenizer.special_pattern.findall(written) if mark != bos]
    stops = dict.fromkeys(stop for stop in (*ends, *marks) if stop.strip() and '"' not in stop)
    return "\n".join([*lines, *(f'PARAMETER stop "{stop}"' for stop in stops)]) + "\n", notes


def measured(chat: ChatTemplate) -> Pieces | None:
    """The pieces of a template; None where it does not write the same ones around all turns."""
    user, answer = Turn("user", FIRST), Turn("assistant", ANSWER)
    system, last = Turn("system", SYSTEM), Turn("user", SECOND)
    try:
        plain, whole = _prompt(chat, user), _prompt(chat, system, user, answer, last)
        two = _prompt(chat, user, answer, last)
    except TemplateRefused:
        return None
    if any(text.count(mark) != 1 for text, mark in ((plain, FIRST), (whole, SYSTEM), (whole, FIRST), (whole, ANSWER))):
        return None
    alone, waiting = plain.split(FIRST)
    opening = whole.split(FIRST)[1].split(ANSWER)[0]
    before, rest = whole.split(SYSTEM)
    after = rest.split(FIRST)[0]
    between = whole.split(ANSWER)[1].partition(SECOND)[0]
    default = None
    if alone.startswith(before) and alone.endswith(after) and len(alone) > len(before) + len(after):
        default = alone[len(before) : len(alone) - len(after)]
    pieces = Pieces(alone, before, after, opening, waiting, between, default)
    same = (
        pieces.rendered(SYSTEM, FIRST, ANSWER, SECOND) == whole and pieces.rendered(None, FIRST, ANSWER, SECOND) == two
    )
    return pieces if same else None


def without_bos(pieces: Pieces, bos: str) -> Pieces:
    """The pieces without the token that llama.cpp puts before a text by itself."""
    if not bos:
        return pieces
    alone, before = pieces.alone.removeprefix(bos), pieces.before_system.removeprefix(bos)
    return replace(pieces, alone=alone, before_system=before)


def _prompt(chat: ChatTemplate, *turns: Turn) -> str:
    return "".join(piece.text for piece in chat.prompt(turns))

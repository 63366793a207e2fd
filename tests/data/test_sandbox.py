"""The sandbox of chat templates: what transformers' makes of a template, and nothing that is too large."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

import pytest
from jinja2.exceptions import SecurityError, TemplateError
from transformers.utils.chat_template_utils import _compile_jinja_template

from mlxsft.data.sandbox import compiled
from mlxsft.data.time_limit import MemoryLimitExceeded, TimeLimitExceeded, time_limit

MESSAGES = [{"role": "user", "content": "a\nb\tc"}, {"role": "assistant", "content": "ä<|im_end|>"}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"x": [1, 2.5, None, True]}}}]
TEMPLATES = [
    "{% for m in messages %}{{ loop.index0 ~ ':' ~ m['role'] + '|' + m.content }}{% endfor %}",
    "{{ tools | tojson }}{{ tools | tojson(indent=4) }}{{ tools[0] | tojson(ensure_ascii=True) }}{{ tools }}",
    "{{ messages | map(attribute='content') | join(', ') }}{{ messages | join('-', attribute='role') }}",
    "{{ 'a' * 3 }}{{ [1] * 2 + [2] }}{{ 7 % 3 }}{{ 2 ** 10 }}{{ '%s is %05d' % ('x', 3) }}{{ 1.5 * 2 }}{{ 0.5 + 1 }}",
    "{{ 'aXbX'.replace('X', 'yy') }}{{ 'aXbX' | replace('X', 'yy', 1) }}{{ 'x'.center(5) }}{{ ', '.join(['a', 'b']) }}",
    "{{ '{} {:>5} {a}'.format(1, 'b', a=2) }}{{ '%s-%s' | format('a', 'b') }}{{ 'a\nb' | indent(3, true) }}",
    "{% for pair in messages | batch(3, 'x') %}{{ pair | length }}{% endfor %}{{ range(5) | slice(2) | list }}",
    "{% set ns = namespace(found=false, all=[]) %}{% for m in messages %}{% set ns.all = ns.all + [m.role] %}"
    "{% endfor %}{{ ns.all }}{{ {'a': (1, 2), 'b': [3]} }}{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}",
    "{% macro m(x, y=2) %}{{ x }}{{ y }}{{ caller() if caller }}{% endmacro %}{{ m(1) }}{% call m(3) %}in{% endcall %}",
    "{%- for m in messages -%}\n  {%- if loop.first %}{% continue %}{% endif %}\n {{ m.role }}\n{% endfor %}{{ x.y }}",
    "{% generation %}{{ messages[1].content | trim | upper }}{% endgeneration %}",
    "{% set x %}a{{ 1 }}{% endset %}{{ x }}{{ x is string }}{{ messages[-1:] }}{{ 'a' in 'abc' }}{{ dict(a=1) }}",
    "{{ ('a', 'b') | first }}{{ [[2, 'b'], [1, 'a']] | sort | list }}{{ {'b': 1, 'a': 2} | dictsort }}{{ 3.7 | int }}",
]


@pytest.mark.parametrize("text", TEMPLATES)
def test_templates_give_what_they_give_in_transformers(text: str) -> None:
    given: dict[str, Any] = {"messages": MESSAGES, "tools": TOOLS, "x": {}}
    outcomes = []
    for template in (_compile_jinja_template(text), compiled(text)):
        try:
            outcomes.append(template.render(**given))
        except (TemplateError, TypeError) as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]
    assert outcomes[0]


TOO_LARGE = [
    "{{ 'a' * N }}",
    "{{ N * ['a'] }}",
    "{{ 7 ** N }}",
    "{{ (7 ** 1000) * (7 ** 1000) }}",
    "{{ '%*d' % (N, 1) }}",
    "{{ '{:{}}'.format(1, N) }}",
    "{{ ['a'] | join('b' * 9999999) ~ 'b' * 9999999 }}",
    "{{ 'a'.ljust(N) }}",
    "{{ ('\\t' * 99).expandtabs(9999999) }}",
    "{% set a = 'a' * 9999999 %}{{ [a, a] }}",
    "{% set a = 'a' * 9999999 %}{% set b = {'a': a, 'b': a} %}",
    "{% set a = 'a' * 9999999 %}{% set b = dict(a=a, b=a) %}",
    "{% set a = 'a' * 9999999 %}{{ a }}{{ a }}",
    "{% set a = 'a' * 9999999 %}{% macro m() %}{{ a }}{{ a }}{% endmacro %}{% set b = m() %}",
    "{{ [1] | tojson(indent=99999999) }}",
]


@pytest.mark.parametrize("text", TOO_LARGE)
def test_what_would_be_too_large_is_refused_before_it_is_made(text: str) -> None:
    with pytest.raises(SecurityError, match="too large"):
        compiled(text.replace("N", "100000000")).render(messages=MESSAGES)


def busy(caught: type[BaseException]) -> None:
    """Work that catches what happens in it."""
    until = time.monotonic() + 5
    while time.monotonic() < until:
        with suppress(caught):
            while time.monotonic() < until:
                time.sleep(0.001)
        if caught is BaseException:
            return


@pytest.mark.parametrize("caught", [Exception, BaseException])
def test_work_that_catches_errors_does_not_escape_its_limit(caught: type[BaseException]) -> None:
    with pytest.raises(TimeLimitExceeded), time_limit(0.1):
        busy(caught)


def test_growing_memory_is_stopped() -> None:
    kept: list[bytes] = []

    def hoard() -> None:
        while len(kept) < 500:
            kept.append(b"\1" * (8 << 20))
            time.sleep(0.003)

    with pytest.raises(MemoryLimitExceeded), time_limit(60):
        hoard()

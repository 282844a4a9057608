"""Templates that try to break out, to run for ever or to fill the memory are refused, and soon."""

# ruff: noqa: E501 - a template on one line is easier to read

from __future__ import annotations

import threading
import time

import pytest

from nybble.errors import TemplateError
from nybble.text.budget import Limits
from nybble.text.chat import ChatTemplate

LIMITS = Limits(seconds=0.5)
SLOWEST = 5.0  # seconds on a busy machine, for work that unbounded would take hours
USER = [{"role": "user", "content": "Hi"}]

ESCAPES = {
    "CVE-2024-34359 popen": (
        "{% for x in ().__class__.__base__.__subclasses__() %}{% if 'warning' in x.__name__ %}"
        "{{ x()._module.__builtins__['__import__']('os').popen('touch /tmp/owned').read() }}{% endif %}{% endfor %}"
    ),
    "mro of a string": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals of a function": "{{ raise_exception.__globals__['os'] }}",
    "globals of a class": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "globals of a namespace": "{{ namespace.__init__.__globals__ }}",
    "globals of a macro": "{% macro m() %}{% endmacro %}{{ m.__call__.__func__.__globals__ }}",
    "context of self": "{{ self.__init__.__globals__ }}{{ self._TemplateReference__context.x.y }}",
    "attr filter": "{{ ''|attr('__class__') }}",
    "format string": "{{ '{0.__class__.__mro__}'.format('').x.y }}{{ '{0.__class__}'.format(0)() }}",
    "format by reference": "{% set f = '{0.__class__}'.format %}{{ f('')() }}",
    "format through map": "{{ ['{0.__class__}']|map('attr', 'format')|list }}",
    "format_map": "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "map to a hidden attribute": "{{ [range]|map(attribute='__class__')|map(attribute='__mro__')|list|first|first }}",
    "lipsum": "{{ lipsum.__globals__ }}",
    "code of a frame": "{{ range.gi_frame.f_globals.x }}",
    "changes the messages": "{{ messages.append('x') }}",
    "changes a message": "{{ messages[0].update({'role': 'system'}) }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import '/etc/passwd' as x %}",
    "extends": "{% extends '/etc/passwd' %}",
    "hidden filter": "{{ 1|_step(-1000000) }}",
}

BLOWUPS = {
    "nested empty loops": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
        "{% endfor %}{% endfor %}{% endfor %}"
    ),
    "filtered loops": (
        "{% for a in range(99999) if false %}{% endfor %}{% for a in range(9999) %}"
        "{% for b in range(99999) if false %}{% endfor %}{% endfor %}"
    ),
    "recursive loop": (
        "{% for x in [range(999)] recursive %}{{ loop([range(999), range(999)]) }}{% endfor %}"
    ),
    "loop called again and again": (
        "{% for x in [1, 2] recursive %}{% if loop.depth < 60 %}{{ loop([1, 2]) }}{% endif %}{% endfor %}"
    ),
    "macros calling macros": (
        "{% macro a(n) %}{% if n %}{{ a(n - 1) }}{{ a(n - 1) }}{% endif %}{% endmacro %}{{ a(60) }}"
    ),
    "macro without end": "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "block without end": "{% block a %}{{ self.a() }}{% endblock %}",
    "large range": "{{ range(10**10)|list }}",
    "string times number": "{{ 'a' * 10**10 }}",
    "number times string": "{% set x = 10000000000 %}{{ x * 'a' }}",
    "list times number": "{{ [1] * 10**9 }}",
    "power tower": "{{ 9**9**9**9**9 }}",
    "product": "{% set n = namespace(x=2) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}{{ n.x }}",
    "doubling by concatenation": (
        "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
    ),
    "doubling by addition": (
        "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}"
    ),
    "doubling lists": "{% set n = namespace(x=[1]) %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "nested lists": "{% set n = namespace(x=[1]) %}{% for i in range(99) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "nested dicts": (
        "{% set n = namespace(x=1) %}{% for i in range(99) %}{% set n.x = {'a': n.x, 'b': n.x} %}{% endfor %}"
        "{{ n.x|tojson }}"
    ),
    "nested by dict()": (
        "{% set n = namespace(x=1) %}{% for i in range(99) %}{% set n.x = dict(a=n.x, b=n.x) %}{% endfor %}{{ n.x }}"
    ),
    "namespaces that hold namespaces": (
        "{% set a = namespace() %}{% set b = namespace() %}{% set a.x = [b, b] %}{% set b.x = [a, a] %}{{ a }}"
    ),
    "slices kept": (
        "{% set s = 'a' * 1000000 %}{% set n = namespace(x=[]) %}"
        "{% for i in range(99999) %}{% set n.x = n.x + [s[i:]] %}{% endfor %}"
    ),
    "text in a loop": "{% for a in range(99999) %}{% for b in range(99) %}"
    + "x" * 9999
    + "{% endfor %}{% endfor %}",
    "set block": (
        "{% set s %}"
        + "x" * 9999
        + "{% endset %}{% for a in range(99999) %}{% set t %}{{ s }}{{ s }}{% endset %}"
        "{{ t }}{% endfor %}"
    ),
    "%-width": "{{ '%1000000000d' % 1 }}",
    "%-star": "{{ '%*d' % (1000000000, 1) }}",
    "%-precision": "{{ '%.1000000000f' % 1.0 }}",
    "format width": "{{ '{:1000000000d}'.format(1) }}",
    "format nested width": "{{ '{:{}}'.format(1, 1000000000) }}",
    "format filter": "{{ '%1000000000d'|format(1) }}",
    "format repeats": "{% set s = 'a' * 1000000 %}{{ ('{0}' * 1000).format(s) }}",
    "ljust": "{{ 'a'.ljust(10000000000) }}",
    "zfill": "{{ 'a'.zfill(10000000000) }}",
    "expandtabs": "{{ '\t'.expandtabs(1000000000) }}",
    "replace": "{% set s = 'a' * 100000 %}{{ s.replace('a', s) }}",
    "replace filter": "{% set s = 'a' * 100000 %}{{ s|replace('a', s) }}",
    "join": "{% set s = 'a' * 1000000 %}{{ s.join(range(99999)|map('string')) }}",
    "join filter": "{% set s = 'a' * 1000000 %}{{ range(99999)|join(s) }}",
    "join many": "{% set s = 'a' * 1000000 %}{{ ''.join([s] * 99999) }}",
    "center": "{{ 'a'|center(10000000000) }}",
    "indent": "{{ 'a\n' * 1000|indent(1000000000) }}",
    "batch": "{{ [1]|batch(1000000000, 0)|list }}",
    "slice": "{{ [1]|slice(1000000000)|list }}",
    "tojson indent": "{{ [[[1]]]|tojson(indent=1000000000) }}",
    "sum of lists": "{{ ([[1] * 1000] * 900)|sum(start=[]) }}",
    "time format": "{{ strftime_now('%1000000000Y') }}",
    "large source": "{# " + "x" * 300_000 + " #}",
    "deep parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep operators": "{{ 1" + " + 1" * 20000 + " }}",
    "deep blocks": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "deep loops": "{% for a in [1] %}" * 90 + "{% endfor %}" * 90,
}


def refused(source: str) -> float:
    """Seconds until the template is refused."""
    start = time.monotonic()
    with pytest.raises(TemplateError):
        ChatTemplate(source, limits=LIMITS).render(USER)
    return time.monotonic() - start


@pytest.mark.parametrize("name", ESCAPES)
def test_escapes_are_refused(name: str) -> None:
    assert refused(ESCAPES[name]) < SLOWEST


@pytest.mark.parametrize("name", BLOWUPS)
def test_blowups_are_refused(name: str) -> None:
    assert refused(BLOWUPS[name]) < SLOWEST


def test_time_limit_works_in_a_thread() -> None:
    caught: list[float] = []
    thread = threading.Thread(target=lambda: caught.append(refused(BLOWUPS["nested empty loops"])))
    thread.start()
    thread.join(timeout=30)
    assert caught and caught[0] < SLOWEST


def test_messages_say_what_happened() -> None:
    def message(source: str) -> str:
        with pytest.raises(TemplateError) as caught:
            ChatTemplate(source, limits=LIMITS).render(USER)
        return str(caught.value)

    assert "ran for more than 0.5 seconds" in message(BLOWUPS["nested empty loops"])
    assert "not safe" in message(ESCAPES["mro of a string"])
    assert "include is not allowed" in message(ESCAPES["include"])
    assert "300006 characters; the limit is 200000" in message(BLOWUPS["large source"])
    assert "invalid, line 2" in message("\n{% if %}")
    assert "'nothing' is undefined" in message("{{ nothing.at.all }}")
    assert message("{{ raise_exception('only cats') }}").endswith("refuses these messages: only cats")


def test_messages_cannot_bring_objects_in() -> None:
    class Trap:
        def __str__(self) -> str:
            raise AssertionError("was called")

    with pytest.raises(TemplateError, match=r"messages\[0\].content is a Trap"):
        ChatTemplate("{{ messages[0].content }}").render([{"role": "user", "content": Trap()}])


def test_long_honest_conversations_fit() -> None:
    text = "word " * 200_000
    messages = [{"role": role, "content": text} for role in ("user", "assistant") * 4 + ("user",)]
    rendered = ChatTemplate.named("chatml").render(messages)
    assert len(rendered) > 9 * len(text)

"""Honest templates work; templates that loop, grow or attack end with a TemplateError, soon and in little memory."""

from __future__ import annotations

import datetime
import threading
import time
from typing import Any

import pytest

from ggufmoe import TemplateError
from ggufmoe.templates.budget import Limits
from ggufmoe.templates.sandbox import MAX_TEMPLATE_CHARS, Program

MESSAGES = [{"role": "user", "content": 'say "hé" <now>'}, {"role": "assistant", "content": "hé"}]
QUICK = Limits(steps=20_000, seconds=2.0)


def run(source: str, limits: Limits = QUICK, **variables: Any) -> str:
    return Program(source, "test", limits).run({"messages": MESSAGES, **variables}, 100)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ 'a,b'.split(',') | join('-') }}", "a-b"),
        ("{{ ' x ' | trim }}{{ ' y '.strip() }}", "xy"),
        ("{{ messages[0]['content'][:3] }}{{ messages[-1].content }}", "sayhé"),
        ("{{ messages[1:] | length }}", "1"),
        ('{{ {"b": [1, 2.5], "a": none} | tojson(sort_keys=true) }}', '{"a": null, "b": [1, 2.5]}'),
        ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
        ("{{ '<é>' | tojson }}{{ 'é' | tojson(ensure_ascii=true) }}", '"<é>""\\u00e9"'),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "2"),
        ("{% for x in range(4) %}{% if x == 1 %}{% continue %}{% endif %}{{ x }}{% if x == 2 %}{% break %}{% endif %}"
         "{% endfor %}", "02"),
        ("{% for x in range(5) if x is odd %}{{ loop.index ~ ':' ~ x ~ ' ' }}{% endfor %}", "1:1 2:3 "),
        ("{% macro f(x, y='z') %}<{{ x ~ y }}{{ varargs | length }}>{% endmacro %}{{ f(1) }}{{ f(2, 3, 4) }}",
         "<1z0><231>"),
        ("{% macro f() %}({{ caller(7) }}){% endmacro %}{% call(x) f() %}{{ x }}!{% endcall %}", "(7!)"),
        ("{% set a, b = 1, 2 %}{{ a + b }}{{ 7 % 4 }}{{ 2 ** 10 }}{{ 'ab' * 2 }}{{ [1] * 2 }}", "331024abab[1, 1]"),
        ("{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list }}",
         "['say \"hé\" <now>']"),
        ("{% generation %}{{ 'said' }}{% endgeneration %}", "said"),
        ("{{ 'a-%s-%d' % ('b', 3) }}{{ '{} {x:>3}'.format(1, x=2) }}", "a-b-31   2"),
        ("{{ 'aXbX'.replace('X', 'yy') }}{{ 'aXbX' | replace('X', 'z') }}", "ayybyyazbz"),
        ("{{ 'a\nb' | indent(2) }}|{{ 'a\n\nb' | indent(2, true, true) }}", "a\n  b|  a\n  \n  b"),
        ("{{ [{'n': 1}, {'n': 2}] | join('+', attribute='n') }}{{ '-'.join(['a', 'b']) }}", "1+2a-b"),
        ("{% if 'user' in messages[0].role and undefined_thing is not defined %}yes{% endif %}", "yes"),
        ("{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}{{ dict(b=2).b }}", "a12"),
        ("{{ undefined_thing }}{{ none }}{{ 1.5 }}{{ (1, 2) }}{{ range(3) | list }}", "None1.5(1, 2)[0, 1, 2]"),
        ("{% set x %}in{{ 'side' }}{% endset %}{{ x | upper }}", "INSIDE"),
        ("{% if true %}\n  line\n{% endif %}\nend", "  line\nend"),
    ],
)  # fmt: skip
def test_honest_templates(source: str, expected: str) -> None:
    assert run(source) == expected


def test_what_is_refused_is_refused_when_it_is_used() -> None:
    source = "{% if used %}{{ 'http://x' | urlize }}{{ messages.append(1) }}{% endif %}{{ 'urlize' is filter }}"
    assert run(source, used=False) == "True"
    with pytest.raises(TemplateError, match="the filter urlize is not available to chat templates"):
        run(source, used=True)


def test_dates_without_padding() -> None:
    now = datetime.datetime.now()
    assert run("{{ strftime_now('%-d. %B %Y, 100%%') }}") == f"{now.day}. {now:%B %Y}, 100%"
    assert run("{{ strftime_now('%%-d') }}") == "%-d"
    assert run("{{ strftime_now('%-S') }}").isdigit()


def test_dates_with_the_other_flags_of_strftime() -> None:
    now = datetime.datetime.now()
    source = "{{ strftime_now('%_d|%^a|%0m|%F|%Od') }}"
    assert run(source) == f"{now.day:2}|{f'{now:%a}'.upper()}|{now:%m}|{now:%Y-%m-%d}|{now:%d}"
    with pytest.raises(TemplateError, match="an unusual date format"):
        run("{{ strftime_now('%999999999d') }}")


def test_the_whole_of_a_loop_over_messages() -> None:
    source = "{% for m in messages %}[{{ m.role }}] {{ m['content'] | tojson }}{% endfor %}"
    assert run(source) == '[user] "say \\"hé\\" <now>"[assistant] "hé"'


def test_the_time_is_told() -> None:
    assert run("{{ strftime_now('%Y') }}") == time.strftime("%Y")


def test_a_long_conversation_is_no_attack() -> None:
    messages = [{"role": "user", "content": "word " * 2000}] * 1000
    source = "{% for m in messages %}{% if m.role == 'user' %}{{ '[' + m.content | trim + ']' }}{% endif %}{% endfor %}"
    text = Program(source, "test").run({"messages": messages}, 1000 * 10_000)
    assert len(text) == 1000 * 10_001


_SHARED = "{% set a = [1] %}{% set b = [1] %}" + "{% set a = [a, a] %}{% set b = [b, b] %}" * 60
ATTACKS = {
    "loops in loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops whose filter is false": "{% for a in range(99999) %}"
    "{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
    "native loops": "{{ range(99999) | select('in', range(99999) | list) | list | length }}",
    "a range too large": "{% for a in range(10 ** 9) %}{% endfor %}",
    "text times a number": "{{ 'a' * 10 ** 9 }}",
    "a number times a list": "{{ (10 ** 9 * [1]) | length }}",
    "doubling with ~": "{% set n = namespace(x='aaaa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "doubling with +": "{% set n = namespace(x='aaaa') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "doubling lists": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "doubling with set blocks": "{% set x %}aaaaaaaa{% endset %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 40,
    "literal text in loops": "{% set x %}{% for i in range(9999) %}" + "z" * 50_000 + "{% endfor %}{% endset %}",
    "literal lists in loops": "{% set n = namespace(l=[]) %}{% for i in range(9999) %}"
    "{% set n.l = [n.l, [" + "1," * 5000 + "]] %}{% endfor %}",
    "slices kept": "{% set b = 'a' * 1000000 %}{% set n = namespace(l=[]) %}"
    "{% for i in range(999) %}{% set n.l = [n.l, b[1:]] %}{% endfor %}",
    "many texts joined": "{% set x = 'a' * 1000000 %}{{ ([x] * 100000) | join | length }}",
    "many texts printed": "{% set x = 'a' * 1000000 %}{{ [x] * 100000 }}",
    "a long separator": "{{ ('a' * 100000).join(range(9999) | map('string') | list) | length }}",
    "join of a text": "{{ ('a' * 100000).join('b' * 99999) | length }}",
    "replace, the method": "{% set x = 'a' * 1000000 %}{{ x.replace('a', x) | length }}",
    "replace of nothing": "{% set x = 'a' * 1000000 %}{{ x.replace('', x) | length }}",
    "replace, the filter": "{% set x = 'a' * 1000000 %}{{ x | replace('a', x) | length }}",
    "translate into long texts": "{{ ('a' * 100000).translate({97: 'x' * 100000}) | length }}",
    "bytes times a number": "{{ 'a'.encode() * 10 ** 9 }}",
    "a slow encoding": "{{ ('\u00e9' * 100000).encode('punycode') | length }}",
    "bytes with a wide field": "{{ '%1000000000d'.encode() % 1 }}",
    "indents at depth": "{% set n = namespace(l=range(50000) | list) %}{% for i in range(300) %}"
    "{% set n.l = [n.l] %}{% endfor %}{{ n.l | tojson(indent=16) | length }}",
    "powers": "{{ 9 ** (9 ** 9) }}",
    "a large base": "{{ (2 ** 64) ** 64 }}",
    "large numbers": "{% set n = namespace(x=2 ** 64) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "a wide field": "{{ '{:1000000000}'.format(1) }}",
    "a wide field inside": "{{ '{:{}}'.format(1, 10 ** 9) }}",
    "many fields": "{% set x = 'a' * 1000000 %}{{ ('{0}' * 1000).format(x) | length }}",
    "a wide % field": "{{ '%1000000000d' % 1 }}",
    "a % field of any width": "{{ '%*d' % (10 ** 9, 1) }}",
    "many % fields": "{% set x = 'a' * 1000000 %}{{ ('%(x)s' * 1000) % {'x': x} }}",
    "a wide date": "{{ strftime_now('%1000000000d') }}",
    "a deep indent": "{{ messages | tojson(indent=100000000) }}",
    "a long json separator": "{{ messages | tojson(separators=('a' * 7000000, ('b' * 7000000))) }}",
    "indent, the filter": "{{ 'a\nb' | indent(1000000000) }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "recursion that branches": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}",
    "recursive loops": "{% for x in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
    "blocks that call blocks": "{% block b0 %}x{% endblock %}"
    + "".join(f"{{% block b{i + 1} %}}" + f"{{{{ self.b{i}() }}}}" * 2 + "{% endblock %}" for i in range(40)),
    "arguments of arguments": "{% macro f() %}{{ g(varargs, varargs) }}{% endmacro %}"
    "{% macro g() %}{{ f(varargs, varargs) }}{% endmacro %}{{ f(1, 1) }}",
    "shared lists compared": _SHARED + "{% if a == b %}x{% endif %}",
    "shared lists printed": _SHARED + "{{ a }}",
    "shared lists as json": _SHARED + "{{ a | tojson }}",
    "shared tuples as keys": "{% set a = (1,) %}" + "{% set a = (a, a) %}" * 60 + "{{ {a: 1} | length }}",
    "the class of a text": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "the class by key": "{{ ''['__class__']['__mro__'] }}",
    "the class by filter": "{{ '' | attr('__class__') }}",
    "the class by format": "{{ '{0.__class__.__mro__}'.format(1) ~ undefined.x }}",
    "globals of a function": "{{ raise_exception.__globals__['sys'] }}",
    "the frame of a generator": "{{ (messages | map('upper')).gi_frame.f_globals }}",
    "methods that pad": "{{ 'a'.center(1000000000) }}",
    "methods that pad to the left": "{{ 'a'.zfill(1000000000) ~ 'a'.ljust(width=10 ** 9) }}",
    "tabs": "{{ ('\t' * 100000).expandtabs(100000) }}",
    "tabs by name": "{{ 'a\tb'.expandtabs(tabsize=10 ** 9) }}",
    "filters that pad": "{{ 'a' | center(1000000000) }}",
    "many slices": "{{ [1] | slice(10 ** 9) | list | length }}",
    "a wide batch": "{{ [1] | batch(10 ** 9, 'x') | list | length }}",
    "sums of lists": "{{ ([[1] * 1000] * 100000) | sum(start=[]) | length }}",
    "many digits": "{{ 1.5 | round(10 ** 9, 'ceil') }}",
    "a wide format by filter": "{{ '%1000000000d' | format(1) }}",
    "many fields by filter": "{% set x = 'a' * 1000000 %}{{ ('%(x)s' * 1000) | format(x=x) }}",
    "a wide field by mapping": "{{ '{a:1000000000}'.format_map({'a': 1}) }}",
    "quoted text": "{% set x = 'é' * 3000000 %}{{ x | urlencode | length }}",
    "escaped text": "{% set x = '<' * 7000000 %}{{ x | forceescape | length }}",
    "tags upon tags": "{{ ('<' * 500000 ~ '>' * 500000) | striptags | length }}",
    "one long word": "{{ ('a' * 1000000) | wordwrap(1) | length }}",
    "hyphens": "{{ ('-' * 1000000) | wordwrap(5) | length }}",
    "pretty printing": "{% set a = [1] %}" + "{% set a = [a, a] %}" * 60 + "{{ a | pprint }}",
    "a short truncation": "{{ 'abcdefghijkl' | truncate(1) }}",
    "a cycle of nothing": "{{ cycler() }}",
    "items by attribute": "{{ {'a': 1} | attr('__init__') }}",
    "bytes of a number": "{{ (1).to_bytes(1000000000, 'big') }}",
    "dummy text": "{{ lipsum(n=100000) }}",
    "changing what was given": "{{ messages.append(1) }}",
    "other files": "{% include '/etc/passwd' %}",
    "an object that has no text": "{% set n = namespace() %}{% set n.n = n %}{{ [n] }}",
    "a generator that has no text": "{{ messages | map('length') }}",
    "deep parentheses": "{{ " + "(" * 40_000 + "1" + ")" * 40_000 + " }}",
    "a long sum": "{{ 1" + "+1" * 40_000 + " }}",
    "no template": "{% for %}",
    "a tag that nobody knows": "{% do x %}",
    "undefined": "{{ x.y.z }}",
    "division": "{{ 1 / 0 }}",
    "a number that is infinite": "{{ 1e999 }}",
    "a key that cannot be": "{{ {[1]: 2} }}",
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks(name: str) -> None:
    begin = time.thread_time()
    with pytest.raises(TemplateError) as caught:
        run(ATTACKS[name], Limits(steps=20_000, seconds=0.5))
    assert time.thread_time() - begin < 5
    message = str(caught.value)
    assert message.startswith("test: ")
    assert "\n" not in message
    assert len(message) < 500


def test_insides_are_not_shown() -> None:
    assert run("{{ raise_exception.__globals__ }}{{ ''.__class__ }}{{ '{0.__class__}'.format(1) }}") == ""
    assert run("{{ [''] | map(attribute='__class__') | map('string') | list }}") == "['']"


def test_a_template_that_is_too_long() -> None:
    with pytest.raises(TemplateError, match="100001 characters; a template may have 100000"):
        Program("x" * (MAX_TEMPLATE_CHARS + 1), "test")


def test_what_the_template_raises_is_one_line() -> None:
    with pytest.raises(TemplateError, match=r"^test: refuses this conversation: Roles must alternate$"):
        run("{{ raise_exception('Roles\n  must alternate') }}")
    with pytest.raises(TemplateError) as caught:
        run("{{ raise_exception('x' * 100000) }}")
    assert len(str(caught.value)) < 400


def test_the_budget_is_new_for_each_rendering() -> None:
    program = Program("{% for x in range(n) %}{% endfor %}done", "test", QUICK)
    for n in (10, 99_999, 10):
        if n == 10:
            assert program.run({"n": n}, 0) == "done"
        else:
            with pytest.raises(TemplateError, match="more than 20000 steps"):
                program.run({"n": n}, 0)


def test_time_is_limited_in_any_thread() -> None:
    caught: list[TemplateError] = []

    def work() -> None:
        try:
            run("{% for a in range(99999) %}{% endfor %}" * 100, Limits(steps=10**9, seconds=0.2))
        except TemplateError as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(10)
    assert "more than 0.2 s" in str(caught[0])

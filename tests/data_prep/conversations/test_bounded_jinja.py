"""What a template may make is bounded, before it is made; what templates do make is not touched."""

from __future__ import annotations

import subprocess
import sys

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from weftrain.data_prep.conversations.bounded_jinja import BoundedEnvironment, TooLargeError

LARGE = [
    "{{ 'a' * 10 ** 10 }}",
    "{{ 10 ** 10 * 'a' }}",
    "{{ [1] * 10 ** 9 }}",
    "{{ 10 ** (10 ** 9) }}",
    "{{ (2 ** 4000) * (2 ** 4000) }}",
    "{{ '%5000000000d' % 1 }}",
    "{{ '%*d' % (5000000000, 1) }}",
    "{{ '{:>5000000000}'.format(1) }}",
    "{{ '{:>{}}'.format(1, 5000000000) }}",
    "{{ '{x:>5000000000}'.format_map({'x': 1}) }}",
    "{{ 'a'.ljust(5000000000) }}",
    "{{ 'a' | center(5000000000) }}",
    "{{ 'x' | indent(10 ** 10, true) }}",
    "{{ {'a': 1} | tojson(indent=10 ** 10) }}",
    "{{ (range(99999) | list) | join('x' * 100000) }}",
    "{{ ('a' * 10000).replace('a', 'b' * 10000).replace('b', 'c' * 10000) }}",
    "{% set m = namespace(x='aaaaaaaa') %}{% for i in range(40) %}{% set m.x = m.x ~ m.x %}{% endfor %}",
    "{% set m = namespace(x='aaaaaaaa') %}{% for i in range(40) %}{% set m.x = m.x + m.x %}{% endfor %}",
    "{% set m = namespace(x=[1]) %}{% for i in range(40) %}{% set m.x = m.x + m.x %}{% endfor %}",
    "{% set m = namespace(x=[]) %}{% for i in range(999) %}{% set m.x = m.x + ['a' * 9999999 ~ i] %}{% endfor %}",
]


@pytest.mark.parametrize("text", LARGE)
def test_what_is_too_large_is_refused(text: str) -> None:
    environment = BoundedEnvironment()
    with pytest.raises(TooLargeError), environment.bounds():
        environment.from_string(text).render()


def test_it_is_refused_before_it_takes_memory() -> None:
    source = f"""
import resource
from weftrain.data_prep.conversations.bounded_jinja import BoundedEnvironment, TooLargeError
environment = BoundedEnvironment()
resource.setrlimit(resource.RLIMIT_AS, (1500 << 20, 1500 << 20))
for text in {LARGE[:-1]!r}:
    try:
        with environment.bounds():
            environment.from_string(text).render()
    except TooLargeError:
        continue
    raise SystemExit(text)
"""
    subprocess.run([sys.executable, "-c", source], check=True, timeout=120)


@pytest.mark.parametrize(
    "text",
    [
        "{{ 'a' * 3 ~ 1 ~ none }}{{ 7 % 3 }}{{ '%s-%03d' % ('x', 5) }}{{ 2 ** 10 }}{{ 3 * 4 }}{{ 1.5 ** 2 }}",
        "{{ '{:>5}|{}'.format(1, 'b') }}{{ '{x}'.format_map({'x': 2}) }}{{ 'a,b'.split(',') | join('; ') }}",
        "{{ [1, 2] + [3] }}{{ 'abc' | upper }}{{ 'abc' | indent(4, true) }}{{ (1, 2) + (3,) }}{{ 'x' + 'y' }}",
        "{{ ['b', 'a'] | sort | first }}{{ [{'r': 1}, {'r': 2}] | map(attribute='r') | list }}",
        "{{ [{'r': 1}, {'r': 2}] | selectattr('r', 'equalto', 2) | list | length }}{{ 'a' in 'cab' }}",
        "{{ {'a': [1, 2]} | tojson }}{{ -2 ** 2 }}{{ 2 ** -1 }}{{ 'é' ~ '中' }}{{ x is defined }}{{ 'a\nb' | trim }}",
    ],
)
def test_what_templates_do_is_as_in_the_sandbox_alone(text: str) -> None:
    environment = BoundedEnvironment()
    with environment.bounds():
        found = environment.from_string(text).render()
    assert found == ImmutableSandboxedEnvironment().from_string(text).render()


def test_each_rendering_counts_from_zero() -> None:
    environment = BoundedEnvironment()
    text = "{% set m = namespace(x=0) %}{% for i in range(40) %}{% set m.x = 'a' * 15000000 %}{% endfor %}"
    template = environment.from_string(text)
    for _ in range(2):
        with environment.bounds():
            template.render()
    with pytest.raises(TooLargeError, match="altogether"), environment.bounds():
        template.render()
        template.render()

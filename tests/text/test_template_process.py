"""Chat templates in a process of their own: the same text, hostile ones are stopped, and the next works."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from pilotfish.checkpoints.catalog import resolve
from pilotfish.errors import ParameterError
from pilotfish.text.template_process import LARGE, TemplateError, TemplateLimitError, TemplateProcesses, fault_of
from pilotfish.text.tokenizer import Tokenizer, load_tokenizer

pytestmark = pytest.mark.process

MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Was ist 2+3? <b>naïve</b> 😀 \ud800 \x00"},
    {"role": "assistant", "content": "five", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 10**30}}}]},
]
TEMPLATES = [
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m['content'] | trim }}\n{% endfor %}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% if loop.last %}{% break %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}>{% endif %}",
    "{{ messages | tojson(indent=2) }}{{ tools | tojson if tools else '' }}{{ enable_thinking }}",
    "{% set ns = namespace(text='') %}{% for m in messages %}{% set ns.text = ns.text ~ m.content %}{% endfor %}"
    "{{ ns.text.split('?')[0] }}",
]
SLOW = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% set ns = namespace(a=[1], b=[1]) %}{% for i in range(60) %}{% set ns.a = [ns.a, ns.a] %}"
    "{% set ns.b = [ns.b, ns.b] %}{% endfor %}{{ ns.a == ns.b }}",
]
SWELLING = [
    "{{ '%1000000000d' % 1 }}",
    "{{ 'a' * 10**9 }}",
    "{{ ('a' * 10**7) | center(10**9) }}",
    "{% set ns = namespace(x='aaaa') %}{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "{{ (['a' * 1000] * 10**6) | join(',') }}",
    "{{ messages[0].content.replace('', 'a' * 10**8) }}",
]


@pytest.fixture(scope="module")
def processes() -> Iterator[TemplateProcesses]:
    made = TemplateProcesses(seconds=1.0)
    yield made
    made.close()


@pytest.fixture(scope="module")
def isolated(tiny_llama: Path) -> Iterator[Tokenizer]:
    tokenizer = load_tokenizer(resolve(str(tiny_llama)))
    tokenizer.isolate_templates()
    yield tokenizer
    tokenizer.close()


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize(
    "variables", [{}, {"tools": [{"type": "function", "function": {"name": "f"}}], "enable_thinking": False}]
)
@pytest.mark.parametrize("times", [1, 2000])
def test_the_text_is_transformers(
    isolated: Tokenizer, tiny_llama: Path, template: str, variables: dict[str, Any], times: int
) -> None:
    plain = load_tokenizer(resolve(str(tiny_llama)))
    plain.chat_template = isolated.chat_template = template
    for more in (True, False):
        wanted = plain.apply_chat_template(MESSAGES * times, more, **variables)
        assert isolated.apply_chat_template(MESSAGES * times, more, **variables) == wanted


@pytest.mark.parametrize("template", SLOW)
def test_a_template_that_takes_too_long_is_ended(processes: TemplateProcesses, template: str) -> None:
    processes.render("warm", MESSAGES, {})
    began = time.monotonic()
    with pytest.raises(TemplateLimitError, match=r"takes more than 1 s, which is the limit"):
        processes.render(template, MESSAGES, {})
    assert time.monotonic() - began < 10
    assert processes.render("{{ messages[0].role }}", MESSAGES, {}) == "system"


@pytest.mark.parametrize("template", SWELLING)
def test_a_template_that_swells_is_ended(template: str) -> None:
    processes = TemplateProcesses(seconds=20.0)
    try:
        with pytest.raises(TemplateLimitError, match=r"too large|memory"):
            processes.render(template, MESSAGES, {})
        assert processes.render("{{ messages[0].role }}", MESSAGES, {}) == "system"
        assert sum(child.memory_info().rss for child in psutil.Process().children()) < 2**30
    finally:
        processes.close()


def test_short_conversations_do_not_wait_for_long_ones(processes: TemplateProcesses) -> None:
    processes.render("warm", MESSAGES, {})
    long = [{"role": "user", "content": "a" * LARGE}]
    processes.render("warm", long, {})
    raised = []

    def stuck() -> None:
        try:
            processes.render(SLOW[0], long, {})
        except TemplateLimitError:
            raised.append(time.monotonic())

    thread = threading.Thread(target=stuck)
    thread.start()
    time.sleep(0.1)
    assert processes.render("short", MESSAGES, {}) == "short"
    answered = time.monotonic()
    thread.join()
    assert answered < raised[0]


def test_errors_of_templates(isolated: Tokenizer, processes: TemplateProcesses) -> None:
    with pytest.raises(TemplateError, match="roles must alternate"):
        processes.render("{{ raise_exception('roles must alternate') }}", MESSAGES, {})
    with pytest.raises(TemplateError):
        processes.render("{% for %}", MESSAGES, {})
    isolated.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ParameterError, match="refuses these messages: roles must alternate"):
        isolated.apply_chat_template(MESSAGES)
    isolated.chat_template = SWELLING[0]
    with pytest.raises(ParameterError, match="the model's chat template makes a text that is too large"):
        isolated.apply_chat_template(MESSAGES)


def test_processes_end_with_what_started_them() -> None:
    made = TemplateProcesses()
    made.start()
    (child,) = [each for each in psutil.Process().children() if "template_process" in " ".join(each.cmdline())][-1:]
    made.close()
    assert not child.is_running()


@pytest.mark.parametrize(
    "template", ["{% if %}", "{{ a", "{% for a in b %}", "{% unknown %}", "{{ '(' " + "(" * 5000, "{% if a %}" * 5000]
)
def test_a_fault_of_syntax_is_found_without_rendering(template: str) -> None:
    assert fault_of(template)


@pytest.mark.parametrize("template", [*TEMPLATES, *SLOW, *SWELLING])
def test_templates_without_a_fault_are_only_read(template: str) -> None:
    start = time.monotonic()
    assert fault_of(template) is None
    assert time.monotonic() - start < 5

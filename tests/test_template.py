"""Chat templates: what real ones write, and what hostile ones cannot do."""

# ruff: noqa: RUF001

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import vocabularies as v

from localds import template as template_module
from localds import template_process
from localds.template import ChatTemplate, TemplateError, template_for
from localds.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi <b>&'\"\n"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "你好 😀"},
]


def render(source: str, messages: list[dict[str, Any]] | None = None, **extra: Any) -> str:
    with closing(ChatTemplate(source, "<s>", "</s>")) as template:
        return template.render(TALK if messages is None else messages, **extra)


def refusal(source: str, **extra: Any) -> str:
    """The message of the error that a template ends with, and within the time limit."""
    started = time.monotonic()
    with pytest.raises(TemplateError) as caught:
        render(source, **extra)
    # Time to start the process and to end it comes on top of the limit.
    assert time.monotonic() - started < template_module.TIMEOUT_SECONDS + 8
    return str(caught.value)


# Templates in the manner of published models

V3 = """{% if not add_generation_prompt is defined %}
{% set add_generation_prompt = false %}{% endif %}
{%- set ns = namespace(is_first=false, system='', tools=[]) -%}
{%- for message in messages %}{%- if message['role'] == 'system' %}
{%- set ns.system = ns.system ~ message['content'] %}{%- endif %}{%- endfor -%}
{{ bos_token }}{{ ns.system }}
{%- for message in messages %}
{%- if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}{%- endif %}
{%- if message['role'] == 'assistant' and message['content'] is not none %}
{%- set content = message['content'] %}
{%- if '</think>' in content %}{%- set content = content.split('</think>')[-1] %}{%- endif %}
{{- '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}{%- endif %}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<｜Assistant｜>' }}
{%- if thinking is defined and thinking %}{{ '<think>\\n' }}{%- endif %}{%- endif %}"""

MIXTRAL = """{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{% endif %}
{% if message['role'] == 'user' %}
{{- '[INST] ' + message['content'] + ' [/INST]' }}
{%- elif message['role'] == 'assistant' %}
{{- message['content'] + eos_token }}
{%- endif %}{% endfor %}"""

GLM = """[gMASK]<sop>
{%- if tools -%}
<|system|>
# Tools
{% for tool in tools %}{{ tool | tojson(ensure_ascii=False) }}
{% endfor %}{%- endif -%}
{%- macro visible(content) -%}
{%- if content is string -%}{{- content }}
{%- elif content is iterable and content is not mapping -%}
{%- for item in content -%}{%- if item is mapping and item.type == 'text' -%}{{- item.text }}
{%- elif item is string -%}{{- item }}{%- endif -%}{%- endfor -%}
{%- else -%}{{- content }}{%- endif -%}{%- endmacro -%}
{%- for m in messages %}
{%- if m.role == 'user' -%}<|user|>
{{ visible(m.content) }}
{{- '/nothink' if enable_thinking is defined and not enable_thinking else '' -}}
{%- elif m.role == 'assistant' -%}<|assistant|>
{{ visible(m.content).strip() }}
{%- elif m.role == 'system' -%}<|system|>
{{ visible(m.content) }}
{%- endif -%}{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"""

KIMI = """{%- for message in messages -%}
{%- if loop.first and messages[0]['role'] != 'system' -%}
<|im_system|>system<|im_middle|>You are Kimi.<|im_end|>
{%- endif -%}
{%- set name = message.get('name') or message['role'] -%}
<|im_{{ message['role'] }}|>{{ name }}<|im_middle|>{{ message['content'] }}<|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_assistant|>assistant<|im_middle|>{%- endif -%}"""


def test_deepseek_v3_style() -> None:
    text = (
        "<s>Be brief.<｜User｜>Hi <b>&'\"\n<｜Assistant｜>Hello<｜end▁of▁sentence｜>"
        "<｜User｜>你好 😀"
    )
    assert render(V3) == text + "<｜Assistant｜>"
    assert render(V3, add_generation_prompt=False) == text
    assert render(V3, thinking=True) == text + "<｜Assistant｜><think>\n"
    thought = [{"role": "assistant", "content": "<think>x</think>y"}]
    assert render(V3, thought) == "<s><｜Assistant｜>y<｜end▁of▁sentence｜><｜Assistant｜>"


def test_mixtral_style() -> None:
    turns = TALK[1:]
    assert render(MIXTRAL, turns) == (
        "<s>[INST] Hi <b>&'\"\n [/INST]Hello</s>[INST] 你好 😀 [/INST]"
    )
    assert "refuses the conversation: Conversation roles must alternate" in refusal(MIXTRAL)


def test_glm_style() -> None:
    tools = [{"name": "größe", "parameters": {"a": [1, None, True]}}]
    text = render(GLM, TALK[:2], tools=tools, enable_thinking=False)
    assert text == (
        '[gMASK]<sop><|system|>\n# Tools\n{"name": "größe", "parameters": {"a": [1, null, true]}}\n'
        "<|system|>\nBe brief.<|user|>\nHi <b>&'\"\n/nothink<|assistant|>"
    )
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, "b"]}]
    assert render(GLM, parts) == "[gMASK]<sop><|user|>\nab<|assistant|>"


def test_kimi_style() -> None:
    assert render(KIMI, TALK[2:]) == (
        "<|im_system|>system<|im_middle|>You are Kimi.<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|>Hello<|im_end|>"
        "<|im_user|>user<|im_middle|>你好 😀<|im_end|><|im_assistant|>assistant<|im_middle|>"
    )


@pytest.mark.oracle
@pytest.mark.parametrize("source", [V3, GLM, KIMI])
def test_as_transformers_renders(source: str) -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    wanted, _ = utils.render_jinja_template(
        [TALK], chat_template=source, add_generation_prompt=True, **tokens
    )
    assert render(source) == wanted[0]


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}x{% endfor %}", "x"),
        ("a\n  {% if true %}\n  b\n  {% endif %}\nc\n", "a\n  b\nc"),
        ("{{ {'b': '<é>', 'a': 1} | tojson }}", '{"b": "<é>", "a": 1}'),
        ("{{ [1, 2] | tojson(indent=1) }}", "[\n 1,\n 2\n]"),
        ("{% generation %}{{ bos_token }}{% endgeneration %}", "<s>"),
        ("{{ tools is none }} {{ nothing is defined }} {{ nothing }}", "True False "),
        ("{{ messages[-1]['content'][:2] }}", "你好"),
        ("{{ messages | selectattr('role', 'equalto', 'user') | list | length }}", "2"),
    ],
)
def test_what_templates_rely_on(source: str, wanted: str) -> None:
    assert render(source) == wanted


def test_the_date() -> None:
    assert render("{{ strftime_now('%Y-%m') }}") == time.strftime("%Y-%m")


# Errors


def test_a_syntax_error_names_the_line() -> None:
    message = refusal("first\nsecond\n{% for x in %}\n")
    assert "syntax error" in message
    assert "line 3 of the template" in message


def test_a_failure_names_the_line() -> None:
    message = refusal("a\n\n{{ messages[0].no.such }}")
    assert "has no attribute 'no'" in message
    assert "line 3 of the template" in message


def test_what_json_cannot_say_is_refused_and_the_template_goes_on() -> None:
    with closing(ChatTemplate("{{ x }}", "", "")) as template:
        for value in (b"bytes", object(), {1, 2}):
            with pytest.raises(TemplateError, match="cannot be given the messages"):
                template.render([], x=value)
        assert template.render([], x=1) == "1"


def test_an_error_does_not_spoil_the_next_rendering() -> None:
    source = "{% if x == 1 %}{{ raise_exception('one') }}{% endif %}{{ 'a' * x }}{{ x }}"
    with closing(ChatTemplate(source, "", "")) as template:
        for x, text in ((2, "aa2"), (1, None), (3, "aaa3"), (10**10, None), (0, "0")):
            if text is None:
                with pytest.raises(TemplateError):
                    template.render([], x=x)
            else:
                assert template.render([], x=x) == text


# Hostile templates

ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (ENDLESS, "takes too long"),
        # Folded when the template is compiled, or computed when it runs.
        ("{{ 9 ** (9 ** (9 ** 9)) }}", "takes too long|too much memory|failed"),
        ("{% set x = 7 %}{{ x ** (x ** (x ** 4)) }}", "takes too long|too much memory|failed"),
        ("{{ 'a' * 10**9 }}", "too much memory"),
        ("{{ 'a' * 10**13 }}", "too much memory"),
        ("{% set a = 'aaaaaaaa' %}{{ a * (10**9) }}", "too much memory"),
        ("{{ [0] * 10**9 }}", "too much memory"),
        ("{{ '%1000000000d' % 1 }}", "too much memory"),
        ("{{ '%s' | format('x') | center(10**9) }}", "too much memory"),
        ("{{ 'a'.ljust(10**10) }}", "too much memory"),
        ("{{ '{:>1000000000}'.format(1) }}", "too much memory"),
        ("{{ ('a' * 10**6) | indent(10**9, true) }}", "too much memory"),
        (
            "{% set n = namespace(x='aaaaaaaaaa') %}{% for i in range(99) %}"
            "{% set n.x = n.x ~ n.x %}{% endfor %}",
            "too much memory",
        ),
        (
            "{% set n = namespace(x=['a']) %}{% for i in range(99) %}"
            "{% set n.x = n.x + n.x %}{% endfor %}",
            "too much memory|takes too long",
        ),
        ("{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}", "more than 4,194,304 char"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "without end"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "without end|failed"),
        ("{{ range(10**9) | list }}", "Range too big"),
        ("{% include '/etc/passwd' %}", "failed"),
        ("{% import 'os' as os %}", "failed"),
        ("{{ messages.append(1) }}", "must not do"),
        ("{{ namespace.__init__.__globals__ }}", "must not do"),
        ("{{ cycler.__init__.__globals__.os }}", "must not do"),
        ("{{ lipsum.__globals__ }}", "undefined"),
        ("{{ ''.__class__.__mro__ }}", "must not do"),
        ("{{ (''|attr('__class__')).__mro__ }}", "must not do"),
        ("{{ raise_exception.__globals__['os'].system('true') }}", "must not do"),
        ("{{ '{0.__class__.__mro__}'.format(1) }}", "must not do"),
        ("{{ strftime_now('%Y' * 10**9) }}", "too much memory"),
        ("\ud800{{ 1 }", "syntax error"),
    ],
)
def test_a_hostile_template_ends_with_an_error(source: str, message: str) -> None:
    assert re.search(message, refusal(source))


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__ }}",
        "{{ ''['__class__'] }}",
        "{{ self.__dict__ }}",
        "{{ messages.__class__ }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ '%(x.__class__)s' | format(x=1) if false else '' }}",
        "{{ raise_exception.__code__ }}",
    ],
)
def test_hidden_attributes_show_nothing(source: str) -> None:
    assert render(source) == ""


def test_a_stopped_template_can_be_used_again() -> None:
    source = "{% if x %}" + ENDLESS + "{% endif %}fine"
    with closing(ChatTemplate(source, "", "")) as template:
        with pytest.raises(TemplateError, match="takes too long"):
            template.render([], x=True)
        assert template.render([], x=False) == "fine"


def test_huge_conversations_pass_or_are_refused() -> None:
    text = "é😀" * 1_000_000
    with closing(ChatTemplate("{{ messages[0].content }}", "", "")) as template:
        assert template.render([{"content": text[:1_500_000]}]) == text[:1_500_000]
        with pytest.raises(TemplateError, match="bytes of text"):
            template.render([{"content": text}])
        assert template.render([{"content": "x"}]) == "x"


# The process


@pytest.fixture
def started() -> Iterator[ChatTemplate]:
    with closing(ChatTemplate("{{ bos_token }}", "<s>", "")) as template:
        template.start()
        yield template


def worker(template: ChatTemplate) -> int:
    """Id of the template's process."""
    process = template._process
    assert process
    return process._process.pid


def test_starting_takes_no_time_and_the_process_stays(started: ChatTemplate) -> None:
    before = time.monotonic()
    with closing(ChatTemplate("x", "", "")) as other:
        other.start()
        assert time.monotonic() - before < 0.5
    pid = worker(started)
    assert started.render([]) == started.render([]) == "<s>"
    assert worker(started) == pid


def test_a_process_that_was_killed_is_an_error_and_then_replaced(started: ChatTemplate) -> None:
    assert started.render([]) == "<s>"
    os.kill(worker(started), signal.SIGKILL)
    with pytest.raises(TemplateError, match=r"ended unexpectedly \(signal 9\)"):
        started.render([])
    assert started.render([]) == "<s>"


def test_a_process_that_cannot_start_is_an_error_of_render(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    template = ChatTemplate("x", "", "")
    template.start()
    with pytest.raises(TemplateError, match="cannot be started"):
        template.render([])


def test_ctrl_c_does_not_reach_the_process(started: ChatTemplate) -> None:
    assert started.render([]) == "<s>"
    assert os.getsid(worker(started)) == worker(started)


def test_an_interrupted_rendering_leaves_nothing_half_read(
    started: ChatTemplate, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert started.render([]) == "<s>"
    process = started._process
    assert process

    def interrupted() -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr(process, "_receive", interrupted)
    with pytest.raises(KeyboardInterrupt):
        started.render([])
    assert started.render([]) == "<s>"


def gone(pid: int, seconds: float = 10) -> bool:
    """Whether the process ends in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False


def test_the_process_ends_when_the_template_is_forgotten() -> None:
    template = ChatTemplate("x", "", "")
    assert template.render([]) == "x"
    pid = worker(template)
    del template
    assert gone(pid)


@pytest.mark.parametrize("busy", [False, True])
def test_the_process_ends_with_its_parent(busy: bool) -> None:
    # A parent that is killed, at rest or in the middle of an endless rendering.
    program = f"""
import threading, time
from localds.template import ChatTemplate
template = ChatTemplate({"{% if x %}" + ENDLESS + "{% endif %}"!r}, "", "")
template.render([], x=False)
print(template._process._process.pid, flush=True)
if {busy}:
    threading.Thread(target=template.render, args=([],), kwargs=dict(x=True), daemon=True).start()
time.sleep(60)
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        cwd=Path(template_module.__file__).parent.parent,
    )
    with parent:
        assert parent.stdout
        pid = int(parent.stdout.readline())
        time.sleep(0.3)
        parent.kill()
    # Sooner than its limit of CPU time ends it, which is there in case.
    assert gone(pid, 2.5)


def test_the_process_can_open_no_file_and_start_no_other(started: ChatTemplate) -> None:
    assert started.render([]) == "<s>"
    limits = Path(f"/proc/{worker(started)}/limits")
    if not limits.exists():
        pytest.skip("this system does not show a process's limits")
    rows = {line[:25].strip(): line[26:46].strip() for line in limits.read_text().splitlines()}
    assert rows["Max open files"] == rows["Max processes"] == rows["Max file size"] == "0"
    assert int(rows["Max address space"]) <= 1 << 30


def test_memory_is_watched_where_the_system_sets_no_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The worker without its address space limit, as on a system that ignores it.
    source = Path(template_module.__file__).with_name("template_worker.py").read_text()
    worker_file = tmp_path / "worker.py"
    worker_file.write_text(
        source.replace("_MAX_ADDRESS_SPACE = 512 << 20", "_MAX_ADDRESS_SPACE = -1")
    )
    template = ChatTemplate("{% set a = 'a' * 4 * 10**8 %}" + ENDLESS, "", "")
    monkeypatch.setattr(template_process, "_WORKER", worker_file)
    monkeypatch.setattr(template_module, "TIMEOUT_SECONDS", 30)
    with closing(template), pytest.raises(TemplateError, match="too much memory"):
        template.render([])


def test_threads_take_turns(started: ChatTemplate) -> None:
    texts: list[str] = []
    threads = [threading.Thread(target=lambda: texts.append(started.render([]))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == ["<s>"] * 8


# Which template


def chosen(tmp_path: Path, tokens: list[str], name: str | None = None, **keys: str) -> ChatTemplate:
    letters = [v.byte_level(bytes([byte])) for byte in range(256)]
    types = [v.NORMAL] * 256 + [v.CONTROL] * len(tokens)
    ids = {"bos_token_id": 256, "eos_token_id": 257}
    metadata = v.bpe_metadata([*letters, *tokens], [], types, **ids)
    metadata |= {f"tokenizer.{key}": value for key, value in keys.items()}
    gguf = v.gguf_of(tmp_path, metadata)
    return template_for(gguf, Tokenizer.from_gguf(gguf), name)


def test_the_file_s_template_comes_first(tmp_path: Path) -> None:
    tokens = ["<b>", "<e>", "<｜User｜>", "<｜Assistant｜>"]
    template = chosen(tmp_path, tokens, chat_template="{{ bos_token + eos_token }}")
    assert (template.origin, template.render([])) == ("file", "<b><e>")
    template.close()


def test_named_templates(tmp_path: Path) -> None:
    keys = {"chat_template.tool_use": "tools!", "chat_template.rag": "rag!", "chat_template": "x"}
    template = chosen(tmp_path, ["<b>", "<e>"], "tool_use", **keys)
    assert (template.origin, template.source) == ("file", "tools!")
    assert chosen(tmp_path, ["<b>", "<e>"], **keys).source == "x"
    with pytest.raises(TemplateError, match="'none'; it has rag, tool_use"):
        chosen(tmp_path, ["<b>", "<e>"], "none", **keys)
    with pytest.raises(TemplateError, match="no named ones"):
        chosen(tmp_path, ["<b>", "<e>"], "none")


def test_without_a_template_the_vocabulary_decides(tmp_path: Path) -> None:
    with closing(chosen(tmp_path, ["<b>", "<e>", "<｜User｜>", "<｜Assistant｜>"])) as template:
        assert template.origin == "deepseek"
        assert template.render(TALK) == (
            "<b>Be brief.<｜User｜>Hi <b>&'\"\n<｜Assistant｜>Hello<e>"
            "<｜User｜>你好 😀<｜Assistant｜>"
        )
        assert template.render(TALK[1:2], add_generation_prompt=False) == (
            "<b><｜User｜>Hi <b>&'\"\n"
        )
    with closing(chosen(tmp_path, ["<b>", "<e>"])) as template:
        assert template.origin == "plain"
        assert template.render(TALK) == (
            "<b>Be brief.\n\nUser: Hi <b>&'\"\n\n\nAssistant: Hello<e>User: 你好 😀\n\nAssistant:"
        )

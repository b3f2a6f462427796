"""Chat templates: the same prompts as transformers', and a sandbox that holds."""

from datetime import datetime
from typing import Any

import pytest

from kvferry.errors import CheckpointError
from kvferry.text.chat_template import MAX_RENDERED_CHARS, ChatTemplate
from kvferry.text.errors import ChatTemplateError
from kvferry.text.model_dir import MAX_TEMPLATE_BYTES

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}

CHATML = """{% for message in messages %}
{% if loop.first and message['role'] != 'system' %}{{ '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}{% endif %}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
TOOLS = """{%- if tools %}
    {{- '<tools>' }}
    {%- for tool in tools %}
        {{- "\\n" ~ (tool | tojson) }}
    {%- endfor %}
    {{- '</tools>\\n' }}
{%- endif %}
{%- set ns = namespace(turns=0) %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}{%- continue %}{%- endif %}
    {%- set ns.turns = ns.turns + 1 %}
    {%- if message.tool_calls is defined %}{{- message.tool_calls | tojson(indent=2) }}{%- endif %}
    {{- message.role }}: {{ message.content | trim }}{{ eos_token if message.role == 'assistant' }}
{%- endfor %}
{{- ns.turns }}"""
HEADERS = """{{- bos_token }}{%- set today = strftime_now("%Y") %}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>' }}
    {{- '\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}{{ today }}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""
INST = """{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('roles must alternate user/assistant') }}{% endif %}
{% if m['role'] == 'user' %}{{ '[INST] ' ~ m['content'] ~ ' [/INST]' }}
{% else %}{% generation %}{% set body = m['content'] %}{{ body }}{{ eos_token }}{% endgeneration %}{% endif %}
{% endfor %}"""

CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Who goes there?"}],
    [{"role": "user", "content": " a <b> & 'c' "}, {"role": "assistant", "content": "你好 😀\n"}],
    [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}, {"role": "user", "content": "z\n\n"}],
]


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("source", [CHATML, TOOLS, HEADERS, INST])
@pytest.mark.parametrize("generate", [True, False])
def test_rendering_equals_that_of_transformers(source: str, conversation: list[dict[str, Any]], generate: bool) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    tools = [{"type": "function", "function": {"name": "now", "description": "It's <now> ✈", "parameters": {}}}]
    rendered, _ = render_jinja_template(
        [conversation], chat_template=source, tools=tools, add_generation_prompt=generate, **TOKENS
    )
    mine = ChatTemplate(source, TOKENS).render(conversation, add_generation_prompt=generate, tools=tools)
    assert mine == rendered[0]
    assert conversation[0]["content"].strip() in mine


def test_fields_that_are_none_count_as_absent() -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.tool_calls is defined }}{% endfor %}")
    assert template.render([{"role": "user", "tool_calls": None}, {"role": "user", "tool_calls": []}]) == "FalseTrue"


def test_the_date_comes_from_the_given_clock() -> None:
    noon = datetime(2031, 5, 4, 12).timestamp()
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}", wall_clock=lambda: noon)
    assert template.render([]) == "04 May 2031"


def test_a_refusal_carries_the_templates_own_words() -> None:
    with pytest.raises(ChatTemplateError) as caught:
        ChatTemplate(INST, TOKENS).render([{"role": "assistant", "content": "me first"}])
    assert caught.value.reason == "roles must alternate user/assistant"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ 'a' + messages[0].content }}", {"role": "user", "content": 5}),
        ("{{ messages[7].role }}", {"role": "user"}),
        ("{{ messages[0].a.b.c }}", {"role": "user"}),
        ("{{ 1 // 0 }}", {"role": "user"}),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", {"role": "user"}),
        ("{% for i in range(10 ** 9) %}{% endfor %}", {"role": "user"}),
    ],
)
def test_a_template_that_fails_raises_the_typed_error(source: str, message: dict[str, Any]) -> None:
    with pytest.raises(ChatTemplateError):
        ChatTemplate(source).render([message])


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''['__class__'] }}",
        "{{ (''|attr('__class__')).__mro__ }}",
        "{{ messages.append('x') }}",
        "{{ messages[0].update(role='root') }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__closure__ }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ self._TemplateReference__context }}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{{ '%s'|format(messages.__class__) }}",
        "{% set f = '{0.__class__.__init__}'.format %}{{ f(messages) }}",
        "{{ namespace.__init__.__globals__ }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
    ],
)
def test_a_template_that_tries_to_leave_the_sandbox_is_refused(source: str) -> None:
    conversation = [{"role": "user", "content": "hi"}]
    with pytest.raises(ChatTemplateError):
        ChatTemplate(source).render(conversation)
    assert conversation == [{"role": "user", "content": "hi"}]


def test_the_same_attempts_succeed_outside_a_sandbox() -> None:
    import jinja2

    assert "object" in jinja2.Environment().from_string("{{ ''.__class__.__mro__[1] }}").render()


def test_output_is_bounded() -> None:
    source = "{% for i in range(99999) %}{{ messages[0].content }}{% endfor %}"
    with pytest.raises(ChatTemplateError, match=str(MAX_RENDERED_CHARS)):
        ChatTemplate(source).render([{"content": "x" * 1000}])


@pytest.mark.parametrize(
    "source",
    ["{% if %}", "{{", "{% for %}", "{% nosuchtag %}", "{{ x | nosuchfilter }}", "x" * (MAX_TEMPLATE_BYTES + 1)],
)
def test_a_template_that_does_not_compile_stops_the_start(source: str) -> None:
    with pytest.raises(CheckpointError, match="chat_template"):
        ChatTemplate(source, origin="model")

# SPDX-License-Identifier: Apache-2.0
"""Chat templates: rendered as transformers does, stopped where they run or grow without bound."""

import json
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from meshwen.common import contained
from meshwen.errors import MeshwenError
from meshwen.tokenizer import chat_template
from meshwen.tokenizer.chat_template import ChatTemplate, templates_in_folder

HELLO = [{"role": "user", "content": "Hello"}]
CHATML = """\
{%- if messages[0].role != 'system' %}
    {{- '<|im_start|>system\\nYou are kind.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {%- continue %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' }}
    {% generation %}
{{ loop.index }}
    {% endgeneration %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
TOOL = {
    "type": "function",
    "function": {
        "name": "météo",
        "description": "Is it <hot> & 'dry'?",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
TOOL_CALLS = [
    {"role": "system", "content": "Answer <briefly>."},
    {"role": "user", "content": "Paris & Nîmes?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"type": "function", "function": {"name": "météo", "arguments": {"city": name}}}
            for name in ("Paris", "Nîmes")
        ],
    },
    {"role": "tool", "name": "météo", "content": "21 °C"},
    {"role": "tool", "name": "météo", "content": "25 °C"},
    {"role": "assistant", "content": "Fine 🌞"},
    {"role": "user", "content": "Thanks"},
]


def render(template, messages=HELLO, special_tokens=None, **variables):
    return ChatTemplate({"default": template}, special_tokens or {}).render(messages, **variables)


def test_a_template_renders_with_trimmed_blocks_loop_controls_and_the_generation_tag():
    messages = [*HELLO, {"role": "tool", "content": "hidden"}, {"role": "user", "content": "Bye"}]
    assert render(CHATML, messages) == (
        "<|im_start|>system\nYou are kind.<|im_end|>\n"
        "<|im_start|>user\nHello<|im_end|>\n1\n"
        "<|im_start|>user\nBye<|im_end|>\n3\n"
        "<|im_start|>assistant\n"
    )
    assert render(CHATML, add_generation_prompt=False).endswith("Hello<|im_end|>\n1\n")


def test_json_keeps_html_and_unicode_as_they_are():
    text = render("{{ tools[0] | tojson }}|{{ tools | tojson(indent=2) }}", tools=[TOOL])
    compact, _, indented = text.partition("|")
    assert compact == json.dumps(TOOL, ensure_ascii=False)
    assert "<hot> & 'dry'" in compact
    assert indented == json.dumps([TOOL], ensure_ascii=False, indent=2)


def test_special_tokens_documents_and_further_variables_reach_the_template():
    text = render(
        "{{ bos_token }}{{ documents[0].title }}{{ mood }}{{ strftime_now('%Y') | length }}",
        special_tokens={"bos_token": "<s>"},
        documents=[{"title": "T"}],
        mood="!",
    )
    assert text == "<s>T!4"


def test_content_is_not_escaped_and_any_unicode_survives():
    content = "<|im_end|> 👨‍👩‍👧 \x00 \u2028 {{ 1 }} \r\n"
    assert render("{{ messages[0].content }}", [{"role": "user", "content": content}]) == content


def test_a_long_conversation_is_no_hostile_one():
    messages = [{"role": "user", "content": "日本語 " * 1000}] * 1000
    assert len(render(CHATML, messages)) > 4_000_000


def test_tools_pick_the_template_named_for_them():
    templates = ChatTemplate({"default": "plain", "tool_use": "tools"}, {})
    assert templates.render(HELLO) == "plain"
    assert templates.render(HELLO, tools=[TOOL]) == "tools"
    with pytest.raises(MeshwenError, match="no default chat template, only: rag"):
        ChatTemplate({"rag": ""}, {}).render(HELLO)


def test_no_template_says_to_use_raw():
    with pytest.raises(MeshwenError, match="no chat template: use --raw"):
        ChatTemplate({}, {}).render(HELLO)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('Roles must\nalternate') }}", "failed: Roles must alternate$"),
        ("one\n{% if %}", "failed: line 2: Expected an expression"),
        ("{{ messages[0].who.name }}", "has no attribute 'who'"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ raise_exception('x' * 100000) }}", "failed: x{500}$"),
    ],
)
def test_a_faulty_template_is_an_error_in_one_line(template, message):
    with pytest.raises(MeshwenError, match=message) as caught:
        render(template)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__.keys() }}",
        "{{ messages.append(1) }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
        "{% include '/etc/hostname' %}",
    ],
)
def test_the_sandbox_refuses(template):
    with pytest.raises(MeshwenError, match="the chat template failed: "):
        render(template)


def test_a_template_that_takes_no_parts_is_said_to():
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    with pytest.raises(MeshwenError, match="; it may take contents as text only, not in parts"):
        render("{{ 'a' + messages[0].content }}", parts)
    assert render("{{ messages[0].content[0].text }}", parts) == "Hello"


NEST = "{% set ns = namespace(x=[], y=[], s='ab') %}"
HOSTILE = {
    "a range": "{% for i in range(10 ** 9) %}a{% endfor %}",
    "loops that write nothing": "{% for i in range(99999) %}{% for j in range(99999) %}"
    "{% endfor %}{% endfor %}",
    "loops that select nothing": "{% for i in range(99999) %}{% for j in range(99999) if 0 %}"
    "{% endfor %}{% endfor %}",
    "much output": "{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}",
    "a repeated string": "{{ 'a' * 10 ** 11 }}",
    "a power": "{{ 10 ** (10 ** 10) }}",
    "a power at run time": "{{ (messages | length + 9) ** (10 ** 10) }}",
    "a wide string": "{{ messages[0].content | center(10 ** 10) }}",
    "a wide format": "{{ '%99999999999d' % 1 }}",
    "a wide json": "{{ [1] | tojson(indent=10 ** 10) }}",
    "a doubled string": NEST + "{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "a doubled block": NEST
    + "{% for i in range(60) %}{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}{% endfor %}",
    "nested lists, written": NEST
    + "{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "nested lists, compared in one C call": NEST
    + "{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y] %}"
    "{% endfor %}{{ ns.x == ns.y }}",
    "a macro calling itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a macro calling itself twice": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}"
    "{% endif %}{% endmacro %}{{ f(99) }}",
    "endless slices": "{{ [1] | slice(10 ** 10) | list }}",
}


STOPPED = (
    r"the chat template (was stopped: it ran for more than 0\.5 s or grew beyond 256 MiB|failed: "
    r"(it needs too much memory|it writes more than|OverflowError: Range too big|RecursionError))"
)


@pytest.mark.parametrize("template", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_template_that_runs_or_grows_without_bound_is_stopped(template, monkeypatch):
    monkeypatch.setattr(contained, "TIME_LIMIT_S", 0.5)
    monkeypatch.setattr(contained, "MEMORY_LIMIT_BYTES", 1 << 28)
    with pytest.raises(MeshwenError, match=STOPPED) as caught:
        render(template)
    assert "\n" not in str(caught.value)


def test_output_is_bounded(monkeypatch):
    monkeypatch.setattr(chat_template, "OUTPUT_LIMIT_CHARACTERS", 5)
    assert render("{% for i in range(5) %}a{% endfor %}") == "aaaaa"
    with pytest.raises(MeshwenError, match="it writes more than 5 characters"):
        render("{% for i in range(6) %}a{% endfor %}")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux surely caps a process's memory")
def test_memory_is_bounded(monkeypatch):
    template = "{% set text = 'a' * (messages | length * 2 ** 28) %}{{ text | length }}"
    assert render(template) == str(2**28)
    monkeypatch.setattr(contained, "MEMORY_LIMIT_BYTES", 2**28)
    with pytest.raises(MeshwenError, match="it needs too much memory"):
        render(template)


def test_templates_render_again_after_one_was_stopped(monkeypatch):
    monkeypatch.setattr(contained, "TIME_LIMIT_S", 0.5)
    template = "{% if wait %}" + HOSTILE["loops that write nothing"] + "{% endif %}done"
    templates = ChatTemplate({"default": template}, {})
    with pytest.raises(MeshwenError, match=r"it ran for more than 0\.5 s or grew beyond"):
        templates.render(HELLO, wait=True)
    assert templates.render(HELLO, wait=False) == "done"


def test_one_process_serves_many_renders_and_ends_with_its_owner():
    templates = ChatTemplate({"default": "{{ messages[0].content }}"}, {})
    conversations = [[{"role": "user", "content": f"number {i}"}] for i in range(200)]
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(templates.render, conversations))
    assert texts == [f"number {i}" for i in range(200)]
    worker = templates._process._worker
    del templates
    assert worker.poll() is not None


def test_ctrl_c_neither_ends_the_process_nor_mixes_up_replies(monkeypatch):
    templates = ChatTemplate({"default": "{{ messages[0].content }}"}, {})
    assert templates.render(HELLO) == "Hello"
    os.kill(templates._process._worker.pid, signal.SIGINT)
    assert templates.render([{"role": "user", "content": "again"}]) == "again"

    class Interrupted:
        close = templates._process._worker.stdout.close

        def readline(self):
            raise KeyboardInterrupt

    worker = templates._process._worker
    monkeypatch.setattr(worker, "stdout", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        templates.render([{"role": "user", "content": "lost"}])
    assert worker.poll() is not None
    assert templates.render(HELLO) == "Hello"


def test_a_process_that_cannot_start_is_an_error(monkeypatch):
    monkeypatch.setattr(contained.sys, "executable", "/nowhere/python")
    with pytest.raises(MeshwenError, match="cannot start the process that runs the chat template"):
        render("a")


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ("hi", 'messages must be a list of objects, found "hi"'),
        ({"role": "user"}, "messages must be a list of objects"),
        (["hi"], 'message 0 must be an object, found "hi"'),
        ([HELLO], "message 0 must be an object"),
    ],
)
def test_messages_of_another_form_are_refused(messages, said):
    with pytest.raises(MeshwenError, match=said):
        render("a", messages)


def test_a_key_without_a_value_is_left_out():
    message = {"role": "assistant", "content": None}
    assert render("{{ messages[0] }}", [message]) == "{'role': 'assistant'}"


def test_a_message_that_the_template_strips_is_continued_without_its_end():
    template = "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}"
    options = {"add_generation_prompt": False, "continue_final_message": True}
    assert render(template, [{"role": "user", "content": "a b "}], **options) == "[a b"
    with pytest.raises(MeshwenError, match="does not show the last message whole"):
        render("[{{ messages[0].content[:3] }}]", [{"role": "user", "content": "abcd"}], **options)


def test_values_that_are_not_json_are_refused():
    with pytest.raises(MeshwenError, match="the chat template needs plain JSON values"):
        render("a", [{"role": "user", "content": object()}])


def test_a_folder_gives_named_templates_and_its_files_override_them(tmp_path):
    assert templates_in_folder(tmp_path, {}) == {}
    assert templates_in_folder(tmp_path, {"chat_template": "a"}) == {"default": "a"}
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    (tmp_path / "chat_template.jinja").write_text("ä", encoding="utf-8")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("c", encoding="utf-8")
    expected = {"default": "ä", "tool_use": "b", "rag": "c"}
    assert templates_in_folder(tmp_path, {"chat_template": named}) == expected
    with pytest.raises(MeshwenError, match=r"chat_template\[0\]\.template is missing"):
        templates_in_folder(tmp_path, {"chat_template": [{"name": "default"}]})


# What Qwen3's template does with thoughts: those of earlier turns are left out, those that answer
# the last question stay, and `enable_thinking` false gives the answer an empty one.
THINKING = """\
{%- set ns = namespace(last=0) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- set ns.last = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set text = message.content if message.content is string else '' %}
    {%- set thought = message.reasoning_content or '' %}
    {%- if not thought and '</think>' in text %}
        {%- set thought = text.split('</think>')[0].rstrip('\\n').split('<think>')[-1] %}
        {%- set text = text.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' and loop.index0 > ns.last and thought %}
        {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- text + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
THOUGHTS = [
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "<think>\nIt is 4.\n</think>\n\n4"},
    {"role": "user", "content": "And 3?"},
    {"role": "assistant", "content": "7", "reasoning_content": "4 + 3"},
]


def test_thoughts_are_the_templates_to_keep_and_to_switch_off():
    template = ChatTemplate({"default": THINKING}, {})
    said = "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"
    asked = "<|im_start|>user\nAnd 3?<|im_end|>\n<|im_start|>assistant\n"
    whole = "<think>\n4 + 3\n</think>\n\n7<|im_end|>\n"
    assert template.render(THOUGHTS, add_generation_prompt=False) == said + asked + whole
    for switch, shown in (({}, ""), ({"enable_thinking": False}, "<think>\n\n</think>\n\n")):
        assert template.render(THOUGHTS[:3], **switch) == said + asked + shown


@pytest.mark.torch
@pytest.mark.parametrize("switch", [{}, {"enable_thinking": True}, {"enable_thinking": False}])
def test_thoughts_are_those_of_transformers(switch):
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    for messages, open_turn in ((THOUGHTS, False), (THOUGHTS[:3], True)):
        (theirs,), _ = utils.render_jinja_template(
            conversations=[messages],
            chat_template=THINKING,
            add_generation_prompt=open_turn,
            **switch,
        )
        ours = ChatTemplate({"default": THINKING}, {})
        assert ours.render(messages, add_generation_prompt=open_turn, **switch) == theirs


@pytest.mark.torch
@pytest.mark.parametrize("tools", [None, [TOOL]], ids=["no tools", "tools"])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.real
def test_rendering_equals_transformers(real_model_dir, tools, add_generation_prompt):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(real_model_dir)
    config = json.loads((real_model_dir / "tokenizer_config.json").read_text(encoding="utf-8"))
    ours = ChatTemplate(templates_in_folder(real_model_dir, config), theirs.special_tokens_map)
    for messages in (HELLO, TOOL_CALLS):
        expected = theirs.apply_chat_template(
            messages, tools=tools, add_generation_prompt=add_generation_prompt, tokenize=False
        )
        assert (
            ours.render(messages, tools=tools, add_generation_prompt=add_generation_prompt)
            == expected
        )

"""Chat templates: llama.cpp's goldens, real templates with tools, forms of content."""

# ruff: noqa: E501 - a template on one line is easier to read

from __future__ import annotations

import json

import pytest
from vocabularies import DATA

from nybble.errors import NotFoundError, TemplateError
from nybble.text.chat import ChatTemplate
from nybble.text.named_templates import TEMPLATES

GOLDENS = json.loads((DATA / "goldens" / "chat_template.json").read_text("utf-8"))
AGREED = [case for case in GOLDENS["cases"] if case["jinja2_agrees"]]
FILES = sorted((DATA / "templates").glob("*.jinja"))
WITH_TOOLS = [path for path in FILES if "Phi-3.5" not in path.name and "gemma" not in path.name]

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Gets the weather – now",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "A city"}},
                "required": ["city"],
            },
        },
    }
]
CALL = {
    "id": "call12345",
    "type": "function",
    "function": {"name": "get_weather", "arguments": {"city": "Köln"}},
}
TOOL_CHAT = [
    {"role": "user", "content": "Weather in Köln?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "get_weather", "tool_call_id": "call12345", "content": "sunny"},
]


def test_there_are_22_goldens() -> None:
    assert len(AGREED) == 22


@pytest.mark.parametrize("case", AGREED, ids=lambda case: case["name"])
def test_goldens(case: dict[str, str]) -> None:
    template = ChatTemplate(case["template"], bos_token=case["bos_token"], eos_token=case["eos_token"])
    assert template.render(GOLDENS["messages"]) == case["expected_jinja"]


@pytest.mark.parametrize("path", WITH_TOOLS, ids=lambda path: path.stem)
def test_real_templates_with_tools(path: object) -> None:
    template = ChatTemplate(path.read_text("utf-8"), bos_token="<s>", eos_token="</s>")  # type: ignore[attr-defined]
    # One older template takes its functions under another name.
    chat = json.loads(json.dumps(TOOL_CHAT))
    if path.name.startswith("deepseek-ai"):  # type: ignore[attr-defined]
        chat[1]["content"] = None  # these write calls only of a message without content
    text = template.render(chat, tools=TOOLS, functions=json.dumps(TOOLS), datetime="now")
    assert "get_weather" in text and "Köln" in text and "sunny" in text


def test_arguments_may_be_json() -> None:
    source = (DATA / "templates" / "Qwen-Qwen2.5-7B-Instruct.jinja").read_text("utf-8")
    as_text = json.loads(json.dumps(TOOL_CHAT))
    as_text[1]["tool_calls"][0]["function"]["arguments"] = '{"city": "Köln"}'
    template = ChatTemplate(source)
    assert template.render(as_text, tools=TOOLS) == template.render(TOOL_CHAT, tools=TOOLS)
    assert '"arguments": {"city": "Köln"}' in template.render(TOOL_CHAT, tools=TOOLS)
    # A template that joins strings gets a string.
    joins = ChatTemplate("{{ messages[1].tool_calls[0].function.arguments + '!' }}")
    assert joins.render(TOOL_CHAT) == '{"city": "Köln"}!'


def test_generation_prompt() -> None:
    template = ChatTemplate.named("chatml")
    messages = [{"role": "user", "content": "Hi"}]
    assert template.render(messages, add_generation_prompt=False) == "<|im_start|>user\nHi<|im_end|>\n"
    assert template.render(messages).endswith("<|im_start|>assistant\n")


def test_parts_are_joined_for_templates_that_want_strings() -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert "user\nab<|im_end|>" in ChatTemplate.named("chatml").render(messages)
    picture = [{"role": "user", "content": [{"type": "image", "url": "x"}]}]
    with pytest.raises(TemplateError, match="messages\\[0\\] has a part of type 'image'"):
        ChatTemplate.named("chatml").render(picture)


def test_parts_reach_templates_that_want_parts() -> None:
    source = "{% for p in messages[0].content %}[{% if p.type == 'text' %}{{ p.text }}{% else %}IMG{% endif %}]{% endfor %}"
    template = ChatTemplate(source)
    parts = [{"type": "text", "text": "a"}, {"type": "image"}]
    assert template.render([{"role": "user", "content": parts}]) == "[a][IMG]"
    assert template.render([{"role": "user", "content": "plain"}]) == "[plain]"


def test_what_transformers_offers_is_there() -> None:
    def run(source: str, **variables: object) -> str:
        return ChatTemplate(source).render([{"role": "user", "content": "é<b>"}], **variables)

    assert run("{{ messages|tojson }}") == '[{"role": "user", "content": "é<b>"}]'
    assert run("{{ {'b': [1], 'a': 2}|tojson(indent=2) }}") == '{\n  "b": [\n    1\n  ],\n  "a": 2\n}'
    assert len(run("{{ strftime_now('%Y-%m-%d') }}")) == 10
    assert run("{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "012"
    assert run("a\n  {% generation %}\nx{% endgeneration %}\nb") == "a\nxb"
    assert run("{{ documents[0].title }}", documents=[{"title": "T"}]) == "T"
    assert (
        run("{% if enable_thinking is defined and not enable_thinking %}no{% endif %}", enable_thinking=False)
        == "no"
    )
    assert run("{{ bos_token }}|{{ tools is none }}|{{ add_generation_prompt }}") == "|True|True"
    assert (
        run("{% set n = namespace(i=0) %}{% for m in messages %}{% set n.i = n.i + 1 %}{% endfor %}{{ n.i }}")
        == "1"
    )
    assert (
        run(
            "{{ messages|map(attribute='role')|join(',') }}{{ messages|selectattr('role', 'equalto', 'x')|list }}"
        )
        == "user[]"
    )
    assert (
        run("{% macro f(x, y=2) %}{{ x }}{{ y }}{% endmacro %}{{ f(1) }}{{ 'a-b'.split('-')[-1] }}") == "12b"
    )
    assert (
        run("{{ '{:>5}|{}'.format('a', 1) }}{{ '%02d' % 3 }}{{ 'a' * 3 }}{{ 7 // 2 }}{{ 2 ** 10 }}")
        == "    a|103aaa31024"
    )
    assert run("{{ messages[0].items()|list|length }}{{ messages[0].get('no', 'd') }}") == "2d"
    assert (
        run(
            "{% for n in [[1, [2, [3]]]] recursive %}{% if n is iterable %}{{ loop(n) }}{% else %}{{ n }}{% endif %}{% endfor %}"
        )
        == "123"
    )


def test_no_template_and_unknown_name() -> None:
    message = str(ChatTemplate.missing("m.gguf"))
    assert "m.gguf has no chat template" in message and "--raw" in message and "chatml" in message
    with pytest.raises(NotFoundError, match="no chat template named 'x'; known: chatml, gemma"):
        ChatTemplate.named("x")


@pytest.mark.parametrize(
    ("name", "golden"),
    [("chatml", "teknium/OpenHermes-2.5-Mistral-7B"), ("llama3", "Llama-3"), ("phi3", "Phi-3-small")],
)
def test_named_templates_say_what_the_models_own_say(name: str, golden: str) -> None:
    case = next(case for case in AGREED if case["name"] == golden)
    messages = [{**message, "content": message["content"].strip()} for message in GOLDENS["messages"]]
    own = ChatTemplate(case["template"]).render(messages)
    assert ChatTemplate.named(name).render(messages) == own


def test_named_templates_with_system_folded_in() -> None:
    messages = [
        {"role": r, "content": c}
        for r, c in (("system", "S"), ("user", "U"), ("assistant", "A"), ("user", "V"))
    ]
    expected = {
        "gemma": "<b><start_of_turn>user\nS\n\nU<end_of_turn>\n<start_of_turn>model\nA<end_of_turn>\n"
        "<start_of_turn>user\nV<end_of_turn>\n<start_of_turn>model\n",
        "mistral": "<b>[INST] S\n\nU [/INST] A<e>[INST] V [/INST]",
        "llama2": "<b>[INST] <<SYS>>\nS\n<</SYS>>\n\nU [/INST] A <e><b>[INST] V [/INST]",
        "zephyr": "<|system|>\nS<e>\n<|user|>\nU<e>\n<|assistant|>\nA<e>\n<|user|>\nV<e>\n<|assistant|>\n",
    }
    for name, text in expected.items():
        assert ChatTemplate.named(name, bos_token="<b>", eos_token="<e>").render(messages) == text
    assert set(TEMPLATES) >= {*expected, "chatml", "llama3", "phi3"}


def test_messages_must_be_messages() -> None:
    with pytest.raises(TemplateError, match=r"messages\[0\] must be a dict with role and content"):
        ChatTemplate.named("chatml").render([{"content": "x"}])


def test_templates_equal_transformers() -> None:
    chat = pytest.importorskip("transformers.utils.chat_template_utils")
    compared = 0
    for path in FILES:
        source = path.read_text("utf-8")
        if "datetime" in source or "functions" in source:
            continue
        messages = [
            {"role": "user", "content": " Hi "},
            {"role": "assistant", "content": "Hello ü "},
            {"role": "user", "content": "More <b>"},
        ]
        for tools in (None, TOOLS):
            if tools and path not in WITH_TOOLS:
                continue
            values = {"bos_token": "<s>", "eos_token": "</s>"}
            template = ChatTemplate(source, **values)
            try:
                theirs, _ = chat.render_jinja_template(
                    [messages], tools=tools, chat_template=source, add_generation_prompt=True, **values
                )
            except TypeError:  # one must have tools, another gives tojson a generator (which we allow)
                continue
            compared += 1
            assert template.render(messages, tools=tools) == theirs[0], path.name
    assert compared >= 12

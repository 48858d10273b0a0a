"""Chat templates render as in transformers, and a hostile one gets nowhere."""

from __future__ import annotations

import json
from itertools import product
from typing import Any

import pytest
from helpers.data import data_path

from smelt.runtime.chat_template import ChatTemplate
from smelt.runtime.errors import UserError

USER = {"role": "user", "content": "What is <b>2 & 3</b>? Grüße 你好"}
CHATS: list[list[dict[str, Any]]] = [
    [USER],
    [{"role": "system", "content": "Be brief.\n"}, USER],
    [USER, {"role": "assistant", "content": " Five. "}, {"role": "user", "content": "Sure?"}],
]
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds 'numbers' & more",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}


def theirs(template: str, messages: list[dict[str, Any]], **values: Any) -> str:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    tools = values.pop("tools", None)
    rendered = utils.render_jinja_template(
        [messages], tools=tools, chat_template=template, **values
    )
    text = rendered[0][0]
    assert isinstance(text, str)
    return text


def test_real_templates_equal_transformers() -> None:
    models = json.loads(data_path("chat_templates.json").read_text("utf-8"))
    compared = 0
    for name, entry in models.items():
        templates = entry["chat_template"]
        special = {k: v for k, v in entry.items() if k.endswith("_token") and v is not None}
        for template in [templates] if isinstance(templates, str) else templates.values():
            compared += same(name, template, special)
    assert compared > 1000


def same(name: str, template: str, special: dict[str, str]) -> int:
    """Compare renderings with transformers'; where that refuses a conversation we must too."""
    ours = ChatTemplate(template, special)
    compared = 0
    for chat, tools, prompt in product(CHATS, (None, [TOOL]), (True, False)):
        values: dict[str, Any] = {"add_generation_prompt": prompt, "tools": tools}
        try:
            expected = theirs(template, chat, **special, **values)
        except Exception:
            with pytest.raises(UserError):
                ours.render(chat, **values)
            continue
        assert ours.render(chat, **values) == expected, name
        compared += 1
    return compared


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['__builtins__']['open']('/etc/passwd').read() }}",
        "{{ strftime_now.__globals__.x }}",
        "{{ dict.__base__.__subclasses__() }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ (namespace() | attr('__init__')).__globals__ }}",
        "{% set n = namespace(__class__=1) %}{{ n.__class__ }}",
        "{{ messages.append(1) }}",
        "{{ '{0.__class__.__mro__}'.format('x') }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ self.__init__.__globals__ }}",
        "{{ lipsum.__globals__.x }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(999999999999) %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{% set _ = f(n - 1) + f(n - 1) %}{% endif %}{% endmacro %}"
        "{{ f(60) }}",
        "{{ ('a' * 100000) * 100000 }}",
        "{{ [0] * 999999999999 }}",
        "{{ 9 ** 99999 }}",
        "{{ '%0999999999d' % 1 }}",
        "{{ 'a'.center(99999999999) }}",
        "{{ 'a' | center(99999999999) }}",
        "{% for i in range(9999) %}{{ 'a' * 9999 }}{% endfor %}",
    ],
)
def test_hostile_templates_are_stopped(template: str) -> None:
    with pytest.raises(UserError) as caught:
        ChatTemplate(template, {}).render([USER])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("template", ["{% if %}", "{{ x", "{% for %}", "{% unknown %}"])
def test_a_template_that_does_not_parse_is_refused(template: str) -> None:
    with pytest.raises(UserError, match="does not parse"):
        ChatTemplate(template, {})


def test_the_template_sees_plain_data_only() -> None:
    class Message(dict):  # type: ignore[type-arg]
        def secret(self) -> str:
            return "leak"

    template = ChatTemplate("{{ messages[0].secret }}|{{ messages[0].x }}", {})
    assert template.render([Message(x=object())]) == "|<object>"


def test_what_the_environment_offers() -> None:
    template = ChatTemplate(
        "{%- for m in messages %}\n  {%- if loop.first %}{% continue %}{% endif %}"
        "{% generation %}{{ m | tojson }}{% endgeneration %}{{ loop.length }}{{ loop.last }}"
        "\n{% endfor %}{{ strftime_now('%Y') | length }}{{ bos_token }}{{ extra }}",
        {"bos_token": "<s>"},
    )
    got = template.render([USER, {"role": "user", "content": "<é>"}], extra="!")
    assert got == '{"role": "user", "content": "<é>"}2True\n4<s>!'


def test_a_refused_conversation_says_why() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(UserError, match="roles must alternate"):
        template.render([USER])

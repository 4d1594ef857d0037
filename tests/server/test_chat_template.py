"""The sandbox against transformers' rendering of the same templates."""

import datetime

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from penstock.core.errors import BadRequest, StartupFailed
from penstock.server.chat_template import ChatTemplate

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  Grüße & <b>好</b>\n"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "why?"},
]
TEMPLATES = {
    "llama2": (
        "{{ bos_token }}{% for message in messages %}\n"
        "    {% if message['role'] == 'user' %}\n"
        "[INST] {{ message['content'].strip() }} [/INST]\n"
        "    {% else %}\n"
        "{{ ' ' + message['content'] + eos_token }}\n"
        "    {% endif %}\n"
        "{% endfor %}\n"
    ),
    "chatml": (
        "{%- for message in messages %}"
        "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
        "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
    ),
    "loop controls": (
        "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
        "{{ m.content }}{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}"
    ),
    "namespace and json": (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
        "{{ m | tojson }}{{ m.content | tojson(indent=2) }}{% endfor %}{{ ns.n }}"
    ),
    "generation": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    ),
    "no tools": "{% if tools is none and not documents %}{{ messages[0]['content'] }}{% endif %}",
    "date": "{{ strftime_now('%Y') }}{{ messages[-1].content }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompt", [True, False])
def test_renders_as_transformers_does(name, prompt):
    source = TEMPLATES[name]
    (expected,), _ = render_jinja_template(
        [CHAT], chat_template=source, add_generation_prompt=prompt, **TOKENS
    )
    template = ChatTemplate(source, TOKENS)
    assert template.render(CHAT, add_generation_prompt=prompt) == expected


def test_the_date_is_today():
    text = ChatTemplate(TEMPLATES["date"], {}).render(CHAT)
    assert text == f"{datetime.date.today().year}why?"


@pytest.mark.parametrize(
    ("source", "content", "text"),
    [
        ("{{ messages[0]['content'] }}", [("a", "b")], "a\nb"),
        ("{{ messages[0]['content'] | trim }}", ["a"], "a"),
        ("{{ messages[0]['content'] | tojson }}", [("a", "b")], '"a\\nb"'),
        ("{% for p in messages[0]['content'] %}{{ p['text'] }}{% endfor %}", [("a", "b")], "ab"),
        ("{% for p in messages[0]['content'] %}{{ p['text'] }}{% endfor %}", ["ab"], "ab"),
        (
            "{% if messages[0].content is string %}{{ messages[0].content }}{% else %}"
            "{% for p in messages[0].content %}<{{ p.text }}>{% endfor %}{% endif %}",
            [("a", "b")],
            "<a><b>",
        ),
    ],
)
def test_content_is_given_in_the_form_that_the_template_understands(source, content, text):
    (given,) = content
    if isinstance(given, tuple):
        given = [{"type": "text", "text": part} for part in given]
    assert ChatTemplate(source, {}).render([{"role": "user", "content": given}]) == text


def test_empty_fields_are_dropped():
    template = ChatTemplate("{{ messages[0] | tojson }}", {})
    message = {"role": "user", "content": "a", "name": None}
    assert template.render([message]) == '{"role": "user", "content": "a"}'


def test_options_reach_the_template_but_do_not_replace_the_messages():
    template = ChatTemplate("{{ enable_thinking }} {{ messages[0].content }}", {})
    options = {"enable_thinking": False, "messages": []}
    assert template.render([{"role": "user", "content": "a"}], options=options) == "False a"


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no system role') }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages[7].content.strip() }}",
        "{{ 1 / 0 }}",
        "{% for i in range(999999999) %}{% endfor %}",
        "{{ messages.append(1) }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__ }}",
    ],
)
def test_what_a_template_refuses_or_may_not_do_is_a_bad_request(source):
    template = ChatTemplate(source, {})
    with pytest.raises(BadRequest) as refused:
        template.render([{"role": "user", "content": "a"}])
    assert refused.value.field == "messages"


def test_a_template_that_does_not_parse_stops_the_start():
    with pytest.raises(StartupFailed, match="chat template"):
        ChatTemplate("{% if %}", {})

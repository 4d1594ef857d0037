"""Writes a conversation as the text a model was trained on, as Hugging Face's templates do.

Owns the sandbox in which a model's Jinja template runs: a template comes with the weights and is
not trusted. Knows no token ids. `tokenizer.py` loads it.
"""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import NoReturn

from jinja2 import Template, TemplateError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node, Scope
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from penstock.core.errors import BadRequest, StartupFailed

Message = Mapping[str, object]

_PROBE = "zQprobeQz"
_PRINTED_PART = re.compile(r"""['"]text['"]""")
# What an expression of a template may raise when the messages are not as it expects.
_TEMPLATE_ERRORS = (
    TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError,
    RecursionError,
)  # fmt: skip


class ChatTemplate:
    """A compiled template. `variables` are the special tokens' strings by name (`bos_token`, ...).

    Templates differ in whether they take a message's content as a string or as a list of parts;
    content is given in the form that this one understands.
    """

    def __init__(self, source: str, variables: Mapping[str, str]) -> None:
        self._template = _compile(source)
        self._variables = dict(variables)
        as_string = self._probe(_PROBE)
        as_parts = self._probe([{"type": "text", "text": _PROBE}])
        # A template that knows only strings raises, or prints the list as it is.
        self._takes_parts = (
            as_parts is not None and _PROBE in as_parts and not _PRINTED_PART.search(as_parts)
        )
        self._takes_strings = not self._takes_parts or (
            as_string is not None and _PROBE in as_string
        )

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        options: Mapping[str, object] | None = None,
    ) -> str:
        """Return the conversation as text. `options` are further variables for the template.

        Raises: `BadRequest` with the template's own words when it refuses the messages.
        """
        messages = [self._adapt(message) for message in messages]
        try:
            return self._render(messages, add_generation_prompt, options or {})
        except _TEMPLATE_ERRORS as error:
            raise BadRequest(f"the chat template refuses this: {error}", "messages") from error

    def _render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        options: Mapping[str, object],
    ) -> str:
        return self._template.render(
            {
                **self._variables,
                "tools": None,
                "documents": None,
                **options,
                "messages": messages,
                "add_generation_prompt": add_generation_prompt,
            }
        )

    def _adapt(self, message: Message) -> Message:
        """Drop empty fields, as templates print None; bring content into the understood form."""
        message = {name: value for name, value in message.items() if value is not None}
        match message.get("content"):
            case str(text) if not self._takes_strings:
                message["content"] = [{"type": "text", "text": text}]
            case list(parts) if not self._takes_parts:
                message["content"] = "\n".join(str(part["text"]) for part in parts)
        return message

    def _probe(self, content: object) -> str | None:
        try:
            return self._render([{"role": "user", "content": content}], True, {})
        except _TEMPLATE_ERRORS:
            return None


class _Generation(Extension):
    """Lets `{% generation %}` blocks, which mark training targets, through as their contents."""

    tags = {"generation"}  # noqa: RUF012  Jinja reads it from the class

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        return Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(
            line
        )


def _compile(source: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    try:
        return environment.from_string(source)
    except TemplateSyntaxError as error:
        raise StartupFailed(f"the model's chat template does not parse: {error}") from error


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which no model was trained on.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().astimezone().strftime(form)

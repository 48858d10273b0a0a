"""Renders a model's chat template as transformers does, in a sandbox.

A template is a program that came with a checkpoint of unknown origin. It runs in jinja2's immutable
sandbox, sees only plain data, and may neither loop for ever nor produce text without end.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from .errors import UserError

# Far above what any conversation needs.
MAX_STEPS = 300_000
MAX_CHARACTERS = 20_000_000
_PADDING = frozenset(("center", "ljust", "rjust", "zfill", "expandtabs"))


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's text for training; its body renders as it is."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _PlainNamespace(Namespace):
    """jinja2's namespace() without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, values = args[0], dict(*args[1:], **kwargs)
        for name in values:
            _refuse_private(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Also bounds the work of one rendering: loop steps, calls, and the size of what `*` makes."""

    intercepted_binops = frozenset(("*", "**", "%"))
    steps = 0

    def step(self) -> None:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise jinja2.exceptions.SecurityError(f"it ran for more than {MAX_STEPS} steps")

    def counted(self, iterable: Any) -> Iterator[Any]:
        """The items of a loop, each of them a step; this filter is put around every loop."""
        for item in iterable:
            self.step()
            yield item

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        __self.step()
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if not _small_result(operator, left, right):
            raise jinja2.exceptions.SecurityError(f"the result of {operator} would be too large")
        return super().call_binop(context, operator, left, right)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in _PADDING and super().is_safe_attribute(obj, attr, value)


def _small_result(operator: str, left: Any, right: Any) -> bool:
    """Whether `left operator right` stays within memory: text and lists grow by repetition."""
    if operator == "%":
        return not isinstance(left, str) or not any(c.isdigit() or c == "*" for c in left)
    if operator == "**":
        return not isinstance(left, int) or abs(right) * max(abs(left).bit_length(), 1) <= 4096
    for sized, times in ((left, right), (right, left)):
        if isinstance(sized, (str, list, tuple)) and isinstance(times, int):
            return len(sized) * times <= MAX_CHARACTERS
    return True


class ChatTemplate:
    """A compiled template; `special_tokens` are its variables bos_token, eos_token and so on."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self.source = source
        self.special_tokens = dict(special_tokens)
        self._environment = _environment()
        try:
            tree = self._environment.parse(source)
            for loop in list(tree.find_all(nodes.For)):
                loop.iter = nodes.Filter(loop.iter, "counted", [], [], None, None)
            self._template = self._environment.from_string(tree)
        except (jinja2.TemplateError, RecursionError) as error:
            raise UserError(f"the chat template does not parse: {error}; pass another") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt for a conversation of {"role", "content"} messages; `UserError` if refused.

        variables: further names the template reads (enable_thinking and the like).
        """
        self._environment.steps = 0
        values = {**self.special_tokens, **_plain(variables)}
        values.update(messages=_plain(list(messages)), tools=_plain(tools), documents=None)
        values["add_generation_prompt"] = add_generation_prompt
        pieces: list[str] = []
        length = 0
        try:
            for piece in self._template.generate(values):
                pieces.append(piece)
                length += len(piece)
                if length > MAX_CHARACTERS:
                    raise UserError(f"the chat template wrote over {MAX_CHARACTERS} characters")
        except jinja2.TemplateError as error:
            raise UserError(f"the chat template refused the conversation: {error}") from error
        except UserError:
            raise
        except Exception as error:  # whatever the template's own code runs into
            raise UserError(
                f"the chat template failed with {type(error).__name__}: {error}; "
                "the conversation may have a shape this model was not made for"
            ) from error
        return "".join(pieces)


def _environment() -> _Sandbox:
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters.update(tojson=_tojson, counted=environment.counted)
    environment.filters.pop("center")
    environment.globals.update(
        raise_exception=_raise_exception,
        strftime_now=_strftime_now,
        namespace=_PlainNamespace,
        dict=_new_dict,
    )
    return environment


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _new_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON; jinja2's own filter would escape for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _refuse_private(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace may not hold {name!r}")


def _plain(value: Any) -> Any:
    """Lists, dicts and scalars only: any other object's methods would be open to the template."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    for kind in (str, bool, int, float):
        if isinstance(value, kind):
            return kind(value)
    return f"<{type(value).__name__}>"

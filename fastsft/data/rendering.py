"""Jinja chat templates: messages -> text, with the places the model is to have written.

Templates are rendered in the sandbox transformers uses, with the same settings and helpers, so that a
model's own template gives here what it gives at inference. Two differences: `strftime_now` returns the
run's fixed date, and `{% generation %}` leaves two private characters in the text, which come out as
spans after rendering (so a tag inside a macro, a filter or a captured block still counts, where
counting output blocks, as transformers does, does not).
"""

from __future__ import annotations

import datetime
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fastsft.errors import UserError

_OPEN, _CLOSE = "\U0010fff2", "\U0010fff3"  # what a generation tag leaves in the text
THOUGHTS = (
    "reasoning_content",
    "thinking",
    "reasoning",
)  # names one thing goes by, the usual first


def thoughts_of(message: Mapping[str, Any]) -> str:
    """A message's reasoning under whichever name it has; empty without one."""
    return next((message[key] for key in THOUGHTS if message.get(key)), "")


def _with_thoughts(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """The message with its reasoning under the names that templates read."""
    thoughts = thoughts_of(message)
    return {"thinking": thoughts, **message, "reasoning_content": thoughts} if thoughts else message


class TemplateRefused(Exception):
    """The template cannot render these messages (its own raise_exception, or a field it misses)."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """text, and [start, end) character ranges of what stands in generation tags, in order."""

    text: str
    spans: list[tuple[int, int]]


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}: the body between two private characters."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return _OPEN + caller() + _CLOSE


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which no model has seen."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _environment(date: datetime.date) -> ImmutableSandboxedEnvironment:
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    env.filters["tojson"] = _tojson
    env.globals["raise_exception"] = _raise_exception
    env.globals["strftime_now"] = date.strftime
    return env


class Template:
    """A chat template ready to render. Pickles as its source; compiled again where it is used.

    name: for messages. tagged: has generation tags. stop, stop_ids: tokens that end an answer, with
    the tokenizer's own ends. notes: what a person should be told at start.
    """

    def __init__(
        self,
        name: str,
        source: str,
        *,
        special_tokens: Mapping[str, str],
        kwargs: Mapping[str, Any],
        date: str,
    ) -> None:
        """date: "YYYY-MM-DD", what strftime_now sees. Raises UserError where the Jinja is wrong."""
        self.name, self.source, self.date = name, source, date
        self._constants = {**special_tokens, "documents": None, **kwargs}
        self.tagged = re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", source) is not None
        self.stop: tuple[str, ...] = ()
        self.stop_ids: tuple[int, ...] = ()
        self.notes: list[str] = []
        assert self._compiled

    @cached_property
    def _compiled(self) -> jinja2.Template:
        try:
            return _environment(datetime.date.fromisoformat(self.date)).from_string(self.source)
        except jinja2.TemplateSyntaxError as error:
            what = (error.message or "malformed").rstrip(".")
            raise UserError(
                f"chat template {self.name}, line {error.lineno}: {what}. Mend it, or choose another with "
                "chat_template="
            ) from None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_compiled"}

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        **kwargs: Any,
    ) -> Rendered:
        """Raises TemplateRefused with the template's reason."""
        if any(key in message for message in messages for key in THOUGHTS):
            messages = [_with_thoughts(message) for message in messages]
        try:
            marked = self._compiled.render(
                **{**self._constants, **kwargs},
                messages=messages,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
            )
        except jinja2.TemplateError as error:
            raise TemplateRefused(error.message or type(error).__name__) from None
        except (TypeError, ValueError, LookupError, AttributeError) as error:
            # A template that meets a message it was not written for fails like any program.
            raise TemplateRefused(f"{type(error).__name__}: {error}") from None
        if not self.tagged or _OPEN not in marked:
            return Rendered(marked, [])
        head, *tail = marked.split(_OPEN)
        parts, spans, at = [head], [], len(head)
        for piece in tail:
            inside, closed, outside = piece.partition(_CLOSE)
            if not closed or _CLOSE in outside:
                raise TemplateRefused(
                    "generation tags nest, or the text holds characters kept for them"
                )
            parts += inside, outside
            spans.append((at, at + len(inside)))
            at += len(inside) + len(outside)
        return Rendered("".join(parts), spans)

    def fingerprint(self) -> str:
        date = self.date if "strftime_now" in self.source else ""  # most templates print none
        facts = [self.name, self.source, date, self._constants, self.stop]
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()

"""Chat templates: messages -> text, with the places the model is to have written.

Templates are Jinja, rendered in the sandbox transformers uses, with the same settings and helpers, so
that a model's own template gives here what it gives at inference. Two differences: `strftime_now`
returns the run's fixed date, and `{% generation %}` leaves two private characters in the text, which
come out as spans after rendering (so a tag inside a macro, a filter or a captured block still counts,
where counting output blocks, as transformers does, does not).

Ours are in templates/*.jinja. `auto` is the tokenizer's own template, else the first of ours in OURS
whose control tokens are all in the vocabulary. A template's stop tokens end an answer; for a foreign
template they are read off a rendering: what stands behind the last answer.
"""

from __future__ import annotations

import datetime
import difflib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fastsft.data.tokenizer import Tokenizer
from fastsft.errors import UserError

_OPEN, _CLOSE = "\U0010fff2", "\U0010fff3"  # what a generation tag leaves in the text
EOS = "eos_token"


@dataclass(frozen=True, slots=True)
class Layout:
    """What a template of ours needs: control tokens in the vocabulary, and the one that ends an answer."""

    tokens: tuple[str, ...]
    stop: str
    automatic: bool = False  # whether the tokens alone identify the format


_ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
# In the order in which `auto` tries them.
OURS: dict[str, Layout] = {
    "phi4": Layout(("<|im_start|>", "<|im_sep|>", "<|im_end|>"), "<|im_end|>", True),
    "chatml": Layout(("<|im_start|>", "<|im_end|>"), "<|im_end|>", True),
    "llama3": Layout(
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>", True
    ),
    "gemma": Layout(("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>", True),
    "granite": Layout(
        ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"), "<|end_of_text|>", True
    ),
    "phi3": Layout(_ROLE_TOKENS, "<|end|>", True),
    "mistral-v3": Layout(("[INST]", "[/INST]"), EOS, True),
    "mistral-tekken": Layout(("[INST]", "[/INST]"), EOS, True),
    "qwen": Layout(("<|im_start|>", "<|im_end|>"), "<|im_end|>"),
    "qwen3": Layout(("<|im_start|>", "<|im_end|>"), "<|im_end|>"),
    "llama2": Layout((), EOS),
    "mistral-v1": Layout((), EOS),
    "zephyr": Layout((), EOS),
    "olmo2": Layout((), EOS),
    "vicuna": Layout((), EOS),
    "alpaca": Layout((), EOS),
}
_PROMPT_LAYOUTS = (
    "vicuna",
    "alpaca",
)  # take BOS only where the tokenizer puts it before plain text
# Other names for the same; "phi" is the one of the two whose tokens are there.
_ALIASES = {"smollm": "chatml", "qwen2": "qwen", "qwen2.5": "qwen", "phi": "phi3"}


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
        self.kwargs = dict(kwargs)
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
            raise UserError(
                f"chat template {self.name}, line {error.lineno}: {error.message}. Mend it, or choose "
                f"another with chat_template="
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
        facts = [self.name, self.source, self.date, self._constants, self.stop]
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def our_source(name: str) -> str:
    return (resources.files("fastsft.data") / "templates" / f"{name}.jinja").read_text("utf-8")


def resolve_template(
    choice: str,
    tokenizer: Tokenizer,
    *,
    kwargs: Mapping[str, Any],
    date: str,
    extra_stop: Sequence[str] = (),
    new_tokens: Literal["error", "train"] = "error",
) -> Template:
    """The template a config means. choice: auto | a name of ours | a .jinja file.

    new_tokens: "train" adds control tokens the vocabulary lacks to the tokenizer; "error" refuses.
    Raises UserError: unknown name, no file, no template and none of ours fits, unknown stop token.
    """
    name = _ALIASES.get(choice, choice)
    layout: Layout | None = None
    if choice == "phi" and tokenizer.id_of("<|im_sep|>") is not None:
        name = "phi4"
    if choice == "auto" and tokenizer.chat_template is not None:
        name, source = "the tokenizer's own", tokenizer.chat_template
    elif choice.endswith((".jinja", ".j2")):
        name, source = Path(choice).name, _read(Path(choice))
    else:
        name = _automatic(tokenizer) if choice == "auto" else name
        if name not in OURS:
            near = difflib.get_close_matches(name, OURS, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(
                f"chat_template: {choice!r} is not a name of ours{hint} Choose from "
                f"{', '.join(sorted([*OURS, *_ALIASES]))}, auto, or a .jinja file"
            )
        layout, source = OURS[name], our_source(name)
        _add_missing(name, layout, tokenizer, new_tokens)
        if name in _PROMPT_LAYOUTS and not tokenizer.adds_bos:
            source = source.replace("{{- bos_token }}\n", "")
    template = Template(
        name, source, special_tokens=tokenizer.special_tokens, kwargs=kwargs, date=date
    )
    _find_stops(template, layout, tokenizer, extra_stop)
    return template


def _automatic(tokenizer: Tokenizer) -> str:
    """The first of ours whose control tokens are all there."""
    for name, layout in OURS.items():
        known = all(tokenizer.id_of(token) is not None for token in layout.tokens)
        byte_level = tokenizer.byte_lengths is not None
        if name in ("mistral-v3", "mistral-tekken") and byte_level != (name == "mistral-tekken"):
            continue
        if layout.automatic and known:
            return name
    raise UserError(
        f"the tokenizer in {tokenizer.folder} has no chat template, and its vocabulary has the control "
        f"tokens of none of ours. Choose one with chat_template: {', '.join(sorted(OURS))} (vicuna, "
        "alpaca, zephyr need no tokens of their own; chatml does: new_tokens: train), or a .jinja file"
    )


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise UserError(f"chat_template: cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"chat_template: {path} is not UTF-8 text") from None


def _add_missing(name: str, layout: Layout, tokenizer: Tokenizer, new_tokens: str) -> None:
    missing = [token for token in layout.tokens if tokenizer.id_of(token) is None]
    if layout.stop == EOS and tokenizer.eos_id is None:
        raise UserError(
            f"chat_template: {name} ends answers with EOS, and the tokenizer has no eos_token"
        )
    if missing and new_tokens == "train":
        tokenizer.add_control_tokens(missing)
    elif missing:
        raise UserError(
            f"chat_template: {name} needs {', '.join(missing)}, which the tokenizer in {tokenizer.folder} "
            "does not have. Set new_tokens: train to add and train them, or choose a template without "
            "tokens of its own, such as alpaca"
        )


def _find_stops(
    template: Template, layout: Layout | None, tokenizer: Tokenizer, extra: Sequence[str]
) -> None:
    """Fill in stop and stop_ids, and say what will not be learned."""
    named = tokenizer.special_tokens
    found = [] if layout is None else [named.get(layout.stop, layout.stop)]
    unknown = [token for token in extra if tokenizer.id_of(token) is None]
    if unknown:
        raise UserError(
            f"stop: {unknown[0]!r} is not one token of the tokenizer in {tokenizer.folder}"
        )
    found += extra
    if layout is None:
        found += _observed_stop(template, tokenizer)
    ids = [i for token in found if (i := tokenizer.id_of(token)) is not None]
    template.stop_ids = tuple(dict.fromkeys([*ids, *tokenizer.stop_ids]))
    texts = {i: token for token, i in tokenizer.added_tokens.items()}
    known = [texts[i] for i in template.stop_ids if i in texts]
    template.stop = tuple(dict.fromkeys([*found, *known]))
    if template.tagged and layout is None:
        _warn_untrained_stop(template)


_PROBE = "fastsftprobe"
_PROBES: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": "x"}, {"role": "assistant", "content": _PROBE}],
    [
        {"role": "system", "content": "x"},
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": _PROBE},
    ],
)


def _probe(template: Template) -> Rendered | None:
    for messages in _PROBES:
        try:
            rendered = template.render(messages)
        except TemplateRefused:
            continue
        if rendered.text.count(_PROBE) == 1:
            return rendered
    return None


def _observed_stop(template: Template, tokenizer: Tokenizer) -> list[str]:
    """The control token right behind a last answer, blanks apart."""
    rendered = _probe(template)
    if rendered is None:
        return []
    behind = rendered.text.split(_PROBE)[1].lstrip()
    fitting = [token for token in tokenizer.control if token and behind.startswith(token)]
    return [max(fitting, key=len)] if fitting else []


def _warn_untrained_stop(template: Template) -> None:
    rendered = _probe(template)
    if rendered is None or not rendered.spans:
        return
    start, end = rendered.spans[-1]
    answer = rendered.text[start:end].rstrip()
    if not answer.endswith(template.stop):
        template.notes.append(
            f"chat template {template.name}: no stop token stands inside its generation tags, so the model "
            "will not learn to end an answer; move {% endgeneration %} behind it"
        )

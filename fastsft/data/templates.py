"""Which chat template a run uses, and which tokens end an answer in it.

Ours are in templates/*.jinja, written for training: generation tags around what the model writes, the
stop token inside, what follows it outside. `auto` is the tokenizer's own template, else the first of
ours in OURS whose control tokens are all in the vocabulary. For a foreign template the stop is read off
a rendering: the control token behind the last answer.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from fastsft.data.rendering import Rendered, Template, TemplateRefused
from fastsft.data.tokenizer import Tokenizer
from fastsft.errors import UserError

__all__ = ["OURS", "Rendered", "Template", "TemplateRefused", "our_source", "resolve_template"]
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
        raise UserError(
            f"chat_template: cannot read {path}: {error.strerror}; give a .jinja file that is there, or "
            "the name of a template of ours"
        ) from None
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

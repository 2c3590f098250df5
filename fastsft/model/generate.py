"""Answers from a model: for samples while training, and for a person at a terminal.

transformers' `generate` does the decoding, since it knows which cache each architecture needs; the training
attention has none, so the model's own attention runs meanwhile. The settings are ours alone, greedy unless
a temperature is given: what a checkpoint's generation_config.json suggests (penalties, nucleus) would make
answers of two checkpoints incomparable. Training state is left as it was: mode, gradients' absence, and
the random numbers, which sampling draws from a generator of its own seed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from fastsft.errors import UserError
from fastsft.model.attention import plain_attention
from fastsft.model.inference import load_for_inference, load_subject, locate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fastsft.data.templates import Template
    from fastsft.data.tokenizer import Tokenizer

__all__ = ["chat", "generate", "load_for_inference"]

CHAT_TOKENS = 1024
OnText = Callable[[str], None]


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    template: Template | None,
    messages: str | list[dict[str, Any]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    on_text: OnText | None = None,
) -> tuple[str, bool]:
    """The model's answer, and whether it ended it by itself (else it was cut at max_new_tokens).

    messages: a conversation, or a string: one question with a template, a text to go on with without.
    temperature 0 is greedy. on_text is told of each piece of text as it comes. Raises UserError where
    the prompt leaves no room in the model's context.
    """
    prompt = prompt_ids(tokenizer, template, messages)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and len(prompt) >= limit:
        raise UserError(
            f"the prompt has {len(prompt)} tokens and the model takes {limit}; shorten it or start again"
        )
    stops = list(template.stop_ids if template is not None else tokenizer.stop_ids)
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens
        if limit is None
        else min(max_new_tokens, limit - len(prompt)),
        do_sample=temperature > 0,
        eos_token_id=stops or None,
        pad_token_id=stops[0] if stops else 0,
        **({"temperature": temperature, "top_k": 0} if temperature > 0 else {}),
    )
    ids = torch.tensor([prompt], device=model.device)
    run: Any = model.generate
    streamer = None if on_text is None else _Streamer(tokenizer, frozenset(stops), on_text)
    training, own_settings = model.training, model.generation_config
    devices = [ids.device] if ids.is_cuda else []
    try:
        model.eval()
        model.generation_config = settings  # else the checkpoint's fill in what ours leave open
        with plain_attention(model), torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            out = run(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=settings,
                streamer=streamer,
            )
    finally:
        model.generation_config = own_settings
        model.train(training)
    answer: list[int] = out[0, len(prompt) :].tolist()
    stopped = bool(answer) and answer[-1] in stops
    return tokenizer.decode(answer[:-1] if stopped else answer), stopped


def prompt_ids(
    tokenizer: Tokenizer, template: Template | None, messages: str | list[dict[str, Any]]
) -> list[int]:
    """What the model is shown: the rendered conversation up to its turn, or the text after any BOS."""
    if template is None:
        if not isinstance(messages, str):
            raise UserError("this model has no chat template; give it a text to go on with")
        ids, bos = tokenizer.encode(messages), tokenizer.bos_id
        if bos is not None and tokenizer.adds_bos and ids[:1] != [bos]:
            ids = [bos, *ids]
        if not ids:
            raise UserError("an empty prompt gives the model nothing to go on with")
        return ids
    from fastsft.data.encode import encode_prompt
    from fastsft.data.rendering import TemplateRefused

    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    try:
        return encode_prompt(tokenizer, template, messages)
    except TemplateRefused as error:
        raise UserError(f"the chat template {template.name} refuses this prompt: {error}") from None


class _Streamer(BaseStreamer):
    """Turns ids into text piece by piece; a character whose bytes are not all there yet waits."""

    def __init__(self, tokenizer: Tokenizer, stops: frozenset[int], on_text: OnText) -> None:
        self.tokenizer, self.stops, self.on_text = tokenizer, stops, on_text
        self.prompt_seen = False
        self.ids: list[int] = []
        self.shown = ""

    def put(self, value: torch.Tensor) -> None:
        if not self.prompt_seen:
            self.prompt_seen = True
            return
        self.ids += [i for i in value.flatten().tolist() if i not in self.stops]
        text = self.tokenizer.decode(self.ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._show(text)

    def end(self) -> None:
        self._show(self.tokenizer.decode(self.ids))

    def _show(self, text: str) -> None:
        self.on_text(text[len(self.shown) :])
        self.shown = text


def chat(
    name: str,
    prompt: str | None = None,
    *,
    max_new_tokens: int = CHAT_TOKENS,
    temperature: float = 0.0,
    trust_remote_code: bool = False,
) -> None:
    """Talk to a run, checkpoint, adapter or model: one `prompt`, or lines from stdin until /exit.

    Answers go to stdout as they come; everything else (the prompt sign, notes) to stderr or the terminal.
    """
    subject = locate(name, trust_remote_code=trust_remote_code)
    model, tokenizer, template = load_subject(subject)
    start: list[dict[str, Any]] = []
    if template is not None and subject.config is not None and subject.config.system:
        start = [{"role": "system", "content": subject.config.system}]
    history = list(start)
    for line in [prompt] if prompt is not None else _lines():
        asked: str | list[dict[str, Any]] = line
        if template is not None:
            history.append({"role": "user", "content": line})
            asked = history
        answer, stopped = generate(
            model,
            tokenizer,
            template,
            asked,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            on_text=_write,
        )
        _write("\n")
        if not stopped and tokenizer.stop_ids:
            print(f"[cut after {max_new_tokens} tokens]", file=sys.stderr)
        history.append({"role": "assistant", "content": answer})


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _lines() -> Iterator[str]:
    """What a person types, or the lines of a pipe, until /exit or the end; empty lines are skipped."""
    terminal = sys.stdin.isatty()
    if terminal:
        print("One message a line; /exit or Ctrl-D ends.", file=sys.stderr)
    while True:
        if terminal:
            try:
                line = input("> ")
            except EOFError:
                return
        else:
            line = sys.stdin.readline()
            if not line:
                return
        line = line.strip()
        if line == "/exit":
            return
        if line:
            yield line

"""Conversations -> token ids and the mask of what is trained, a batch at a time.

Chat goes through the template (turns.py says which characters are learned, spans.py which tokens).
Plain text and prompt/completion strings are taken as they stand, control tokens in them included: such
data is often rendered beforehand. There the tokenizer's BOS goes first if it puts one, once; EOS ends
the document and is trained, once.

The first token of a sequence is never trained: nothing precedes it. A document split for its length
repeats one token at each cut, the last of a part being the first of the next, so that every token is
learned exactly once. Truncation ends a row where the limit is; no EOS is invented.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fastsft.data.rendering import Template
from fastsft.data.rows import BadRow, Conversation
from fastsft.data.spans import Marked, encode_marked
from fastsft.data.tokenizer import Tokenizer
from fastsft.data.turns import MultiTurn, Plan, Planner, TrainOn
from fastsft.data.words import Words, strings_in, unfit
from fastsft.errors import UserError

Overlong = Literal["auto", "drop", "truncate", "split", "error"]
Sequence_ = tuple[np.ndarray, np.ndarray]
_SAMPLE = 128  # texts on which tiktoken is compared with `tokenizers`
_CODE = ("encode", "turns", "words", "spans", "rendering", "templates", "tokenizer", "fast_bpe")


@dataclass(slots=True)
class Encoded:
    """One example. sequences: (ids int32[n], trained bool[n]), usually one.

    extra_tokens: tokens beyond the longest sequence's, where a template forces one per trained turn.
    notes: what was done to it, in a few words each, to be counted: truncated, split, ...
    """

    sequences: list[Sequence_]
    where: str
    extra_tokens: int = 0
    notes: tuple[str, ...] = ()


class Encoder:
    """Rows to examples. Picklable; the first `encode` decides whether tiktoken runs the tokenizer."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: Template | None,
        *,
        train_on: TrainOn = "assistant",
        multi_turn: MultiTurn = "auto",
        max_length: int | None = None,
        overlong: Overlong = "auto",
        no_template: str = "there is no chat template",
    ) -> None:
        """template: None where no row is a conversation; no_template: why, for one all the same.

        max_length: tokens of a sequence, or no limit.
        """
        if train_on == "all" and multi_turn == "per_turn":
            raise UserError(
                "multi_turn: per_turn with train_on: all would train every prompt once per turn. "
                "Leave multi_turn at auto"
            )
        self.tokenizer, self.template = tokenizer, template
        self.train_on, self.multi_turn = train_on, multi_turn
        self.max_length, self.overlong = max_length, overlong
        self.no_template = no_template
        self._planner = None
        if template:
            self._planner = Planner(tokenizer, template, train_on=train_on, multi_turn=multi_turn)

    def encode(self, rows: Sequence[Conversation | BadRow]) -> list[Encoded | BadRow]:
        """One result per row and in its order, but several for a row that was split.

        Raises UserError where the template or the tokenizer is at fault rather than a row.
        """
        plans = [row if isinstance(row, BadRow) else self._plan(row) for row in rows]
        texts = [marked for plan in plans if isinstance(plan, Plan) for marked in plan.sequences]
        self._choose_fast(texts)
        encoded = iter(encode_marked(self.tokenizer, texts))
        out: list[Encoded | BadRow] = []
        for row, plan in zip(rows, plans, strict=True):
            if isinstance(plan, BadRow) or isinstance(row, BadRow):
                assert isinstance(plan, BadRow)
                out.append(plan)
                continue
            sequences = [next(encoded) for _ in plan.sequences]
            out += self._finish(row, [self._close(row, s) for s in sequences], plan.notes)
        return out

    def _choose_fast(self, texts: Sequence[Marked]) -> None:
        if texts:
            self.tokenizer.choose_fast([marked.text for marked in texts[:_SAMPLE]])

    def _plan(self, row: Conversation) -> Plan | BadRow:
        if row.kind == "chat":
            if self._planner is None:
                raise UserError(f"{row.where} is a conversation, but {self.no_template}")
            return self._planner.plan(row)
        text = row.text if row.kind == "text" else row.prompt + row.completion
        start = len(row.prompt) if row.kind == "completion" and self.train_on != "all" else 0
        reason = unfit([text])
        if reason:
            return BadRow(row.where, "not text", reason)
        return Plan([Marked(text, [(start, len(text))])])

    def _close(self, row: Conversation, sequence: Sequence_) -> Sequence_:
        """BOS and EOS for what is no chat; the tokens that are never trained for all."""
        ids, trained = sequence
        bos, eos = self.tokenizer.bos_id, self.tokenizer.eos_id
        if row.kind != "chat":
            eos = eos if eos is not None else next(iter(self.tokenizer.stop_ids), None)
            if eos is None:
                raise UserError(
                    f"the tokenizer in {self.tokenizer.folder} names no eos_token, so a document cannot be "
                    "ended; name one in its tokenizer_config.json"
                )
            first = [bos] if self.tokenizer.adds_bos and (not len(ids) or ids[0] != bos) else []
            last = [] if len(ids) and ids[-1] == eos else [eos]
            ids = np.concatenate([np.array(first, np.int32), ids, np.array(last, np.int32)])
            trained = np.concatenate(
                [np.zeros(len(first), bool), trained, np.ones(len(last), bool)]
            )
        elif bos is not None and len(ids) > 1 and ids[0] == ids[1] == bos:
            assert self.template is not None
            raise UserError(
                f"{row.where}: chat template {self.template.name} begins with BOS twice; remove one from it"
            )
        if self.train_on == "all" and bos is not None and bos not in self.tokenizer.stop_ids:
            trained &= ids != bos
        trained[:1] = False
        return ids, trained

    def _finish(
        self, row: Conversation, sequences: list[Sequence_], notes: list[str]
    ) -> list[Encoded | BadRow]:
        """Apply the length limit."""
        limit = self.max_length
        longest = max(len(ids) for ids, _ in sequences)
        over = limit is not None and longest > limit
        policy = self.overlong
        if policy == "auto":
            policy = "split" if row.kind == "text" else "drop"
        if over and policy in ("drop", "error"):
            detail = f"It has {longest} tokens, over max_length {limit}."
            return [BadRow(row.where, "too long", detail)]
        if over and policy == "truncate":
            assert limit is not None
            sequences = [(ids[:limit], trained[:limit]) for ids, trained in sequences]
            notes = [*notes, "truncated"]
        if over and policy == "split":
            assert limit is not None
            parts = [part for sequence in sequences for part in _split(sequence, limit)]
            kept = [
                Encoded([part], row.where, 0, (*notes, "split")) for part in parts if part[1].any()
            ]
            return [*kept] or [_nothing(row)]
        sequences = [sequence for sequence in sequences if sequence[1].any()]
        if not sequences:
            return [_nothing(row)]
        lengths = [len(ids) for ids, _ in sequences]
        return [Encoded(sequences, row.where, sum(lengths) - max(lengths), tuple(notes))]

    def fingerprint(self) -> str:
        """Changes whenever a row's ids or mask may change: tokenizer, template, options, this code."""
        folder = Path(__file__).parent
        facts = [
            self.tokenizer.fingerprint(),
            self.template.fingerprint() if self.template else "",
            repr((self.train_on, self.multi_turn, self.max_length, self.overlong)),
            *((folder / f"{name}.py").read_text("utf-8") for name in _CODE),
        ]
        return hashlib.sha256("\0".join(facts).encode()).hexdigest()


def encode_prompt(
    tokenizer: Tokenizer, template: Template, messages: list[dict[str, Any]]
) -> list[int]:
    """The ids a model is shown before its answer: those that come first where the answer is trained.

    Control tokens spelled in a message are words here as there. Raises TemplateRefused; UserError for
    messages that are not text.
    """
    strings = list(strings_in(messages))
    reason = unfit(strings)
    if reason:
        raise UserError(f"the prompt cannot be read: {reason}")
    words = Words(tokenizer)
    if words.hold_control(strings):
        text = template.render(words.stand_in(messages), add_generation_prompt=True).text
        marked = words.spell_out(Marked(text, []))
    else:
        marked = Marked(template.render(messages, add_generation_prompt=True).text, [])
    ((ids, _),) = encode_marked(tokenizer, [marked])
    return ids.tolist()


def _nothing(row: Conversation) -> BadRow:
    return BadRow(row.where, "nothing to train", "No token of the row is to be trained.")


def _split(sequence: Sequence_, limit: int) -> list[Sequence_]:
    """Parts of at most `limit` tokens; each begins with the last token of the one before, untrained."""
    ids, trained = sequence
    parts = []
    for at in range(0, max(1, len(ids) - 1), limit - 1):
        mask = trained[at : at + limit].copy()
        mask[:1] = False
        parts.append((ids[at : at + limit], mask))
    return parts

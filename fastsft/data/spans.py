"""Text with marked character ranges -> ids with a mask, for any tokenizer.

A range is an answer: at inference the model is given the ids of the text before it and writes on from
there. So the text is cut where an answer starts and the parts are tokenised on their own; then the
prompt's ids are a prefix of the training ids even where, uncut, a token would lie astride the start, or
where the blanks a prompt ends with would be grouped otherwise because of what follows. An answer's end
is no such place (usually a control token stands there): a token that begins inside the answer is part
of it, which is also transformers' rule.

Byte-level tokenizers: parts are independent, and a token's place is a sum of byte lengths. Others
(SentencePiece and its like) put a blank before the first word of a text, so there the text stays whole
unless a token does lie astride; then what follows the cut is encoded behind a lead that is taken off.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer as Backend

from fastsft.data.tokenizer import Tokenizer

Ids = np.ndarray
Mask = np.ndarray
_LEADS = ("\n", "\ue000")  # tried in this order; nothing merges with the second


@dataclass(slots=True)
class Marked:
    """spans: trained [start, end) ranges of characters, ascending, disjoint.

    guarded: control tokens in the text are wrapped (Tokenizer.guarded), bare ones are words.
    """

    text: str
    spans: list[tuple[int, int]]
    guarded: bool = False


def encode_marked(tokenizer: Tokenizer, texts: Sequence[Marked]) -> list[tuple[Ids, Mask]]:
    """(ids int32[n], trained bool[n]) of each text. No token is added around it."""
    out: list[tuple[Ids, Mask] | None] = [None] * len(texts)
    parts: list[str] = []
    plain: list[int] = []
    for i, marked in enumerate(texts):
        if marked.guarded or not _sums_up(tokenizer, marked.text):
            out[i] = _by_offsets(tokenizer, marked)
        else:
            plain.append(i)
            parts += _cut(marked.text, (start for start, _ in marked.spans))
    encoded = iter(_encode_parts(tokenizer, parts))
    for i in plain:
        out[i] = _by_lengths(tokenizer, texts[i], encoded)
    return out  # type: ignore[return-value]


def _sums_up(tokenizer: Tokenizer, text: str) -> bool:
    """Whether the tokens' byte lengths give their places in this very text."""
    if tokenizer.byte_lengths is None:
        return False
    return not tokenizer.normalizes or text.isascii() or unicodedata.is_normalized("NFC", text)


def _cut(text: str, places: Iterable[int]) -> list[str]:
    edges = [0, *(place for place in places if place), len(text)]
    return [text[a:b] for a, b in zip(edges, edges[1:], strict=False)]


def _encode_parts(tokenizer: Tokenizer, parts: list[str]) -> list[Ids]:
    fast = tokenizer.fast
    if fast is None:
        return [np.array(ids, np.int32) for ids in tokenizer.encode_batch(parts)]
    return [
        fast.encode(part) if fast.takes(part) else np.array(tokenizer.encode(part), np.int32)
        for part in parts
    ]


def _by_lengths(tokenizer: Tokenizer, marked: Marked, encoded: Iterable[Ids]) -> tuple[Ids, Mask]:
    """Join the parts of one text, marking in each the tokens that begin before its answer's end."""
    text, spans = marked.text, marked.spans
    parts = iter(encoded)
    if len(spans) == 1 and spans[0] == (0, len(text)):
        ids = next(parts)
        return ids, np.ones(len(ids), bool)
    before = [] if spans and spans[0][0] == 0 else [next(parts)]
    joined, counts, at = before, [], sum(map(len, before))
    for i, (start, end) in enumerate(spans):
        ids = next(parts)
        stop = spans[i + 1][0] if i + 1 < len(spans) else len(text)
        counts.append(
            (at, at + (len(ids) if end == stop else _begun(tokenizer, ids, text[start:end])))
        )
        joined.append(ids)
        at += len(ids)
    trained = np.zeros(at, bool)
    for first, last in counts:
        trained[first:last] = True
    return np.concatenate(joined), trained


def _begun(tokenizer: Tokenizer, ids: Ids, answer: str) -> int:
    """How many of the ids begin inside the first len(answer) characters of their text."""
    assert tokenizer.byte_lengths is not None
    ends = tokenizer.byte_lengths[ids].cumsum()
    size = len(answer) if answer.isascii() else len(answer.encode())
    return 1 + int(ends.searchsorted(size)) if size else 0


def _by_offsets(tokenizer: Tokenizer, marked: Marked) -> tuple[Ids, Mask]:
    backend = tokenizer.guarded if marked.guarded else tokenizer.backend
    text, starts = marked.text, [start for start, _ in marked.spans]
    whole = tokenizer.byte_lengths is None
    ids, first, last = _offsets(backend, text)
    if whole:
        starts = [s for s in starts if ((first < s) & (last > s)).any()]
    if starts:
        pieces, at = [], 0
        for part in _cut(text, starts):
            lead = whole and at > 0
            one, a, b = _continued(backend, part) if lead else _offsets(backend, part)
            pieces.append((one, a + at, b + at))
            at += len(part)
        ids, first, last = (np.concatenate(column) for column in zip(*pieces, strict=True))
    trained = np.zeros(len(ids), bool)
    for start, end in marked.spans:
        trained |= (first >= start) & (first < end)
    return ids, trained


def _offsets(backend: Backend, text: str) -> tuple[Ids, np.ndarray, np.ndarray]:
    """ids int32[n], and the characters each token begins at and ends before."""
    encoded = backend.encode(text, add_special_tokens=False)
    places = np.array(encoded.offsets, np.int64).reshape(-1, 2)
    return np.array(encoded.ids, np.int32), places[:, 0], places[:, 1]


def _continued(backend: Backend, text: str) -> tuple[Ids, np.ndarray, np.ndarray]:
    """`_offsets` of a text that others go before: no blank is put in front of its first word."""
    for lead in _LEADS:
        head = backend.encode(lead, add_special_tokens=False).ids
        ids, first, last = _offsets(backend, lead + text)
        if ids[: len(head)].tolist() == head:
            return ids[len(head) :], first[len(head) :] - len(lead), last[len(head) :] - len(lead)
    return _offsets(backend, text)

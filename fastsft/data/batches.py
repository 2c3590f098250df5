"""From an optimizer step to its micro-batches: pure functions over numpy arrays, no state, no files.

The examples form one stream: epoch 0's keyed permutation, then epoch 1's, and so on. Step s takes
positions [sB, (s+1)B) of it, whatever the packing; only the last step may be short. A source's weight
w is its passes per epoch: floor(w) whole copies and a keyed sample for the rest, new each epoch.

    step --stream--> examples --store--> sequences --divide--> micro-batches --collate--> MicroBatch

A step's sequences are divided into the fewest micro-batches under a token budget, balanced by cost
(linear in a document's length for the matmuls, quadratic for attention). The loss of a step is the sum
over its trained tokens divided by their number over all its micro-batches, so the division changes the
time, never the gradient. Nothing crosses a document: labels are shifted inside each one, positions start
at zero, `cu_seqlens` marks the boundaries.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

IGNORE = -100
ROW_KEY_SHIFT = 24  # row_key = sequence id << 24 | position: documents of up to 16.7 M tokens


class Document(NamedTuple):
    """One document on its way into a micro-batch: ids int32[n], trained bool[n]."""

    key: int
    ids: np.ndarray
    trained: np.ndarray


@dataclass(slots=True)
class MicroBatch:
    """Many documents side by side in one row of T tokens; S documents, n trained tokens.

    Arrays are numpy here and torch tensors of the same shape and dtype once the loader has moved them.
    """

    ids: Any  # int64[T]
    labels: Any  # int64[T], already shifted; -100 = not trained
    positions: Any  # int32[T], from 0 in each document
    cu_seqlens: Any  # int32[S+1], a possible untrained tail document included
    max_seqlen: int
    trained_rows: Any  # int64[n], where labels != -100
    row_key: Any  # int64[T], (sequence, position): what keys dropout's random numbers
    step_trained: int  # trained tokens of the whole optimizer step
    tokens: int  # real tokens, the tail not counted
    lengths: tuple[int, ...]  # of the S documents: cu_seqlens as the host knows it
    targets: tuple[int, ...]  # trained tokens of each document, n in all
    sequences: tuple[int, ...]
    host_ids: Any = None  # ids once more, on the host, once the loader has moved the batch


@dataclass(frozen=True)
class Mixture:
    """Which examples an epoch holds. `sizes[i]` examples of source i, in store order; all keyed by seed."""

    sizes: tuple[int, ...]
    weights: tuple[float, ...]
    seed: int
    shuffle: bool = True

    def counts(self) -> list[int]:
        """Examples each source gives to one epoch: floor(w)·n whole copies and round(frac(w)·n) sampled."""
        return [
            int(w) * n + round((w - int(w)) * n)
            for n, w in zip(self.sizes, self.weights, strict=True)
        ]

    def epoch_size(self) -> int:
        return sum(self.counts())

    def epoch(self, epoch: int) -> np.ndarray:
        """The examples of one epoch in training order, int64[epoch_size]."""
        parts, first = [], 0
        for source, (n, w) in enumerate(zip(self.sizes, self.weights, strict=True)):
            whole = np.tile(np.arange(first, first + n, dtype=np.int64), int(w))
            extra = round((w - int(w)) * n)
            if extra:
                sample = _generator(self.seed, 1 + source, epoch).permutation(n)[:extra]
                whole = np.concatenate([whole, first + np.sort(sample)])
            parts.append(whole)
            first += n
        order = np.concatenate(parts)
        return _generator(self.seed, 0, epoch).permutation(order) if self.shuffle else order


def _generator(seed: int, purpose: int, epoch: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, purpose, epoch]))


class ExampleOrder:
    """The endless stream of examples, epoch after epoch; `take(a, b)` gives positions a to b."""

    def __init__(self, mixture: Mixture) -> None:
        assert mixture.epoch_size() > 0, "an epoch without examples"
        self.mixture = mixture
        self._epoch = lru_cache(maxsize=2)(mixture.epoch)

    def take(self, start: int, stop: int) -> np.ndarray:
        size = self.mixture.epoch_size()
        parts = []
        while start < stop:
            epoch, offset = divmod(start, size)
            part = self._epoch(epoch)[offset : offset + stop - start]
            parts.append(part)
            start += len(part)
        return np.concatenate(parts) if parts else np.empty(0, np.int64)


def step_bounds_by_examples(total: int, batch_size: int) -> np.ndarray:
    """Stream positions where steps begin, int64[steps+1]; only the last step may be short."""
    return np.append(np.arange(0, total, batch_size, dtype=np.int64), total)


def step_bounds_by_tokens(
    order: ExampleOrder,
    tokens: np.ndarray,
    batch_tokens: int,
    *,
    total: int | None,
    max_steps: int | None,
) -> np.ndarray:
    """The same for steps of at most `batch_tokens` tokens (at least one example each).

    tokens: int64[examples], the length of each example. Exactly one of total (stream positions) and
    max_steps ends the run.
    """
    bounds, position, size = [0], 0, order.mixture.epoch_size()
    epoch_tokens = int(tokens[order.take(0, size)].sum())
    window = size * (2 + batch_tokens // max(1, epoch_tokens))  # longer than any step
    while (total is None or position < total) and (max_steps is None or len(bounds) <= max_steps):
        stop = position + window if total is None else min(position + window, total)
        sums = np.cumsum(tokens[order.take(position, stop)])
        start, used = 0, 0
        while start < len(sums) and (max_steps is None or len(bounds) <= max_steps):
            end = max(start + 1, int(np.searchsorted(sums, used + batch_tokens, side="right")))
            if end == len(sums) and stop != total and start > 0:
                break  # this step may reach into the next window
            bounds.append(position + end)
            start, used = end, int(sums[end - 1])
        position = bounds[-1]
    return np.asarray(bounds, np.int64)


def divide(lengths: Sequence[int], budget: int, *, quadratic: float = 0.0) -> list[list[int]]:
    """Index lists of the fewest micro-batches of at most `budget` tokens that balance by cost.

    Cost of a document of n tokens: n + quadratic·n². Longest first, each to the cheapest micro-batch that
    has room (LPT); when that does not fit, best fit decreasing; when that does not either, one more.
    """
    assert lengths and max(lengths) <= budget, "the budget is at least the longest row"
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    count = -(-sum(lengths) // budget)
    while True:
        for tightest in (False, True):
            bins = _assign(order, lengths, budget, count, quadratic, tightest)
            if bins is not None:
                return [sorted(members) for members in bins if members]
        count += 1


def _assign(
    order: list[int],
    lengths: Sequence[int],
    budget: int,
    count: int,
    quadratic: float,
    tightest: bool,
) -> list[list[int]] | None:
    bins: list[list[int]] = [[] for _ in range(count)]
    used, cost = [0] * count, [0.0] * count
    for i in order:
        n = lengths[i]
        fits = [b for b in range(count) if used[b] + n <= budget]
        if not fits:
            return None
        best = min(fits, key=lambda b: (-used[b] if tightest else cost[b], b))
        bins[best].append(i)
        used[best] += n
        cost[best] += n + quadratic * n * n
    return bins


def trained_targets(trained: np.ndarray) -> int:
    """Tokens of a document that are predicted and trained: its first token has no predecessor."""
    return int(np.count_nonzero(trained[1:]))


def collate(documents: Sequence[Document], step_trained: int, *, round_to: int = 1) -> MicroBatch:
    """Lay documents side by side. T is rounded up by one untrained tail document, never counted."""
    tokens = sum(len(d.ids) for d in documents)
    tail = -tokens % round_to
    lengths = [len(d.ids) for d in documents] + ([tail] if tail else [])
    total = tokens + tail
    ids = np.zeros(total, np.int64)
    labels = np.full(total, IGNORE, np.int64)
    positions = np.zeros(total, np.int32)
    row_key = np.zeros(total, np.int64)
    cu_seqlens = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=cu_seqlens[1:])
    targets = []
    for d, begin in zip(documents, cu_seqlens, strict=False):
        end = begin + len(d.ids)
        targets.append(trained_targets(d.trained))
        ids[begin:end] = d.ids
        labels[begin : end - 1] = np.where(d.trained[1:], d.ids[1:], IGNORE)
        positions[begin:end] = np.arange(end - begin)
        row_key[begin:end] = (np.int64(d.key) << ROW_KEY_SHIFT) + np.arange(end - begin)
    if tail:
        targets.append(0)
        positions[tokens:] = np.arange(tail)
        row_key[tokens:] = -1 - np.arange(tail)  # no document has negative keys
    return MicroBatch(
        ids=ids,
        labels=labels,
        positions=positions,
        cu_seqlens=cu_seqlens,
        max_seqlen=max(lengths),
        trained_rows=np.flatnonzero(labels != IGNORE),
        row_key=row_key,
        step_trained=step_trained,
        tokens=tokens,
        lengths=tuple(lengths),
        targets=tuple(targets),
        sequences=tuple(d.key for d in documents),
    )


def micro_batches(
    documents: Sequence[Document], budget: int, *, quadratic: float = 0.0, round_to: int = 1
) -> Iterator[MicroBatch]:
    """Divide one step's documents and lay each part out; all parts know the step's trained tokens."""
    lengths = [len(d.ids) for d in documents]
    step_trained = sum(trained_targets(d.trained) for d in documents)
    for members in divide(lengths, max(budget, max(lengths)), quadratic=quadratic):
        yield collate([documents[i] for i in members], step_trained, round_to=round_to)


def pack_in_order(lengths: Sequence[int], budget: int) -> Iterator[range]:
    """Consecutive runs of documents of at most `budget` tokens each, for evaluation."""
    first, used = 0, 0
    for i, n in enumerate(lengths):
        if i > first and used + n > budget:
            yield range(first, i)
            first, used = i, 0
        used += n
    if first < len(lengths):
        yield range(first, len(lengths))

"""Examples straight from the sources, for data nobody wants to tokenise beforehand.

Each source is read in blocks of `BLOCK` rows; a block's examples are shuffled by a permutation keyed on
(seed, source, pass, block). Sources take turns in a fixed pattern: smooth weighted round robin, in whole
numbers, so that every stretch of the stream holds the weights' shares as exactly as it can. A source that
ends begins its next pass, where every block has another order.

The position is therefore a few small numbers, and resuming skips to them: read on from the block's first
row, shuffle it by the same key, go to the offset. A reservoir buffer would shuffle further, but its
contents are no function of a position: on resume it loses some rows and repeats others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from itertools import islice
from math import lcm
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastsft.data.report import Policy, SourceReport
from fastsft.data.rows import BadRow, Conversation
from fastsft.errors import UserError

if TYPE_CHECKING:
    from fastsft.data.encode import Encoded, Encoder
    from fastsft.data.sources import Source

BLOCK = 1024  # rows encoded and shuffled together
PURPOSE = 2 << 64  # keeps these permutations apart from others of the same seed


class Example(NamedTuple):
    """sequences: (ids int32[n], trained bool[n]) each, usually one. where: its row. source: its number."""

    sequences: list[tuple[np.ndarray, np.ndarray]]
    where: str
    source: int


@dataclass(slots=True)
class Position:
    """Where a source stands. Counts are of all passes, up to the beginning of the block.

    A source can begin to read at a row number, but rows that hold nothing (blank lines) have one too, so
    the block's beginning is `skip` readable rows after row number `row`.
    """

    round: int = 0  # passes completed
    block: int = 0
    row: int = 0
    skip: int = 0
    offset: int = 0  # examples of the block already given
    kept: int = 0  # examples of this pass before the block
    rows: int = 0
    dropped: dict[str, int] = field(default_factory=dict)


class _SourceStream:
    """One source, endlessly, from its position on."""

    def __init__(
        self, number: int, source: Source, encoder: Encoder, policy: Policy, seed: int | None
    ) -> None:
        self.number, self.source, self.encoder = number, source, encoder
        self.policy, self.seed = policy, seed
        self.report = SourceReport(source.label, source.verdict)
        self.position = Position()
        self._ahead = 0, 0  # row and skip of the next row to be read
        self._rows: Iterator[Conversation | BadRow] | None = None
        self._examples: list[Encoded] | None = None  # the block in its order

    def restore(self, position: Position) -> None:
        self.position = position
        self.report.rows, self.report.dropped = position.rows, dict(position.dropped)
        self._rows = self._examples = None

    def next(self) -> Encoded:
        while True:
            if self._examples is None:
                self._examples = self._load()
            at = self.position.offset
            if at < len(self._examples):
                self.position.offset += 1
                return self._examples[at]
            self._leave_block()

    def _load(self) -> list[Encoded]:
        """The examples of the block at `position`, in its order; an empty list at the end of a pass."""
        place, report = self.position, self.report
        if self._rows is None:
            self._ahead = place.row, place.skip
            self._rows = self._read(place.row, place.skip)
        place.row, place.skip = self._ahead
        rows = list(islice(self._rows, BLOCK))
        if not rows:
            self._rows = None
            return []
        place.rows, place.dropped = report.rows, dict(report.dropped)
        report.rows += len(rows)
        examples = []
        for item in self.encoder.encode(rows):
            if isinstance(item, BadRow):
                report.drop(item, self.policy)
            else:
                examples.append(item)
        if self.seed is None:
            return examples
        key = [0, self.number, place.round, place.block]
        bits = np.random.Philox(key=self.seed | PURPOSE, counter=key)
        return [examples[i] for i in np.random.Generator(bits).permutation(len(examples))]

    def _leave_block(self) -> None:
        place = self.position
        place.kept += place.offset
        place.offset, place.block = 0, place.block + 1
        if self._rows is None:  # that was the end of the pass
            if not place.kept:
                raise UserError(
                    f"{self.source.label}: nothing left to train, {self.report.rows:,} rows read and all "
                    f"dropped ({self.report.reasons()})"
                )
            place.round, place.block, place.kept = place.round + 1, 0, 0
            place.row, place.skip = 0, 0
        self._examples = None

    def _read(self, first: int, skip: int) -> Iterator[Conversation | BadRow]:
        for chunk in self.source.chunks(first):
            for taken, row in enumerate(self.source.parse(chunk), 1):
                self._ahead = chunk.first_row, taken
                if skip:
                    skip -= 1
                else:
                    yield row


class Mixer:
    """Smooth weighted round robin: `next()` is the source whose share is furthest behind.

    Weights are shares of the examples. They become whole numbers first, so that nothing drifts.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        fractions = [Fraction(str(weight)) for weight in weights]
        scale = lcm(*(f.denominator for f in fractions))
        self.weights = [int(f * scale) for f in fractions]
        self.credit = [0] * len(fractions)

    def next(self) -> int:
        for i, weight in enumerate(self.weights):
            self.credit[i] += weight
        chosen = self.credit.index(max(self.credit))
        self.credit[chosen] -= sum(self.weights)
        return chosen


class ExampleStream:
    """The endless stream of examples. Iterate it in one thread; `state()` is JSON of the position.

    weights: share of each source in the stream. Bad rows are dropped and counted in `reports`, or raise
    UserError, as `policy` says; a source with nothing to train in a whole pass is a UserError.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        encoder: Encoder,
        weights: Sequence[float],
        seed: int,
        shuffle: bool = True,
        *,
        policy: Policy,
    ) -> None:
        self._mixer = Mixer(weights)
        self._streams = [
            _SourceStream(number, source, encoder, policy, seed if shuffle else None)
            for number, source in enumerate(sources)
        ]

    @property
    def reports(self) -> list[SourceReport]:
        """Rows read and dropped so far, by source; a row counts once in every pass."""
        return [stream.report for stream in self._streams]

    def __iter__(self) -> Iterator[Example]:
        while True:
            number = self._mixer.next()
            encoded = self._streams[number].next()
            yield Example(encoded.sequences, encoded.where, number)

    def state(self) -> dict[str, Any]:
        """What `restore` needs to give next what this stream would give next."""
        return {
            "credit": list(self._mixer.credit),
            "sources": [asdict(stream.position) for stream in self._streams],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a `state()` of a stream over the same sources, encoder, weights and seed."""
        if len(state["sources"]) != len(self._streams):
            raise UserError(
                f"the checkpoint streamed {len(state['sources'])} sources, but data names "
                f"{len(self._streams)}; resume with the data it was made with"
            )
        self._mixer.credit = list(state["credit"])
        for stream, position in zip(self._streams, state["sources"], strict=True):
            stream.restore(Position(**position))

"""A source and an encoder of the real ones' shape that workers can import, with nothing in between:
row n of a fake source is the text str(n), and its tokens say which row they are."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fastsft.data.rows import BadRow, Conversation
from fastsft.errors import UserError


@dataclass
class FakeChunk:
    first_row: int
    payload: range


@dataclass
class FakeSource:
    rows: int
    label: str = "rows.jsonl"
    chunk: int = 10
    bad: tuple[int, ...] = ()
    too_long: tuple[int, ...] = ()
    version: str = "1"
    verdict: str = "fake: column text"
    parse_error: int = 0  # this row ends the run
    die_at: int = 0
    blank: tuple[int, ...] = ()  # these rows have a number and hold nothing

    def chunks(self, start_row: int = 0) -> Iterator[FakeChunk]:
        size = self.chunk + start_row % 7  # where chunks end is nobody's business
        for first in range(start_row, self.rows, size):
            yield FakeChunk(first, range(first + 1, min(first + size, self.rows) + 1))

    def parse(self, chunk: FakeChunk) -> Iterator[Conversation | BadRow]:
        for row in chunk.payload:
            where = f"{self.label}:{row}"
            if row == self.parse_error:
                raise UserError(f"{where}: broken beyond parsing")
            if row == self.die_at:
                os.kill(os.getpid(), 9)
            if row in self.blank:
                continue
            if row in self.bad:
                yield BadRow(where, "empty row", "The row holds nothing.")
            elif row in self.too_long:
                yield BadRow(where, "too long", "The row has 9 tokens.")
            else:
                yield Conversation("text", where, text=str(row))

    def fingerprint(self) -> str:
        return f"{self.rows} {self.version}"


@dataclass
class FakeEncoded:
    sequences: list[tuple[np.ndarray, np.ndarray]]
    where: str
    extra_tokens: int
    notes: tuple[str, ...] = ()


@dataclass
class FakeEncoder:
    """Row n -> n % 7 + 2 tokens of value n, trained from the second on; n % 5 == 0: two sequences."""

    version: str = "1"
    seconds: float = 0.0

    def encode(self, rows: list[Conversation | BadRow]) -> list[FakeEncoded | BadRow]:
        time.sleep(self.seconds)
        out: list[FakeEncoded | BadRow] = []
        for row in rows:
            if isinstance(row, BadRow):
                out.append(row)
                continue
            n = int(row.text)
            ids = np.full(n % 7 + 2, n, np.int32)
            sequences = [(ids, np.arange(len(ids)) > 0)] * (2 if n % 5 == 0 else 1)
            out.append(
                FakeEncoded(
                    sequences, row.where, len(ids) if n % 5 == 0 else 0, ("done",) * (n == 8)
                )
            )
        return out

    def fingerprint(self) -> str:
        return self.version

"""JSON lines, JSON arrays and CSV, plain or compressed -> chunks of rows, in bounded memory.

Reading is split in two. `chunks` runs in one process and does the least that finds where rows
end: whole lines are cut out of blocks of bytes without looking inside; an array is cut at its
elements by the JSON scanner itself (a boundary inside a string cannot fool it); CSV records are
put together by the csv module, since quotes may hide line breaks. `rows` runs in many processes
and does the parsing. What is wrong with one line is that row's trouble and yields an Unreadable;
what is wrong with the file (an array broken in the middle, a compressed file cut short) cannot be
read past and is a UserError: dropping the rest of the file is not dropping a row.

A reader numbers rows twice: by position in the source, for start_row and max_rows, and by the
number a person looks up, which is the line for JSON lines and CSV and the row otherwise. Blank
lines of JSON lines hold no row but count in both, so that skipping need not look inside.
Bytes that are not UTF-8 travel as lone surrogates (Python's surrogateescape) to the row they hit.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from fastsft.errors import UserError

BLOCK = 1 << 20
ROWS = 1000
_SPACE = re.compile(r"[ \t\n\r]*")
# An error this near the end of what has been read may be cured by reading on ("tru" -> "true").
_LONGEST_WORD = 16
_MAGIC = {
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"\x1f\x8b": "compressed with gzip (its name should end in .gz)",
    b"\x28\xb5\x2f\xfd": "compressed with zstd (its name should end in .zst)",
    b"PK\x03\x04": "a zip archive or a spreadsheet",
    b"\xff\xfe": "UTF-16 text (save it as UTF-8)",
    b"\xfe\xff": "UTF-16 text (save it as UTF-8)",
}


@dataclass(slots=True)
class Chunk:
    """About 1 MB or 1000 rows, not yet parsed. first_row: how many rows of the source precede it."""

    first_row: int
    payload: Any


@dataclass(slots=True)
class Unreadable:
    """Stands for a row that is no JSON value, no text or no record."""

    reason: str
    detail: str


class Row(NamedTuple):
    """position: 0-based in the source; number: what a person looks up; value: JSON or Unreadable."""

    position: int
    number: int
    value: Any


class Reader(Protocol):
    """What a file format must do. Picklable; `rows` needs nothing but the chunk."""

    label: str
    remark: str  # said with the verdict, "" when there is nothing to say

    def chunks(self, start_row: int = 0) -> Iterator[Chunk]: ...
    def rows(self, chunk: Chunk) -> Iterator[Row]: ...
    def columns(self) -> list[str] | None: ...  # where the file itself names them
    def keep(self, columns: list[str]) -> None: ...  # read no others, where that is cheaper
    def digest(self, update: Any) -> None: ...  # feeds every byte of the data to update()


@dataclass
class TextFile:
    """What the three text formats share."""

    path: Path
    label: str
    remark: str = ""

    def columns(self) -> list[str] | None:
        return None

    def keep(self, columns: list[str]) -> None:
        """Text is parsed whole rows at a time: nothing to leave out."""

    def digest(self, update: Any) -> None:
        feed_file(self.path, update)


@dataclass
class JsonLines(TextFile):
    """One object per line. A chunk is the bytes of whole lines."""

    def chunks(self, start_row: int = 0) -> Iterator[Chunk]:
        line = 0
        for payload in _whole_lines(self.path):
            lines = payload.count(b"\n")
            skip = max(0, start_row - line)
            if skip <= lines:
                rest = payload.split(b"\n", skip)[skip] if skip else payload
                if rest and not rest.isspace():
                    yield Chunk(line + skip, rest)
            line += lines

    def rows(self, chunk: Chunk) -> Iterator[Row]:
        lines = chunk.payload.decode("utf-8", "surrogateescape").split("\n")
        for position, line in enumerate(lines, chunk.first_row):
            if line and not line.isspace():
                yield Row(position, position + 1, parse_json(line))


@dataclass
class JsonArray(TextFile):
    """One array of objects, over any number of lines. A chunk is a list of elements' texts."""

    def chunks(self, start_row: int = 0) -> Iterator[Chunk]:
        held: list[str] = []
        size = row = 0
        for row, element in enumerate(_ArrayText(self.path, self.label).elements(), 1):
            if row <= start_row:
                continue
            held.append(element)
            size += len(element)
            if size >= BLOCK or len(held) == ROWS:
                yield Chunk(row - len(held), held)
                held, size = [], 0
        if held:
            yield Chunk(row - len(held), held)

    def rows(self, chunk: Chunk) -> Iterator[Row]:
        for position, element in enumerate(chunk.payload, chunk.first_row):
            yield Row(position, position + 1, parse_json(element))


@dataclass
class CsvFile(TextFile):
    """A header and records, comma-separated, quoted as RFC 4180 has it. Every cell is text.

    A chunk is (header, [(line, cells), ...]).
    """

    def columns(self) -> list[str] | None:
        header = next((cells for _, cells in self._records()), [])
        if len(set(header)) < len(header):
            twice = sorted({name for name in header if header.count(name) > 1})
            raise UserError(f"{self.label}: the header names {twice} twice; rename one")
        return header

    def chunks(self, start_row: int = 0) -> Iterator[Chunk]:
        records = self._records()
        _, header = next(records, (0, []))
        first = start_row
        records = islice(records, start_row, None)
        while held := _take(records):
            yield Chunk(first, (header, held))
            first += len(held)

    def rows(self, chunk: Chunk) -> Iterator[Row]:
        header, records = chunk.payload
        for position, (line, cells) in enumerate(records, chunk.first_row):
            yield Row(position, line, self._row(header, cells))

    @staticmethod
    def _row(header: list[str], cells: list[str]) -> dict[str, str] | Unreadable:
        if len(cells) != len(header):
            what = f"The record has {len(cells)} cells where the header has {len(header)}."
            return Unreadable("malformed CSV", what)
        for cell in cells:
            if not cell.isascii() and (damage := _not_utf8(cell, "cell")):
                return damage
        return dict(zip(header, cells, strict=True))

    def _records(self) -> Iterator[tuple[int, list[str]]]:
        """(the line a record begins at, its cells), blank lines left out, the header first."""
        # The module's own limit of 128 kB is less than a long conversation. A limit there must be:
        # after a quote that is never closed, the rest of the file is one cell.
        csv.field_size_limit(64 * BLOCK)
        reader = csv.reader(_text_lines(self.path), strict=True)
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise UserError(
                    f"{self.label}:{line}: malformed CSV from here on: {error}; "
                    "check the quotes, a quote inside a quoted cell is written twice"
                ) from None
            if cells:
                yield line, cells


class _ArrayText:
    """A window that moves over the text of one JSON array and cuts it at its elements."""

    def __init__(self, path: Path, label: str):
        self.label = label
        self.blocks = _decoded(path)
        self.text, self.at = "", 0
        self.line = 1  # of the window's first character

    def elements(self) -> Iterator[str]:
        if self.next_mark() != "[":
            raise self.broken("an array was expected", self.at)
        self.at += 1
        if self.next_mark() == "]":
            self.at += 1
        else:
            while True:
                self.next_mark()
                yield self.element()
                mark = self.next_mark()
                self.at += 1
                if mark == "]":
                    break
                if mark != ",":
                    raise self.broken("',' or ']' was expected", self.at - 1)
        if self.next_mark():
            raise self.broken("there is more after the end of the array", self.at)

    def element(self) -> str:
        while True:
            try:
                end = _DECODER.raw_decode(self.text, self.at)[1]
            except json.JSONDecodeError as error:
                unfinished = error.pos >= len(self.text) - _LONGEST_WORD
                if (unfinished or error.msg.startswith("Unterminated")) and self.read_on():
                    continue
                raise self.broken(error.msg, error.pos) from None
            except (RecursionError, ValueError) as error:  # nested too deeply; a number too long
                raise self.broken(str(error), self.at) from None
            if end == len(self.text) and self.read_on():
                continue  # a number may go on in the next block
            element, self.at = self.text[self.at : end], end
            return element

    def next_mark(self) -> str:
        """The next character that is not space, "" at the end of the file."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.read_on():
                return ""

    def read_on(self) -> bool:
        """Drop what lies behind, double what lies ahead (an element may be long); False at the end."""
        ahead = self.text[self.at :]
        more = list(islice(self.blocks, max(1, len(ahead) // BLOCK)))
        self.line += self.text.count("\n", 0, self.at)
        self.text, self.at = "".join((ahead, *more)), 0
        return bool(more)

    def broken(self, what: str, at: int) -> UserError:
        line = self.line + self.text.count("\n", 0, at)
        return UserError(
            f"{self.label}: malformed JSON in line {line}: {what}. An array cannot be read past "
            "such a place; mend it, or write one object per line (.jsonl), where a bad line is "
            "one bad row"
        )


_DECODER = json.JSONDecoder()


def parse_json(text: str) -> Any:
    """One JSON value, or what is wrong with its text."""
    if not text.isascii() and (damage := _not_utf8(text, "row")):
        return damage
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        return Unreadable("malformed JSON", f"{error.msg} at column {error.colno}.")
    except RecursionError:
        return Unreadable("malformed JSON", "The row is nested too deeply.")
    except ValueError as error:  # a whole number of more digits than Python converts
        return Unreadable("malformed JSON", f"{error}.")
    if "\\ud" in text or "\\uD" in text:  # half of a surrogate pair is not text
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return Unreadable(
                "invalid Unicode", "The row escapes half of a surrogate pair (\\ud...)."
            )
    return value


def _not_utf8(text: str, what: str) -> Unreadable | None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        position = len(text[: error.start].encode()) + 1
        byte = text[error.start].encode("utf-8", "surrogateescape")[0]
        return Unreadable(
            "invalid UTF-8", f"Byte {position} of the {what} (0x{byte:02x}) is not UTF-8."
        )
    return None


def check_magic(path: Path, label: str) -> None:
    """Refuse what is plainly another kind of file than its ending says."""
    head = next(blocks(path), b"")
    for magic, what in _MAGIC.items():
        if head.startswith(magic):
            raise UserError(
                f"{label} is not what its ending says: it is {what}; rename it, or name another file"
            )
    if b"\0" in head[:1000]:
        raise UserError(
            f"{label} is not what its ending says: it is binary, not text; name a text file"
        )
    if ".csv" in path.suffixes and re.match(rb'\s*[\[{]\s*["{\[]', head):
        raise UserError(
            f"{label} is not what its ending says: it holds JSON; rename it to end in .jsonl or .json"
        )


def first_text(path: Path) -> str:
    """The first block of a text file, for a look at it; damage does not matter here."""
    return next(_decoded(path), "")


def feed_file(path: Path, update: Any) -> None:
    for block in _plain_blocks(path):
        update(block)


def blocks(path: Path) -> Iterator[bytes]:
    """The unpacked bytes of a file, 1 MB at a time, without a UTF-8 byte order mark."""
    codec = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix.lower())
    found = _unpacked_blocks(path, codec) if codec else _plain_blocks(path)
    yield next(found, b"").removeprefix(codecs.BOM_UTF8)
    yield from found


def _plain_blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            yield block


def _unpacked_blocks(path: Path, codec: str) -> Iterator[bytes]:
    """Arrow's streams take several members or frames, and notice when the last is cut short."""
    import pyarrow as pa  # takes time to import, and most text is not packed

    try:
        with pa.input_stream(str(path), compression=codec) as file:
            while block := file.read(BLOCK):
                yield block
    except OSError as error:
        raise UserError(
            f"{path} cannot be unpacked as {codec} ({error}); copy it or make it again"
        ) from None


def _decoded(path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    for block in blocks(path):
        yield decoder.decode(block)
    yield decoder.decode(b"", final=True)


def _whole_lines(path: Path) -> Iterator[bytes]:
    """Blocks again, each now ending at the end of a line."""
    begun: list[bytes] = []
    for block in blocks(path):
        end = block.rfind(b"\n") + 1
        if end:
            yield b"".join((*begun, block[:end]))
            begun = []
        begun.append(block[end:])
    yield b"".join(begun)


def _text_lines(path: Path) -> Iterator[str]:
    for payload in _whole_lines(path):
        # StringIO, not splitlines: U+2028 and its like are no line breaks here.
        yield from io.StringIO(payload.decode("utf-8", "surrogateescape"), newline="")


def _take(records: Iterator[tuple[int, list[str]]]) -> list[tuple[int, list[str]]]:
    """The next chunk's worth of CSV records."""
    held: list[tuple[int, list[str]]] = []
    size = 0
    for record in records:
        held.append(record)
        size += sum(map(len, record[1]))
        if size >= BLOCK or len(held) == ROWS:
            break
    return held

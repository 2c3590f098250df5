"""Where rows come from: one entry of `data` -> a Source that reads, parses and names its rows.

`open_source` looks at the first rows, so that whatever is wrong with a whole file (it is missing,
empty, not what its ending says, without the columns its format needs) is said at once, and so that
`format: auto` can state its verdict together with the columns it goes by and those it leaves. The
order in which formats are tried matters where a row fits several: message lists first, as they say
the most. A Source pickles to a path and a few options; worker processes call only `parse`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

from fastsft.data.rows import (
    FIELDS,
    REQUIRED,
    TARGET_ROLES,
    BadRow,
    Conversation,
    Converter,
    Format,
)
from fastsft.data.textfiles import (
    ROWS,
    Chunk,
    CsvFile,
    JsonArray,
    JsonLines,
    Reader,
    Row,
    Unreadable,
    check_magic,
    first_text,
)
from fastsft.errors import UserError

if TYPE_CHECKING:
    from fastsft.config import DataSource

ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".parquet", ".arrow")
PACKED = (".gz", ".zst")
_SAMPLE = 100  # rows looked at before the verdict


@dataclass
class Source:
    """One opened entry of `data`. verdict: its format and columns, for a person to read."""

    spec: DataSource
    label: str
    verdict: str
    reader: Reader
    converter: Converter

    def chunks(self, start_row: int = 0) -> Iterator[Chunk]:
        """Unparsed rows from a position on, about 1 MB or 1000 rows at a time."""
        limit = self.spec.max_rows
        for chunk in self.reader.chunks(start_row):
            if limit is not None and chunk.first_row >= limit:
                return
            yield chunk

    def parse(self, chunk: Chunk) -> Iterator[Conversation | BadRow]:
        """A chunk's rows in order, good and bad."""
        limit, convert, label = self.spec.max_rows, self.converter, self.label
        for position, number, value in self.reader.rows(chunk):
            if limit is not None and position >= limit:
                return
            where = f"{label}:{number}"
            if type(value) is Unreadable:
                yield BadRow(where, value.reason, value.detail)
            else:
                yield convert(value, where)

    def fingerprint(self) -> str:
        """Changes with any byte of the data and any option that changes what its rows become."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(json.dumps([vars(self.converter), self.spec.max_rows]).encode())
        digest.update(type(self.reader).__name__.encode())
        self.reader.digest(digest.update)
        return digest.hexdigest()


@dataclass
class Builtin:
    """`builtin:docstrings`: rows made on the spot. A chunk is a list of them."""

    label: str
    split: str
    remark: str = ""

    def chunks(self, start_row: int = 0) -> Iterator[Chunk]:
        from fastsft.builtin import docstrings

        rows = islice(docstrings.rows(self.split), start_row, None)
        while held := list(islice(rows, ROWS)):
            yield Chunk(start_row, held)
            start_row += len(held)

    def rows(self, chunk: Chunk) -> Iterator[Row]:
        for position, value in enumerate(chunk.payload, chunk.first_row):
            yield Row(position, position + 1, value)

    def columns(self) -> list[str] | None:
        return None

    def keep(self, columns: list[str]) -> None:
        """They have no others."""

    def digest(self, update: Callable[[bytes], object]) -> None:
        for chunk in self.chunks():
            update(json.dumps(chunk.payload).encode())


def open_source(spec: DataSource, *, system: str | None, streaming: bool = False) -> Source:
    """Open a file, a folder, a hub id or builtin:docstrings, and decide on its format.

    system: for chat rows without a system message. streaming: read a hub data set over the network
    instead of downloading it first (files are never held in memory either way).
    Raises UserError for whatever concerns the source as a whole.
    """
    reader = _reader(spec, streaming)
    _check_options(spec, reader.label)
    rows = _sample(reader)
    found = reader.columns() or list(dict.fromkeys(key for row in rows for key in row))
    format, columns = _decide(spec, rows, found, reader.label)
    converter = Converter.make(format, columns, spec.roles, system)
    used = [name for name in found if name in converter.columns.values()]
    reader.keep(used)
    verdict = f"{format}: columns {', '.join(used)}"
    if rest := [name for name in found if name not in used]:
        more = f" and {len(rest) - 8} more" if len(rest) > 8 else ""
        verdict += f" (not used: {', '.join(rest[:8])}{more})"
    if reader.remark:
        verdict += f"; {reader.remark}"
    return Source(spec, reader.label, verdict, reader, converter)


# -- which reader -----------------------------------------------------------------------------


def _reader(spec: DataSource, streaming: bool) -> Reader:
    if spec.path.startswith("builtin:"):
        if spec.path != "builtin:docstrings":
            raise UserError(f"data {spec.path!r} is unknown; there is only builtin:docstrings")
        return Builtin(spec.path, spec.split or "train")
    path = Path(spec.path).expanduser()
    if path.is_file():
        for key in ("name", "split", "revision"):
            if getattr(spec, key) is not None:
                raise UserError(
                    f"{spec.path}: `{key}` is for hub data sets, this is a file; leave it out"
                )
        return _file_reader(path, spec.path)
    ending = _ending(path)
    looks_local = ending[0] in ENDINGS or ending[1] or spec.path[:1] in "./~\\"
    if not path.is_dir() and (looks_local or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", spec.path)):
        raise UserError(f"data file {spec.path} does not exist{_nearest(path)}")
    if path.is_dir() and spec.revision is not None:
        raise UserError(f"{spec.path}: `revision` is for hub data sets, this is a folder")
    from fastsft.data.tables import Dataset

    label = f"{spec.path}[{spec.split or 'train'}]"
    where = str(path) if path.is_dir() else spec.path
    return Dataset(
        label,
        path=where,
        name=spec.name,
        split=spec.split,
        revision=spec.revision,
        streaming=streaming and not path.is_dir(),
    )


def _file_reader(path: Path, label: str) -> Reader:
    ending, packed = _ending(path)
    if ending not in ENDINGS or (packed and ending in (".parquet", ".arrow")):
        raise UserError(
            f"{label}: the ending {''.join(path.suffixes[-2:]) or '(none)'!r} is not one of "
            f"{', '.join(ENDINGS)}; JSON and CSV may be compressed ({', '.join(PACKED)})"
        )
    if path.stat().st_size == 0:
        raise UserError(f"{label} is empty; make it again, or name another file")
    if ending in (".parquet", ".arrow"):
        from fastsft.data import tables  # pyarrow takes time to import

        kind = tables.ParquetFile if ending == ".parquet" else tables.ArrowFile
        return kind(label, path=path)
    check_magic(path, label)
    if ending == ".csv":
        return CsvFile(path, label)
    return _json_reader(path, label, ending)


def _json_reader(path: Path, label: str, ending: str) -> Reader:
    """By what is in the file: .json that holds lines and .jsonl that holds an array are common."""
    text = first_text(path)
    if text.lstrip()[:1] == "[":
        return JsonArray(
            path, label, "" if ending == ".json" else f"a JSON array in a {ending} file"
        )
    if ending != ".json":
        return JsonLines(path, label)
    line = text.lstrip().partition("\n")[0]
    try:
        whole = isinstance(json.loads(line), dict)
    except ValueError:
        whole = len(line) == len(text)  # a first line longer than what was read
    if not whole:
        raise UserError(
            f"{label} holds neither an array of rows nor one row a line; write it as [row, row, ...] "
            "or as JSON lines"
        )
    return JsonLines(path, label, "JSON lines in a .json file")


def _ending(path: Path) -> tuple[str, str]:
    """The ending that tells the format, and the compression's or ""."""
    suffix = path.suffix.lower()
    if suffix in PACKED:
        return Path(path.stem).suffix.lower(), suffix
    return suffix, ""


def _nearest(path: Path) -> str:
    if not path.parent.is_dir():
        return f"; nor does the folder {path.parent}"
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], 1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


# -- which format -----------------------------------------------------------------------------


def _sample(reader: Reader) -> list[dict[str, Any]]:
    """The first rows that are objects. UserError where there are none."""
    rows = (row for chunk in reader.chunks() for row in reader.rows(chunk))
    first = list(islice(rows, _SAMPLE))
    if not first:
        raise UserError(f"{reader.label} holds no rows; make it again, or name another file")
    objects = [row.value for row in first if type(row.value) is dict]
    if not objects:
        _, number, value = first[0]
        what = (
            f"{value.reason}: {value.detail}"
            if type(value) is Unreadable
            else "It is not an object."
        )
        raise UserError(
            f"{reader.label}: none of the first {len(first)} rows is a JSON object; "
            f"{reader.label}:{number}: {what} Is the file what its ending says? Name it by what it holds"
        )
    return objects


def _check_options(spec: DataSource, label: str) -> None:
    for theirs, ours in (spec.roles or {}).items():
        if ours not in TARGET_ROLES:
            raise UserError(
                f"{label}: roles maps {theirs!r} to {ours!r}; known are {', '.join(TARGET_ROLES)}"
            )
    formats = [spec.format] if spec.format != "auto" else list(FIELDS)
    fields = list(dict.fromkeys(name for format in formats for name in FIELDS[format]))
    for ours in spec.columns or {}:
        if ours not in fields:
            raise UserError(
                f"{label}: columns names the field {ours!r}; it maps our field to your column, and "
                f"ours are {', '.join(fields)}"
            )


def _decide(
    spec: DataSource, rows: list[dict[str, Any]], found: list[str], label: str
) -> tuple[Format, dict[str, str]]:
    """The format and what `columns` maps for it. found: every column there is."""
    columns = dict(spec.columns or {})
    for ours, theirs in columns.items():
        if theirs not in found:
            raise UserError(
                f"{label}: columns maps {ours!r} to {theirs!r}, which none of the first rows has; "
                f"found: {', '.join(found)}"
            )
    format: str = spec.format
    if format == "auto":
        format, extra = _detect(rows, {name: columns.get(name, name) for name in _ALL}, found)
        columns |= extra
    needs = FIELDS[format][: REQUIRED[format]] if format != "auto" else ()
    missing = [name for name in needs if columns.get(name, name) not in found]
    if format == "auto" or missing:
        wanted = "; ".join(
            f"{name}: {', '.join(FIELDS[name][: REQUIRED[name]])}" for name in get_args(Format)
        )
        what = (
            f"format {format} needs the field {missing[0]!r}"
            if missing
            else f"the format could not be told; needed are ({wanted})"
        )
        raise UserError(
            f"{label}: {what}; columns found: {', '.join(found) or 'none'}. Name yours with "
            f"columns: {{{missing[0] if missing else 'our_field'}: your_column}}"
        )
    return cast(Format, format), {k: v for k, v in columns.items() if k in FIELDS[format]}


_ALL = [name for names in FIELDS.values() for name in names]


def _detect(
    rows: list[dict[str, Any]], named: dict[str, str], found: list[str]
) -> tuple[str, dict[str, str]]:
    """The first format that fits, or "auto"; and where its message list is kept."""
    for field in ("messages", "conversations"):
        column = named[field]
        turn = next(filter(None, (_first_turn(row.get(column)) for row in rows)), None)
        if turn is None:
            continue
        if "from" in turn:
            return "sharegpt", {"conversations": column}
        if "role" in turn:
            return "messages", {"messages": column}
    for format in ("alpaca", "completion", "text", "messages"):
        if all(named[name] in found for name in FIELDS[format][: REQUIRED[format]]):
            return format, {}
    return "auto", {}


def _first_turn(value: Any) -> dict[str, Any] | None:
    """The first message of a list of them, which may be JSON text, as may each of them."""
    for _ in range(2):
        if type(value) is str:
            try:
                value = json.loads(value)
            except ValueError:
                return None
        if type(value) is list and value:
            value = value[0]
    return value if type(value) is dict else None

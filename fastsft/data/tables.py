"""Arrow tables, from Parquet, Arrow files and the `datasets` library -> chunks of rows.

`chunks` slices record batches without turning them into Python objects and sends them as Arrow
IPC bytes (pickling a slice would send the whole batch); `rows` turns them into dicts, in many
processes. Only the columns in use are read.

Arrow gives every struct of a column the same fields, so that one tool's parameters turn up as
nulls in all others; and `datasets` keeps mixed objects as JSON text of a type of its own. Both
are undone by the column's type: null fields of structs are dropped, JSON is parsed. A null that
somebody meant cannot be told from an injected one, and goes too.

Hub data sets are downloaded once and memory-mapped by `datasets`; with streaming=True they are
read over the network instead, never held. Folders go the same way: those that `save_to_disk`
wrote, and those that simply hold data files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fastsft.data.textfiles import BLOCK, ROWS, Chunk, Row, Unreadable, feed_file
from fastsft.errors import UserError


@dataclass
class Table:
    """What every source of Arrow batches shares: a chunk is the IPC bytes of one small batch."""

    label: str
    remark: str = ""
    kept: list[str] | None = None

    def batches(self, start_row: int) -> Iterator[pa.RecordBatch]:
        """The batches from a row on, of any size that is already in memory or mapped."""
        raise NotImplementedError

    def keep(self, columns: list[str]) -> None:
        self.kept = columns

    def chunks(self, start_row: int = 0) -> Iterator[Chunk]:
        first = start_row
        for batch in self.batches(start_row):
            for piece in _pieces(batch):
                yield Chunk(first, _to_bytes(piece))
                first += piece.num_rows

    def rows(self, chunk: Chunk) -> Iterator[Row]:
        with pa.ipc.open_stream(chunk.payload) as reader:
            for batch in reader:
                for position, value in enumerate(_dicts(batch), chunk.first_row):
                    yield Row(position, position + 1, value)


@dataclass
class ParquetFile(Table):
    path: Path = field(kw_only=True)

    def columns(self) -> list[str] | None:
        with self._open() as file:
            return list(file.schema_arrow.names)

    def batches(self, start_row: int) -> Iterator[pa.RecordBatch]:
        first = 0
        with self._open() as file:
            for group in range(file.num_row_groups):
                facts = file.metadata.row_group(group)
                skip, first = start_row - first, first + facts.num_rows
                if skip >= facts.num_rows:
                    continue
                try:
                    yield from _after(skip, self._group(file, group, facts))
                except (pa.ArrowException, OSError) as error:
                    raise UserError(
                        f"{self.label}: row group {group} is damaged: {error}"
                    ) from None

    def _group(self, file: pq.ParquetFile, group: int, facts: Any) -> Iterator[pa.RecordBatch]:
        row_bytes = facts.total_byte_size // max(1, facts.num_rows)
        size = min(ROWS, max(1, BLOCK // max(1, row_bytes)))
        yield from file.iter_batches(size, row_groups=[group], columns=self.kept, use_threads=False)

    def _open(self) -> pq.ParquetFile:
        try:
            # Page by page: the defaults hold a row group's columns whole.
            return pq.ParquetFile(self.path, buffer_size=BLOCK, pre_buffer=False)
        except (pa.ArrowException, OSError) as error:
            raise UserError(
                f"{self.label} is not what its ending says, or is cut short: no Parquet file ({error}); "
                "rename it, or make it again"
            ) from None

    def digest(self, update: Callable[[bytes], object]) -> None:
        feed_file(self.path, update)


@dataclass
class ArrowFile(Table):
    """Arrow's IPC format, both as a file and as a stream (what `datasets` writes)."""

    path: Path = field(kw_only=True)

    def columns(self) -> list[str] | None:
        return next(iter(self._all()), pa.record_batch({})).schema.names

    def batches(self, start_row: int) -> Iterator[pa.RecordBatch]:
        for batch in _after(start_row, self._all()):
            yield batch.select(self.kept) if self.kept else batch

    def _all(self) -> Iterator[pa.RecordBatch]:
        try:
            with pa.memory_map(str(self.path)) as mapped:
                if mapped.read(6) == b"ARROW1":
                    file = pa.ipc.open_file(mapped)
                    yield from map(file.get_batch, range(file.num_record_batches))
                else:
                    mapped.seek(0)
                    yield from pa.ipc.open_stream(mapped)
        except (pa.ArrowException, OSError) as error:
            raise UserError(
                f"{self.label} is not what its ending says, or is cut short: no Arrow file or "
                f"stream ({error}); rename it, or make it again"
            ) from None

    def digest(self, update: Callable[[bytes], object]) -> None:
        feed_file(self.path, update)


@dataclass
class Dataset(Table):
    """What `datasets` can open: a hub id, or a folder. Workers never open it again."""

    path: str = field(kw_only=True)
    name: str | None = None
    split: str | None = None
    revision: str | None = None
    streaming: bool = False
    _opened: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def columns(self) -> list[str] | None:
        return self._open().column_names

    def batches(self, start_row: int) -> Iterator[pa.RecordBatch]:
        data = self._open()
        if self.kept:
            data = data.select_columns(self.kept)
        if start_row:
            data = data.skip(start_row)
        with self._refusals():
            for table in data.with_format("arrow").iter(batch_size=ROWS):
                yield from table.combine_chunks().to_batches()

    def digest(self, update: Callable[[bytes], object]) -> None:
        """The mapped files' bytes; of a stream, which has none yet, what names it."""
        named = [self.path, self.name, self.split, self.revision]
        update(json.dumps(named).encode())
        if not self.streaming:
            for file in self._open().cache_files:
                feed_file(Path(file["filename"]), update)

    def _open(self) -> Any:
        if self._opened is None:
            with self._refusals():
                self._opened = self._load()
        return self._opened

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        """What `datasets` refuses is the user's to mend; its reason often hides in the cause."""
        from datasets.exceptions import DatasetsError  # seconds, and most data is a local file

        try:
            yield
        except (OSError, ValueError, DatasetsError) as error:
            causes = [error, *filter(None, [error.__cause__])]
            why = "; ".join(f"{type(cause).__name__}: {cause}" for cause in causes)
            raise UserError(f"{self.label} cannot be read as a data set: {why}") from error

    def _load(self) -> Any:
        import datasets

        split = self.split or "train"
        folder = Path(self.path)
        if (folder / "dataset_dict.json").is_file():
            folder = folder / split
            if not folder.is_dir():
                raise ValueError(f"it has no split {split!r}")
        if (folder / "state.json").is_file():
            return datasets.load_from_disk(folder)
        return datasets.load_dataset(
            self.path,
            self.name,
            split=split,
            revision=self.revision,
            streaming=self.streaming,
        )


def _after(skip: int, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        if skip < batch.num_rows:
            yield batch.slice(max(0, skip))
        skip -= batch.num_rows


def _pieces(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    row_bytes = max(1, batch.nbytes // max(1, batch.num_rows))
    size = min(ROWS, max(1, BLOCK // row_bytes))
    for start in range(0, batch.num_rows, size):
        yield batch.slice(start, size)


def _to_bytes(batch: pa.RecordBatch) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def _dicts(batch: pa.RecordBatch) -> Iterator[Any]:
    try:
        columns = [_values(column) for column in batch.columns]
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            yield Unreadable("invalid UTF-8", f"A text of the row is not UTF-8: {error}.")
            return
        for row in range(batch.num_rows):
            yield from _dicts(batch.slice(row, 1))
    else:
        names = batch.schema.names
        for values in zip(*columns, strict=True):
            yield dict(zip(names, values, strict=True))


def _values(column: pa.Array) -> list[Any]:
    undo = _undo(column.type)
    values = column.to_pylist()
    return values if undo is None else [None if v is None else undo(v) for v in values]


def _undo(kind: pa.DataType) -> Callable[[Any], Any] | None:
    """What turns a non-null Python value of this type back into the JSON that it came from."""
    if isinstance(kind, pa.JsonType):
        return json.loads
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        item = _undo(kind.value_type)
        return item and (lambda values: [None if v is None else item(v) for v in values])
    if pa.types.is_struct(kind):
        fields = {child.name: _undo(child.type) or _same for child in kind}
        return lambda value: {k: fields[k](v) for k, v in value.items() if v is not None}
    return None


def _same(value: Any) -> Any:
    return value

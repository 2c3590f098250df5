"""The token cache: the store of a list of sources, found by a key of its content or made now.

    sources --chunks--> workers: parse, encode --in order--> writer --rename--> cache/<key>/

The key is a hash of what the tokens depend on: the data's bytes, tokenizer, template, options, and the
source text of this package with the versions of the libraries under it. There is no other way to
invalidate an entry, and none is needed. An entry is written in a folder of its own beside its place and
renamed when whole, so a reader never meets half of one and of two runs at once both win.

The parent only reads chunks of about a megabyte, takes its share of the encoding and writes arrays; at
most two chunks per process are in memory, so the size of the data does not matter.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fastsft.data.report import Policy, SourceReport
from fastsft.data.rows import BadRow
from fastsft.data.store import (
    TokenBatch,
    TokenStore,
    TokenWriter,
    open_store,
    read_meta,
    writing,
)
from fastsft.data.workers import cores, ordered_map
from fastsft.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from fastsft.data.encode import Encoder
    from fastsft.data.sources import Chunk, Source

LIBRARIES = ("jinja2", "numpy", "pyarrow", "tiktoken", "tokenizers")
STALE_SECONDS = 24 * 3600  # an unfinished entry nobody wrote to for so long belongs to a dead run
PRELOAD = "fastsft.data.encode"  # what workers need beyond this module
TELL_SECONDS = 10.0


def default_cache_dir() -> Path:
    """FASTSFT_CACHE, else fastsft/ under XDG_CACHE_HOME or ~/.cache; the tokens have a folder in it."""
    chosen = os.environ.get("FASTSFT_CACHE")
    if chosen:
        return Path(chosen).expanduser() / "tokens"
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "fastsft" / "tokens"


@cache
def code_version() -> str:
    """Changes with any source text or template of this package, and with the libraries it stands on."""
    folder = Path(__file__).parent
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted([*folder.glob("*.py"), *folder.glob("templates/*.jinja")]):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    for library in LIBRARIES:
        digest.update(f"{library} {version(library)}\n".encode())
    return digest.hexdigest()


class EncodedChunk(NamedTuple):
    """What a worker sends back for one chunk of source number `source`."""

    source: int
    rows: int
    batch: TokenBatch
    bad: list[BadRow]
    extra_tokens: int
    notes: Counter[str]  # rows to which something was done, by what


class EncodeChunk:
    """The work of one task (source number, chunk): parse its rows and encode them. Pickles."""

    def __init__(self, sources: Sequence[Source], encoder: Encoder) -> None:
        self.sources, self.encoder = sources, encoder

    def __call__(self, task: tuple[int, Chunk]) -> EncodedChunk:
        number, chunk = task
        rows = list(self.sources[number].parse(chunk))
        bad, examples, extra = [], [], 0
        notes: dict[str, tuple[str, ...]] = {}  # by row: a row that was split comes several times
        for item in self.encoder.encode(rows):
            if isinstance(item, BadRow):
                bad.append(item)
            else:
                examples.append((int(item.where.rpartition(":")[2]), item.sequences))
                extra += item.extra_tokens
                notes[item.where] = item.notes
        counted = Counter(note for of_row in notes.values() for note in of_row)
        return EncodedChunk(number, len(rows), TokenBatch.of(examples), bad, extra, counted)


class TokenCache:
    """Gives token stores, made where `folder` does not hold them, in up to `processes` processes."""

    def __init__(
        self,
        folder: Path | None,
        policy: Policy,
        console: Console | None = None,
        processes: int | None = None,
    ) -> None:
        self.folder = folder or default_cache_dir()
        self.policy, self.console = policy, console
        self.processes = processes or cores()
        self.made = False  # was any store not found

    def store(
        self, sources: Sequence[Source], encoder: Encoder, purpose: str = "train"
    ) -> tuple[TokenStore, list[SourceReport]]:
        """The store of some sources, one after the other, and what became of their rows.

        purpose: what the rows are for, "train" or "evaluate", said where none is left.
        Raises UserError for a bad row the policy refuses, no row left, no room on the disk.
        """
        labels = tuple(source.label for source in sources)
        folder = self.folder / self._key(sources, encoder)
        meta = read_meta(folder)
        if meta is None:
            self.made = True
            self._build(folder, sources, encoder, purpose)
            meta = read_meta(folder)
            assert meta is not None, f"{folder} vanished"
        return open_store(folder, labels), [SourceReport(**entry) for entry in meta["sources"]]

    def _key(self, sources: Sequence[Source], encoder: Encoder) -> str:
        digest = hashlib.blake2b(digest_size=16)
        parts = [code_version(), encoder.fingerprint(), repr(self.policy)]
        for source in sources:
            parts += [source.label, source.verdict, source.fingerprint()]
        digest.update("\0".join(parts).encode())
        return digest.hexdigest()

    def _build(
        self, folder: Path, sources: Sequence[Source], encoder: Encoder, purpose: str
    ) -> None:
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            _sweep(self.folder)
            made = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".part", dir=self.folder))
        try:
            with TokenWriter(made) as writer:
                reports = self._write(writer, sources, encoder)
                if not writer.examples:
                    raise _nothing_left(reports, purpose)
                writer.finish({"sources": [asdict(report) for report in reports]})
            _move_into_place(made, folder)
        finally:
            shutil.rmtree(made, ignore_errors=True)

    def _write(
        self, writer: TokenWriter, sources: Sequence[Source], encoder: Encoder
    ) -> list[SourceReport]:
        reports = [SourceReport(source.label, source.verdict) for source in sources]
        tasks = ((n, chunk) for n, source in enumerate(sources) for chunk in source.chunks())
        work = EncodeChunk(sources, encoder)
        with (
            closing(ordered_map(work, tasks, self.processes, PRELOAD)) as results,
            _Progress(self.console) as progress,
        ):
            for result in results:
                report = reports[result.source]
                report.rows += result.rows
                for bad in result.bad:
                    report.drop(bad, self.policy)
                report.examples += len(result.batch.row)
                report.tokens += len(result.batch.ids)
                report.targets += writer.append(result.source, result.batch)
                report.extra_tokens += result.extra_tokens
                report.notes = dict(Counter(report.notes) + result.notes)
                progress.tell(sum(r.rows for r in reports), writer.tokens)
        return reports


class _Progress:
    """A live line on a terminal, a line every ten seconds elsewhere, nothing for quick work."""

    def __init__(self, console: Console | None) -> None:
        self.console = console
        live = console is not None and console.is_terminal
        self._status: Any = console.status("preparing data") if live and console else nullcontext()
        self._told = time.monotonic()

    def __enter__(self) -> _Progress:
        self._live = self._status.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._status.__exit__(*exc)

    def tell(self, rows: int, tokens: int) -> None:
        text = f"preparing data: {rows:,} rows, {tokens:,} tokens"
        if self._live is not None:
            self._live.update(text)
        elif self.console is not None and time.monotonic() - self._told > TELL_SECONDS:
            self._told = time.monotonic()
            self.console.print(text, markup=False, highlight=False)


def _sweep(cache_dir: Path) -> None:
    """Remove what killed runs left unfinished."""
    for made in cache_dir.glob("*.part"):
        newest = max((f.stat().st_mtime for f in made.glob("*")), default=made.stat().st_mtime)
        if time.time() - newest > STALE_SECONDS:
            shutil.rmtree(made, ignore_errors=True)


def _move_into_place(made: Path, folder: Path) -> None:
    """Rename, giving way to another run's whole entry and replacing a damaged one."""
    with writing(folder.parent):
        if folder.exists() and read_meta(folder) is None:
            shutil.rmtree(folder)
        try:
            made.rename(folder)
        except OSError:
            if read_meta(folder) is None:
                raise


def _nothing_left(reports: Sequence[SourceReport], purpose: str) -> UserError:
    rows = sum(report.rows for report in reports)
    told = [f"  {r.label}: {r.reasons() or 'no rows'}" for r in reports]
    first = next((d for r in reports for details in r.details.values() for d in details), None)
    text = f"nothing left to {purpose} on: of {rows:,} rows none was kept\n" + "\n".join(told)
    return UserError(text + (f"\nthe first: {first}" if first else ""))

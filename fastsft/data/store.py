"""Token arrays on disk: written once in order, read as memory maps by every later step and run.

    ids      [ sequence 0 | sequence 1 | sequence 2 | ... ]    int32, with `trained` beside it, bool
    starts, lengths, targets                                    one number per sequence
    example_offsets                                             sequences o[e] to o[e+1] are example e
    source, row                                                 where example e comes from

Almost always an example is one sequence; a template that hides earlier thoughts makes it one per
trained turn. A sequence has its own `starts` entry rather than a boundary shared with its neighbour,
so that a subset (the validation split) is a selection of small arrays over the same tokens: nothing
is copied and readers cannot tell the difference.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from os import fsync
from pathlib import Path
from typing import Any

import numpy as np

from fastsft.errors import UserError

DTYPES: dict[str, Any] = {
    "ids": np.int32,
    "trained": np.bool_,
    "starts": np.int64,
    "lengths": np.int32,
    "targets": np.int32,
    "example_offsets": np.int64,
    "source": np.int32,
    "row": np.int64,
}
META = "meta.json"
DIGESTED = ("ids", "trained", "lengths")  # what a run learns from


@dataclass(slots=True)
class TokenBatch:
    """Encoded examples side by side, as they come from a worker. Shapes: tokens, sequences, examples."""

    ids: np.ndarray  # int32[tokens]
    trained: np.ndarray  # bool[tokens]
    lengths: np.ndarray  # int32[sequences]
    turns: np.ndarray  # int32[examples], sequences of each
    row: np.ndarray  # int64[examples], 1-based

    @classmethod
    def of(
        cls, examples: Sequence[tuple[int, Sequence[tuple[np.ndarray, np.ndarray]]]]
    ) -> TokenBatch:
        """From (row, sequences) pairs."""
        flat = [sequence for _, sequences in examples for sequence in sequences]
        none = [np.empty(0)]
        return cls(
            ids=np.concatenate([ids for ids, _ in flat] or none).astype(np.int32, copy=False),
            trained=np.concatenate([trained for _, trained in flat] or none).astype(
                bool, copy=False
            ),
            lengths=np.array([len(ids) for ids, _ in flat], np.int32),
            turns=np.array([len(sequences) for _, sequences in examples], np.int32),
            row=np.array([row for row, _ in examples], np.int64),
        )

    def targets(self) -> np.ndarray:
        """Tokens of each sequence that bear loss, int32[sequences]: the first has no predecessor."""
        starts = np.cumsum(self.lengths, dtype=np.int64) - self.lengths
        return np.add.reduceat(self.trained, starts, dtype=np.int32) - self.trained[starts]


class TokenStore:
    """Examples of a data set as mapped arrays. Sequences and examples are numbered from 0, without gaps.

    ids int32[*], trained bool[*]: the tokens of all sequences (of a subset: of more than those).
    starts int64[n_seq], lengths int32[n_seq], targets int32[n_seq]: first token, tokens, tokens that are
    predicted and trained. example_offsets int64[n+1], source int32[n], row int64[n]. labels: the sources.
    digest: of all tokens and what is trained of them, so that a resumed run knows its data again.
    """

    def __init__(
        self, arrays: dict[str, np.ndarray], labels: tuple[str, ...], digest: str = ""
    ) -> None:
        self.arrays = arrays
        self.labels = labels
        self.digest = digest
        self.ids, self.trained = arrays["ids"], arrays["trained"]
        self.starts, self.lengths, self.targets = (
            arrays[k] for k in ("starts", "lengths", "targets")
        )
        self.example_offsets = arrays["example_offsets"]
        self.source, self.row = arrays["source"], arrays["row"]

    def __len__(self) -> int:
        return len(self.source)

    def sequence(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Sequence `index` as (ids int32[n], trained bool[n]), views of the mapped file."""
        start = int(self.starts[index])
        stop = start + int(self.lengths[index])
        return self.ids[start:stop], self.trained[start:stop]

    def sequences(self, example: int) -> list[tuple[np.ndarray, np.ndarray]]:
        first, last = int(self.example_offsets[example]), int(self.example_offsets[example + 1])
        return [self.sequence(i) for i in range(first, last)]

    def where(self, example: int) -> str:
        """The row an example came from, such as data/train.jsonl:37."""
        return f"{self.labels[self.source[example]]}:{self.row[example]}"

    @cached_property
    def example_tokens(self) -> np.ndarray:
        """Tokens of each example over all its sequences, int64[n]."""
        return np.add.reduceat(self.lengths, self.example_offsets[:-1], dtype=np.int64)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Examples of each source; they lie together, in the order of the sources."""
        return tuple(np.bincount(self.source, minlength=len(self.labels)).tolist())

    def subset(self, examples: np.ndarray) -> TokenStore:
        """The store of some examples (int64[m], ascending), renumbered from 0, over the same tokens."""
        first, last = self.example_offsets[examples], self.example_offsets[examples + 1]
        turns = last - first
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(turns)])
        chosen = np.arange(offsets[-1]) + np.repeat(first - offsets[:-1], turns)
        arrays = {name: self.arrays[name][chosen] for name in ("starts", "lengths", "targets")}
        arrays |= {name: self.arrays[name][examples] for name in ("source", "row")}
        arrays |= {"example_offsets": offsets, "ids": self.ids, "trained": self.trained}
        return TokenStore(arrays, self.labels, self.digest)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turns the system's refusal to write (disk full, no permission) into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write the token cache in {folder}: {error.strerror or error}. Make room there, or set "
            "the FASTSFT_CACHE variable to a folder on a disk that has it"
        ) from None


class TokenWriter:
    """Appends batches to the arrays of a new store. A context manager; `finish` makes it complete."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokens = self.sequences = self.examples = 0
        self._digests = {name: hashlib.blake2b(digest_size=16) for name in DIGESTED}
        with ExitStack() as files, writing(folder):
            self._files = {
                name: files.enter_context(open(folder / f"{name}.bin", "wb", buffering=1 << 20))
                for name in DTYPES
            }
            self._close = files.pop_all()
        self._write("example_offsets", np.zeros(1, np.int64))

    def _write(self, name: str, values: np.ndarray) -> None:
        raw = np.ascontiguousarray(values, DTYPES[name]).data
        if name in DIGESTED:
            self._digests[name].update(raw)
        with writing(self.folder):
            self._files[name].write(raw)

    def append(self, source: int, batch: TokenBatch) -> int:
        """Add examples of `source`; returns how many of their tokens are targets."""
        if not len(batch.row):
            return 0
        starts = np.cumsum(batch.lengths, dtype=np.int64) - batch.lengths
        targets = batch.targets()
        self._write("ids", batch.ids)
        self._write("trained", batch.trained)
        self._write("starts", starts + self.tokens)
        self._write("lengths", batch.lengths)
        self._write("targets", targets)
        self._write("example_offsets", self.sequences + np.cumsum(batch.turns, dtype=np.int64))
        self._write("source", np.full(len(batch.row), source))
        self._write("row", batch.row)
        self.tokens += len(batch.ids)
        self.sequences += len(batch.lengths)
        self.examples += len(batch.row)
        return int(targets.sum())

    def finish(self, meta: dict[str, Any]) -> None:
        """Put everything on the disk, sizes, a digest of the tokens and `meta` (JSON) last."""
        meta = {**meta, "digest": "".join(d.hexdigest() for d in self._digests.values())}
        with writing(self.folder):
            for file in self._files.values():
                file.flush()
                fsync(file.fileno())
            sizes = {name: file.tell() for name, file in self._files.items()}
            with open(self.folder / META, "wb") as last:
                text = json.dumps({**meta, "bytes": sizes}, ensure_ascii=False, indent=1)
                last.write(text.encode())
                last.flush()
                fsync(last.fileno())

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        with writing(self.folder):
            self._close.close()


def read_meta(folder: Path) -> dict[str, Any] | None:
    """The meta data of a whole store; None where there is none, or its files are not as long as written."""
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        whole = all((folder / f"{k}.bin").stat().st_size == meta["bytes"][k] for k in DTYPES)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return meta if whole else None


def open_store(folder: Path, labels: tuple[str, ...]) -> TokenStore:
    """Map the arrays of a whole store with at least one example."""
    meta = read_meta(folder)
    assert meta is not None, f"{folder} holds no whole store"
    arrays = {
        name: np.memmap(folder / f"{name}.bin", dtype=dtype, mode="r")
        for name, dtype in DTYPES.items()
    }
    plain = {name: np.asarray(array) for name, array in arrays.items()}
    return TokenStore(plain, labels, meta["digest"])

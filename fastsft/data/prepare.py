"""From the config to token stores, a validation split and a report: all that happens before step 1.

The validation split is drawn per source and by row, after the cache: another `val_size` or `seed`
prepares nothing again, and its store shares the arrays of the training store. Neither torch nor
transformers is imported on the way.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastsft.data.cache import TokenCache
from fastsft.data.report import DataReport, Policy, Preview, SourceReport, SplitReport
from fastsft.data.sources import Source, open_source
from fastsft.data.store import TokenBatch, TokenStore
from fastsft.data.stream import BLOCK, ExampleStream
from fastsft.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from fastsft.config import Config, DataSource
    from fastsft.data.encode import Encoder
    from fastsft.data.templates import Template
    from fastsft.data.tokenizer import Tokenizer

VAL_PURPOSE = 3 << 64  # keeps the split's permutations apart from others of the same seed


@dataclass(frozen=True)
class Prepared:
    """Stores of what is trained and evaluated on. sizes: examples of each source in `train`."""

    train: TokenStore
    eval: TokenStore | None
    report: DataReport

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.train.sizes

    @property
    def digest(self) -> str:
        """Of every token trained or evaluated on: a resumed run must find the same."""
        return self.train.digest + (self.eval.digest if self.eval is not None else "")


@dataclass(frozen=True)
class Streamed:
    """The same for `streaming: true`; the report speaks of the first block of each source."""

    stream: ExampleStream
    eval: TokenStore | None
    report: DataReport
    digest: (
        str  # of the sources, tokenizer and template: a stream's tokens are not known beforehand
    )


def split(store: TokenStore, val_size: float, seed: int) -> tuple[TokenStore, TokenStore]:
    """(train, validation): `val_size` rows (a share of them if below 1), spread over the sources by size.

    Rows, not examples: the pieces of a long text stay together. Every source keeps a row to train on;
    where that is impossible it is a UserError. Drawn by a permutation keyed on (seed, source).
    """
    new_row = np.append(True, (np.diff(store.row) != 0) | (np.diff(store.source) != 0))
    row_of_example = np.cumsum(new_row) - 1
    counts = np.bincount(store.source[new_row], minlength=len(store.labels))
    rows = int(counts.sum())
    wanted = max(1, round(val_size * rows)) if val_size < 1 else int(val_size)
    quota = wanted * counts // rows
    left = wanted - int(quota.sum())
    for source in np.argsort(-(wanted * counts % rows), kind="stable"):
        if left and quota[source] < counts[source] - 1:
            quota[source] += 1
            left -= 1
    if left or wanted >= rows:
        raise UserError(
            f"val_size: {val_size:g} sets aside {wanted:,} of {rows:,} rows, and some source would have "
            "none left to train on; lower val_size"
        )
    chosen = np.zeros(rows, bool)
    firsts = np.cumsum(counts) - counts
    for source, (first, count, take) in enumerate(zip(firsts, counts, quota, strict=True)):
        bits = np.random.Philox(key=seed | VAL_PURPOSE, counter=[0, 0, 0, source])
        chosen[first + np.random.Generator(bits).permutation(int(count))[: int(take)]] = True
    mask = chosen[row_of_example]
    return store.subset(np.flatnonzero(~mask)), store.subset(np.flatnonzero(mask))


def prepare(
    config: Config,
    tokenizer: Tokenizer,
    encoder: Encoder,
    console: Console | None = None,
    *,
    cache_dir: Path | None = None,
    processes: int | None = None,
    examples: int = 1,
) -> Prepared:
    """Token stores of the config's data, from the cache or made now in `processes` processes.

    examples: how many previews the report holds. The tokens do not depend on `processes`. Raises
    UserError: unreadable data, a bad row under on_bad_row: error, nothing left, no room for the cache.
    """
    started = time.monotonic()
    cache = TokenCache(cache_dir, Policy.of(config), console, processes)
    train, reports = cache.store(_open(config, config.data), encoder)
    evaluation, eval_reports = _evaluation(config, encoder, cache)
    if config.val_size:
        train, evaluation = split(train, config.val_size, config.seed)
    report = DataReport(
        sources=reports,
        eval_sources=eval_reports,
        train=SplitReport.of(len(train), train.lengths, train.targets),
        eval=_split_report(evaluation),
        template=_described(encoder.template),
        warnings=_warnings(encoder.template),
        previews=[
            Preview.of(train.where(e), *train.sequences(e)[-1], tokenizer)
            for e in np.linspace(0, len(train) - 1, min(examples, len(train)), dtype=int).tolist()
        ],
        cache=_said(cache, tokenizer, started),
    )
    return Prepared(train, evaluation, report)


def prepare_stream(
    config: Config,
    tokenizer: Tokenizer,
    encoder: Encoder,
    console: Console | None = None,
    *,
    cache_dir: Path | None = None,
    processes: int | None = None,
    examples: int = 1,
) -> Streamed:
    """The same for streaming: true, where only evaluation data is prepared.

    The report speaks of the stream's first `BLOCK` examples; the stream itself is at its beginning.
    """
    started = time.monotonic()
    cache = TokenCache(cache_dir, Policy.of(config), console, processes)
    evaluation, eval_reports = _evaluation(config, encoder, cache)
    weights = [spec.weight for spec in config.data]
    sources = _open(config, config.data, streaming=True)
    stream = ExampleStream(
        sources,
        encoder,
        weights,
        config.seed,
        config.shuffle,
        policy=cache.policy,
    )
    start = stream.state()
    first = list(islice(stream, BLOCK))
    batch = TokenBatch.of([(0, example.sequences) for example in first])
    report = DataReport(
        sources=deepcopy(stream.reports),
        eval_sources=eval_reports,
        train=SplitReport.of(len(first), batch.lengths, batch.targets()),
        eval=_split_report(evaluation),
        template=_described(encoder.template),
        warnings=_warnings(encoder.template),
        previews=[Preview.of(e.where, *e.sequences[-1], tokenizer) for e in first[:examples]],
        cache=_said(cache, tokenizer, started) if evaluation is not None else "",
        partial=f"streaming: these numbers are of the rows behind the first {len(first):,} examples",
    )
    stream.restore(start)
    parts = [tokenizer.fingerprint(), encoder.template.fingerprint() if encoder.template else ""]
    parts += [source.fingerprint() for source in sources]
    digest = hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()
    return Streamed(stream, evaluation, report, digest)


def _open(config: Config, specs: Sequence[DataSource], streaming: bool = False) -> list[Source]:
    return [open_source(spec, system=config.system, streaming=streaming) for spec in specs]


def _evaluation(
    config: Config, encoder: Encoder, cache: TokenCache
) -> tuple[TokenStore | None, list[SourceReport]]:
    if not config.eval_data:
        return None, []
    return cache.store(_open(config, config.eval_data), encoder, "evaluate")


def _split_report(store: TokenStore | None) -> SplitReport | None:
    return None if store is None else SplitReport.of(len(store), store.lengths, store.targets)


def _described(template: Template | None) -> str:
    if template is None:
        return "none"
    stop = f", stops at {', '.join(map(repr, template.stop))}" if template.stop else ""
    return f"{template.name}, {'with' if template.tagged else 'without'} generation tags{stop}"


def _warnings(template: Template | None) -> list[str]:
    return list(template.notes) if template else []


def _said(cache: TokenCache, tokenizer: Tokenizer, started: float) -> str:
    if not cache.made:
        return f"tokens: found in {cache.folder}, prepared by an earlier run"
    seconds = time.monotonic() - started
    through = "tiktoken" if tokenizer.fast else f"tokenizers ({tokenizer.fast_reason})"
    return f"tokens: prepared in {seconds:.1f} s through {through}, kept in {cache.folder}"

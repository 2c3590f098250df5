"""What the trainer will see, said before it trains: rows kept and dropped, tokens, lengths, one example.

The numbers come from the writing of the token store (per source) and from its arrays (per split); they
are the same whether the tokens were made now or found in the cache. The example is decoded from the
very ids that are trained on, so what is shown green is what the loss sees, not what a template promised.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from fastsft.data.rows import BadRow
from fastsft.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from fastsft.config import Config

TOO_LONG = "too long"  # the encoder's reason for rows above max_length
SHOWN_TOKENS = 800  # of an example; the rest is counted
SHOWN_ROWS = 3  # dropped rows told in full, per reason and source


class Decoder(Protocol):
    def decode(self, ids: Sequence[int]) -> str: ...


@dataclass(frozen=True, slots=True)
class Policy:
    """on_bad_row and overlong of the config: which rows end the run, and which are counted."""

    on_bad_row: str
    overlong: str

    @classmethod
    def of(cls, config: Config) -> Policy:
        return cls(config.on_bad_row, config.overlong)

    def check(self, bad: BadRow) -> None:
        """Raises UserError unless the row may be dropped. `overlong` alone decides on rows too long."""
        what = f"{bad.where}: {bad.reason}: {bad.detail}"
        if bad.reason == TOO_LONG:
            if self.overlong == "error":
                raise UserError(f"{what} Raise max_length or set overlong: drop")
        elif self.on_bad_row == "error":
            raise UserError(f"{what} Mend the row, or set on_bad_row: drop to leave such rows out")


@dataclass(slots=True)
class SourceReport:
    """What became of one source's rows.

    dropped: reason -> rows; details: reason -> first sentences. notes: kept rows something was done to,
    such as truncated -> rows.
    """

    label: str
    verdict: str
    rows: int = 0
    examples: int = 0
    tokens: int = 0
    targets: int = 0
    extra_tokens: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    details: dict[str, list[str]] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)

    @property
    def kept(self) -> int:
        return self.rows - sum(self.dropped.values())

    def drop(self, bad: BadRow, policy: Policy) -> None:
        """Count a row that is left out; raises UserError where the policy does not leave it out."""
        policy.check(bad)
        self.dropped[bad.reason] = self.dropped.get(bad.reason, 0) + 1
        told = self.details.setdefault(bad.reason, [])
        if len(told) < SHOWN_ROWS:
            told.append(f"{bad.where}: {bad.detail}")

    def reasons(self) -> str:
        return ", ".join(f"{reason} {count:,}" for reason, count in self.dropped.items())


@dataclass(slots=True)
class SplitReport:
    """Sizes of what is trained or evaluated on; lengths are of sequences, in tokens."""

    examples: int
    sequences: int
    tokens: int
    trained_tokens: int
    length_p50: int
    length_p95: int
    length_max: int

    @classmethod
    def of(cls, examples: int, lengths: np.ndarray, targets: np.ndarray) -> SplitReport:
        """From the arrays of a store: int32[n_seq] tokens and trained tokens of each sequence."""
        lengths = np.sort(lengths)
        # Nearest rank: the smallest length that at least this share of sequences does not exceed.
        p50, p95 = (int(lengths[-(-len(lengths) * share // 100) - 1]) for share in (50, 95))
        return cls(
            examples=examples,
            sequences=len(lengths),
            tokens=int(lengths.sum(dtype=np.int64)),
            trained_tokens=int(targets.sum(dtype=np.int64)),
            length_p50=p50,
            length_p95=p95,
            length_max=int(lengths[-1]),
        )


@dataclass(slots=True)
class Preview:
    """One sequence as runs of (text, trained); `hidden` tokens at its end are left out."""

    where: str
    pieces: list[tuple[str, bool]]
    hidden: int = 0

    @classmethod
    def of(cls, where: str, ids: np.ndarray, trained: np.ndarray, decoder: Decoder) -> Preview:
        shown, mask = ids[:SHOWN_TOKENS], trained[:SHOWN_TOKENS]
        edges = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(shown)]
        pieces = [
            (decoder.decode(shown[a:b].tolist()), bool(mask[a]))
            for a, b in zip(edges, edges[1:], strict=False)
            if b > a
        ]
        return cls(where, pieces, len(ids) - len(shown))

    def text(self, coloured: bool) -> Text:
        """Trained text green and the rest dim, or ⟦trained⟧ where there are no colours."""
        from rich.text import Text

        text = Text()
        for piece, trained in self.pieces:
            piece = _visible(piece)
            if not coloured:
                text.append(f"⟦{piece}⟧" if trained else piece)
            else:
                text.append(piece, style="green" if trained else "dim")
        if self.hidden:
            text.append(f" … and {self.hidden:,} more tokens", style="italic")
        return text


def _visible(text: str) -> str:
    """Control characters spelled out, so that data cannot steer the terminal."""
    return "".join(
        c if c in "\n\t" or c.isprintable() or c == " " else ascii(c)[1:-1] for c in text
    )


@dataclass(slots=True)
class DataReport:
    """Everything that is said about the data; `to_json` is what data_report.json holds."""

    sources: list[SourceReport]
    eval_sources: list[SourceReport]
    train: SplitReport
    eval: SplitReport | None
    template: str
    previews: list[Preview]
    cache: str = ""
    partial: str = ""  # for a stream: how far these numbers reach
    tokenizer: str = ""  # where it is from, if not from the model
    warnings: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        for report, given in zip(
            values["sources"] + values["eval_sources"],
            self.sources + self.eval_sources,
            strict=True,
        ):
            report["kept"] = given.kept
        return values

    def write(self, path: Path) -> None:
        text = json.dumps(self.to_json(), ensure_ascii=False, indent=2)
        path.write_text(text + "\n", encoding="utf-8")

    def lines(self) -> Iterator[str]:
        """The report without its example, one line at a time."""
        for role, sources in (("data", self.sources), ("eval data", self.eval_sources)):
            for source in sources:
                yield f"{role}: {source.label}, {source.verdict}"
                yield "  " + _rows(source)
                yield from (f"  {note}: {rows:,} rows" for note, rows in source.notes.items())
                for reason, details in source.details.items():
                    yield from (f"  dropped, {reason}: {detail}" for detail in details)
                    more = source.dropped[reason] - len(details)
                    if more:
                        yield f"  dropped, {reason}: and {more:,} more"
        if self.partial:
            yield self.partial
        yield "train: " + _split(self.train)
        if self.eval is not None:
            yield "eval: " + _split(self.eval)
        if self.tokenizer:
            yield f"tokenizer: {self.tokenizer}"
        yield f"template: {self.template}"
        extra = sum(source.extra_tokens for source in self.sources)
        if extra:
            yield (
                f"one sequence per trained turn, because the template shows earlier turns otherwise than "
                f"it let them be written: {extra:,} extra tokens"
            )
        if self.cache:
            yield self.cache
        yield from (f"warning: {warning}" for warning in self.warnings)

    def render(self, console: Console, examples: int = 1) -> None:
        """Print all of it, with the first `examples` previews coloured by mask."""
        for line in self.lines():
            style = "yellow" if line.startswith("warning:") else None
            console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)
        coloured = console.is_terminal and not console.no_color
        for preview in self.previews[:examples]:
            legend = "trained is green" if coloured else "trained is in ⟦ ⟧"
            console.print(f"example {preview.where} ({legend}):", markup=False, highlight=False)
            console.print(preview.text(coloured), soft_wrap=True)


def _rows(source: SourceReport) -> str:
    text = f"{source.rows:,} rows in, {source.kept:,} kept"
    if source.dropped:
        text += f", {sum(source.dropped.values()):,} dropped ({source.reasons()})"
    if source.examples and source.examples != source.kept:
        text += f", {source.examples:,} examples after splitting"
    return text


def _split(split: SplitReport) -> str:
    share = 100 * split.trained_tokens / split.tokens
    sequences = "" if split.sequences == split.examples else f" in {split.sequences:,} sequences"
    return (
        f"{split.examples:,} examples{sequences}, {split.tokens:,} tokens, {share:.1f} % trained; "
        f"length p50 {split.length_p50:,}, p95 {split.length_p95:,}, max {split.length_max:,}"
    )

"""The data report: its numbers, its coloured example, its JSON, and `fastsft data` without torch."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from data_fakes import FakeEncoder, FakeSource
from rich.console import Console

from fastsft.data.cache import TokenCache
from fastsft.data.report import DataReport, Policy, Preview, SplitReport


class Characters:
    """Token n is chr(n)."""

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def preview(text: str, trained: str) -> Preview:
    """trained: a string as long as the text, x where trained."""
    ids = np.array([ord(c) for c in text], np.int32)
    return Preview.of("data.jsonl:7", ids, np.array([c == "x" for c in trained]), Characters())


def report(tmp_path: Path) -> DataReport:
    cache = TokenCache(tmp_path, Policy("drop", "auto"), processes=1)
    source = FakeSource(100, bad=(1, 2, 3, 4, 50), too_long=(9,))
    store, sources = cache.store([source], FakeEncoder())
    return DataReport(
        sources=sources,
        eval_sources=[],
        train=SplitReport.of(len(store), store.lengths, store.targets),
        eval=None,
        template="chatml",
        previews=[preview("user: hi bot: ho.\n", "             xxxx ")],
        warnings=["no stop token stands inside the generation tags"],
    )


def console(terminal: bool) -> Console:
    colours = {"force_terminal": True, "color_system": "truecolor"} if terminal else {}
    return Console(file=io.StringIO(), width=200, no_color=False, **colours)


def printed(report: DataReport, terminal: bool, examples: int = 1) -> str:
    out = console(terminal)
    report.render(out, examples)
    return out.file.getvalue()


def test_lengths_are_nearest_rank_percentiles() -> None:
    lengths = np.arange(1, 101, dtype=np.int32)[::-1]
    split = SplitReport.of(90, lengths, lengths - 1)
    assert (split.length_p50, split.length_p95, split.length_max) == (50, 95, 100)
    assert (split.examples, split.sequences, split.tokens, split.trained_tokens) == (
        90,
        100,
        5050,
        4950,
    )
    one = SplitReport.of(1, np.array([7], np.int32), np.array([3], np.int32))
    assert (one.length_p50, one.length_p95, one.length_max) == (7, 7, 7)


def test_what_is_printed(tmp_path: Path) -> None:
    text = printed(report(tmp_path), terminal=False)
    kept = [n for n in range(1, 101) if n not in (1, 2, 3, 4, 50, 9)]
    tokens = sum((n % 7 + 2) * (2 if n % 5 == 0 else 1) for n in kept)
    trained = sum((n % 7 + 1) * (2 if n % 5 == 0 else 1) for n in kept)
    assert "data: rows.jsonl, fake: column text" in text
    assert "100 rows in, 94 kept, 6 dropped (empty row 5, too long 1)" in text
    assert "dropped, empty row: rows.jsonl:1: The row holds nothing." in text
    assert "dropped, empty row: and 2 more" in text
    assert (
        f"train: 94 examples in 113 sequences, {tokens:,} tokens, {100 * trained / tokens:.1f} %"
        in text
    )
    assert "p50 5, p95 8, max 8" in text
    assert "extra tokens" in text and "template: chatml" in text
    assert "warning: no stop token stands inside" in text


def test_the_example_is_marked_without_colours_and_green_with(tmp_path: Path) -> None:
    plain = printed(report(tmp_path), terminal=False)
    assert "example data.jsonl:7 (trained is in ⟦ ⟧):\nuser: hi bot:⟦ ho.⟧\n" in plain
    coloured = printed(report(tmp_path), terminal=True)
    assert "trained is green" in coloured and "⟦" not in coloured
    assert "\x1b[32m" in coloured and "\x1b[2m" in coloured


def test_no_example_when_none_is_asked_for(tmp_path: Path) -> None:
    assert "example data.jsonl" not in printed(report(tmp_path), terminal=False, examples=0)


def test_pieces_follow_the_mask_exactly() -> None:
    text, mask = "abcdefgh", "xx  x xx"
    pieces = preview(text, mask).pieces
    assert pieces == [("ab", True), ("cd", False), ("e", True), ("f", False), ("gh", True)]
    assert preview("ab", "xx").pieces == [("ab", True)] and preview("ab", "  ").pieces == [
        ("ab", False)
    ]


def test_long_examples_are_cut_and_say_so() -> None:
    long = preview("a" * 5000, " " * 2500 + "x" * 2500)
    assert long.hidden == 4200 and "and 4,200 more tokens" in long.text(False).plain


@pytest.mark.parametrize("terminal", [True, False])
def test_data_cannot_steer_the_terminal(terminal: bool) -> None:
    nasty = preview("\x1b[2J\x07\r\x9b[bold]x[/bold]\n\té漢🙂 ", "x" * 25)
    out = console(terminal)
    out.print(nasty.text(terminal))
    text = out.file.getvalue()
    assert "\\x1b[2J\\x07\\r\\x9b" in text and "[bold]x[/bold]" in text  # no markup either
    assert "\x1b[2J" not in text and "\x07" not in text and "é漢🙂" in text


def test_json_holds_the_same(tmp_path: Path) -> None:
    made = report(tmp_path)
    made.write(tmp_path / "data_report.json")
    text = (tmp_path / "data_report.json").read_text()
    assert text.endswith("}\n")
    values = json.loads(text)
    assert values["sources"][0]["rows"] == 100 and values["sources"][0]["kept"] == 94
    assert values["sources"][0]["dropped"] == {"empty row": 5, "too long": 1}
    assert values["train"]["trained_tokens"] == made.train.trained_tokens
    assert values["previews"][0]["pieces"][1][1] is True and values["warnings"] == made.warnings

"""The token cache and its arrays: order, keys, atomicity, bad rows, splits, damage, a full disk."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import numpy as np
import pytest
from data_fakes import FakeEncoder, FakeSource

from fastsft.data import cache as cache_module
from fastsft.data.cache import TokenCache, default_cache_dir
from fastsft.data.prepare import split
from fastsft.data.report import Policy, SourceReport
from fastsft.data.store import TokenBatch, TokenStore, TokenWriter
from fastsft.errors import UserError

DROP = Policy("drop", "auto")
ERROR = Policy("error", "auto")


def make(
    folder: Path,
    *sources: FakeSource,
    policy: Policy = DROP,
    version: str = "1",
    processes: int = 1,
) -> tuple[TokenStore, list[SourceReport], bool]:
    cache = TokenCache(folder, policy, processes=processes)
    store, reports = cache.store(sources or (FakeSource(137),), FakeEncoder(version))
    return store, reports, cache.made


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_arrays_hold_every_row_in_order(tmp_path: Path) -> None:
    sources = FakeSource(137, "a.jsonl", bad=(3, 9)), FakeSource(41, "b.jsonl", too_long=(1,))
    store, reports, _ = make(tmp_path, *sources)
    rows = [(0, n) for n in range(1, 138) if n not in (3, 9)] + [(1, n) for n in range(2, 42)]
    assert len(store) == len(rows) == 175 and store.sizes == (135, 40)
    assert list(zip(store.source.tolist(), store.row.tolist(), strict=True)) == rows
    for example, (source, n) in enumerate(rows):
        sequences = store.sequences(example)
        assert len(sequences) == (2 if n % 5 == 0 else 1)
        for ids, trained in sequences:
            assert ids.dtype == np.int32 and trained.dtype == bool
            assert ids.tolist() == [n] * (n % 7 + 2)
            assert trained.tolist() == [False] + [True] * (n % 7 + 1)
        assert store.example_tokens[example] == (n % 7 + 2) * len(sequences)
        assert store.where(example) == f"{'ab'[source]}.jsonl:{n}"
    assert store.targets.tolist() == [n - 1 for n in store.lengths.tolist()]
    assert store.lengths.sum() == len(store.ids) == sum(r.tokens for r in reports)
    assert [(r.rows, r.kept, r.dropped) for r in reports] == [
        (137, 135, {"empty row": 2}),
        (41, 40, {"too long": 1}),
    ]
    assert reports[0].details == {
        "empty row": ["a.jsonl:3: The row holds nothing.", "a.jsonl:9: The row holds nothing."]
    }
    assert [r.notes for r in reports] == [{"done": 1}, {"done": 1}]
    assert reports[0].extra_tokens == sum(n % 7 + 2 for n in range(5, 138, 5))


@pytest.mark.parametrize("processes", [2, 3])
def test_the_number_of_processes_changes_nothing(tmp_path: Path, processes: int) -> None:
    sources = FakeSource(300, "a.jsonl", bad=(7,)), FakeSource(55, "b.jsonl")
    make(tmp_path / "one", *sources)
    cache = TokenCache(tmp_path / "many", DROP, processes=processes)
    cache.store(sources, FakeEncoder(seconds=0.03))  # time for the children to come up
    (one,), (many,) = entries(tmp_path / "one"), entries(tmp_path / "many")
    assert one == many
    for file in entries(tmp_path / "one" / one):
        assert (tmp_path / "one" / one / file).read_bytes() == (
            tmp_path / "many" / one / file
        ).read_bytes()


def test_the_cache_is_used_and_told(tmp_path: Path) -> None:
    first, reports, made = make(tmp_path, FakeSource(50, bad=(3,)))
    again, cached, made_again = make(tmp_path, FakeSource(50, bad=(3,)))
    assert (made, made_again) == (True, False) and reports == cached
    assert np.array_equal(first.ids, again.ids) and len(entries(tmp_path)) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"sources": (FakeSource(50, version="2"),)},
        {"sources": (FakeSource(50, label="other.jsonl"),)},
        {"sources": (FakeSource(50), FakeSource(50))},
        {"version": "2"},
        {"policy": ERROR},
    ],
)
def test_whatever_changes_tokens_changes_the_key(tmp_path: Path, change: dict) -> None:
    make(tmp_path, FakeSource(50))
    sources = change.pop("sources", (FakeSource(50),))
    assert make(tmp_path, *sources, **change)[2]


def test_the_code_is_part_of_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path)
    monkeypatch.setattr(cache_module, "__file__", str(tmp_path / "copy" / "cache.py"))
    copy = tmp_path / "copy" / "templates"
    copy.mkdir(parents=True)
    versions = []
    for file, text in (("a.py", "1"), ("a.py", "2"), ("templates/t.jinja", "1"), ("b.py", "")):
        (tmp_path / "copy" / file).write_text(text)
        cache_module.code_version.cache_clear()
        versions.append(cache_module.code_version())
    cache_module.code_version.cache_clear()
    assert len(set(versions)) == 4


@pytest.mark.parametrize("file", ["ids.bin", "meta.json", "example_offsets.bin"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_entry_is_made_again(tmp_path: Path, file: str, damage: str) -> None:
    whole, _, _ = make(tmp_path)
    path = next(tmp_path.iterdir()) / file
    path.write_bytes(path.read_bytes()[:-1]) if damage == "cut" else path.unlink()
    again, _, made = make(tmp_path)
    assert made and np.array_equal(again.ids, np.repeat(*counts_of(again)))
    assert len(again) == len(whole) and len(entries(tmp_path)) == 1


def test_the_first_token_of_a_sequence_is_no_target() -> None:
    ids, all_of_it = np.arange(4, dtype=np.int32), np.ones(4, bool)
    batch = TokenBatch.of(
        [(1, [(ids, all_of_it)]), (2, [(ids, ~all_of_it), (ids[:1], all_of_it[:1])])]
    )
    assert batch.targets().tolist() == [3, 0, 0] and batch.targets().dtype == np.int32
    assert batch.turns.tolist() == [1, 2] and batch.row.tolist() == [1, 2]


def counts_of(store: TokenStore) -> tuple[np.ndarray, np.ndarray]:
    rows = np.repeat(store.row, np.diff(store.example_offsets))
    return rows, store.lengths


class FullDisk:
    """A file that takes `room` bytes."""

    def __init__(self, file, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data) -> int:
        self.room -= memoryview(data).nbytes
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)


def test_no_room_is_said_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = TokenWriter._write

    def full(self: TokenWriter, name: str, values: np.ndarray) -> None:
        if name == "ids" and not isinstance(self._files[name], FullDisk):
            self._files[name] = FullDisk(self._files[name], 1000)
        write(self, name, values)

    monkeypatch.setattr(TokenWriter, "_write", full)
    with pytest.raises(UserError, match=r"No space left on device.*FASTSFT_CACHE") as caught:
        make(tmp_path)
    assert str(tmp_path) in str(caught.value) and entries(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write the token cache in .*file/tokens"):
        make(tmp_path / "file" / "tokens")


def test_an_error_half_way_leaves_nothing(tmp_path: Path) -> None:
    for processes in (1, 2):
        with pytest.raises(UserError, match=r"^rows\.jsonl:90: broken beyond parsing$"):
            make(tmp_path, FakeSource(137, parse_error=90), processes=processes)
        assert entries(tmp_path) == []


def test_two_runs_at_once_both_have_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other run's entry appears while ours is being written."""
    finish = TokenWriter.finish

    def slower(self: TokenWriter, meta: dict) -> None:
        monkeypatch.setattr(TokenWriter, "finish", finish)
        assert make(tmp_path)[2]
        finish(self, meta)

    monkeypatch.setattr(TokenWriter, "finish", slower)
    store, _, made = make(tmp_path)
    assert made and len(store) == 137 and len(entries(tmp_path)) == 1


def test_leftovers_of_dead_runs_are_removed(tmp_path: Path) -> None:
    for name, age in (("dead.part", 30), ("alive.part", 1)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "ids.bin").write_bytes(b"x")
        then = time.time() - age * 3600
        os.utime(tmp_path / name / "ids.bin", (then, then))
    make(tmp_path)
    assert len(entries(tmp_path)) == 2 and "alive.part" in entries(tmp_path)


def test_the_first_bad_row_ends_the_run(tmp_path: Path) -> None:
    source = FakeSource(137, bad=(88, 37, 120), too_long=(5,))
    for processes in (1, 2):
        with pytest.raises(
            UserError, match=r"rows\.jsonl:37: empty row: The row holds nothing\..*drop"
        ):
            make(tmp_path, source, policy=ERROR, processes=processes)
    _, reports, _ = make(tmp_path, FakeSource(137, too_long=(5,)), policy=ERROR)
    assert reports[0].dropped == {"too long": 1}  # overlong decides, and it drops
    with pytest.raises(UserError, match=r"rows\.jsonl:5: too long: The row has 9 tokens\."):
        make(tmp_path, source, policy=Policy("drop", "error"))


def test_nothing_left_is_an_error_with_the_reasons(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        make(tmp_path, FakeSource(5, bad=(1, 2), too_long=(3, 4, 5)))
    text = str(caught.value)
    assert "nothing left to train on: of 5 rows" in text and "empty row 2, too long 3" in text
    assert "rows.jsonl:1: The row holds nothing." in text and entries(tmp_path) == []


def test_nothing_left_says_what_for(tmp_path: Path) -> None:
    cache = TokenCache(tmp_path, DROP, processes=1)
    for purpose in ("train", "evaluate"):
        with pytest.raises(UserError, match=f"nothing left to {purpose} on: of 1 rows"):
            cache.store([FakeSource(1, bad=(1,))], FakeEncoder(), purpose)


def test_only_the_first_bad_rows_are_told_in_full(tmp_path: Path) -> None:
    _, reports, _ = make(tmp_path, FakeSource(50, bad=tuple(range(1, 41))))
    assert reports[0].dropped == {"empty row": 40} and len(reports[0].details["empty row"]) == 3


def test_cache_folder_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTSFT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_cache_dir() == Path.home() / ".cache/fastsft/tokens"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert default_cache_dir() == Path("/x/fastsft/tokens")
    monkeypatch.setenv("FASTSFT_CACHE", "/y")
    assert default_cache_dir() == Path("/y/tokens")


def test_split_is_by_row_keyed_and_complete(tmp_path: Path) -> None:
    store, _, _ = make(tmp_path, FakeSource(200, "a.jsonl"), FakeSource(50, "b.jsonl"))
    train, val = split(store, 0.1, seed=3)
    assert (len(train), len(val), val.sizes, train.sizes) == (225, 25, (20, 5), (180, 45))
    rows = [(s, r) for part in (train, val) for s, r in zip(part.source, part.row, strict=True)]
    assert sorted(rows) == [(0, n) for n in range(1, 201)] + [(1, n) for n in range(1, 51)]
    for part in (train, val):
        for example in range(len(part)):
            n = int(part.row[example])
            assert [ids.tolist() for ids, _ in part.sequences(example)] == [[n] * (n % 7 + 2)] * (
                2 if n % 5 == 0 else 1
            )
        assert part.targets.tolist() == [n - 1 for n in part.lengths.tolist()]
        assert part.example_tokens.sum() == part.lengths.sum()
        assert part.where(0) == f"a.jsonl:{part.row[0]}"
    again = split(store, 0.1, seed=3)[1]
    assert again.row.tolist() == val.row.tolist() and again.ids is store.ids
    assert split(store, 0.1, seed=4)[1].row.tolist() != val.row.tolist()
    assert len(split(store, 30, seed=3)[1]) == 30 and len(split(store, 1e-6, seed=3)[1]) == 1


def test_split_keeps_the_pieces_of_a_row_together(tmp_path: Path) -> None:
    writer_folder = tmp_path / "store"
    writer_folder.mkdir()
    store, _, _ = make(tmp_path / "cache", FakeSource(20))
    pieces = store.subset(np.repeat(np.arange(20), 3))  # every row in three pieces
    train, val = split(pieces, 5, seed=0)
    assert len(val) == 15 and len(train) == 45
    assert not set(train.row.tolist()) & set(val.row.tolist())


@pytest.mark.parametrize("size", [6, 0.9, 100])
def test_split_leaves_every_source_a_row(tmp_path: Path, size: float) -> None:
    store, _, _ = make(tmp_path, FakeSource(6, "a.jsonl"), FakeSource(1, "b.jsonl"))
    assert split(store, 5, seed=0)[0].sizes == (1, 1)
    with pytest.raises(UserError, match=r"val_size: .* of 7 rows"):
        split(store, size, seed=0)

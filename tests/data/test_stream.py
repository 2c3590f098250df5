"""Streaming: every row once a pass, a keyed order, exact shares, and resuming at any point."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice

import pytest
from data_fakes import FakeEncoder, FakeSource

from fastsft.data.report import Policy
from fastsft.data.stream import BLOCK, ExampleStream, Mixer
from fastsft.errors import UserError

DROP = Policy("drop", "auto")
SIZES = (2500, 700, 1024)


BLANK = tuple(range(5, 505, 50))


def make(
    seed: int = 7, shuffle: bool = True, weights: tuple[float, ...] = (2.0, 0.5, 1.0)
) -> ExampleStream:
    sources = [
        FakeSource(n + len(BLANK), f"file{i}.jsonl", chunk=300, blank=BLANK)
        for i, n in enumerate(SIZES)
    ]
    return ExampleStream(sources, FakeEncoder(), weights, seed, shuffle, policy=DROP)


def take(stream: ExampleStream, count: int) -> list[str]:
    return [example.where for example in islice(stream, count)]


def test_each_row_of_a_pass_appears_exactly_once() -> None:
    seen = Counter(take(make(), 9000))
    by_source: list[Counter[str]] = [Counter() for _ in SIZES]
    for where, count in seen.items():
        by_source[int(where[4])][where] = count
    for source, (size, counts) in enumerate(zip(SIZES, by_source, strict=True)):
        passes, rest = divmod(sum(counts.values()), size)
        assert passes >= 1, f"source {source}: the test must see a whole pass"
        assert Counter(counts.values()) == +Counter({passes + 1: rest, passes: size - rest})


def test_shuffle_is_keyed_by_seed_pass_block_and_source() -> None:
    def rows(**kwargs: object) -> list[int]:
        stream = ExampleStream(
            [FakeSource(2 * BLOCK)], FakeEncoder(), [1.0], policy=DROP, **{"seed": 1, **kwargs}
        )
        return [int(where.rpartition(":")[2]) for where in take(stream, 4 * BLOCK)]

    order = rows()
    blocks = [order[i : i + BLOCK] for i in range(0, len(order), BLOCK)]
    assert order == rows() and order != rows(seed=2)
    assert blocks[0] != blocks[2] and sorted(blocks[0]) == sorted(blocks[2])  # another pass
    assert blocks[1] != [n + BLOCK for n in blocks[0]]  # another block
    assert rows(shuffle=False) == list(range(1, 2 * BLOCK + 1)) * 2


def test_weights_are_exact_shares_of_every_stretch() -> None:
    mixer = Mixer([2.0, 0.5])
    picks = [mixer.next() for _ in range(1000)]
    for start in range(0, 900, 7):
        assert abs(picks[start : start + 100].count(1) - 20) <= 1
    counts = Counter(where.split(":")[0] for where in take(make(), 7000))
    assert counts == {"file0.jsonl": 4000, "file1.jsonl": 1000, "file2.jsonl": 2000}


def test_shares_are_whole_numbers_and_do_not_drift() -> None:
    mixer = Mixer([0.1, 0.2, 0.3])  # in floating point the third is not three times the first
    picks = [mixer.next() for _ in range(6000)]
    assert mixer.weights == [1, 2, 3] and mixer.credit == [0, 0, 0]
    assert picks == picks[:6] * 1000


def test_resumes_anywhere_with_the_same_examples() -> None:
    whole = take(make(), 6200)
    for point in (0, 1, 511, 1791, 1792, 1793, 3500, 4375, 5999):
        first = make()
        take(first, point)
        state = json.loads(json.dumps(first.state()))
        second = make()
        take(second, 37)  # where it stood before does not matter
        second.restore(state)
        assert take(second, 150) == whole[point : point + 150], point


def test_many_kills_one_after_the_other() -> None:
    whole = take(make(), 5000)
    state, seen = make().state(), []
    for stretch in (1, 999, 24, 1, 1500, 700, 3, 772, 1000):
        stream = make()  # a new process knows the state only
        stream.restore(json.loads(json.dumps(state)))
        seen += take(stream, stretch)
        state = stream.state()
    assert seen == whole


def test_bad_rows_are_counted_once_a_pass_even_after_resuming() -> None:
    def stream() -> ExampleStream:
        source = FakeSource(1500, bad=(3, 1200), too_long=(1499,))
        return ExampleStream([source], FakeEncoder(), [1.0], 0, policy=DROP)

    straight, resumed = stream(), stream()
    take(straight, 1497 + 10)
    first = stream()
    take(first, 1100)
    resumed.restore(first.state())
    take(resumed, 1497 + 10 - 1100)
    for report in (straight.reports[0], resumed.reports[0]):
        assert report.rows == 1500 + BLOCK
        assert report.dropped == {"empty row": 3, "too long": 1}


def test_a_bad_row_ends_the_run_unless_dropped() -> None:
    source = FakeSource(50, bad=(37,), too_long=(2,))
    stream = ExampleStream([source], FakeEncoder(), [1.0], 0, policy=Policy("error", "drop"))
    with pytest.raises(
        UserError, match=r"rows\.jsonl:37: empty row: The row holds nothing.*on_bad_row: drop"
    ):
        take(stream, 1)
    stream = ExampleStream([source], FakeEncoder(), [1.0], 0, policy=Policy("drop", "error"))
    with pytest.raises(
        UserError, match=r"rows\.jsonl:2: too long: The row has 9 tokens.*max_length"
    ):
        take(stream, 1)


def test_nothing_left_is_an_error_not_an_endless_loop() -> None:
    for source in (FakeSource(3, bad=(1, 2, 3)), FakeSource(0)):
        stream = ExampleStream([source], FakeEncoder(), [1.0], 0, policy=DROP)
        with pytest.raises(UserError, match=r"rows\.jsonl: nothing left to train"):
            take(stream, 1)


def test_another_number_of_sources_is_refused() -> None:
    stream = ExampleStream([FakeSource(5)], FakeEncoder(), [1.0], 0, policy=DROP)
    with pytest.raises(UserError, match="streamed 3 sources, but data names 1"):
        stream.restore(make().state())

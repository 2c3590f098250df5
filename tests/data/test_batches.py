"""The stream of examples and its division into micro-batches, against counting by hand."""

import itertools
from collections import Counter

import numpy as np
import pytest

from fastsft.data.batches import (
    IGNORE,
    Document,
    ExampleOrder,
    Mixture,
    collate,
    divide,
    micro_batches,
    pack_in_order,
    step_bounds_by_examples,
    step_bounds_by_tokens,
    trained_targets,
)


def make_documents(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [
        Document(10 + i, rng.integers(1, 99, n).astype(np.int32), rng.random(n) < 0.5)
        for i, n in enumerate(lengths)
    ]


def test_every_example_once_per_epoch_and_epochs_differ():
    order = ExampleOrder(Mixture(sizes=(7, 4), weights=(1.0, 1.0), seed=3))
    first, second = order.take(0, 11), order.take(11, 22)
    assert sorted(first) == sorted(second) == list(range(11))
    assert list(first) != list(second)
    assert list(order.take(5, 17)) == list(first[5:]) + list(second[:6])


def test_unshuffled_is_file_order():
    order = ExampleOrder(Mixture(sizes=(3, 2), weights=(1.0, 1.0), seed=0, shuffle=False))
    assert list(order.take(0, 7)) == [0, 1, 2, 3, 4, 0, 1]


def test_weights_are_passes_per_epoch_row_by_row():
    """A chat source twice and half of a text source: counted over four epochs."""
    order = ExampleOrder(Mixture(sizes=(5, 8), weights=(2.0, 0.5), seed=1))
    assert order.mixture.epoch_size() == 14
    samples = []
    for epoch in range(4):
        counts = Counter(order.take(14 * epoch, 14 * (epoch + 1)).tolist())
        assert all(counts[e] == 2 for e in range(5))
        halves = frozenset(e for e in counts if e >= 5)
        assert len(halves) == 4 and all(counts[e] == 1 for e in halves)
        samples.append(halves)
    assert len(set(samples)) > 1, "the sampled half is drawn anew each epoch"


def test_order_depends_on_the_seed_alone():
    a, b, c = (ExampleOrder(Mixture((50,), (1.0,), seed)).take(0, 50) for seed in (4, 4, 5))
    assert list(a) == list(b) != list(c)


def test_steps_by_examples_only_the_last_is_short():
    assert list(step_bounds_by_examples(10, 4)) == [0, 4, 8, 10]
    assert list(step_bounds_by_examples(8, 4)) == [0, 4, 8]


@pytest.mark.parametrize("batch_tokens", [1, 17, 40, 95, 400])
@pytest.mark.parametrize(
    "ending", [{"total": 60, "max_steps": None}, {"total": None, "max_steps": 9}]
)
def test_steps_by_tokens_take_as_many_examples_as_fit(batch_tokens, ending):
    tokens = np.random.default_rng(0).integers(1, 30, 20)
    order = ExampleOrder(Mixture((20,), (1.0,), 0))
    bounds = step_bounds_by_tokens(order, tokens, batch_tokens, **ending)
    if ending["total"] is None:
        assert len(bounds) - 1 == 9
    else:
        assert bounds[-1] == 60
    sizes = [int(tokens[order.take(a, b)].sum()) for a, b in zip(bounds, bounds[1:], strict=False)]
    for i, (a, b, size) in enumerate(zip(bounds, bounds[1:], sizes, strict=False)):
        assert b > a and (size <= batch_tokens or b == a + 1)
        last = i == len(sizes) - 1 and ending["total"] is not None
        assert last or size + tokens[order.take(b, b + 1)][0] > batch_tokens, (
            "one more would have fit"
        )


@pytest.mark.parametrize("seed", range(5))
def test_divide_keeps_every_document_under_the_budget_and_balances(seed):
    lengths = np.random.default_rng(seed).integers(1, 500, 64).tolist()
    parts = divide(lengths, 2000, quadratic=1e-3)
    assert sorted(i for part in parts for i in part) == list(range(64))
    sums = [sum(lengths[i] for i in part) for part in parts]
    assert max(sums) <= 2000
    assert len(parts) == -(-sum(lengths) // 2000), "these lengths fit into the fewest"
    costs = [sum(lengths[i] + 1e-3 * lengths[i] ** 2 for i in part) for part in parts]
    assert max(costs) < 1.2 * sum(costs) / len(costs)


def test_divide_opens_one_more_only_when_nothing_fits():
    assert len(divide([6, 6, 6], 10)) == 3
    assert sorted(map(sorted, divide([7, 5, 3, 5], 10))) == [[0, 2], [1, 3]]


def test_collate_shifts_inside_documents_and_keys_rows_by_document():
    documents = make_documents([5, 1, 3])
    batch = collate(documents, 99, round_to=4)
    assert batch.tokens == 9 and len(batch.ids) == 12 and batch.step_trained == 99
    assert batch.cu_seqlens.tolist() == [0, 5, 6, 9, 12] and batch.max_seqlen == 5
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 0, 0, 1, 2, 0, 1, 2]
    for d, begin in zip(documents, (0, 5, 6), strict=True):
        for t in range(len(d.ids)):
            trained = t + 1 < len(d.ids) and d.trained[t + 1]
            assert batch.labels[begin + t] == (d.ids[t + 1] if trained else IGNORE)
            assert batch.row_key[begin + t] == (d.key << 24) + t
    assert (batch.labels[9:] == IGNORE).all() and (batch.row_key[9:] < 0).all()
    assert batch.trained_rows.tolist() == [t for t in range(12) if batch.labels[t] != IGNORE]
    assert [a.dtype for a in (batch.ids, batch.labels, batch.positions, batch.cu_seqlens)] == [
        np.int64,
        np.int64,
        np.int32,
        np.int32,
    ]


def test_micro_batches_agree_on_the_trained_tokens_of_the_step():
    documents = make_documents([30, 20, 10, 25])
    parts = list(micro_batches(documents, 40))
    total = sum(trained_targets(d.trained) for d in documents)
    assert len(parts) > 1 and {p.step_trained for p in parts} == {total}
    assert sum(len(p.trained_rows) for p in parts) == total
    alone = list(
        micro_batches(documents, 1)
    )  # below the longest row: the longest row is the budget
    assert max(p.tokens for p in alone) == 30


def test_pack_in_order_covers_everything_once():
    lengths = [5, 5, 9, 1, 30, 2]
    runs = list(pack_in_order(lengths, 10))
    assert [i for run in runs for i in run] == list(range(6))
    assert all(sum(lengths[i] for i in run) <= 10 or len(run) == 1 for run in runs)


def test_what_the_host_knows_of_a_pack_agrees_with_its_arrays():
    """Lengths and trained tokens of each document, the untrained tail included."""
    rng = np.random.default_rng(3)
    docs = [
        Document(i, np.arange(n, dtype=np.int32), rng.random(n) < 0.4)
        for i, n in enumerate([5, 1, 9, 2])
    ]
    for round_to in (1, 8):
        batch = collate(docs, 1, round_to=round_to)
        assert list(batch.lengths) == np.diff(batch.cu_seqlens).tolist()
        counts = [
            int(((batch.trained_rows >= a) & (batch.trained_rows < b)).sum())
            for a, b in itertools.pairwise(batch.cu_seqlens)
        ]
        assert list(batch.targets) == counts and sum(counts) == len(batch.trained_rows)

"""bench.first: order, deadline, failures, a second call and the last table, on a clock of its own."""

import os
import signal
import time

import pytest
import torch

from bench import first
from bench.first import KEY, Schedule, Worker, performed, table
from bench.first_steps import STEPS, Bench, Figures, Item, items_of
from bench.ledger import Ledger


class Clock:
    """Seconds that pass only when an item says so."""

    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def ledgers(path=None, on_gpu=True, kept=()):
    device = torch.device("cuda" if on_gpu else "cpu")
    about = {"card": "c", "driver": "1", "versions": {}}
    return {"first": Ledger(device, path, about, list(kept), KEY)}


def item(name, seconds, do=lambda bench: None, **more):
    return Item("facts", name, seconds, do, **more)


def schedule(clock, books, ends, taking, seen, problems=None):
    def perform(one, limit, add):
        seen.append((one.name, limit))
        clock.now += taking.get(one.name, 0)
        problem = (problems or {}).get(one.name, "")
        if not problem:
            row = {"kind": "figure", "step": one.step, "item": one.name, "what": one.name}
            add("first", row | {"unit": "us", "goal": 2.0, "measured": 3.5, "limit": 1})
        return problem

    return Schedule(books, perform, clock, ends)


def test_items_come_in_order_and_only_where_their_seconds_are_left(clock):
    books, seen = ledgers(), []
    items = [item("a", 10), item("b", 30), item("c", 20), item("d", 5)]
    ran = schedule(clock, books, 40, {"a": 15, "d": 1, "c": 20}, seen).run(items)
    # 25 s are left after a: too few for b, enough for c, whose patience they cut; then 5 for d.
    assert seen == [("a", 20), ("c", 25), ("d", 5)] and ran == 3
    row = books["first"].find(kind="item", step="facts", item="b")
    assert row["problem"] == "skipped: 25 s left, 30 s needed"


def test_a_failure_is_a_row_and_never_the_end(clock):
    books, seen = ledgers(), []
    items = [item("a", 1), item("b", 1), item("c", 1)]
    ran = schedule(clock, books, 9, {}, seen, {"a": "no end within 2 s"}).run(items)
    assert ran == 2 and [name for name, _ in seen] == ["a", "b", "c"]
    assert books["first"].find(kind="item", step="facts", item="a")["problem"]


def test_a_gpu_s_item_is_not_begun_without_one(clock):
    books, seen = ledgers(on_gpu=False), []
    assert schedule(clock, books, 9, {}, seen).run([item("a", 1, needs_gpu=True)]) == 0
    assert not seen and books["first"].rows[0]["problem"] == "not measured: no GPU"


def test_a_second_call_measures_what_the_first_did_not(clock, tmp_path, monkeypatch):
    monkeypatch.setattr(first.engine.ledger.rows, "source", lambda folders: "same")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    items = [item("a", 1), item("b", 1), item("c", 50)]
    seen = []
    book = first.books(tmp_path)
    schedule(clock, book, 9, {}, seen, {"b": "wrong"}).run(items)
    again = first.books(tmp_path)
    ran = schedule(clock, again, 99, {}, seen).run(items)
    assert [name for name, _ in seen] == ["a", "b", "b", "c"] and ran == 3
    problems = [r["problem"] for r in again["first"].rows if r["kind"] == "item"]
    assert problems == ["", "", ""]


def test_the_table_has_a_line_for_everything(clock):
    books, items = ledgers(), [item("a", 1), item("b", 1), item("c", 99), item("d", 1)]
    schedule(clock, books, 9, {}, [], {"b": "ValueError: bad | worse"}).run(items[:3])
    assert table(books["first"], items).splitlines() == [
        "| | goal | measured | limit |",
        "|---|---|---|---|",
        "| a | 2.000 us | 3.500 us | 1.000 us |",
        "| facts: b | - | ValueError: bad / worse | - |",
        "| facts: c | - | skipped: 9 s left, 99 s needed | - |",
        "| facts: d | - | not measured | - |",
    ]


def test_what_an_item_raises_is_its_problem():
    def broken(bench):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried\nto allocate")

    bench = Bench(ledgers(on_gpu=False), None, True, lambda book, row: None)
    said = performed(item("a", 1, broken), bench)
    assert said == "OutOfMemoryError: CUDA out of memory. Tried"


def test_every_item_has_a_name_of_its_own_and_stands_in_its_step():
    for quick, on_gpu in ((True, False), (False, True)):
        items = items_of(quick, on_gpu)
        names = [(i.step, i.name) for i in items]
        assert len(set(names)) == len(names)
        order = [STEPS.index(i.step) for i in items]
        assert order == sorted(order) and set(order) == set(range(len(STEPS)))
    assert sum(i.seconds for i in items) < 780, "what a lent card has"


# --- the process -------------------------------------------------------------------------------------


def figure(bench):
    Figures(bench, "facts", "good").add("x", "", 1)


def ended(bench):
    os.kill(os.getpid(), signal.SIGKILL)


def endless(bench):
    while True:
        time.sleep(1)


@pytest.fixture
def worker(monkeypatch, tmp_path):
    def items(quick, on_gpu):
        return [item("good", 1, figure), item("ended", 1, ended), item("endless", 1, endless)]

    monkeypatch.setattr(first, "items_of", items)
    found = Worker("fork", tmp_path, True)
    yield found
    found.stop()


def test_a_process_that_dies_costs_its_item_alone(worker):
    made = []
    add = lambda book, row: made.append((book, row["what"]))  # noqa: E731
    assert worker.perform(item("ended", 1), 1e4, add) == "its process ended, exit code -9"
    assert worker.perform(item("good", 1), 1e4, add) == ""
    assert made == [("first", "x")]


def test_an_item_that_does_not_end_is_ended(worker):
    assert worker.perform(item("good", 1), 1e4, lambda *row: None) == ""
    pid = worker.process.pid
    assert worker.perform(item("endless", 1), 0.0, lambda *row: None) == "no end within 0 s"
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_the_command_measures_the_facts_and_ends_with_the_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(first, "PATIENCE", 1e4)  # a loaded machine is no failure
    monkeypatch.setattr(first, "OPENING", 1e4)
    given = ["--quick", "--deadline", "100000", "--out", str(tmp_path)]
    assert first.main([*given, "--steps", "facts,compile"]) == 0
    said = capsys.readouterr().out
    assert "| facts: transfers | - | not measured: no GPU | - |" in said
    assert said.splitlines()[-1] == "| compile: all | - | not measured: no GPU | - |"
    assert (tmp_path / "cpu" / "first.json").exists()
    assert first.main([*given, "--steps", "compile"]) == 1, "nothing ran"
    assert first.main([*given, "--steps", "facts"]) == 0
    assert "facts     rates: is there" in capsys.readouterr().out

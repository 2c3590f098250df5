"""Work in processes: order, errors as themselves, deaths, and no import of the caller's main module."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import closing

import pytest
from worker_tasks import exit_quietly, kill_yourself, slow_square

from fastsft.data.workers import ordered_map
from fastsft.errors import UserError


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_results_come_in_the_order_of_the_tasks(processes: int) -> None:
    results = list(ordered_map(slow_square, range(60), processes))
    assert [square for square, _ in results] == [n * n for n in range(60)]
    workers = {pid for _, pid in results}
    assert os.getpid() in workers and len(workers) <= processes
    assert processes == 1 or len(workers) > 1, "the children did nothing"


def test_a_few_tasks_start_no_process() -> None:
    assert {pid for _, pid in ordered_map(slow_square, range(2), 4)} == {os.getpid()}


def test_tasks_are_read_lazily() -> None:
    read = []

    def tasks():
        for n in range(1000):
            read.append(n)
            yield n

    with closing(ordered_map(slow_square, tasks(), 2)) as results:
        for _ in range(10):
            next(results)
        assert len(read) <= 10 + 2 * 2 + 1


def test_an_error_in_a_worker_surfaces_as_itself() -> None:
    with pytest.raises(UserError, match=r"^row 1000 is one too many$"):
        list(ordered_map(slow_square, range(940, 1100), 3))


def test_a_killed_worker_is_reported() -> None:
    with pytest.raises(UserError, match=r"was killed \(signal 9\).*memory"):
        list(ordered_map(kill_yourself, range(200), 2))


def test_a_worker_that_leaves_is_a_bug_with_its_status() -> None:
    with pytest.raises(RuntimeError, match="ended with status 3"):
        list(ordered_map(exit_quietly, range(200), 2))


def test_the_main_module_is_not_run_again(tmp_path) -> None:
    """A script without `if __name__ == "__main__"` works, and its imports cost the children nothing."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "print('main ran')\n"
        "from worker_tasks import slow_square\n"
        "from fastsft.data.workers import ordered_map\n"
        "pids = {pid for _, pid in ordered_map(slow_square, range(60), 2)}\n"
        "print(len(pids))\n"
    )
    path = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.returncode) == ("main ran\n2\n", 0), done.stderr

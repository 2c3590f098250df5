"""Work spread over processes; results come back in the order of the tasks, whatever their number.

The caller's own process works too: it takes the oldest task no child has started. Children take half a
second to start, so little data is done before they are up, and nothing has to guess what "little" is.
The first task is always done here, before the work is sent to the children, so that what the work
learns from it (which of two tokenizers to use) is known to all of them alike.

Children are started as `python -c`, not through `multiprocessing`, whose spawned children run the
caller's main module again: a script that trains without an `if __name__ == "__main__"` would start
itself over, and one that imports torch at its top would pay for torch in every child. Tasks, results
and exceptions travel as pickles over the child's standard streams. A child whose parent is gone reads
the end of its input and leaves.
"""

from __future__ import annotations

import importlib
import json
import os
import pickle
import queue
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import chain, islice
from typing import Any, TypeVar

from fastsft.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")

IN_LINE = 2  # this many tasks are done here without starting a process
BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from fastsft.data.workers import serve; serve(sys.argv[2])"
)


def cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def ordered_map(
    work: Callable[[Task], Result], tasks: Iterable[Task], processes: int, preload: str = "pickle"
) -> Generator[Result, None, None]:
    """`map(work, tasks)` in up to `processes` processes, this one included.

    `work`, tasks and results must pickle; tasks are read lazily and at most 2·processes are held. An
    exception of `work` is raised here as it is. Close the iterator (contextlib.closing) to end early.
    preload: a module the children import while they have nothing else to do.
    """
    tasks = iter(tasks)
    first = list(islice(tasks, IN_LINE + 1))
    if processes == 1 or len(first) <= IN_LINE:
        yield from map(work, chain(first, tasks))
        return
    rest = chain(first, tasks)
    held: deque[tuple[Task, Future[Result]]] = deque()
    with _Children(processes - 1, preload) as children:
        yield work(next(rest))
        children.greet(work)
        while True:
            for task in islice(rest, 2 * processes - len(held)):
                held.append((task, children.submit(task)))
            if not held:
                return
            if held[0][1].done():
                yield held.popleft()[1].result()
                continue
            mine = next((i for i, (_, future) in enumerate(held) if future.cancel()), None)
            if mine is None:
                wait([held[0][1]])
            else:
                done: Future[Result] = Future()
                done.set_result(work(held[mine][0]))
                held[mine] = held[mine][0], done


class _Children:
    """A thread per child process that feeds it; leaving the context ends the processes."""

    def __init__(self, count: int, preload: str) -> None:
        self._all = [_Child(preload) for _ in range(count)]
        self._idle: queue.SimpleQueue[_Child] = queue.SimpleQueue()
        for child in self._all:
            self._idle.put(child)
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="data worker")

    def greet(self, work: Callable[[Any], Any]) -> None:
        """What they are to do; said once, before the first task."""
        greeting = pickle.dumps(work, protocol=5)
        for child in self._all:
            child.unsent = greeting

    def submit(self, task: Any) -> Future[Any]:
        return self._threads.submit(self._run, task)

    def _run(self, task: Any) -> Any:
        child = self._idle.get()
        try:
            return child.run(task)
        finally:
            self._idle.put(child)

    def __enter__(self) -> _Children:
        return self

    def __exit__(self, *exc: object) -> None:
        for child in self._all:
            child.process.kill()
        self._threads.shutdown(cancel_futures=True)
        for child in self._all:
            child.process.communicate()


class _Child:
    def __init__(self, preload: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", BOOT, json.dumps(sys.path), preload],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # A process per core is enough; their own threads would only get in each other's way.
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
            start_new_session=True,  # Ctrl-C is for the parent, which ends its children itself
        )
        self.unsent = b""

    def run(self, task: Any) -> Any:
        requests, replies = self.process.stdin, self.process.stdout
        assert requests is not None and replies is not None
        try:
            requests.write(self.unsent)
            self.unsent = b""
            pickle.dump(task, requests, protocol=5)
            requests.flush()
            error, result = pickle.load(replies)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            raise self._death() from None
        if error is not None:
            raise error
        return result

    def _death(self) -> Exception:
        status = self.process.wait()
        if status < 0:
            return UserError(
                f"a process preparing the data was killed (signal {-status}), most often because the "
                "machine ran out of memory; free some, or use streaming: true"
            )
        return RuntimeError(f"a process preparing the data ended with status {status}; see above")


def serve(preload: str) -> None:
    """A child's life: read the work, then answer tasks with (exception | None, result) until the end."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a stray print must not land among the replies
    requests = os.fdopen(os.dup(0), "rb")
    importlib.import_module(preload)
    work = pickle.load(requests)
    with ThreadPoolExecutor(1) as lane:  # a future holds an exception of any kind as a value
        while requests.peek(1):
            future = lane.submit(work, pickle.load(requests))
            error = future.exception()
            pickle.dump((error, None if error else future.result()), replies, protocol=5)
            replies.flush()

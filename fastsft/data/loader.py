"""Steps, collated ahead of time: a thread reads the memory-mapped tokens, lays out the micro-batches of
the next steps and moves them to the device, so that the training loop only ever takes finished ones.

Every count is known here on the host, and the position in the data is a small JSON object, so a resumed
run takes exactly the steps an uninterrupted one would have taken.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from fastsft.data.batches import (
    Document,
    ExampleOrder,
    MicroBatch,
    collate,
    micro_batches,
    pack_in_order,
    trained_targets,
)

if TYPE_CHECKING:
    from fastsft.data.stream import ExampleStream

AHEAD = 2  # steps ready before they are asked for: one being moved, one being laid out


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step. `cursor` is the position in the data after it; `rows` name where it came from."""

    index: int  # from 1
    batches: tuple[MicroBatch, ...]
    epoch: float  # passes over the data once this step is done
    rows: tuple[str, ...]  # "file:line" of each example
    tokens: int
    trained: int
    cursor: dict[str, Any]


class Store(Protocol):
    """What the loader needs of a token store (fastsft.data.store.TokenStore)."""

    example_offsets: np.ndarray
    lengths: np.ndarray

    def sequence(self, index: int) -> tuple[np.ndarray, np.ndarray]: ...

    def where(self, example: int) -> str: ...


@dataclass(frozen=True, slots=True)
class Layout:
    """How documents become micro-batches: a token budget, attention's weight in the cost, a rounding of T."""

    budget: int
    quadratic: float
    round_to: int
    device: torch.device


def to_device(batch: MicroBatch, device: torch.device) -> MicroBatch:
    """The same batch as torch tensors on `device`, through pinned memory when that is a GPU."""

    def move(array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        if device.type == "cuda":
            tensor = tensor.pin_memory().to(device, non_blocking=True)
        return tensor

    return replace(
        batch,
        ids=move(batch.ids),
        labels=move(batch.labels),
        positions=move(batch.positions),
        cu_seqlens=move(batch.cu_seqlens),
        trained_rows=move(batch.trained_rows),
        row_key=move(batch.row_key),
        host_ids=torch.from_numpy(batch.ids),
    )


def documents_of(store: Store, examples: np.ndarray) -> list[Document]:
    """The sequences of some examples, in order; a per-turn example gives several."""
    offsets = store.example_offsets
    return [
        Document(s, *store.sequence(s))
        for e in examples
        for s in range(int(offsets[e]), int(offsets[e + 1]))
    ]


def _make_step(
    index: int,
    documents: list[Document],
    layout: Layout,
    *,
    epoch: float,
    rows: tuple[str, ...],
    cursor: dict,
) -> Step:
    parts = tuple(
        to_device(batch, layout.device)
        for batch in micro_batches(
            documents, layout.budget, quadratic=layout.quadratic, round_to=layout.round_to
        )
    )
    return Step(
        index=index,
        batches=parts,
        epoch=epoch,
        rows=rows,
        tokens=sum(part.tokens for part in parts),
        trained=parts[0].step_trained,
        cursor=cursor,
    )


def stored_steps(
    store: Store, order: ExampleOrder, bounds: np.ndarray, layout: Layout, *, first: int = 1
) -> Iterator[Step]:
    """Steps `first` to the last one over a token store."""
    epoch_size = order.mixture.epoch_size()
    for index in range(first, len(bounds)):
        begin, end = int(bounds[index - 1]), int(bounds[index])
        examples = order.take(begin, end)
        yield _make_step(
            index,
            documents_of(store, examples),
            layout,
            epoch=end / epoch_size,
            rows=tuple(store.where(int(e)) for e in examples),
            cursor={"step": index},
        )


def streamed_steps(
    stream: ExampleStream, batch_size: int, steps: int, layout: Layout, *, first: int = 1
) -> Iterator[Step]:
    """Steps over a stream of examples, which carries its own position in its sources."""
    examples = iter(stream)
    for index in range(first, steps + 1):
        documents, rows = [], []
        for position in range((index - 1) * batch_size, index * batch_size):
            example = next(examples)
            rows.append(example.where)
            # Sequences of one example share its place in the stream: 256 turns of room.
            documents += [
                Document(position << 8 | turn, ids, trained)
                for turn, (ids, trained) in enumerate(example.sequences)
            ]
        yield _make_step(
            index,
            documents,
            layout,
            epoch=0.0,
            rows=tuple(rows),
            cursor={"step": index, "stream": stream.state()},
        )


def evaluation_batches(store: Store, examples: np.ndarray, layout: Layout) -> Iterator[MicroBatch]:
    """All of an evaluation set once, in order, under the same token budget."""
    documents = documents_of(store, examples)
    for run in pack_in_order([len(d.ids) for d in documents], layout.budget):
        members = [documents[i] for i in run]
        trained = sum(trained_targets(d.trained) for d in members)
        yield to_device(collate(members, trained, round_to=layout.round_to), layout.device)


class Ahead:
    """Runs an iterator of steps in a thread, `AHEAD` steps ahead; its errors surface at `next()`.

    Usable as a context manager; leaving it stops the thread.
    """

    def __init__(self, make: Callable[[], Iterator[Step]]) -> None:
        self._queue: queue.Queue[Step | BaseException | None] = queue.Queue(AHEAD)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(make,), daemon=True, name="loader")
        self._thread.start()

    def _put(self, item: Step | BaseException | None) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def _run(self, make: Callable[[], Iterator[Step]]) -> None:
        try:
            for step in make():
                if not self._put(step):
                    return
            self._put(None)
        except BaseException as error:  # handed to the consumer, which raises it
            self._put(error)

    def __iter__(self) -> Iterator[Step]:
        while (item := self._queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

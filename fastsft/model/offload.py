"""Block inputs in host memory between forward and backward.

    forward   layer i's input is copied to its place in a slab of pinned memory, on a stream of its own
    backward  two buffers on the device in turn: while layer i is worked on, layer i-1's input comes back

A token costs the device two inputs in all on their way out, and two on their way back, instead of one
for each layer. 8 KiB a layer and token (4096
numbers of bf16) are 0.33 us at 25 GB/s each way; a layer of that size computes longer than that for a
token on any card seen so far, so the copies hide behind the products.

The slab is registered with the driver rather than taken from torch's pinned allocator, which rounds
sizes up to a power of two.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from fastsft.errors import UserError


class CopyStream:
    """A CUDA stream for copies beside the current one, which is called the main one here."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def copy(self, to: Tensor, source: Tensor) -> Any:
        """Copies behind all that the main stream has been given -> the event of the copy's end."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            to.copy_(source, non_blocking=True)
        return self._stream.record_event()

    def wait(self, event: Any) -> None:
        """What the main stream is given from here on runs behind the event; the host waits for nothing."""
        torch.cuda.current_stream(self._device).wait_event(event)


class DirectCopies:
    """The same where nothing runs beside anything else."""

    def copy(self, to: Tensor, source: Tensor) -> Any:
        to.copy_(source)

    def wait(self, event: Any) -> None:
        pass


Copies = CopyStream | DirectCopies


def copies_of(device: torch.device) -> Copies:
    return CopyStream(device) if device.type == "cuda" else DirectCopies()


class Stash:
    """Places for `slots` inputs [T, H]; one forward pass's at a time, taken back in reverse order.

    An input is referred to until the main stream waits for its copy, two inputs later: from there on the
    allocator may hand its memory to whatever comes next on the main stream. So the device holds two
    inputs on their way, however far the host runs ahead (`record_stream` would leave that to the host's
    lead).
    """

    def __init__(
        self,
        slots: int,
        hidden: int,
        dtype: torch.dtype,
        device: torch.device,
        copies: Copies | None = None,
    ) -> None:
        self.slots, self.hidden, self.dtype, self.device = slots, hidden, dtype, device
        self._slab: Tensor | None = None
        self._release: Any = None
        self._copies = copies or copies_of(device)
        self._leaving: list[tuple[Tensor, Any] | None] = [
            None,
            None,
        ]  # inputs and their copies' ends
        self._buffers: list[Tensor | None] = [None, None]
        self._coming: tuple[int, Any] | None = None  # the slot on its way back, its copy's end
        self._tokens = 0

    @property
    def host_bytes(self) -> int:
        return 0 if self._slab is None else self._slab.nbytes

    def begin(self, tokens: int) -> None:
        """Room for a pass of `tokens` tokens; what an earlier pass left is forgotten."""
        self.end()
        self._tokens = tokens
        if self._slab is None or self._slab.shape[1] < tokens:
            self._grow(tokens)

    def end(self) -> None:
        """Lets go of everything on the device, behind the copies under way on the main stream."""
        self._let_go()
        if self._coming is not None:
            self._copies.wait(self._coming[1])
        self._coming, self._buffers = None, [None, None]

    def put(self, slot: int, x: Tensor) -> None:
        """x [T, H] goes to its place; slot - 2's memory may be used again from here on."""
        assert self._slab is not None and x.shape[0] == self._tokens
        self._let_go(slot % 2)
        self._leaving[slot % 2] = x, self._copies.copy(self._slab[slot, : self._tokens], x)

    def take(self, slot: int) -> Tensor:
        """The input of `slot`, valid until the next call but one; slot - 1 is fetched meanwhile."""
        self._let_go()
        if self._coming is None or self._coming[0] != slot:
            self._coming = self._fetch(slot)
        self._copies.wait(self._coming[1])
        x = self._buffers[slot % 2]
        assert x is not None
        self._coming = self._fetch(slot - 1) if slot > 0 else None
        if slot == 0:
            self._buffers = [None, None]
        return x

    def _let_go(self, *places: int) -> None:
        """Of the inputs on their way at these places (none given: at both)."""
        for place in places or (0, 1):
            leaving = self._leaving[place]
            if leaving is not None:
                self._copies.wait(leaving[1])
                self._leaving[place] = None

    def _fetch(self, slot: int) -> tuple[int, Any]:
        """The buffer's last reader is in front of the copy on the main stream."""
        assert self._slab is not None
        place = self._slab[slot, : self._tokens]
        buffer = self._buffers[slot % 2]
        if buffer is None:
            buffer = torch.empty(place.shape, dtype=self.dtype, device=self.device)
            self._buffers[slot % 2] = buffer
        return slot, self._copies.copy(buffer, place)

    def _grow(self, tokens: int) -> None:
        if self._release is not None:
            torch.cuda.synchronize(self.device)  # a copy may still read the old slab
            self._release()
        host = torch.device("meta" if self.device.type == "meta" else "cpu")
        shape = (self.slots, tokens, self.hidden)
        self._slab = torch.empty(shape, dtype=self.dtype, device=host)
        if self.device.type == "cuda":
            self._release = pin(self._slab)


def pin(tensor: Tensor) -> Any:
    """Registers host memory with the driver -> what takes it back, also at the tensor's end.

    Raises UserError where the driver refuses.
    """
    runtime: Any = torch.cuda.cudart()
    address = tensor.data_ptr()
    error = runtime.cudaHostRegister(address, tensor.nbytes, 0)
    if int(error) != 0:
        raise UserError(
            f"{tensor.nbytes / 1e9:.1f} GB of host memory cannot be pinned (CUDA error {int(error)}); set "
            "activations: recompute_block, or raise the limit of locked memory (ulimit -l)"
        )
    return weakref.finalize(tensor, runtime.cudaHostUnregister, address)

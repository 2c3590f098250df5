"""Block inputs in host memory between forward and backward.

    forward   layer i's input is copied to its place in a slab of pinned memory, on a stream of its own
    backward  two buffers on the device in turn: while layer i is worked on, layer i-1's input comes back

A token costs the device two inputs in all, instead of one for each layer. 8 KiB a layer and token (4096
numbers of bf16) are 0.33 us at 25 GB/s each way; a layer of that size computes longer than that for a
token on any card seen so far, so the copies hide behind the products.

The slab is registered with the driver rather than taken from torch's pinned allocator, which rounds
sizes up to a power of two.
"""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from fastsft.errors import UserError


class Stash:
    """Places for `slots` inputs [T, H]; one forward pass's at a time, taken back in reverse order."""

    def __init__(self, slots: int, hidden: int, dtype: torch.dtype, device: torch.device) -> None:
        self.slots, self.hidden, self.dtype, self.device = slots, hidden, dtype, device
        self._slab: Tensor | None = None
        self._release: Any = None
        self._buffers: list[Tensor | None] = [None, None]
        self._coming: int | None = None  # the slot whose input is on its way back
        self._tokens = 0
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def host_bytes(self) -> int:
        return 0 if self._slab is None else self._slab.nbytes

    def begin(self, tokens: int) -> None:
        """Room for a pass of `tokens` tokens; what an earlier pass left is forgotten."""
        self._tokens, self._coming = tokens, None
        if self._slab is None or self._slab.shape[1] < tokens:
            self._grow(tokens)
        self._buffers = [None, None]

    def put(self, slot: int, x: Tensor) -> None:
        """x [T, H] goes to its place; its memory may be used again once the copy is done."""
        assert self._slab is not None and x.shape[0] == self._tokens
        place = self._slab[slot, : self._tokens]
        if self._stream is None:
            place.copy_(x)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            place.copy_(x, non_blocking=True)
        x.record_stream(self._stream)

    def take(self, slot: int) -> Tensor:
        """The input of `slot`, valid until the next call but one; slot - 1 is fetched meanwhile."""
        if self._coming != slot:
            self._fetch(slot)
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)
        if slot > 0:
            self._fetch(slot - 1)
        x = self._buffers[slot % 2]
        assert x is not None
        if slot == 0:
            self._buffers = [None, None]
        return x

    def _fetch(self, slot: int) -> None:
        assert self._slab is not None
        place = self._slab[slot, : self._tokens]
        buffer = self._buffers[slot % 2]
        if buffer is None:
            buffer = torch.empty(place.shape, dtype=self.dtype, device=self.device)
            self._buffers[slot % 2] = buffer
        self._coming = slot
        if (
            self._stream is not None
        ):  # the buffer's last reader is in front of this on the main stream
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            buffer.record_stream(self._stream)
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            buffer.copy_(place, non_blocking=True)

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

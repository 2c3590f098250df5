"""What a layer must know about the pass it runs in, beyond its input.

A LoRA layer deep inside a model receives hidden states and nothing else, but its dropout is a function of
(seed, step, document, position, layer): masks then do not depend on how documents were packed, on
checkpoint recomputation or on where a run was interrupted. The engine writes those facts here before
each forward pass and the layers read them; one object is shared by all of them.

Recomputation happens during the backward pass, when the next document's facts may already stand here.
So every checkpointed block takes a snapshot in its forward pass and puts it back while it is recomputed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

from torch import Tensor


@dataclass
class StepContext:
    """The pass under way: seed of the run, optimizer step, and what each row of the batch is.

    row_key int64[T] identifies (document, position); cu_seqlens int32[S+1], max_seqlen and positions
    int32[T] describe the packing, and lengths is what the host knows of it. None until an engine has run.
    """

    seed: int = 0
    step: int = 0
    row_key: Tensor | None = None
    cu_seqlens: Tensor | None = None
    max_seqlen: int = 0
    lengths: tuple[int, ...] | None = None
    positions: Tensor | None = None

    def restore(self, snapshot: StepContext) -> None:
        """Take over every fact of `snapshot`."""
        self.__dict__.update(snapshot.__dict__)

    @contextmanager
    def _as_it_was(self, snapshot: StepContext) -> Iterator[None]:
        now = replace(self)
        self.restore(snapshot)
        try:
            yield
        finally:
            self.restore(now)

    def for_checkpoint(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """torch.utils.checkpoint's `context_fn`: around the recompute, the facts as they are now."""
        return nullcontext(), self._as_it_was(replace(self))

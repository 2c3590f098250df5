"""Where the documents of a batch lie, read from what transformers knows when it would build a mask.

transformers describes who sees whom by a mask function (row, head, query, key) -> bool and the 2-D padding
mask, and asks the registered mask function to make of it whatever its attention wants. Ours wants runs of
tokens: a token begins a document where it does not see the token before it. Evaluated on those neighbours
alone, B x L numbers instead of B x L x L, the mask function gives every boundary: packing (position_ids that
restart), chunks, rows. Padding is left out of the runs, on either side. A token that sees the token behind it
(bidirectional blocks), padding in the middle of a row, or a pattern made of custom functions is no run:
such a batch keeps the whole mask. Windows are no part of this: the layer says its own to the attention.

transformers looks for packing only in passes that make no cache. A pass that makes one (the default outside
trainers that switch it off) has its position_ids read here, so that packing is seen all the same.

What this costs: the neighbours are read on the host once per forward pass and mask, one synchronisation on a
GPU, and none where a batch has neither padding nor packing and makes no cache. transformers' own look at
position_ids is another.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.masking_utils import sdpa_mask

from fastsft.model.attention import Documents


class Runs(NamedTuple):
    """The documents of a batch; `rows` int64[T] are their tokens in the flattened batch, None for all."""

    documents: Documents
    rows: Tensor | None


class BatchLayout:
    """What stands in a mask's place on the way to the attention: the documents, or the mask if need be.

    Made anew in each forward pass. Not a tensor and not a dataclass, so that wrappers which move or
    cast a layer's arguments hand it through as it is. `generate` makes the masks of a static cache ahead
    and asks them two things that it would ask a mask of four dimensions.
    """

    ndim = 4

    def __init__(self, size: tuple[int, int], options: dict[str, Any]) -> None:
        self.size = size
        self.padding: Tensor | None = options.get("attention_mask")
        self._options = options
        self._restarts: Runs | None = None
        chunked = getattr(options.get("config"), "attention_chunk_size", None) is not None
        # transformers withdraws the permission to skip wherever a pattern beyond causal plays a part.
        self.rows_are_documents = (
            self.padding is None and bool(options.get("allow_is_causal_skip")) and not chunked
        )

    def contiguous(self) -> BatchLayout:
        return self

    @property
    def has_padding(self) -> bool:
        """Whether there is any: a mask of ones is none, though trainers pass it all the same."""
        return self.padding is not None and (self.runs is None or self.runs.rows is not None)

    @cached_property
    def mask(self) -> Tensor | None:
        """bool [B, 1, L, L] as torch's attention takes it; None where its is_causal says the same."""
        mask: Tensor | None = sdpa_mask(**self._options)
        return mask

    @cached_property
    def runs(self) -> Runs | None:
        """The documents, or None where the batch is not made of causal runs."""
        batch, length = self.size
        if self.rows_are_documents:
            return _runs([length] * batch, None, self._options["device"])
        if self._options.get("use_vmap"):
            return None
        if self.padding is not None and self.padding.shape != self.size:
            return None
        return self._read()

    def runs_with(self, positions: Tensor) -> Runs | None:
        """The same, for position_ids [1 or B, L] that transformers has not looked at."""
        if (
            not self.rows_are_documents
            or positions.shape[-1] != self.size[1]
            or positions.ndim != 2
        ):
            return self.runs
        if self._restarts is None:
            follows = torch.zeros(self.size, dtype=torch.bool)
            follows[:, 1:] = (positions.diff() == 1).cpu()
            lengths = _lengths(~follows.flatten(), follows.numel())
            self._restarts = _runs(lengths, None, self._options["device"])
        return self._restarts

    def _read(self) -> Runs | None:
        sees: Callable[..., Tensor] = self._options["mask_function"]
        device = self._options["device"]
        batch, length = self.size
        row = torch.arange(batch, device=device)[:, None]
        head = torch.zeros_like(row)
        here = torch.arange(length, device=device)[None]
        behind = sees(row, head, here, (here - 1).clamp_min(0)).expand(self.size)
        ahead = sees(row, head, here, (here + 1).clamp_max(length - 1)).expand(self.size)
        valid = torch.ones_like(behind) if self.padding is None else self.padding.bool()
        behind, ahead, valid = torch.stack([behind, ahead, valid]).cpu()  # the one synchronisation
        if (ahead[:, :-1] & valid[:, :-1] & valid[:, 1:]).any():
            return None
        after_padding = valid.clone()
        after_padding[:, 1:] &= ~valid[:, :-1]
        if (after_padding.sum(1) > 1).any():
            return None
        lengths = _lengths((after_padding | ~behind)[valid], int(valid.sum()))
        rows = None if valid.all() else valid.flatten().nonzero().flatten()
        return _runs(lengths, rows, device)


def _lengths(starts: Tensor, total: int) -> list[int]:
    """Document lengths from bool[T], True where one begins."""
    places = [*starts.nonzero().flatten().tolist(), total]
    return [end - start for start, end in zip(places, places[1:], strict=False)]


def _runs(lengths: list[int], rows: Tensor | None, device: torch.device | str) -> Runs:
    ends = torch.tensor([0, *lengths]).cumsum(0).int().to(device, non_blocking=True)
    if rows is not None:
        rows = rows.to(device, non_blocking=True)
    return Runs(Documents(ends, max(lengths, default=0), lengths), rows)


def batch_layout(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    **more: Any,
) -> BatchLayout | Tensor | None:
    """The mask function registered for our attention: a BatchLayout, or torch's mask where a cache is.

    With keys from a cache, queries are fewer than keys; then the mask is what transformers makes for
    torch's own attention, which also runs it.
    """
    made = more.get("attention_mask")
    if isinstance(made, BatchLayout):
        return made
    options = {
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        **more,
    }
    offsets = (q_offset, kv_offset)
    from_zero = all(isinstance(offset, int) and offset == 0 for offset in offsets)
    if from_zero and 1 < q_length == kv_length:
        return BatchLayout((batch_size, q_length), options)
    mask: Tensor | None = sdpa_mask(**options)
    return mask

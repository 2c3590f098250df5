"""Cross entropy: in place as the fast engine uses it, as a public op, and behind an output head.

A mean is one number, whose error in torch may happen to be nothing, so gradients and losses of
rows are what is compared. Liger overwrites the logits it is given, as `cross_entropy_` does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from fastsft_kernels import cross_entropy, limits, linear_cross_entropy, reference
from fastsft_kernels.fused import cross_entropy_
from fastsft_kernels.limits import Work
from torch import Tensor

from bench.kernels.case import Case

LLAMA, GPT2, GEMMA = 128256, 50257, 256000
IGNORED = -100


def cases() -> list[Case]:
    return [
        _in_place(8192, LLAMA),
        _in_place(8192, GPT2),
        _in_place(4096, GEMMA, softcap=30.0),
        _public(8192, LLAMA, backward=False),
        _public(8192, LLAMA, backward=True),
        _head(4096, 4096, LLAMA),
        _head(4096, 4096, LLAMA, train_head=True),
        _head(4096, 4096, LLAMA, tokens=16384),
        _evaluated(4096, 4096, LLAMA),
    ]


# --- of logits --------------------------------------------------------------------------------------


def _in_place(rows: int, vocabulary: int, softcap: float | None = None) -> Case:
    return Case(
        op="cross_entropy_",
        label=f"{rows}x{vocabulary}" + (f" softcap {softcap:g}" if softcap else ""),
        record=partial(_logits, rows, vocabulary),
        small=partial(_logits, 11, 5000 + vocabulary % 2),
        run=partial(_overwritten, cross_entropy_, softcap),
        oracle=partial(_overwritten, reference.cross_entropy_, softcap),
        work=_logits_work,
        peers=_peers_of_logits(backward=True, softcap=softcap),
    )


def _public(rows: int, vocabulary: int, *, backward: bool) -> Case:
    return Case(
        op="cross_entropy",
        label=f"{'forward + backward' if backward else 'forward'} {rows}x{vocabulary}",
        record=partial(_logits, rows, vocabulary),
        small=partial(_logits, 11, 5001),
        run=partial(_kept, cross_entropy, backward),
        oracle=partial(_kept, _composed, backward),
        work=partial(_public_work, backward),
        peers=_peers_of_logits(backward=backward),
    )


def _logits(
    rows: int, vocabulary: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Logits, and labels of which one row in the first eight has none."""
    logits = torch.randn(rows, vocabulary, device=device, dtype=dtype)
    labels = torch.randint(0, vocabulary, (rows,), device=device)
    labels[:1] = IGNORED
    return logits, labels


def _overwritten(
    op: Callable[..., Any], softcap: float | None, logits: Tensor, labels: Tensor
) -> tuple[Tensor, ...]:
    losses = op(logits, labels, softcap=softcap)
    return losses.loss, losses.correct, losses.entropy, logits


def _kept(
    op: Callable[..., Tensor], backward: bool, logits: Tensor, labels: Tensor
) -> tuple[Tensor, ...]:
    """The gradient of a sum, or the losses of rows without one."""
    if not backward:
        return (op(logits, labels, reduction="none"),)
    x = logits.detach().requires_grad_()
    return torch.autograd.grad(op(x, labels, reduction="sum"), [x])


def _composed(logits: Tensor, labels: Tensor, *, reduction: str) -> Tensor:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide, labels, reduction=reduction, ignore_index=IGNORED)


def _logits_work(logits: Tensor, labels: Tensor) -> Work:
    return limits.cross_entropy(*logits.shape, logits.element_size())


def _public_work(backward: bool, logits: Tensor, labels: Tensor) -> Work:
    """Logits that must stay are read in forward, read again and their gradient written in backward."""
    read = logits.numel() * logits.element_size()
    return Work(_logits_work(logits, labels).bytes + read if backward else read)


def _peers_of_logits(
    *, backward: bool, softcap: float | None = None
) -> Mapping[str, Callable[..., Callable[[], Any]]]:
    def torch_(logits: Tensor, labels: Tensor) -> Callable[[], Any]:
        return _timed(partial(_capped_loss, softcap), backward, logits, labels)

    def compiled(logits: Tensor, labels: Tensor) -> Callable[[], Any]:
        loss = torch.compile(partial(_capped_loss, softcap), dynamic=False)
        return _timed(loss, backward, logits, labels)

    def liger(logits: Tensor, labels: Tensor) -> Callable[[], Any]:
        from liger_kernel.transformers.functional import liger_cross_entropy

        loss = partial(liger_cross_entropy, softcap=softcap)
        return _timed(loss, backward, logits, labels)

    return {"torch": torch_, "torch.compile": compiled, "Liger": liger}


def _capped_loss(softcap: float | None, logits: Tensor, labels: Tensor) -> Tensor:
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, labels)


def _timed(
    loss: Callable[..., Tensor], backward: bool, logits: Tensor, labels: Tensor
) -> Callable[[], Any]:
    if not backward:

        def forward() -> Tensor:
            with torch.no_grad():
                return loss(logits, labels)

        return forward
    x = logits.detach().requires_grad_()
    return lambda: torch.autograd.grad(loss(x, labels), [x])


# --- behind a head ----------------------------------------------------------------------------------


def _head(
    rows: int, hidden: int, vocabulary: int, *, tokens: int = 0, train_head: bool = False
) -> Case:
    what = "trained head" if train_head else "frozen head"
    label = f"{what} {rows}x{hidden}x{vocabulary}" + (f" of {tokens} tokens" if tokens else "")
    return Case(
        op="linear_cross_entropy",
        label=label,
        record=partial(_hidden, tokens or rows, rows, hidden, vocabulary),
        small=partial(_hidden, 37, 29, 72, 301),
        run=partial(_through_head, linear_cross_entropy, train_head),
        oracle=partial(_through_head, _composed_head, train_head),
        work=partial(_head_work, train_head),
        peers={
            "torch": partial(_peer_head, _composed_head, train_head),
            "Liger": partial(_liger_head, train_head),
            "CCE": partial(_cut_head, train_head),
        },
    )


def _evaluated(rows: int, hidden: int, vocabulary: int) -> Case:
    return Case(
        op="linear_cross_entropy",
        label=f"evaluation {rows}x{hidden}x{vocabulary}",
        record=partial(_hidden, rows, rows, hidden, vocabulary),
        small=partial(_hidden, 37, 29, 72, 301),
        run=partial(_losses, linear_cross_entropy),
        oracle=partial(_losses, _composed_head),
        work=_evaluation_work,
    )


def _hidden(
    tokens: int,
    trained: int,
    hidden: int,
    vocabulary: int,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """Hidden states, the head, labels, and which rows are trained: spread over all of them."""
    x = torch.randn(tokens, hidden, device=device, dtype=dtype)
    weight = torch.randn(vocabulary, hidden, device=device, dtype=dtype) / hidden**0.5
    rows = torch.arange(trained, device=device) * tokens // trained
    labels = torch.full((tokens,), IGNORED, device=device)
    labels[rows] = torch.randint(0, vocabulary, (trained,), device=device)
    return x, weight, labels, rows


def _through_head(
    op: Callable[..., Tensor],
    train_head: bool,
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    rows: Tensor,
) -> tuple[Tensor, ...]:
    """The gradients of a sum of losses."""
    leaves = [x.detach().requires_grad_(), weight.detach().requires_grad_(train_head)]
    loss = op(*leaves, labels, reduction="sum", rows=rows)
    return torch.autograd.grad(loss, leaves[: 1 + train_head])


def _losses(
    op: Callable[..., Tensor], x: Tensor, weight: Tensor, labels: Tensor, rows: Tensor
) -> tuple[Tensor]:
    with torch.no_grad():
        return (op(x, weight, labels, reduction="none", rows=rows),)


def _composed_head(
    x: Tensor, weight: Tensor, labels: Tensor, *, reduction: str, rows: Tensor | None = None
) -> Tensor:
    return _composed(F.linear(x, weight), labels, reduction=reduction)


def _head_work(train_head: bool, x: Tensor, weight: Tensor, labels: Tensor, rows: Tensor) -> Work:
    size = (rows.numel(), x.shape[1], weight.shape[0], x.element_size())
    return limits.linear_cross_entropy(*size, train_head=train_head)


def _evaluation_work(x: Tensor, weight: Tensor, labels: Tensor, rows: Tensor) -> Work:
    """One product; between it and the end every logit is written and read."""
    products = 2 * rows.numel() * weight.numel()
    logits = rows.numel() * weight.shape[0] * x.element_size()
    return Work((x.numel() + weight.numel()) * x.element_size(), products, logits)


def _peer_head(
    loss: Callable[..., Tensor],
    train_head: bool,
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    rows: Tensor,
) -> Callable[[], Any]:
    leaves = [x.detach().requires_grad_(), weight.detach().requires_grad_(train_head)]
    wanted = leaves[: 1 + train_head]
    return lambda: torch.autograd.grad(loss(*leaves, labels, reduction="mean"), wanted)


def _liger_head(train_head: bool, *inputs: Tensor) -> Callable[[], Any]:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return _peer_head(liger_fused_linear_cross_entropy, train_head, *inputs)


def _cut_head(train_head: bool, *inputs: Tensor) -> Callable[[], Any]:
    from cut_cross_entropy import linear_cross_entropy as cut

    return _peer_head(partial(cut, impl="cce"), train_head, *inputs)

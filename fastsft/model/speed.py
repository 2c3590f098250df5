"""How long a step of the fast engine takes, from sizes and a card's rates: a model, not a measurement.

    seconds of an op = max(bytes / bandwidth, operations / rate) + the gap behind its launch

Bytes and operations of each op are those of `fastsft_kernels.limits`; which ops a block runs, and which
of them again in backward, is what block.py does under each policy. No card reaches its rates; how far
below them each kind of op stays is assumed in `Shares`, in the open: whoever prints a prediction prints
them too.

A copy to the host or back runs beside the products; a layer takes as long as the slower of the two.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from fastsft_kernels import limits
from fastsft_kernels.cards import DATASHEET, Rates
from fastsft_kernels.limits import Work

from fastsft.model.job import Group, Job
from fastsft.model.memory import chunk_rows
from fastsft.model.plan import Plan


class Shares(NamedTuple):
    """What kinds of ops are taken to reach of a card's rates, and seconds lost at each launch.

    The attention's two are shares of the rate of products.
    """

    products: float
    bandwidth: float
    attention_forward: float
    attention_backward: float
    gap: float = 4e-6

    def said(self) -> str:
        return (
            f"products at {self.products:.0%} of the card's rate, attention at {self.attention_forward:.0%} "
            f"forward and {self.attention_backward:.0%} backward, other kernels at {self.bandwidth:.0%} of "
            f"the bandwidth, {self.gap * 1e6:.0f} us between kernels"
        )


# Of a rate measured in a burst a long run keeps less; of a datasheet's, no product ever saw all.
OF_MEASURED = Shares(0.90, 0.85, 0.55, 0.38)
OF_DATASHEET = Shares(0.75, 0.80, 0.45, 0.30)


def shares(rates: Rates) -> Shares:
    return OF_DATASHEET if rates.source == DATASHEET else OF_MEASURED


class Load(NamedTuple):
    """The rows of a micro-batch: lengths of its documents, how many tokens are trained."""

    lengths: tuple[int, ...]
    trained: int

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


def packed(tokens: int, document: int, trained_share: float = 1.0) -> Load:
    """As many whole documents of one length as fit, at least one."""
    lengths = (document,) * max(1, tokens // document)
    return Load(lengths, max(1, round(sum(lengths) * trained_share)))


@dataclass(frozen=True)
class Speed:
    """Seconds of a micro-batch, by what they go to; `tokens` it held."""

    tokens: int
    layers: float
    head: float
    update: float

    @property
    def seconds(self) -> float:
        return self.layers + self.head + self.update

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def predict_speed(job: Job, plan: Plan, rates: Rates, load: Load) -> Speed:
    """One micro-batch and one update of what trains."""
    layers = sum(
        _layer_seconds(job, rates, load, i, policy, i < plan.resident, plan.mlp_rows)
        for i, policy in enumerate(plan.policies)
    )
    head = _head_seconds(job, plan, rates, load)
    s, numbers = job.spec, job.adapter_numbers
    numbers += len(job.whole) * job.embedding_numbers
    # Gradients, masters and moments read, masters and moments written; the embedding's rows.
    update = (9 * 4 * numbers + 2 * load.tokens * s.hidden * job.size) / rates.bandwidth
    return Speed(load.tokens, layers, head, update)


# --- the ops of a block -----------------------------------------------------------------------------

UNFUSED = 36  # bytes a logit moves in torch's own operations, in each of two passes
PRODUCT, MEMORY, FORWARD, BACKWARD = "product", "memory", "attention forward", "attention backward"
Op = tuple[str, Work]


def _time(ops: Iterator[Op], rates: Rates) -> float:
    reached = shares(rates)
    of = {
        PRODUCT: reached.products,
        MEMORY: reached.products,
        FORWARD: reached.attention_forward,
        BACKWARD: reached.attention_backward,
    }
    total = 0.0
    for kind, work in ops:
        moved = (work.bytes + work.unhidden) / (rates.bandwidth * reached.bandwidth)
        total += max(moved, work.flops / (rates.flops * of[kind])) + reached.gap
    return total


@lru_cache(maxsize=1 << 14)
def _layer_seconds(
    job: Job,
    rates: Rates,
    load: Load,
    index: int,
    policy: str,
    resident: bool,
    mlp_rows: int | None,
) -> float:
    """Forward and backward of one layer under a policy."""
    twin = _twin(job, load, index)
    if twin != index:
        return _layer_seconds(job, rates, load, twin, policy, resident, mlp_rows)
    last = index == job.spec.layers - 1
    block = _BlockOps(job, load, index, load.trained if last else load.tokens, resident)
    forward = _time(block.forward(), rates)
    backward = _time(block.backward(), rates)
    if policy == "recompute_mlp":
        backward += _time(block.gate_up_again(), rates)
    elif policy != "keep":
        backward += _time(block.forward(to_output=False), rates)
    if mlp_rows is not None:
        tiles = -(-block.rows // mlp_rows)
        backward += (tiles - 1) * 24 * shares(rates).gap  # launches of a tile
    if policy == "offload":
        copy = load.tokens * job.spec.hidden * job.size / rates.pcie
        return max(forward, copy) + max(backward, copy)
    return forward + backward


def _twin(job: Job, load: Load, index: int) -> int:
    """The first layer that does the same work, so that 32 equal layers are counted once."""
    return _twins(job)[index]


@lru_cache(maxsize=64)
def _twins(job: Job) -> tuple[int, ...]:
    seen: dict[object, int] = {}
    last = job.spec.layers - 1
    return tuple(
        seen.setdefault((layer, job.spec.windows[i], i == last), i)
        for i, layer in enumerate(job.layers)
    )


class _BlockOps:
    """The ops of a block's passes; `rows` go through everything behind the attention."""

    def __init__(self, job: Job, load: Load, index: int, rows: int, resident: bool) -> None:
        self.job, self.load, self.rows, self.resident = job, load, rows, resident
        self.layer, self.window = job.layers[index], job.spec.windows[index]
        self.tokens, self.size = load.tokens, job.size

    def forward(self, *, to_output: bool = True) -> Iterator[Op]:
        """`to_output`: down's product too, which backward never needs again."""
        s, layer, size = self.job.spec, self.layer, self.size
        yield self._norm(self.tokens)
        yield from self._product(layer.qkv, self.tokens)
        if s.qk_norm:
            width = (s.heads + s.kv_heads) * s.head_dim
            yield MEMORY, limits.rms_norm_forward(self.tokens, 2 * width, size)
        yield MEMORY, limits.rope(self.tokens, s.heads + s.kv_heads, s.head_dim, size)
        yield (
            FORWARD,
            limits.attention_forward(
                self.load.lengths, s.heads, s.kv_heads, s.head_dim, size, window=self.window
            ),
        )
        yield from self._product(layer.o, self.rows)
        yield self._norm(self.rows)
        yield from self._product(layer.gate_up, self.rows)
        yield MEMORY, limits.glu_forward(self.rows, s.ffn, size)
        if to_output:
            yield from self._product(layer.down, self.rows)
        for _ in range(0 if s.norms == "pre" else 2):
            yield self._norm(self.rows)

    def gate_up_again(self) -> Iterator[Op]:
        yield self._norm(self.rows)
        yield from self._product(self.layer.gate_up, self.rows, tails=False)

    def backward(self) -> Iterator[Op]:
        s, layer, size = self.job.spec, self.layer, self.size
        yield from self._product_backward(layer.down, self.rows, a_elsewhere=True)
        rank = layer.down.tail
        yield MEMORY, limits.glu_backward(self.rows, s.ffn, size, rank=rank)
        yield from self._product_backward(layer.gate_up, self.rows, b_elsewhere=True)
        yield self._norm_backward(self.rows, layer.gate_up)
        yield from self._product_backward(layer.o, self.rows)
        yield (
            MEMORY,
            limits.attention_delta(self.tokens, s.heads, s.head_dim, size, rank=layer.o.tail),
        )
        yield (
            BACKWARD,
            limits.attention_backward(
                self.load.lengths, s.heads, s.kv_heads, s.head_dim, size, window=self.window
            ),
        )
        yield MEMORY, limits.rope(self.tokens, s.heads + s.kv_heads, s.head_dim, size)
        if s.qk_norm:
            width = (s.heads + s.kv_heads) * s.head_dim
            yield MEMORY, limits.rms_norm_backward(self.tokens, 2 * width, size)
        yield from self._product_backward(layer.qkv, self.tokens)
        yield self._norm_backward(self.tokens, layer.qkv)
        for _ in range(0 if s.norms == "pre" else 2):
            yield self._norm_backward(self.rows, None)

    def _norm(self, rows: int) -> Op:
        return MEMORY, limits.rms_norm_forward(rows, self.job.spec.hidden, self.size, residual=True)

    def _norm_backward(self, rows: int, group: Group | None) -> Op:
        rank = group.tail if group is not None else 0
        hidden = self.job.spec.hidden
        return MEMORY, limits.rms_norm_backward(rows, hidden, self.size, residual=True, rank=rank)

    def _product(self, group: Group, rows: int, *, tails: bool = True) -> Iterator[Op]:
        if group.tail and tails:
            yield MEMORY, limits.tails(rows, group.k, group.tail, self.size)
        yield from self._weight(group)
        yield self._gemm(group, rows)

    def _product_backward(
        self, group: Group, rows: int, *, a_elsewhere: bool = False, b_elsewhere: bool = False
    ) -> Iterator[Op]:
        yield from self._weight(group)
        yield self._gemm(group, rows)
        if self.job.method == "full":
            yield self._gemm(group, rows)  # the weight's gradient
        if group.tail and not a_elsewhere:
            yield MEMORY, limits.skinny_dA(rows, group.k, group.tail, self.size)
        if group.tail and not b_elsewhere:
            yield MEMORY, limits.skinny_dB(rows, group.n, group.tail, self.size)

    def _weight(self, group: Group) -> Iterator[Op]:
        if self.job.quantised and not self.resident:
            yield MEMORY, limits.nf4_dequantize(group.n, group.pitch, self.size)

    def _gemm(self, group: Group, rows: int) -> Op:
        numbers = rows * (group.pitch + group.n) + group.n * group.pitch
        return PRODUCT, Work(numbers * self.size, 2 * rows * group.n * group.pitch)


def _head_seconds(job: Job, plan: Plan, rates: Rates, load: Load) -> float:
    s, n = job.spec, load.trained
    if plan.host_head:
        return _streamed_head_seconds(job, rates, n)
    trains = "head" in job.whole
    work = limits.linear_cross_entropy(n, s.hidden, s.vocabulary, job.size, train_head=trains)
    pieces = -(-n // chunk_rows(s.vocabulary, n, plan.head_rows))
    table = job.embedding_numbers * job.size
    work = work._replace(bytes=work.bytes + 2 * (pieces - 1) * table)  # each piece reads the head
    return _time(iter([(PRODUCT, work)]), rates) + 3 * pieces * shares(rates).gap


def _streamed_head_seconds(job: Job, rates: Rates, n: int) -> float:
    """host_weights.py: three products, plain torch between them, and the head over the bus twice."""
    s = job.spec
    logits = n * s.vocabulary
    between = Work((2 * UNFUSED + job.size) * logits)
    products = Work(0, 3 * 2 * logits * s.hidden)
    copies = 2 * job.embedding_numbers * job.size / rates.pcie
    return max(_time(iter([(PRODUCT, products), (MEMORY, between)]), rates), copies)

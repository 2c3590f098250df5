"""The least an op can cost: bytes moved, operations done. One place, for benchmarks and the planner.

Counted are each input read once and each output written once at the size given, and the operations
of matrix products (a multiply and an add are two). Elementwise arithmetic is not counted: on every
card the kernels serve it hides behind the bytes. Nor are scratch buffers, second reads or
recomputation: what an implementation spends on those is its own loss, and shows as such.

    time >= max(bytes / bandwidth, flops / rate) + unhidden / bandwidth

`unhidden` are bytes that must move while no product runs: between the two products of the linear
cross entropy every logit is read and rewritten, and no product of a LoRA linear can start before
x Aᵀ has read x. (A kernel that did all of it in one would have to be as fast at products as cuBLAS;
none is known.) For everything else it is 0.

`itemsize` is of activations and weights in bytes; what is float32 whatever the activations are
(rstd, sums of squares, gradients of adapters) is counted as 4.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

# Stored per weight: half a byte, one byte of scale per 64 and one float32 per 256 of those.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)


class Work(NamedTuple):
    """Bytes that move, operations of matrix products, and bytes that move between the products."""

    bytes: int
    flops: int = 0
    unhidden: int = 0


def rms_norm_forward(T: int, H: int, itemsize: int, residual: bool = False) -> Work:
    """Reads x and writes y; with a residual reads that too and writes the sum."""
    return Work((4 if residual else 2) * T * H * itemsize + H * itemsize + 4 * T)


def rms_norm_backward(T: int, H: int, itemsize: int, residual: bool = False, rank: int = 0) -> Work:
    """Reads dy and x, writes dx; reads a residual's gradient, and d [T, rank], a [rank, H].

    The weight's gradient, where asked for, is one more row: not counted.
    """
    size = (4 if residual else 3) * T * H + H + rank * (T + H)
    return Work(size * itemsize + 4 * T, 2 * T * rank * H)


def rope(T: int, heads: int, D: int, itemsize: int) -> Work:
    """Reads and writes q and k, of `heads` heads together, and reads cos and sin [T, D/2]."""
    return Work((2 * heads + 1) * T * D * itemsize)


def glu_forward(T: int, F: int, itemsize: int) -> Work:
    """Reads gate and up, writes h."""
    return Work(3 * T * F * itemsize)


def glu_backward(T: int, F: int, itemsize: int, h_out: bool = False, rank: int = 0) -> Work:
    """Reads dh, gate, up and writes dgate, dup; h too if wanted.

    rank R: also the down projection's d [T, R] and a [R, F] in, two tails [T, R] in, and the
    float32 gradients of its a and of both b [F, R] out: one product into dh, three out of it.
    """
    size = (6 if h_out else 5) * T * F + rank * (3 * T + F)
    return Work(size * itemsize + 3 * 4 * rank * F, 4 * 2 * T * rank * F)


def cross_entropy(T: int, V: int, itemsize: int) -> Work:
    """Reads each logit once and writes its gradient in place; labels in, three numbers a row out."""
    return Work(2 * T * V * itemsize + (8 + 4 + 1 + 4) * T)


def linear_cross_entropy(
    rows: int, H: int, V: int, itemsize: int, train_head: bool = False
) -> Work:
    """Loss and gradient of `rows` trained rows: two products, three if the head trains too.

    Logits do not count as bytes of the op, since no caller sees them; reading and rewriting each
    one between the products is `unhidden`.
    """
    size = 2 * rows * H + (2 if train_head else 1) * V * H
    products = 3 if train_head else 2
    between = cross_entropy(rows, V, itemsize).bytes
    return Work(size * itemsize, products * 2 * rows * H * V, between)


def attention_pairs(lengths: Iterable[int], causal: bool = True, window: int | None = None) -> int:
    """How many (query, key) pairs one head has over documents of these lengths."""
    if not causal:
        return sum(n * n for n in lengths)
    total = 0
    for n in lengths:
        full = n if window is None else min(n, window)  # queries that see all before them
        total += full * (full + 1) // 2 + (n - full) * full
    return total


def attention_forward(
    lengths: Iterable[int],
    Hq: int,
    Hkv: int,
    D: int,
    itemsize: int,
    causal: bool = True,
    window: int | None = None,
) -> Work:
    """Reads q, k, v, writes o and the log-sum-exp; two products over the pairs that see each other."""
    lengths = list(lengths)
    T = sum(lengths)
    pairs = attention_pairs(lengths, causal, window)
    return Work(2 * T * (Hq + Hkv) * D * itemsize + 4 * T * Hq, 2 * 2 * pairs * Hq * D)


def attention_backward(
    lengths: Iterable[int],
    Hq: int,
    Hkv: int,
    D: int,
    itemsize: int,
    causal: bool = True,
    window: int | None = None,
) -> Work:
    """Reads do, q, k, v, lse, delta, writes dq, dk, dv; five products over the pairs."""
    lengths = list(lengths)
    T = sum(lengths)
    pairs = attention_pairs(lengths, causal, window)
    return Work(T * (3 * Hq + 4 * Hkv) * D * itemsize + 8 * T * Hq, 5 * 2 * pairs * Hq * D)


def attention_delta(T: int, heads: int, D: int, itemsize: int, rank: int = 0) -> Work:
    """Reads o and do, writes delta [heads, T]; with adapters also updates do in place."""
    K = heads * D
    size = (3 if rank else 2) * T * K + rank * (T + K)
    return Work(size * itemsize + 4 * T * heads, 2 * T * rank * K)


def nf4_dequantize(N: int, K: int, itemsize: int) -> Work:
    """Reads codes and both levels of scales, writes the weight [N, K]."""
    return Work(round(N * K * (NF4_BYTES + itemsize)))


def nf4_quantize(N: int, K: int, itemsize: int) -> Work:
    """Reads the weight, writes codes and both levels of scales."""
    return nf4_dequantize(N, K, itemsize)


def lora_linear_forward(M: int, K: int, N: int, R: int, itemsize: int, nf4: bool = False) -> Work:
    """The base product, x Aᵀ and its product with B; x is read once more, for x Aᵀ.

    nf4: the weight is stored so and decoded before the product.
    """
    size = M * (K + N) + N * K + R * (K + N)
    return _linear(size, 2 * M * (N * K + R * (K + N)), M * K, N, K, itemsize, nf4)


def lora_linear_backward(M: int, K: int, N: int, R: int, itemsize: int, nf4: bool = False) -> Work:
    """dx with the adapter's part, dA and dB; the weight is frozen.

    Reads dy, x, x Aᵀ, W, A, B, writes dx and both gradients at `itemsize`; x and dy are each read
    once more, for dA and dB.
    """
    size = M * (2 * K + N + R) + N * K + 2 * R * (K + N)
    return _linear(size, 2 * M * (N * K + 2 * R * (K + N)), M * (K + N), N, K, itemsize, nf4)


def _linear(size: int, flops: int, again: int, N: int, K: int, itemsize: int, nf4: bool) -> Work:
    decode = nf4_dequantize(N, K, itemsize).bytes if nf4 else 0
    return Work(size * itemsize, flops, again * itemsize + decode)


def tails(T: int, K: int, R: int, itemsize: int) -> Work:
    """Reads x and a [R, K], writes x aᵀ; R counts the columns of all strips."""
    return Work((T * K + R * K + T * R) * itemsize, 2 * T * K * R)


def skinny_dA(T: int, K: int, R: int, itemsize: int) -> Work:
    """Reads x and d [T, R], writes the float32 gradient [R, K]; R counts all strips."""
    return Work((T * K + T * R) * itemsize + 4 * R * K, 2 * T * K * R)


def skinny_dB(T: int, N: int, R: int, itemsize: int) -> Work:
    """Reads dy and the tail each segment goes with, writes the float32 gradient [N, R].

    One strip of R columns; for S segments the tail has S of them, R(S - 1) columns more to read.
    """
    return Work((T * N + T * R) * itemsize + 4 * N * R, 2 * T * N * R)


def pack_adapters(numbers: int) -> Work:
    """Reads float32 masters, writes their bf16 copies."""
    return Work((4 + 2) * numbers)

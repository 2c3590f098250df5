"""Bytes and operations of every op, and the time they take at the rates of a card."""

import inspect

import pytest
from fastsft_kernels import limits
from fastsft_kernels.cards import CARDS
from fastsft_kernels.limits import Work

from bench.limits import Rates, rates_of, seconds, share

H200 = Rates(4.3e12, 790e12, "for the test")
T, H, F, V = 8192, 4096, 14336, 128256
DOCUMENTS = [4096, 4096]


# Microseconds on an H200 worked out by hand: tensors read and written, over the bandwidth.
@pytest.mark.parametrize(
    "work,microseconds",
    [
        (limits.rms_norm_forward(T, H, 2), 31.2),
        (limits.rms_norm_forward(T, H, 2, residual=True), 62.4),
        (limits.rms_norm_backward(T, H, 2), 46.8),
        (limits.rope(T, 40, 128, 2), 39),
        (limits.glu_forward(T, F, 2), 164),
        (limits.glu_backward(T, F, 2), 273),
        (limits.cross_entropy(T, V, 2), 980),
        (limits.linear_cross_entropy(4096, H, V, 2), 11_400),
        (limits.linear_cross_entropy(4096, H, V, 2, train_head=True), 16_800),
        (limits.nf4_dequantize(F, H, 2), 34.4),
        (limits.nf4_quantize(F, H, 2), 34.4),
        (limits.tails(T, H, 16, 2), 15.7),
        (limits.skinny_dA(T, F, 16, 2), 55),
        (limits.skinny_dB(T, F, 16, 2), 55),
        (limits.pack_adapters(42_000_000), 58.6),
        (limits.attention_delta(T, 32, 128, 2), 31.4),
    ],
)
def test_limits_are_those_of_the_design(work, microseconds):
    assert seconds(work, H200) * 1e6 == pytest.approx(microseconds, rel=0.015)


def test_a_lora_linear_costs_its_base_and_a_little():
    base = 2 * T * H * F / H200.flops
    forward = seconds(limits.lora_linear_forward(T, H, F, 16, 2), H200) / base
    backward = seconds(limits.lora_linear_backward(T, H, F, 16, 2), H200) / base
    assert forward == pytest.approx(1.013, abs=0.006) and backward == pytest.approx(
        1.057, abs=0.011
    )
    stored = limits.lora_linear_forward(T, H, F, 16, 2, nf4=True)
    plain = limits.lora_linear_forward(T, H, F, 16, 2)
    decode = limits.nf4_dequantize(F, H, 2)
    assert seconds(stored, H200) - seconds(plain, H200) == pytest.approx(seconds(decode, H200))


@pytest.mark.parametrize("lengths", [[1], [7], [3, 1, 20], [64, 5]])
@pytest.mark.parametrize("window", [None, 1, 4, 100])
def test_attention_counts_pairs(lengths, window):
    seen = [
        (n, i, j)
        for n in lengths
        for i in range(n)
        for j in range(i + 1)
        if window is None or i - j < window
    ]
    assert limits.attention_pairs(lengths, True, window) == len(seen)
    assert limits.attention_pairs(lengths, False) == sum(n * n for n in lengths)


def test_attention_work():
    pairs = 2 * 4096 * 4097 // 2
    forward = limits.attention_forward(DOCUMENTS, 32, 8, 128, 2)
    assert forward.flops == 4 * pairs * 32 * 128
    assert forward.bytes == 2 * T * (2 * 32 + 2 * 8) * 128 + 4 * T * 32
    backward = limits.attention_backward(DOCUMENTS, 32, 8, 128, 2)
    assert backward.flops * 2 == forward.flops * 5
    assert limits.attention_forward([T], 32, 8, 128, 2, causal=False).flops == 4 * T * T * 32 * 128


def test_adapters_add_what_they_read_write_and_multiply():
    plain, with_them = limits.glu_backward(T, F, 2), limits.glu_backward(T, F, 2, rank=16)
    assert with_them.flops == 4 * 2 * T * 16 * F
    assert with_them.bytes - plain.bytes == 2 * 16 * (3 * T + F) + 4 * 3 * 16 * F
    assert limits.rms_norm_backward(T, H, 2, rank=48).flops == 2 * T * 48 * H
    delta, updated = (
        limits.attention_delta(T, 32, 128, 2),
        limits.attention_delta(T, 32, 128, 2, 16),
    )
    assert updated.bytes - delta.bytes == 2 * (T * H + 16 * (T + H))  # do is written


def test_no_tokens_no_work_but_weights():
    for name, function in inspect.getmembers(limits, inspect.isfunction):
        if "T" in inspect.signature(function).parameters:
            rest = [16] * (len(inspect.signature(function).parameters) - 1)
            assert function(0, *rest).flops == 0, name


def test_the_slower_of_bytes_and_operations_counts():
    rates = Rates(1e12, 1e14, "")
    assert seconds(Work(2 * 10**12, 10**14), rates) == 2
    assert seconds(Work(10**12, 3 * 10**14), rates) == 3
    assert seconds(Work(10**12, 3 * 10**14, 10**12), rates) == 4
    assert share(Work(10**12), rates, 4.0) == 0.25


def test_rates_are_measured_nominal_or_unknown():
    measured = [{"kind": "check"}, {"kind": "rates", "bandwidth": 1.0, "flops": 2.0}]
    assert rates_of("NVIDIA H200", measured) == Rates(1.0, 2.0, "measured in the same run")
    assert rates_of("NVIDIA H200", []) == CARDS["NVIDIA H200"]
    assert rates_of("some card", []) is None

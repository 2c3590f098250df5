"""The rotary kernel: q and k in one launch, out of place with gradients and in place on views."""

import pytest
import torch
from fastsft_kernels import fused, reference, rope
from fastsft_kernels import launch as gate
from kernel_checks import (  # noqa: F401
    DEVICE,
    DTYPES,
    check,
    check_gradients,
    poisoned_memory,
    randn,
)
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

# (tokens, query heads, key heads, head size, table columns): odd heads, a half that is no power of
# two, partial turns, one number, nothing turned, more heads than a tile holds
SHAPES = [
    (1, 1, 1, 8, 4),
    (7, 3, 1, 16, 8),
    (5, 9, 3, 64, 32),
    (3, 5, 5, 96, 48),
    (4, 2, 1, 20, 3),
    (2, 3, 2, 6, 0),
    (3, 70, 1, 128, 64),
    (2, 4, 2, 256, 32),
]


def tables(tokens, half, dtype=torch.float32):
    angle = randn(tokens, half, seed=7, scale=3.0)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def triton_rope(q, k, cos, sin):
    return rope(q, k, cos, sin, backend="triton")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens,hq,hk,size,half", SHAPES)
def test_turn_and_its_gradients(tokens, hq, hk, size, half, dtype):
    cos, sin = tables(tokens, half)
    q, k = (randn(tokens, h, size, seed=i, dtype=dtype) for i, h in enumerate((hq, hk)))

    def oracle(q, k):
        wide = q.dtype == torch.float64
        return reference.rope(q, k, *((t.double() if wide else t) for t in (cos, sin)))

    check_gradients(lambda q, k: triton_rope(q, k, cos, sin), oracle, [q, k], names="qk")


@pytest.mark.parametrize("candidate", range(3))
@pytest.mark.parametrize("inverse", [False, True])
def test_in_place_on_slices_of_one_buffer(candidate, inverse):
    """Nothing but q's and k's turned numbers changes, v and the pitch's tail included."""
    buffer = randn(9, 3 * 32 + 2 * 32 + 11).half()
    before, (cos, sin) = buffer.clone(), tables(9, 12, torch.bfloat16)
    q = buffer[:, :96].view(9, 3, 32)
    k = buffer[:, 96:128].view(9, 1, 32)
    old = before[:, :96].view(9, 3, 32), before[:, 96:128].view(9, 1, 32)
    with gate.forced(rope=candidate):
        assert fused.rope_(q, k, cos, sin, inverse=inverse, backend="triton") is None
    wide = [t.double() for t in (*old, cos, -sin if inverse else sin)]
    for got, exact, plain in zip(
        (q, k),
        reference.rope(*wide),
        reference.rope(*old, cos, -sin if inverse else sin),
        strict=True,
    ):
        check(got, exact, plain)
        assert torch.equal(got[..., 24:], plain[..., 24:])
    assert torch.equal(buffer[:, 128:], before[:, 128:])


def test_in_place_reference_is_the_other_way_round():
    q, k, (cos, sin) = randn(5, 2, 8), randn(5, 1, 8, seed=1), tables(5, 3)
    new = [x.double().clone() for x in (q, k)]
    wide = [t.double() for t in (cos, sin)]
    fused.rope_(*new, *wide)
    for got, want in zip(new, reference.rope(q.double(), k.double(), *wide), strict=True):
        assert torch.equal(got, want)
    fused.rope_(*new, *wide, inverse=True)
    for got, want in zip(new, (q, k), strict=True):
        norm = wide[0].square() + wide[1].square()  # 1 up to the tables' rounding
        turned = torch.cat([norm, norm, torch.ones_like(norm[:, :2])], -1)[:, None]
        torch.testing.assert_close(got, want.double() * turned, rtol=1e-12, atol=1e-12)


def test_strides_of_every_kind():
    """Heads before tokens, tables with gaps, a head that is not contiguous, an expanded gradient."""
    q, k = randn(3, 6, 16).transpose(0, 1), randn(6, 2, 32, seed=1)[..., ::2]
    wide = torch.cat([t for t in tables(6, 8)], -1)
    cos, sin = wide[:, :8], wide[:, 8:]
    leaves = [q.detach().requires_grad_(), k.detach().requires_grad_()]
    outputs = triton_rope(*leaves, cos, sin)
    want = reference.rope(q.double(), k.double(), cos.double(), sin.double())
    for got, exact, plain in zip(outputs, want, reference.rope(q, k, cos, sin), strict=True):
        assert got.is_contiguous()
        check(got.detach(), exact, plain)
    (outputs[0].sum() + outputs[1].sum()).backward()
    ones = [torch.ones_like(x) for x in outputs]
    for leaf, back in zip(leaves, reference.rope(*ones, cos, -sin), strict=True):
        torch.testing.assert_close(leaf.grad, back)
    odd = torch.stack([cos, sin], -1)
    again = triton_rope(q, k, odd[..., 0], odd[..., 1])
    assert all(torch.equal(a, b) for a, b in zip(again, outputs, strict=True))


def test_against_transformers():
    q, k, (cos, sin) = randn(6, 4, 16), randn(6, 2, 16, seed=1), tables(6, 8)
    whole = [torch.cat([t, t], -1)[None] for t in (cos, sin)]
    theirs = apply_rotary_pos_emb(*(x[None].transpose(1, 2) for x in (q, k)), *whole)
    for got, want in zip(triton_rope(q, k, cos, sin), theirs, strict=True):
        torch.testing.assert_close(got, want[0].transpose(0, 1), rtol=2e-6, atol=2e-6)


def test_no_tokens_and_no_heads():
    empty, table = randn(0, 2, 8), randn(0, 4)
    assert [x.shape for x in triton_rope(empty, empty, table, table)] == [(0, 2, 8)] * 2
    fused.rope_(empty, empty, table, table, backend="triton")
    q, (cos, sin) = randn(3, 2, 8), tables(3, 4)
    turned, none = triton_rope(q, q[:, :0], cos, sin)
    assert none.shape == (3, 0, 8)
    torch.testing.assert_close(turned, reference.rope(q, q, cos, sin)[0])


def test_one_launch():
    with gate.record_launches(90, 132) as recording:
        q, k = (torch.empty(8192, h, 128, dtype=torch.bfloat16, device="meta") for h in (32, 8))
        table = torch.empty(8192, 64, device="meta")
        fused.rope_(q, k, table, table)
    (only,) = recording.launches
    assert only.grid == (8192,)


@pytest.mark.skipif(
    DEVICE == "cuda", reason="4 GiB of address space, of which three pages are used"
)
def test_offsets_beyond_31_bits():
    """Token 2, or head 2, lies 2^31 numbers behind the first: only touched pages are ever there."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    buffer, (cos, sin) = torch.empty(2**31 + 64, dtype=torch.float16), tables(3, 4)
    by_token = buffer.as_strided((3, 3, 8), (2**30, 16, 1))
    by_head = buffer.as_strided((3, 3, 8), (16, 2**30, 1))
    for x in (by_token, by_head):
        old = randn(3, 3, 8, dtype=torch.float16)
        x.copy_(old)
        fused.rope_(x, x[:, :0], cos, sin, backend="triton")
        torch.testing.assert_close(x, reference.rope(old, old, cos, sin)[0])


def test_bad_arguments():
    q, table = randn(4, 2, 16)[..., ::2], randn(4, 4)
    with pytest.raises(ValueError, match=r"rope_: .* of q must lie side by side.*; got strides"):
        fused.rope_(q, q, table, table)
    with pytest.raises(
        ValueError, match="rope_: the tables turn more than a head's 8 numbers; got"
    ):
        fused.rope_(q, q, randn(4, 5), randn(4, 5))

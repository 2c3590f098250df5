"""A run as sizes: what the planner knows of it before any weight is read.

    spec (config.json) + method, adapters, optimizer, dtype  ->  Job  ->  memory.py, speed.py

`Group` repeats the arithmetic of projection.py's layout (strips, pitch) on numbers alone. A test holds
the two together, on every family.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property

from fastsft_kernels.limits import NF4_BYTES

from fastsft.errors import UserError
from fastsft.model.spec import DecoderSpec
from fastsft.model.targets import ALL_LINEAR, ends_with, matches

# Masters and gradients in float32, and what the optimizer holds of a trained number.
MOMENT_BYTES = {"adamw": 8.0, "adamw_8bit": 2 + 8 / 256, "paged_adamw_8bit": 2 + 8 / 256}


def round_up(n: int, to: int) -> int:
    return -(-n // to) * to


@dataclass(frozen=True)
class Group:
    """Linear layers on one input: [N_i, K] each, with an adapter of rank r_i (0: none)."""

    rows: tuple[int, ...]
    k: int
    ranks: tuple[int, ...]

    @property
    def n(self) -> int:
        return sum(self.rows)

    @property
    def r(self) -> int:
        """Width of a strip."""
        return round_up(max(self.ranks), 16)

    @property
    def tail(self) -> int:
        return len(self.rows) * self.r

    @property
    def pitch(self) -> int:
        return round_up(self.k + self.tail, 64) if self.tail else self.k

    @property
    def master_numbers(self) -> int:
        """Numbers in the flat buffers: A in whole strips, B as it is."""
        pairs = zip(self.rows, self.ranks, strict=True)
        return self.tail * self.k + sum(n * r for n, r in pairs)

    @property
    def trained(self) -> int:
        return sum(r * (self.k + n) for n, r in zip(self.rows, self.ranks, strict=True))


@dataclass(frozen=True)
class Layer:
    """The four products of a decoder layer."""

    qkv: Group
    o: Group
    gate_up: Group
    down: Group

    @property
    def groups(self) -> tuple[Group, ...]:
        return self.qkv, self.o, self.gate_up, self.down


@dataclass(frozen=True, eq=False)
class Job:
    """One run of the fast engine.

    ranks: name of a linear layer -> rank of its adapter. size: bytes of an activation. whole: which of
    embedding and head train (modules_to_save, or all weights); token_rows: how many rows of new tokens
    do. fp32_masters, update_in_backward: of `method: full`.
    """

    spec: DecoderSpec
    method: str
    ranks: Mapping[str, int]
    optimizer: str = "adamw"
    size: int = 2
    whole: frozenset[str] = frozenset()
    token_rows: int = 0
    fp32_masters: bool = True
    update_in_backward: bool = False

    @property
    def quantised(self) -> bool:
        return self.method == "qlora"

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        return tuple(self._layer(i) for i in range(self.spec.layers))

    def _layer(self, index: int) -> Layer:
        s = self.spec
        groups = [
            Group(rows, k, tuple(self.ranks.get(f"{prefix(index)}.{n}", 0) for n in names))
            for names, rows, k in _groups(s)
        ]
        return Layer(*groups)

    @cached_property
    def linear_weights(self) -> int:
        return sum(g.n * g.k for layer in self.layers for g in layer.groups)

    @cached_property
    def adapter_numbers(self) -> int:
        return sum(g.trained for layer in self.layers for g in layer.groups)

    @property
    def embedding_numbers(self) -> int:
        return self.spec.vocabulary * self.spec.hidden

    def weight_bytes(self, group: Group) -> int:
        """A group's base weights as they are stored."""
        if self.quantised:
            return round(group.n * group.k * NF4_BYTES)
        return group.n * group.pitch * self.size


def prefix(layer: int) -> str:
    return f"model.layers.{layer}"


def _groups(s: DecoderSpec) -> list[tuple[tuple[str, ...], tuple[int, ...], int]]:
    """(names, rows, K) of the products of a layer."""
    q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
    first: tuple[tuple[str, ...], tuple[int, ...], int]
    third: tuple[tuple[str, ...], tuple[int, ...], int]
    if s.fused_weights:
        first = (("self_attn.qkv_proj",), (q + 2 * kv,), s.hidden)
        third = (("mlp.gate_up_proj",), (2 * s.ffn,), s.hidden)
    else:
        names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        first = (names, (q, kv, kv), s.hidden)
        third = (("mlp.gate_proj", "mlp.up_proj"), (s.ffn, s.ffn), s.hidden)
    return [
        first,
        (("self_attn.o_proj",), (s.hidden,), q),
        third,
        (("mlp.down_proj",), (s.hidden,), s.ffn),
    ]


def linear_names(spec: DecoderSpec) -> list[str]:
    """Every linear layer inside the decoder layers, as the model calls it."""
    return [
        f"{prefix(i)}.{name}"
        for i in range(spec.layers)
        for names, _, _ in _groups(spec)
        for name in names
    ]


def ranks_of(
    spec: DecoderSpec, target: str | Collection[str], r: int, *, kept_whole: Collection[str] = ()
) -> dict[str, int]:
    """The adapters that `lora.target_modules` means, without a model; PEFT's rules, as in targets.py."""
    names = linear_names(spec)
    every = isinstance(target, str) and target.lower() == ALL_LINEAR
    hits = [n for n in names if every or matches(n, target)]
    found = [n for n in hits if not any(ends_with(n, [w]) for w in kept_whole)]
    if not found:
        known = ", ".join(dict.fromkeys(n.rsplit(".", 1)[-1] for n in names))
        raise UserError(
            f"lora.target_modules: {target!r} matches no linear layer; linear layers here: {known}"
        )
    return dict.fromkeys(found, r)

"""What a run does with its memory: the one object that the planner makes and the engine obeys.

Every choice here is exact: whatever the plan, the gradient is the same (bit for bit for the policies,
in the last digits where tiles and chunks change the order of sums).
"""

from __future__ import annotations

from dataclasses import dataclass

# Dearest in memory first; each keeps less for backward than the one before, and takes longer.
POLICIES = ("keep", "recompute_mlp", "recompute_block", "offload")


@dataclass(frozen=True)
class Plan:
    """How the fast engine spends memory.

    policies        per layer, what stays for backward: keep (all it needs), recompute_mlp (all but gate
                    and up), recompute_block (the layer's input), offload (the input, in pinned host
                    memory, fetched one layer ahead)
    mlp_rows        rows of a micro-batch that an MLP takes at a time; None: all at once
    head_rows       trained rows that are turned into logits at a time; None: as the kernel likes
    resident        leading layers whose NF4 weights stay decoded
    host_embedding  the embedding lies in host memory; a micro-batch brings its rows along
    host_head       the head lies in pinned host memory and is streamed in tiles of the vocabulary
    """

    policies: tuple[str, ...]
    mlp_rows: int | None = None
    head_rows: int | None = None
    resident: int = 0
    host_embedding: bool = False
    host_head: bool = False

    def __post_init__(self) -> None:
        unknown = sorted(set(self.policies) - set(POLICIES))
        assert not unknown, unknown
        assert 0 <= self.resident <= len(self.policies)
        assert self.mlp_rows is None or self.mlp_rows > 0

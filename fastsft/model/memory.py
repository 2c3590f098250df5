"""How much memory a run on the fast engine needs, part by part, from sizes alone.

    Job (spec, method, adapters, optimizer) + Plan + micro-batch (T tokens, n trained)  ->  Memory

No model, no weights. What lasts (weights, adapters, buffers) is a sum. What comes and goes is followed
through the moments at which a step is at its widest, with the same tensors in the same order as block.py
makes them: a block's forward, the head, and a block's backward with everything that earlier blocks keep.
The largest moment is the peak, and `Memory` names its parts. A test counts the bytes of every tensor a step
makes on shapes alone (no GPU) and holds the sum to 3 % of it, for every policy.

What torch's allocator loses to gaps, and what CUDA and cuBLAS take, is not in that count: `context` and
`workspace` are set by hand and were not measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import NamedTuple

from fastsft.model.job import MOMENT_BYTES, Group, Job, Layer, round_up
from fastsft.model.plan import Plan

CUDA_CONTEXT = 500 * 10**6  # of the driver; not measured
CUBLAS = 32 * 2**20  # torch's workspace on sm_90, 8 MiB before
SCRATCH = 48 * 10**6  # the kernels' partial sums, the largest of glu_backward's
# As the kernels divide the head (triton_ops/cross_entropy.py): logits in a piece, rows of one.
PIECE, MOST_ROWS, LEAST_ROWS, TILE_ROWS = 1 << 28, 4096, 1024, 128
HEAD_TILE, HEAD_ROWS = 8192, 1024  # of a head streamed from the host (host_weights.py)


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a step; they add up to `peak`. `host` is the host's, beside it.

    weights     the layers' base weights as stored, and the norms
    embedding, head   on the device
    masters, gradients, moments   of everything that trains
    copies      of the adapters (or masters) as the products read them
    decode      the two buffers NF4 weights are decoded into
    resident    layers that stay decoded
    kept        what blocks keep for backward
    working     what one block, or the head, needs while it works, logits aside
    logits      a piece of logits
    batch       the micro-batch, its rope tables
    workspace   of cuBLAS and of the kernels' sums
    context     of CUDA
    """

    weights: int
    embedding: int
    head: int
    masters: int
    gradients: int
    moments: int
    copies: int
    decode: int
    resident: int
    kept: int
    working: int
    logits: int
    batch: int
    workspace: int
    context: int
    host: int
    moment: str  # what the engine is doing at the peak

    @property
    def parts(self) -> dict[str, int]:
        left_out = ("host", "moment")
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in left_out}

    @property
    def peak(self) -> int:
        return sum(self.parts.values())


class Moment(NamedTuple):
    name: str
    kept: int
    working: int
    logits: int


def predict(
    job: Job, plan: Plan, tokens: int, trained: int | None = None, *, cuda: bool = True
) -> Memory:
    """The peak of a step whose micro-batches hold `tokens` tokens, `trained` of them learned (None: all)."""
    trained = tokens if trained is None else trained
    lasting = _lasting(job, plan)
    worst = max(_moments(job, plan, tokens, trained), key=lambda m: m.kept + m.working + m.logits)
    kinds = len({kind for kind in job.spec.rope if kind is not None})
    offloaded = plan.policies.count("offload")
    host = offloaded * tokens * job.spec.hidden * job.size
    host += lasting.pop("host_weights")
    return Memory(
        **lasting,
        kept=worst.kept,
        working=worst.working,
        logits=worst.logits,
        batch=tokens * (28 + kinds * 4 * job.spec.head_dim) + 24 * trained,
        workspace=CUBLAS + SCRATCH if cuda else 0,
        context=CUDA_CONTEXT if cuda else 0,
        host=host,
        moment=worst.name,
    )


# --- what lasts -----------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def _fixed(job: Job) -> dict[str, int]:
    """The parts that no plan changes."""
    ends = min(len(job.whole), 1) if job.spec.tied else len(job.whole)
    outside = ends * job.embedding_numbers + job.token_rows * job.spec.hidden
    return _fixed_full(job, outside) if job.method == "full" else _fixed_adapters(job, outside)


def _fixed_adapters(job: Job, outside: int) -> dict[str, int]:
    groups = [g for layer in job.layers for g in layer.groups]
    padded = sum(g.master_numbers for g in groups)
    # The products read A in strips, and B too where the base is decoded (else B lies in the pitch).
    copies = sum(g.tail * g.k + (g.n * g.r if job.quantised else 0) for g in groups)
    weights = sum(job.weight_bytes(g) for g in groups)
    return {
        "weights": weights + job.size * sum(_norm_numbers(job)),
        "masters": 4 * (padded + outside),
        "gradients": 4 * (padded + outside),
        "moments": round(MOMENT_BYTES[job.optimizer] * (job.adapter_numbers + outside)),
        "copies": copies * job.size,
    }


def _fixed_full(job: Job, outside: int) -> dict[str, int]:
    """Every weight a master; copies in the products' dtype where masters are wider."""
    norms, last_norm = _norm_numbers(job)
    blocks = job.linear_weights + norms
    numbers = blocks + last_norm + outside
    copied = job.fp32_masters and job.size < 4
    summed = numbers
    if job.update_in_backward:  # the blocks take turns in one block's sums
        summed = blocks // job.spec.layers + last_norm + outside
    return {
        "weights": 0,
        "masters": numbers * (4 if job.fp32_masters else job.size),
        "gradients": 4 * summed,
        "moments": round(MOMENT_BYTES[job.optimizer] * numbers),
        "copies": blocks * job.size if copied else 0,
    }


def _norm_numbers(job: Job) -> tuple[int, int]:
    """Weights of the norms inside the blocks, and of the last one."""
    s = job.spec
    per_layer = {"pre": 2, "post": 2, "sandwich": 4}[s.norms] * s.hidden
    qk = {None: 0, "head": 2 * s.head_dim, "all": (s.heads + s.kv_heads) * s.head_dim}[s.qk_norm]
    return s.layers * (per_layer + qk), s.hidden


def _lasting(job: Job, plan: Plan) -> dict[str, int]:
    table = job.embedding_numbers * job.size
    of_host = 0
    embedding = 0 if "embedding" in job.whole else table
    head = 0 if job.spec.tied or "head" in job.whole else table
    if plan.host_embedding:
        of_host, embedding = of_host + embedding, 0
    if plan.host_head:  # two tiles of it are on the device
        tiles = min(2 * HEAD_TILE, job.spec.vocabulary) * job.spec.hidden * job.size
        of_host, head = of_host + head, tiles
    resident = sum(decoded_bytes(job, g) for la in job.layers[: plan.resident] for g in la.groups)
    return _fixed(job) | {
        "embedding": embedding,
        "head": head,
        "decode": _decode_buffers(job, plan.policies, plan.resident) if job.quantised else 0,
        "resident": resident if job.quantised else 0,
        "host_weights": of_host,
    }


def decoded_bytes(job: Job, group: Group) -> int:
    return group.n * group.pitch * job.size


@lru_cache(maxsize=4096)
def _decode_buffers(job: Job, policies: tuple[str, ...], resident: int) -> int:
    """The two buffers of projection.DecodeBuffers once they have seen two micro-batches.

    Whether both come to hold the largest weight depends on whose turn it is, so the turns are taken.
    """
    sizes, last = [0, 0], 1
    for _ in range(2):
        owners = [-1, -1]
        for owner, size in _decodes(job, policies, resident):
            known = owners.index(owner) if owner in owners else None
            last = last ^ 1 if known is None else known
            sizes[last], owners[last] = max(sizes[last], size), owner
    return sum(sizes)


def _decodes(job: Job, policies: tuple[str, ...], resident: int) -> Iterator[tuple[int, int]]:
    """(which weight, its bytes) in the order a step asks for them: qkv 0, o 1, gate and up 2, down 3."""
    again: dict[str, tuple[int, ...]] = {"keep": (), "recompute_mlp": (2,)}
    whole = (0, 1, 2) if job.spec.norms == "pre" else (0, 1, 2, 3)  # post-norms need down's product
    orders: list[tuple[int, tuple[int, ...]]] = [(i, (0, 1, 2, 3)) for i in range(len(policies))]
    for i in reversed(range(len(policies))):
        orders.append((i, (*again.get(policies[i], whole), 3, 2, 1, 0)))
    for i, order in orders:
        if i >= resident:
            groups = job.layers[i].groups
            yield from ((4 * i + n, decoded_bytes(job, groups[n])) for n in order)


# --- what comes and goes ----------------------------------------------------------------------------


class Rows(NamedTuple):
    """Bytes of one row of every tensor of a block, by the names of self_attention.py and mlp.py."""

    stream: int  # x, total, total2, a branch, and their gradients
    y: int  # a norm's output at the pitch of the product behind it
    qkv: int
    o: int
    z: int
    gate_up: int
    h: int
    tail_qkv: int
    tails_mlp: int
    statistics: int  # float32: rstds, the attention's log-sum-exp
    raw: int  # q and k before their norms
    unnormed: int  # a branch before its post-norm


@lru_cache(maxsize=1024)
def _rows(job: Job, layer: Layer) -> Rows:
    s, size = job.spec, job.size
    numbers = 4 if s.norms == "sandwich" else 2
    raw = 0
    if s.qk_norm:
        raw = (s.heads + s.kv_heads) * s.head_dim
        numbers += s.heads + s.kv_heads if s.qk_norm == "head" else 2
    return Rows(
        stream=s.hidden * size,
        y=layer.qkv.pitch * size,
        qkv=layer.qkv.n * size,
        o=layer.o.pitch * size,
        z=layer.gate_up.pitch * size,
        gate_up=layer.gate_up.n * size,
        h=layer.down.pitch * size,
        tail_qkv=layer.qkv.tail * size,
        tails_mlp=(layer.gate_up.tail + layer.down.tail) * size,
        statistics=4 * (numbers + s.heads),
        raw=raw * size,
        unnormed=0 if s.norms == "pre" else s.hidden * size,
    )


class _Widths:
    """One layer under a plan: bytes kept, and the widest moments of its passes.

    T tokens; n rows behind the attention (fewer only in the last layer); m rows that the MLP takes at
    a time.
    """

    def __init__(self, job: Job, plan: Plan, index: int, tokens: int, trained: int) -> None:
        self.r = _rows(job, job.layers[index])
        self.last = index == job.spec.layers - 1
        self.T, self.n = tokens, trained if self.last else tokens
        self.tiled = plan.mlp_rows is not None and plan.mlp_rows < self.n
        self.m = min(plan.mlp_rows or self.n, self.n)
        self.policy = plan.policies[index]
        self.full = job.method == "full"

    @property
    def attention_saved(self) -> int:
        r = self.r
        first = r.stream + r.tail_qkv + r.qkv + r.raw + r.statistics
        return self.T * first + self.n * (r.o + r.unnormed)

    @property
    def kept(self) -> int:
        r, policy = self.r, self.policy
        if policy == "offload":
            return 0
        if policy == "recompute_block":
            return self.T * r.stream
        mlp = r.stream + r.tails_mlp + r.unnormed + (r.gate_up if policy == "keep" else 0)
        return self.attention_saved + self.n * mlp

    def forward(self) -> int:
        """All of a block's forward at its widest, what it keeps included; x and branch come with it."""
        r, T, n, m = self.r, self.T, self.n, self.m
        incoming = 2 * T * r.stream
        selected = n * (r.stream + r.o) if self.last else 0
        attention = T * (r.stream + r.tail_qkv + r.qkv + r.raw + r.statistics)
        scores = attention + max(T * r.y, T * r.o + selected + n * (r.stream + 2 * r.unnormed))
        whole = self.policy in ("keep", "recompute_mlp")
        behind = self.attention_saved if whole else T * r.stream
        behind += n * r.stream if self.last else 0  # the rows of total
        tile = r.tails_mlp + max(r.z + r.gate_up, r.gate_up + r.h + r.stream + r.unnormed)
        streams = 2 if self.tiled else 2 + (1 if r.unnormed else 0)  # branch1 and total2
        if self.tiled and whole:  # other tiles' share of what is kept, total2 in it
            streams = 1
            tile -= r.tails_mlp + (r.gate_up if self.policy == "keep" else 0)
            behind += self.kept - self.attention_saved
        return incoming + max(scores, behind + n * streams * r.stream + m * tile)

    def backward(self) -> int:
        """All of a block's backward at its widest: the incoming gradient, and what was kept or fetched."""
        r, T, n = self.r, self.T, self.n
        whole = self.policy in ("keep", "recompute_mlp")
        kept = self.kept if whole else self.attention_saved
        if self.policy == "offload":
            kept += T * r.stream  # the input of the layer before is on its way
        kept += n * r.stream  # the gradient
        moments = [self._mlp_backward(kept), *self._attention_backward(kept)]
        if not whole:
            again = max(T * r.y, T * r.o * (2 if self.last else 1) + 2 * n * r.stream)
            moments.append(kept - n * r.o + again)
        return max(moments)

    def _mlp_backward(self, kept: int) -> int:
        r, n, m = self.r, self.n, self.m
        # dh, dgate and dup, dz. Where the weights train, h and z once more.
        if self.full:
            made = max(2 * r.h + r.gate_up, r.gate_up + 2 * r.z + r.stream)
        else:
            made = r.gate_up + max(r.h, r.z + r.stream)
        if self.policy in ("recompute_block", "offload"):
            # total2, and the branch it was made of; with tiles one tensor, and a second for the result
            kept += n * r.stream * (3 if self.last else 2)
            made += r.gate_up + r.tails_mlp + 2 * r.unnormed
        else:
            made += r.gate_up if self.policy == "recompute_mlp" else 0
            kept += n * r.stream if self.tiled else 0
        made += r.unnormed
        return kept + m * made

    def _attention_backward(self, kept: int) -> list[int]:
        r, T, n = self.r, self.T, self.n
        kept += n * r.stream  # dtotal
        whole = self.policy in ("keep", "recompute_mlp")
        dropped = 0 if whole else n * (r.o + r.unnormed)  # o, once delta is known
        scores = 0 if whole else T * (r.qkv + r.raw)  # q, k and v, once their gradients are there
        spread = T * r.o if self.last else 0  # do, back among all tokens
        return [
            kept + n * (r.o + r.unnormed) + spread,
            kept - dropped + (spread or n * r.o) + T * r.qkv,
            kept - dropped - scores + T * (r.qkv + r.y + r.stream) + (T - n) * r.stream,
        ]


def _moments(job: Job, plan: Plan, tokens: int, trained: int) -> Iterator[Moment]:
    """The moments at which a step may be at its widest: each layer's passes, and the head."""
    kept = leaving = 0
    seen: dict[object, _Widths] = {}
    last = job.spec.layers - 1
    # Offloaded inputs whose copies the main stream has not waited for: the last two, until one comes back.
    inputs = [tokens * job.spec.hidden * job.size if p == "offload" else 0 for p in plan.policies]
    most = 2 * max(inputs)
    for i, policy in enumerate(plan.policies):
        key = (job.layers[i], policy, i == last)
        if key not in seen:
            seen[key] = _Widths(job, plan, i, tokens, trained)
        layer = seen[key]
        yield Moment(f"forward of layer {i}", kept + leaving, layer.forward(), 0)
        leaving = min(leaving + inputs[i], most)
        staying = 0 if any(inputs[i:]) else leaving
        yield Moment(f"backward of layer {i}", kept + staying, layer.backward(), 0)
        kept += layer.kept
    yield from _head(job, plan, trained, kept + leaving)


def _head(job: Job, plan: Plan, trained: int, kept: int) -> Iterator[Moment]:
    """Hidden rows, a piece of their logits, the gradient of the rows; the weight's where it trains."""
    s, size, table = job.spec, job.size, job.embedding_numbers
    row = s.hidden * size
    yield Moment("last norm", kept, 4 * trained * row, 0)
    if plan.host_head:
        rows = min(plan.head_rows or HEAD_ROWS, trained)
        # The last tile's logits and gradient are there until the next ones are.
        numbers = 2 * (size + 4) + (12 if s.logits_softcap else 0)
        wide = rows * min(HEAD_TILE, s.vocabulary) * numbers
        summed = max(4, size) * s.hidden * trained
        yield Moment("head", kept, 2 * trained * row + summed + trained * row, wide)
        yield Moment("backward of the head", kept, 4 * trained * row, 0)
        return
    chunk = min(chunk_rows(s.vocabulary, trained, plan.head_rows), trained)
    logits = chunk * round_up(s.vocabulary, 64) * size
    narrow = size < 4 and (job.fp32_masters or job.method != "full")
    made = table * size if narrow and ("head" in job.whole or job.token_rows) else 0
    summed = 4 * table if "head" in job.whole or job.token_rows else 0
    # Hidden rows, the sum they are the norm of, their gradient; two pieces of rows.
    yield Moment("head", kept, 3 * trained * row + 2 * chunk * row + made + summed, logits)
    # Scaled by the upstream gradient, and once more where the master is wider.
    again = summed + (table * (size + (4 if narrow else 0)) if summed else 0)
    yield Moment("backward of the head", kept, 4 * trained * row + again, 0)
    if "embedding" in job.whole or job.token_rows:
        wide = size if job.method == "full" and not job.fp32_masters else 4
        own = 0 if job.method == "full" else size  # of the copy in the products' dtype
        yield Moment("backward of the embedding", 0, table * (wide + own) + trained * row, 0)
    if not job.fp32_masters:
        yield Moment("update", 0, 4 * table, 0)


def chunk_rows(vocabulary: int, rows: int, given: int | None) -> int:
    """Rows whose logits are there at a time, as the kernels choose them."""
    most = PIECE // vocabulary // TILE_ROWS * TILE_ROWS
    most = given or min(max(most, LEAST_ROWS), MOST_ROWS)
    pieces = max(-(-rows // most), 1)
    even = -(-max(rows, 1) // pieces)
    return min(round_up(even, TILE_ROWS), most)

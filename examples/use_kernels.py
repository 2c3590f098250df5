"""The kernels in a plain torch loop: no trainer, no transformers, only `fastsft_kernels` and torch.

A model of one block learns to end a document with its first token, three times. Its base weights are
frozen and carry LoRA adapters; documents of all lengths lie in one row, and attention keeps them apart;
the loss is taken without ever making the logits of the whole row. Before training, every gradient is
compared with the same model written in plain torch, one document at a time.

    python examples/use_kernels.py          on a GPU where there is one, else on the CPU (a few seconds)
"""

import torch
import torch.nn.functional as F
from fastsft_kernels import linear_cross_entropy, lora_linear, rms_norm, varlen_attention

VOCABULARY, HIDDEN, HEADS, RANK, SCALING = 64, 128, 4, 8, 2.0
SIDES = ("q", "k", "v", "o")
Weights = dict[str, torch.Tensor]


def make_weights(device: str) -> tuple[Weights, Weights]:
    """(frozen base, adapters that train)"""

    def normal(*shape: int, scale: float) -> torch.Tensor:
        return (scale * torch.randn(*shape)).to(device)

    base = {side: normal(HIDDEN, HIDDEN, scale=HIDDEN**-0.5) for side in SIDES}
    base["embedding"] = normal(VOCABULARY, HIDDEN, scale=0.3)
    base["place"] = normal(64, HIDDEN, scale=0.3)
    base["norm"] = torch.ones(HIDDEN, device=device)
    adapters = {}
    for side in SIDES:
        adapters[f"{side}.a"] = normal(RANK, HIDDEN, scale=HIDDEN**-0.5)
        adapters[f"{side}.b"] = normal(HIDDEN, RANK, scale=0.05)
    return base, {name: w.requires_grad_() for name, w in adapters.items()}


def packed_loss(documents: list[torch.Tensor], base: Weights, adapters: Weights) -> torch.Tensor:
    """All documents in one row [T], with our kernels."""
    lengths = [len(ids) for ids in documents]
    ids = torch.cat(documents)
    places = torch.cat([torch.arange(n, device=ids.device) for n in lengths])
    ends = torch.tensor([0, *lengths]).cumsum(0).int().to(ids.device)

    def linear(side: str, x: torch.Tensor) -> torch.Tensor:
        return lora_linear(x, base[side], adapters[f"{side}.a"], adapters[f"{side}.b"], SCALING)

    x = base["embedding"][ids] + base["place"][places]
    y = rms_norm(x, base["norm"])
    q, k, v = (linear(side, y).view(-1, HEADS, HIDDEN // HEADS) for side in "qkv")
    o = varlen_attention(q, k, v, ends, max(lengths), lengths=lengths)
    x = x + linear("o", o.flatten(1))
    loss = linear_cross_entropy(rms_norm(x, base["norm"]), base["embedding"], labels_of(documents))
    assert isinstance(loss, torch.Tensor)
    return loss


def plain_loss(documents: list[torch.Tensor], base: Weights, adapters: Weights) -> torch.Tensor:
    """The same in plain torch, document by document."""

    def linear(side: str, x: torch.Tensor) -> torch.Tensor:
        adapter = F.linear(F.linear(x, adapters[f"{side}.a"]), adapters[f"{side}.b"])
        return F.linear(x, base[side]) + SCALING * adapter

    logits = []
    for ids in documents:
        x = base["embedding"][ids] + base["place"][: len(ids)]
        y = F.rms_norm(x, (HIDDEN,), base["norm"], 1e-6)
        q, k, v = (linear(s, y).view(-1, HEADS, HIDDEN // HEADS).transpose(0, 1) for s in "qkv")
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + linear("o", o.transpose(0, 1).flatten(1))
        logits.append(F.rms_norm(x, (HIDDEN,), base["norm"], 1e-6) @ base["embedding"].t())
    return F.cross_entropy(torch.cat(logits), labels_of(documents))


def labels_of(documents: list[torch.Tensor]) -> torch.Tensor:
    """Aligned with the rows: what token t should be followed by; -100 outside the answer."""
    labels = torch.cat([ids.roll(-1) for ids in documents])
    ends = torch.tensor([len(ids) for ids in documents]).cumsum(0)
    counts = torch.zeros(len(labels), dtype=torch.bool)
    for end in ends.tolist():
        counts[end - 4 : end - 1] = (
            True  # the answer's three tokens, each predicted by the one before
        )
    return torch.where(counts.to(labels.device), labels, -100)


def make_documents(count: int, device: str) -> list[torch.Tensor]:
    """Random tokens, and the first of them again, three times."""
    found = []
    for length in torch.randint(4, 24, (count,)).tolist():
        ids = torch.randint(1, VOCABULARY, (length,))
        found.append(torch.cat([ids, ids[:1].expand(3)]).to(device))
    return found


def main() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base, adapters = make_weights(device)

    documents = make_documents(16, device)
    parameters = list(adapters.values())
    ours = torch.autograd.grad(packed_loss(documents, base, adapters), parameters)
    torchs = torch.autograd.grad(plain_loss(documents, base, adapters), parameters)
    worst = max(float((x - y).norm() / y.norm()) for x, y in zip(ours, torchs, strict=True))
    print(f"gradients against plain torch: {worst:.1e} apart at most")
    assert worst < (1e-4 if device == "cpu" else 1e-2)  # a GPU may multiply float32 in TF32

    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    first = last = 0.0
    for step in range(60):
        loss = packed_loss(make_documents(64, device), base, adapters)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        last = loss.item()
        first = first or last
        if step % 20 == 0:
            print(f"step {step:>3}  loss {last:.3f}")
    assert last < first
    print(f"ok: loss {first:.3f} -> {last:.3f}")


if __name__ == "__main__":
    main()

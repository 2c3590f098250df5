"""Asking a model what it does before trusting it: small forward passes at start-up.

The compat engine runs models whose code it does not know. Two things must hold before it may pack documents
and skip the model's own head, and both are measured rather than looked up in a table of names:

- isolation: in a pack of two documents, changing the first must leave the second's hidden states as they
  are, and each must come out as when it runs alone with the model's own attention;
- the head: softcap(scale · hidden Wᵀ) must be the logits the model returns.

The first comparison is between runs of equal shapes, so for most models it is exact in any dtype; the
tolerance is there for mixtures of experts, whose grouped products change shape with the routing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastsft.model.lora import LoraLinear, keyed_generator
from fastsft.model.targets import embedding_weight

LENGTHS = (7, 12)  # two documents, neither a multiple of anything


@dataclass(frozen=True)
class Head:
    """How logits come from hidden states: softcap(scale · hidden Wᵀ), or by the model's own code."""

    scale: float = 1.0
    softcap: float | None = None
    own: bool = False
    reason: str = ""


def random_ids(model: PreTrainedModel, name: str, count: int) -> Tensor:
    """`count` token ids of the model's vocabulary, the same at every call with the same name."""
    ids = torch.randint(len(embedding_weight(model)), (count,), generator=keyed_generator(0, name))
    return ids.to(model.device)


def difference(x: Tensor, y: Tensor) -> float:
    """|x - y| / |y| over all elements, in float32 or better; 0 for bitwise equal tensors."""
    if torch.equal(x, y):
        return 0.0
    x, y = (t if t.dtype == torch.float64 else t.float() for t in (x, y))
    return float((x - y).norm() / y.norm().clamp_min(1e-30))


def tolerances(dtype: torch.dtype) -> tuple[float, float]:
    """Largest allowed (leak, packed against alone) as `difference` measures them."""
    return (1e-5, 1e-4) if dtype in (torch.float32, torch.float64) else (0.02, 0.08)


def leak_between(
    packed: Callable[[list[Tensor]], Tensor],
    alone: list[Tensor],
    documents: list[Tensor],
    other: Tensor,
    dtype: torch.dtype,
) -> str:
    """Empty where packing isolates; else what was seen. `other` takes the first document's place once.

    `packed(documents) -> hidden [T, H]`; `alone[i]` are the hidden states of documents[i] by itself;
    `dtype`: what products run in, which under autocast is not what hidden states have.
    """
    cut = len(documents[0])
    both = packed(documents)
    changed = packed([other, documents[1]])
    leak_limit, limit = tolerances(dtype)
    leak = difference(changed[cut:], both[cut:])
    if leak > leak_limit:
        return f"a document's hidden states change by {leak:.1%} with the tokens of the document before it"
    apart = max(difference(both[:cut], alone[0]), difference(both[cut:], alone[1]))
    if apart > limit:
        return (
            f"hidden states of packed documents differ by {apart:.1%} from the same documents alone"
        )
    return ""


def declared_head(model: PreTrainedModel) -> Head:
    """The head as the config describes it; `own` where the module is nothing we can multiply with."""
    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    if isinstance(head, LoraLinear):
        return Head(own=True, reason="the head carries an adapter")
    if not isinstance(head, nn.Linear):
        return Head(own=True, reason="the head is not a linear layer")
    if head.bias is not None:
        return Head(own=True, reason="the head has a bias")
    scale = 1.0
    if getattr(config, "logits_scaling", None):  # Granite divides
        scale = 1.0 / config.logits_scaling
    elif getattr(config, "logit_scale", None):  # Cohere multiplies
        scale = float(config.logit_scale)
    return Head(scale, getattr(config, "final_logit_softcapping", None))


def checked_head(
    model: PreTrainedModel,
    hidden: Callable[[Tensor], Tensor],
    options: dict[str, Any],
    dtype: torch.dtype,
) -> Head:
    """The declared head if it reproduces the model's logits on a few tokens; else the model's own."""
    head = declared_head(model)
    if head.own:
        return head
    ids = random_ids(model, "head", 8)
    expected = model(input_ids=ids[None], **options).logits[0]
    states = hidden(ids)
    ours = head.scale * (states @ model.get_output_embeddings().weight.to(states.dtype).T)
    if head.softcap is not None:
        ours = head.softcap * torch.tanh(ours / head.softcap)
    apart = difference(ours, expected)
    if apart > tolerances(dtype)[1]:
        return Head(
            own=True, reason=f"hidden states times the head's weight miss the logits by {apart:.1%}"
        )
    return head

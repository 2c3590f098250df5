"""What trains beside the adapters: whole modules (`modules_to_save`) and the rows of new tokens.

Both keep fp32 masters outside the model's dtype and enter the model through torch's parametrizations: a
module's `weight` becomes a function of the master, so that embedding, head, scaled embeddings and
whatever else reads `.weight` see the same differentiable value without a change to their code.

    whole modules     weight = master.to(dtype)
    new tokens        weight = base with rows `ids` replaced by master rows [n, H]

A tied head and embedding share one master and it gets both gradients, as long as they are tied: asking
for one of them trains both. PEFT would untie them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from fastsft.errors import UserError
from fastsft.model.quant import NF4Linear
from fastsft.model.targets import embedding_weight, endings, ends_with, is_linear, name_of


class _Cast(nn.Module):
    """master fp32 -> the module's dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, master: Tensor) -> Tensor:
        return master.to(self.dtype)


class _ReplaceRows(nn.Module):
    """weight [V, H] -> the same with rows `ids` taken from `rows`."""

    ids: Tensor

    def __init__(self, ids: Tensor, rows: nn.Parameter) -> None:
        super().__init__()
        self.register_buffer("ids", ids, persistent=False)
        self.rows = rows

    def forward(self, weight: Tensor) -> Tensor:
        return weight.index_copy(0, self.ids, self.rows.to(weight.dtype))


@dataclass
class TrainedModule:
    """One of modules_to_save: its fp32 masters and what else PEFT wants to find in the file."""

    parameters: dict[str, nn.Parameter]
    buffers: dict[str, Tensor]


@dataclass
class TokenRows:
    """Trained rows of single tokens. `rows`: module name -> fp32 [n, H]; one entry where the head is tied."""

    ids: list[int]
    rows: dict[str, nn.Parameter]


def embedding_names(model: PreTrainedModel) -> tuple[str | None, str | None, bool]:
    """Names of the input embedding and of the head, and whether they share one weight."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and embedding is not None and head.weight is embedding.weight
    return name_of(model, embedding), name_of(model, head), tied


def saved_names(model: PreTrainedModel, wanted: Collection[str], *, tie: bool = True) -> list[str]:
    """The modules that `wanted` (names or endings of names) means. Raises UserError where one means nothing.

    `tie`: of a head and an embedding that share one weight, asking for one means both.
    """
    modules = [name for name, _ in model.named_modules() if name]
    for entry in wanted:
        if not any(ends_with(name, [entry]) for name in modules):
            known = endings(name for name in modules if "layers." not in name)
            raise UserError(
                f"lora.modules_to_save: nothing in this model is called {entry};"
                f" modules here: {', '.join(known)}"
            )
    names = {name for name in modules if ends_with(name, wanted)}
    embedding, head, tied = embedding_names(model)
    pair = {name for name in (embedding, head) if name is not None}
    if tied and tie and pair & names:
        names |= pair
    return [name for name in modules if name in names]


def train_modules(
    model: PreTrainedModel, wanted: Collection[str], *, tie: bool = True
) -> dict[str, TrainedModule]:
    """Make the modules that `wanted` means trainable in fp32; returns them by name.

    `tie`: a tied head and embedding stay tied (False: each gets its own copy, as PEFT does it). Raises
    UserError where an entry names nothing or a 4-bit layer.
    """
    masters: dict[int, nn.Parameter] = {}  # of a tied weight there is one
    return {
        name: _train_module(name, model.get_submodule(name), masters if tie else {})
        for name in saved_names(model, wanted, tie=tie)
    }


def _train_module(name: str, module: nn.Module, masters: dict[int, nn.Parameter]) -> TrainedModule:
    if any(isinstance(inner, NF4Linear) for inner in module.modules()):
        raise UserError(
            f"lora.modules_to_save: {name} holds 4-bit weights, which cannot train whole;"
            " use method: lora, or leave it to lora.target_modules"
        )
    result = TrainedModule({}, {})
    parameters = {key for key, _ in module.named_parameters()}
    result.buffers = {k: v for k, v in module.state_dict().items() if k not in parameters}
    for prefix, inner in list(module.named_modules()):
        for key, old in list(inner.named_parameters(recurse=False)):
            master = masters.get(id(old))
            if master is None:
                master = masters[id(old)] = nn.Parameter(old.detach().float().clone())
            setattr(inner, key, master)
            if old.dtype != torch.float32:
                parametrize.register_parametrization(inner, key, _Cast(old.dtype), unsafe=True)
            result.parameters[f"{prefix}.{key}" if prefix else key] = master
    return result


def resize_vocabulary(model: PreTrainedModel, rows: int) -> None:
    """Enlarge embedding and head to `rows`; new rows start at the mean of the old ones. Never shrinks."""
    old = len(embedding_weight(model))
    if rows <= old:
        return
    model.resize_token_embeddings(rows, mean_resizing=False)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        if layer is None:
            continue
        weight, bias = layer.weight, getattr(layer, "bias", None)
        assert isinstance(weight, Tensor)
        weight.data[old:] = weight.data[:old].float().mean(0).to(weight.dtype)
        if isinstance(bias, Tensor):
            bias.data[old:] = 0


def train_token_rows(
    model: PreTrainedModel, ids: Sequence[int], *, trained_whole: Collection[str] = ()
) -> TokenRows:
    """Make the rows `ids` of the embedding and of the head trainable, enlarging the vocabulary if needed.

    Raises UserError where an embedding trains whole already.
    """
    resize_vocabulary(model, max(ids) + 1)
    embedding, head, tied = embedding_names(model)
    assert embedding is not None, "a language model has an input embedding"
    places = [name for name in (embedding, head) if name is not None]
    whole = [name for name in places if name in trained_whole]
    if whole:
        raise UserError(
            f"new_tokens: train and lora.modules_to_save: {whole[0]} both train that module; drop one of them"
        )
    if head is not None and not is_linear(model.get_submodule(head)):
        raise UserError(
            f"new_tokens: train does not know the head {head}; use lora.modules_to_save instead"
        )
    return attach_token_rows(model, sorted(set(ids)), [embedding] if tied else places)


def attach_token_rows(model: PreTrainedModel, ids: list[int], places: list[str]) -> TokenRows:
    """Parametrize the weights of `places` (and of a head tied to them) with trainable rows `ids`."""
    embedding, head, tied = embedding_names(model)
    found = TokenRows(ids, {})
    for name in places:
        module = model.get_submodule(name)
        weight = module.weight
        assert isinstance(weight, Tensor)
        index = torch.tensor(ids, device=weight.device)
        rows = nn.Parameter(weight.detach()[index].float())
        found.rows[name] = rows
        users = [embedding, head] if tied and name in (embedding, head) else [name]
        for user in users:
            assert user is not None
            parametrize.register_parametrization(
                model.get_submodule(user), "weight", _ReplaceRows(index, rows)
            )
    return found

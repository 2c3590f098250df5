"""Adapter and base become one checkpoint that needs neither fastsft nor PEFT.

    W' = round_bf16( W + s · B A )        product and sum in fp32, rounded once, one weight at a time

W is the base checkpoint's weight (`original`), or what its NF4 codes stand for (`dequantized`). A QLoRA
adapter was trained to correct the second, so that one reproduces the run more closely; the first is the
better model in its own right and the usual choice. Rounding to bf16 loses part of a small update either
way, so the merged model is run beside base + adapter on a fixed input, and the difference is reported.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from fastsft_kernels import nf4_dequantize
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from fastsft.device import check_device
from fastsft.errors import UserError
from fastsft.model.adapter import load_adapter
from fastsft.model.context import StepContext
from fastsft.model.files import read_config
from fastsft.model.inference import Subject, load_template, load_tokenizer, locate
from fastsft.model.load import is_prequantized, load_model, save_model
from fastsft.model.lora import LoraLinear
from fastsft.model.quant import NF4Linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROBE_TOKENS = 64


@dataclass(frozen=True)
class MergeReport:
    """What was merged, and how far the result's logits are from base + adapter on the fixed input."""

    folder: Path
    base: str
    layers: int
    max_difference: float
    mean_difference: float
    largest_logit: float

    def __str__(self) -> str:
        return (
            f"merged {self.layers} adapted layers into the {self.base} weights: {self.folder} (bf16). "
            f"Against base + adapter, logits differ by {self.max_difference:.2g} at most and "
            f"{self.mean_difference:.2g} on average (largest logit {self.largest_logit:.3g})"
        )


def merge(
    adapter_or_run: str,
    out: str | Path,
    base: Literal["original", "dequantized"] = "original",
    *,
    device: torch.device | str | None = None,
    trust_remote_code: bool = False,
) -> MergeReport:
    """Write base + adapter to `out`: bf16 safetensors, tokenizer, template, stop ids. Prints the report.

    Raises UserError: nothing to merge, `out` not empty, a base that is not there in the form asked for.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out: {out} exists and is not an empty folder; name a new one")
    subject = locate(adapter_or_run, trust_remote_code=trust_remote_code)
    _check_base(subject, base, adapter_or_run)
    device = check_device() if device is None else torch.device(device)
    folder = subject.base_folder()
    stored = read_config(folder)
    half = "float16" in (stored.get("dtype"), stored.get("torch_dtype"))
    model = load_model(
        folder,
        quantize=base == "dequantized",
        # The file's own, so that each weight is rounded once; fp16 cannot hold what bf16 can.
        dtype=torch.float32 if half else None,
        device=device,
        trust_remote_code=subject.trust_remote_code,
    )
    adapters = load_adapter(subject.folder, model, StepContext())
    model.eval()
    before = _probe(model)
    fold_adapters(model)
    after = _probe(model)
    _write(model, subject, out)
    difference = (after - before).abs()
    report = MergeReport(
        folder=out,
        base=base,
        layers=len(adapters.layers),
        max_difference=difference.max().item(),
        mean_difference=difference.mean().item(),
        largest_logit=before.abs().max().item(),
    )
    print(report)
    return report


def _write(model: PreTrainedModel, subject: Subject, out: Path) -> None:
    """Tokenizer, template and weights; the generation config is the base's with the adapter's stops."""
    tokenizer = load_tokenizer(subject)
    template = load_template(subject, tokenizer)
    stops = template.stop_ids if template is not None else tokenizer.stop_ids
    try:
        tokenizer.save(out, template, generation=False)
        save_model(model, out, torch.bfloat16, stop_ids=stops)
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)  # it was empty: the next attempt may use the name
        raise


def _check_base(subject: Subject, base: str, name: str) -> None:
    if base not in ("original", "dequantized"):
        raise UserError(f"--base: {base!r} is neither original nor dequantized")
    if subject.base is None:
        raise UserError(f"{name} is a whole model already; there is no adapter to merge")
    prequantized = is_prequantized(subject.base_folder())
    if base == "original" and prequantized:
        raise UserError(
            f"{subject.base} exists in 4 bits only, there are no original weights; use --base dequantized"
        )
    trained_on_4_bits = prequantized or subject.config is None or subject.config.method == "qlora"
    if base == "dequantized" and not trained_on_4_bits:
        raise UserError(
            f"{name} was trained on unquantised weights (method: lora); use --base original"
        )


@torch.no_grad()
def fold_adapters(model: PreTrainedModel) -> None:
    """Replace every adapted, quantised or partly trained module by a plain one, in place.

    Afterwards all floating weights have values that bf16 holds exactly, in the dtype they had before.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLinear):
            model.set_submodule(name, _plain(module.base, module.delta(), model.dtype))
    for name, module in list(model.named_modules()):
        if isinstance(module, NF4Linear):
            model.set_submodule(name, _plain(module, None, model.dtype))
    _fold_parametrizations(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).to(parameter.dtype)


def _plain(base: nn.Module, delta: Tensor | None, dtype: torch.dtype) -> nn.Module:
    """A dense layer with the weight of `base` plus `delta` [N, K] (fp32), rounded to `dtype`."""
    if isinstance(base, NF4Linear):
        weight = nf4_dequantize(base.nf4, dtype=torch.float32)
        plain: nn.Module = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
        plain.register_parameter("bias", base.bias)
    else:
        assert isinstance(base.weight, Tensor)
        plain, weight = base, base.weight.float()
    if delta is not None:
        weight = weight + (delta.t() if isinstance(base, Conv1D) else delta)
    plain.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    return plain


def _fold_parametrizations(model: PreTrainedModel) -> None:
    """Modules trained whole and trained token rows: keep the value, drop the way it was computed."""
    for module in list(model.modules()):
        if not parametrize.is_parametrized(module):
            continue
        for key in list(module.parametrizations):  # type: ignore[arg-type]
            value = getattr(module, key).detach().clone()
            parametrize.remove_parametrizations(module, key, leave_parametrized=False)
            setattr(module, key, nn.Parameter(value, requires_grad=False))
    for name, source in model.all_tied_weights_keys.items():  # one tensor again, if still one value
        shared = model.get_parameter(source)
        if torch.equal(model.get_parameter(name), shared):
            owner, _, key = name.rpartition(".")
            setattr(model.get_submodule(owner), key, shared)


@torch.no_grad()
def _probe(model: PreTrainedModel) -> Tensor:
    """float32 logits [T, V] on a fixed sequence that visits the whole vocabulary in strides."""
    embedding = model.get_input_embeddings().weight
    assert isinstance(embedding, Tensor)
    rows = embedding.shape[0]
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or PROBE_TOKENS
    ids = torch.arange(min(PROBE_TOKENS, limit), device=model.device) * 7919 % rows
    return model(input_ids=ids[None], use_cache=False).logits[0].float().cpu()

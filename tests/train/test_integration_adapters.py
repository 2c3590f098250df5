"""Our kernels inside PEFT's LoRA layers and bitsandbytes' 4-bit layers."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from fastsft_kernels import nf4_dequantize
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from small_batches import (
    IDS,
    LABELS,
    PADDED_LABELS,
    PADDING,
    assert_close_gradients,
    assert_same_gradients,
    close,
    gradients,
)
from tiny_models import tiny
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
)

from fastsft.integrations import accelerate, nf4_view


def quantized(
    model: PreTrainedModel, compute: torch.dtype | None, *, kind: str = "nf4", nested: bool = True
):
    """bitsandbytes' layers in the place of the model's, as from_pretrained puts them there."""
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and name != "lm_head":
            other = Linear4bit(
                layer.in_features, layer.out_features, layer.bias is not None, compute
            )
            other.weight = Params4bit(
                layer.weight.data, requires_grad=False, quant_type=kind, compress_statistics=nested
            )
            other.bias = layer.bias
            model.set_submodule(name, other)
    model.is_loaded_in_4bit = True
    return model.to("cpu")


def with_adapters(model: PreTrainedModel, **options: object):
    """PEFT's adapters, B not zero, in training mode."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **options})
    torch.manual_seed(1)
    peft = get_peft_model(model, config).train()
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    return peft


def wide(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return tiny(family, dtype=dtype, hidden_size=64, intermediate_size=128)


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
@pytest.mark.parametrize("base", ["dense", "nf4", "nf4, not nested"])
def test_adapters_train_as_before(family: str, base: str) -> None:
    model = wide(family)
    if base != "dense":
        model = quantized(model, torch.float32, nested="not" not in base)
    model = with_adapters(model)
    batch = {"input_ids": IDS, "labels": PADDED_LABELS, "attention_mask": PADDING}
    loss, grads = gradients(model, **batch)
    with model.disable_adapter():
        bare = model(input_ids=IDS).logits
    changes = accelerate(model)
    layers = 8 if family == "phi3" else 14
    assert changes.count("lora") == layers and not changes.left
    assert changes.count("nf4") == (0 if base == "dense" else layers)
    found, ours = gradients(model, **batch)
    assert float(found) == pytest.approx(float(loss), rel=1e-5)
    assert_close_gradients(ours, grads)
    with model.disable_adapter():
        assert close(model(input_ids=IDS).logits, bare)
    changes.undo()
    found, ours = gradients(model, **batch)
    assert torch.equal(found, loss)
    assert_same_gradients(ours, grads)


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float32, None])
def test_a_4_bit_model_in_bf16(compute: torch.dtype | None) -> None:
    model = with_adapters(quantized(wide("llama", torch.bfloat16), compute))
    loss, grads = gradients(model, input_ids=IDS, labels=LABELS)
    changes = accelerate(model)
    assert changes.count("lora") == 14 and not changes.left
    found, ours = gradients(model, input_ids=IDS, labels=LABELS)
    assert float(found) == pytest.approx(float(loss), rel=2e-2)
    assert_close_gradients(ours, grads, tolerance=0.1)


def test_a_4_bit_weight_is_read_where_it_is() -> None:
    layer = next(
        m for m in quantized(wide("llama"), torch.float32).modules() if isinstance(m, Linear4bit)
    )
    view = nf4_view(layer)
    assert view is not None
    state = layer.weight.quant_state
    assert view.packed.data_ptr() == layer.weight.data_ptr()
    assert view.absmax.data_ptr() == state.absmax.data_ptr()
    assert view.absmax2 is not None and view.absmax2.data_ptr() == state.state2.absmax.data_ptr()
    expected = dequantize_4bit(layer.weight.data, state)
    assert torch.equal(nf4_dequantize(view, dtype=torch.float32), expected)


def test_trying_a_layer_does_not_fix_its_compute_dtype() -> None:
    model = quantized(wide("llama"), None)
    accelerate(with_adapters(model))
    layers = [m for m in model.modules() if isinstance(m, Linear4bit)]
    assert all(m.compute_dtype is None and not m.compute_type_is_set for m in layers)


def test_fp4_and_variants_are_left() -> None:
    changes = accelerate(quantized(wide("llama"), torch.float32, kind="fp4"), attention=False)
    assert {c.why for c in changes.left if c.part == "nf4"} == {
        "its weight is not quantised to nf4"
    }
    for options, why in (
        ({"use_dora": True}, "its adapter is a DoraLinearVariant"),
        ({"lora_bias": True}, "its adapter has a bias"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "PEFT's Embedding adapter"),
    ):
        model = with_adapters(tiny("llama", tie_word_embeddings=False), **options)
        assert why in {c.why for c in accelerate(model).left if c.part == "lora"}


def test_a_head_of_pefts_keeps_the_models_loss() -> None:
    for options, why in (
        ({"modules_to_save": ["lm_head"]}, "its head is a ModulesToSaveWrapper"),
        ({"target_modules": ["q_proj", "lm_head"]}, "its head is a Linear"),
    ):
        model = with_adapters(tiny("llama", tie_word_embeddings=False), **options)
        loss, grads = gradients(model, input_ids=IDS, labels=LABELS)
        changes = accelerate(model)
        assert [c.why for c in changes.left] == [why]
        found, ours = gradients(model, input_ids=IDS, labels=LABELS)
        assert float(found) == pytest.approx(float(loss), rel=1e-5)
        assert_close_gradients(ours, grads)


def test_norms_that_peft_keeps_in_fp32() -> None:
    """Then activations and weights differ in dtype, and Llama's norm returns the wider one."""
    model = prepare_model_for_kbit_training(
        quantized(wide("llama", torch.bfloat16), torch.bfloat16)
    )
    model = with_adapters(model)
    norm = model.base_model.model.model.norm
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = norm(x)
    loss, grads = gradients(model, input_ids=IDS, labels=LABELS)
    changes = accelerate(model)
    assert not changes.left
    assert expected.dtype == norm(x).dtype == torch.float32 == norm.weight.dtype
    torch.testing.assert_close(norm(x), expected, rtol=1e-2, atol=1e-2)
    found, ours = gradients(model, input_ids=IDS, labels=LABELS)
    assert float(found) == pytest.approx(float(loss), rel=1e-2)
    assert_close_gradients(ours, grads, tolerance=0.1)


def test_peft_decides_at_each_call_what_an_adapter_is() -> None:
    model = with_adapters(tiny("llama", tie_word_embeddings=False))
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.eval()

    def logits() -> dict[str, Tensor]:
        found = {"one": model(input_ids=IDS).logits}
        with model.disable_adapter():
            found["disabled"] = model(input_ids=IDS).logits
        model.base_model.set_adapter(["default", "second"])
        found["both"] = model(input_ids=IDS).logits
        model.set_adapter("second")
        found["the other"] = model(input_ids=IDS).logits
        model.set_adapter("default")
        names = ["default", "second", "__base__"]
        found["by row"] = model(input_ids=IDS, adapter_names=names).logits
        model.merge_adapter()
        found["merged"] = model(input_ids=IDS).logits
        model.unmerge_adapter()
        return found

    with torch.no_grad():
        expected = logits()
        accelerate(model)
        found = logits()
    assert all(close(found[name], expected[name]) for name in expected)
    apart = [close(expected[a], expected[b]) for a, b in (("one", "disabled"), ("one", "both"))]
    assert not any(apart)


def test_hooks_on_inner_layers_are_not_passed_by() -> None:
    model = with_adapters(tiny("llama"))
    accelerate(model)
    seen: list[int] = []
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    expected = layer(torch.ones(2, 32))
    layer.lora_A["default"].register_forward_pre_hook(lambda *_: seen.append(1))
    assert close(layer(torch.ones(2, 32)), expected) and seen == [1]


def test_dropout_is_drawn_anew_and_the_same_under_checkpointing() -> None:
    model = with_adapters(tiny("llama"), lora_dropout=0.3)
    assert accelerate(model).count("lora") == 14
    runs = []
    for checkpointing, seed in ((False, 1), (False, 2), (True, 1)):
        if checkpointing:
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(seed)
        loss, grads = gradients(model, input_ids=IDS, labels=LABELS)
        runs.append((loss, grads))
    assert not torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][0], runs[2][0])
    assert_same_gradients(runs[2][1], runs[0][1])
    losses = []
    for seed in range(40):
        torch.manual_seed(seed)
        with torch.no_grad():
            losses.append(float(model(input_ids=IDS, labels=LABELS).loss))
    assert float(torch.tensor(losses).std()) > 1e-4

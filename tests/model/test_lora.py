"""Adapters against PEFT (same modules, values, gradients) and against autograd on the plain model."""

from __future__ import annotations

import copy

import pytest
import torch
from fastsft_kernels import nf4_dequantize, nf4_quantize
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from tiny_models import batch_of, documents, tiny
from torch import nn

from fastsft.config import LoraConfig
from fastsft.errors import UserError
from fastsft.model.compat import CompatEngine
from fastsft.model.context import StepContext
from fastsft.model.lora import LoraLinear, add_adapters, trainable_summary
from fastsft.model.quant import NF4Linear
from fastsft.model.targets import module_numbers

IDS = torch.tensor([[3, 14, 15, 92, 65, 35, 89, 79]])


def peft_names(model: nn.Module) -> set[str]:
    """Modules that PEFT has put adapters on."""
    return {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.default")
        for name, _ in model.named_modules()
        if name.endswith(".lora_A.default")
    }


# --- the mathematics --------------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "gpt2", "mixtral"])
def test_logits_and_gradients_are_pefts(family: str, rslora: bool) -> None:
    base = tiny(family).eval()
    # PEFT takes "all-linear" on Mixtral to mean the stacked experts too; ours says that it does not.
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    target = attention if family == "mixtral" else "all-linear"
    peft = get_peft_model(
        copy.deepcopy(base),
        PeftConfig(
            r=4, lora_alpha=6, target_modules=target, use_rslora=rslora, task_type="CAUSAL_LM"
        ),
    ).eval()
    lora = LoraConfig(r=4, alpha=6, use_rslora=rslora)
    ours = add_adapters(base, lora, seed=0, context=StepContext())
    assert set(ours.layers) == peft_names(peft)
    for name, layer in ours.layers.items():
        layer.lora_B.data.normal_(0, 0.3)
        theirs = peft.base_model.model.get_submodule(name)
        theirs.lora_A.default.weight.data.copy_(layer.lora_A.data)
        theirs.lora_B.default.weight.data.copy_(layer.lora_B.data)
    logits, expected = ours.model(IDS).logits, peft(IDS).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    upstream = torch.randn_like(logits)
    logits.backward(upstream)
    expected.backward(upstream)
    for name, layer in ours.layers.items():
        theirs = peft.base_model.model.get_submodule(name)
        for mine, its in ((layer.lora_A, theirs.lora_A), (layer.lora_B, theirs.lora_B)):
            wanted = its.default.weight.grad
            assert float((mine.grad - wanted).norm()) <= 1e-5 * float(wanted.norm()) + 1e-6, name


def test_delta_is_what_the_adapter_adds() -> None:
    base = tiny("gpt2").eval()
    ours = add_adapters(
        copy.deepcopy(base), LoraConfig(r=4, alpha=6), seed=0, context=StepContext()
    )
    for name, layer in ours.layers.items():
        layer.lora_B.data.normal_(0, 0.3)
        delta = layer.delta()  # [N, K]; GPT-2 stores [K, N]
        base.get_submodule(name).weight.data += delta.t()
    torch.testing.assert_close(ours.model(IDS).logits, base(IDS).logits, atol=1e-5, rtol=1e-5)


def test_a_four_bit_base_gives_the_decoded_weights_result() -> None:
    plain = nn.Linear(64, 48)
    nf4 = nf4_quantize(plain.weight.data)
    settings = dict(
        r=4, alpha=8, dropout=0.0, use_rslora=False, module_index=0, context=StepContext()
    )
    ours = LoraLinear(NF4Linear(nf4, plain.bias), **settings)
    ours.lora_A.data.normal_()
    ours.lora_B.data.normal_()
    x = torch.randn(5, 64, requires_grad=True)
    decoded = nf4_dequantize(nf4, dtype=torch.float32)
    y = x @ (decoded + 2.0 * ours.lora_B @ ours.lora_A).T + plain.bias
    torch.testing.assert_close(ours(x), y, atol=1e-4, rtol=1e-4)
    upstream = torch.randn_like(y)
    (wanted,) = torch.autograd.grad(y, x, upstream, retain_graph=True)
    (found,) = torch.autograd.grad(ours(x), x, upstream)
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-4)


# --- how it starts ----------------------------------------------------------------------------------


def test_start_is_pefts_and_depends_on_seed_and_name_alone() -> None:
    def start(targets, seed):
        lora = LoraConfig(r=4, target_modules=targets)
        return add_adapters(tiny("llama"), lora, seed=seed, context=StepContext())

    base = tiny("llama")(IDS).logits
    every = start("all-linear", 7)
    torch.testing.assert_close(every.model(IDS).logits, base)  # B is zero
    some, other = start(["down_proj", "q_proj"], 7), start("all-linear", 8)
    assert 0 < len(some.layers) < len(every.layers)
    for name, layer in some.layers.items():
        assert torch.equal(layer.lora_A, every.layers[name].lora_A)
        assert not torch.equal(layer.lora_A, other.layers[name].lora_A)
    values = [layer.lora_A.detach() for layer in every.layers.values()]
    assert len({tuple(v.flatten().tolist()) for v in values}) == len(values)
    for a in values:  # kaiming_uniform with a = sqrt(5): uniform in +-1/sqrt(K)
        bound = a.shape[1] ** -0.5
        assert 0.9 * bound < float(a.abs().max()) <= bound
        assert float(a.std()) == pytest.approx(bound / 3**0.5, rel=0.2)


def test_dropout_numbers_of_modules_do_not_depend_on_the_targets() -> None:
    numbers = module_numbers(tiny("llama"))
    ours = add_adapters(
        tiny("llama"), LoraConfig(r=2, target_modules=["up_proj"]), seed=0, context=StepContext()
    )
    assert {name: layer.module_index for name, layer in ours.layers.items()} == {
        name: numbers[name] for name in ours.layers
    }
    assert len(set(numbers.values())) == len(numbers)


def test_the_base_is_frozen_and_the_count_is_right() -> None:
    ours = add_adapters(tiny("qwen2"), LoraConfig(r=4), seed=0, context=StepContext())
    names = {name for name, p in ours.model.named_parameters() if p.requires_grad}
    assert names and all(name.endswith(("lora_A", "lora_B")) for name in names)
    trained, total = trainable_summary(ours.model)
    expected = sum(4 * (x.in_features + x.out_features) for x in ours.layers.values())
    assert trained == expected == sum(p.numel() for _, p in ours.named_parameters())
    assert total == expected + sum(p.numel() for p in tiny("qwen2").parameters())


def test_a_four_bit_weight_counts_as_many_as_it_stands_for() -> None:
    model = nn.Sequential(NF4Linear(nf4_quantize(torch.randn(48, 64))))
    assert trainable_summary(model) == (0, 48 * 64)


def test_masters_are_fp32_under_a_bf16_base() -> None:
    lora = LoraConfig(r=4, modules_to_save=["lm_head"])
    model = tiny("qwen2", dtype=torch.bfloat16)
    context = StepContext()
    ours = add_adapters(model, lora, seed=0, context=context)
    engine = CompatEngine(model, context)
    engine.loss(batch_of(documents()), step=0).loss_sum.backward()
    parameters = dict(ours.named_parameters())
    assert "lm_head.weight" in parameters
    for name, parameter in parameters.items():
        assert parameter.dtype == parameter.grad.dtype == torch.float32, name
    assert model(
        IDS, cu_seq_lens_q=torch.tensor([0, 8], dtype=torch.int32), max_length_q=8
    ).logits.dtype == (torch.bfloat16)


def test_dropout_needs_one_row_per_token() -> None:
    layer = LoraLinear(
        nn.Linear(8, 8),
        r=2,
        alpha=2,
        dropout=0.5,
        use_rslora=False,
        module_index=3,
        context=StepContext(),
    )
    with pytest.raises(
        UserError, match=r"linear layer number 3 sees 5 rows .* set lora.dropout to 0"
    ):
        layer(torch.randn(5, 8))


# --- which modules ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["opt", "phi", "gpt_neox", "falcon", "olmo2"])
@pytest.mark.parametrize(
    "target", ["all-linear", r".*layers\.1\..*(dense|q_proj|in_proj).*", "ends"]
)
def test_targets_are_the_modules_peft_takes(family: str, target: str) -> None:
    model = tiny(family)
    wanted = target
    if target == "ends":
        linears = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
        wanted = sorted({linears[0].rsplit(".", 1)[-1], linears[-2]})
    if target.startswith(".*") and family == "falcon":
        wanted = r"transformer\.h\.1\..*dense.*"
    peft = get_peft_model(copy.deepcopy(model), PeftConfig(r=2, target_modules=wanted))
    ours = add_adapters(
        model, LoraConfig(r=2, target_modules=wanted), seed=0, context=StepContext()
    )
    assert set(ours.layers) == peft_names(peft)


def test_a_layer_that_is_never_called_takes_no_adapter() -> None:
    lora = LoraConfig(r=2)
    ours = add_adapters(tiny("mamba"), lora, seed=0, context=StepContext())
    assert ours.layers and not any(name.endswith("out_proj") for name in ours.layers)
    lora = LoraConfig(r=2, target_modules=["in_proj", "out_proj"])
    with pytest.raises(UserError, match="out_proj can carry no adapter"):
        add_adapters(tiny("mamba"), lora, seed=0, context=StepContext())


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            ["q_proj", "qkv_proj"],
            "nothing in this model is called qkv_proj; linear layers here: q_proj, k_proj",
        ),
        ("nowhere", "'nowhere' matches no linear layer; linear layers here: q_proj"),
        ("(", "is not a regular expression"),
        (["embed_tokens"], "model.embed_tokens is a Embedding, not a linear layer"),
        ([], "matches no linear layer"),
    ],
)
def test_targets_that_are_not_there_are_refused(target, message: str) -> None:
    with pytest.raises(UserError, match=r"lora\.target_modules: ") as error:
        add_adapters(
            tiny("llama"), LoraConfig(target_modules=target), seed=0, context=StepContext()
        )
    assert message in str(error.value)


# --- whole modules and new tokens -------------------------------------------------------------------


def full_gradients(family: str, **more) -> dict[str, torch.Tensor]:
    """Gradients of every parameter of the plain model on the same documents."""
    model = tiny(family, **more)
    engine = CompatEngine(model, StepContext())
    engine.loss(batch_of(documents()), step=0).loss_sum.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def trained_gradients(family: str, lora: LoraConfig, new=(), **more):
    context = StepContext()
    ours = add_adapters(tiny(family, **more), lora, seed=0, context=context, new_token_ids=new)
    CompatEngine(ours.model, context).loss(batch_of(documents()), step=0).loss_sum.backward()
    return ours, dict(ours.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_whole_modules_get_the_plain_models_gradients(tied: bool, dtype: torch.dtype) -> None:
    more = {"tie_word_embeddings": tied, "dtype": dtype}
    wanted = full_gradients("llama", **more)
    lora = LoraConfig(r=2, modules_to_save=["lm_head", "norm"])
    ours, found = trained_gradients("llama", lora, **more)
    pairs = {"model.norm.weight": "model.norm.weight"}
    if tied:
        pairs["model.embed_tokens.weight"] = "model.embed_tokens.weight"
        assert "lm_head.weight" not in found and {"lm_head", "model.embed_tokens"} <= set(
            ours.saved
        )
        assert "model.embed_tokens shares its weight" in ours.notes[0]
    else:
        pairs["lm_head.weight"] = "lm_head.weight"
        assert "model.embed_tokens.weight" not in found and not ours.notes
    for name, other in pairs.items():
        error = float((found[name].grad - wanted[other].float()).norm())
        assert error <= (1e-5 if dtype == torch.float32 else 2e-2) * float(
            wanted[other].float().norm()
        )


@pytest.mark.parametrize(
    ("family", "tied"),
    [("llama", True), ("llama", False), ("gemma3_text", True), ("granite", False)],
)
def test_new_tokens_train_their_rows_alone(family: str, tied: bool) -> None:
    new = [int(i) for i in documents()[2].ids[[5, 2, 3]]]
    wanted = full_gradients(family, tie_word_embeddings=tied)
    ours, found = trained_gradients(family, LoraConfig(r=2), new, tie_word_embeddings=tied)
    assert ours.tokens.ids == sorted(new)
    places = {"model.embed_tokens"} if tied else {"model.embed_tokens", "lm_head"}
    assert {name for name in found if "lora_" not in name} == {
        f"{place}.token_rows" for place in places
    }
    for place in places:
        rows = wanted[f"{place}.weight"][sorted(new)]
        assert float(rows.norm()) > 0
        torch.testing.assert_close(found[f"{place}.token_rows"].grad, rows, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(  # nothing moves before the first step
        ours.model(
            IDS, cu_seq_lens_q=torch.tensor([0, 8], dtype=torch.int32), max_length_q=8
        ).logits,
        tiny(family, tie_word_embeddings=tied)(IDS).logits,
        atol=1e-5,
        rtol=1e-5,
    )


@pytest.mark.parametrize("tied", [True, False])
def test_tokens_beyond_the_vocabulary_enlarge_it(tied: bool) -> None:
    plain = tiny("llama", tie_word_embeddings=tied)
    mean = plain.get_input_embeddings().weight.detach().mean(0)
    ours = add_adapters(
        tiny("llama", tie_word_embeddings=tied),
        LoraConfig(r=2),
        seed=0,
        context=StepContext(),
        new_token_ids=[97, 96],
    )
    logits = ours.model(IDS).logits
    assert logits.shape[-1] == 98 == ours.model.config.vocab_size
    trained = {n for n, p in ours.model.named_parameters() if p.requires_grad}
    assert all(n.endswith(("lora_A", "lora_B", ".rows")) for n in trained)
    torch.testing.assert_close(logits[..., :96], plain(IDS).logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        ours.tokens.rows["model.embed_tokens"].detach(), torch.stack([mean, mean])
    )


def test_what_cannot_train_whole_is_refused() -> None:
    def add(lora, new=(), model=None):
        add_adapters(model or tiny("llama"), lora, seed=0, context=StepContext(), new_token_ids=new)

    with pytest.raises(
        UserError, match=r"modules_to_save: nothing .* called score; modules here: .*lm_head"
    ):
        add(LoraConfig(modules_to_save=["score"]))
    with pytest.raises(UserError, match="both train that module"):
        add(LoraConfig(modules_to_save=["lm_head"]), new=[3])
    model = tiny("llama", tie_word_embeddings=False)
    model.lm_head = NF4Linear(nf4_quantize(torch.randn(96, 64)))
    with pytest.raises(UserError, match="lm_head holds 4-bit weights"):
        add(LoraConfig(modules_to_save=["lm_head"]), model=model)

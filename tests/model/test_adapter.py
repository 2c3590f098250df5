"""Adapters on disk: PEFT reads ours and computes the same, ours reads PEFT's and continues it."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, safe_open, save_file
from tiny_models import batch_of, documents, tiny

from fastsft.config import LoraConfig
from fastsft.errors import UserError
from fastsft.model.adapter import CONFIG, WEIGHTS, load_adapter
from fastsft.model.compat import CompatEngine
from fastsft.model.context import StepContext
from fastsft.model.lora import LoraSet, add_adapters

IDS = torch.tensor([[3, 14, 15, 92, 65, 35, 89, 79]])
UNTIED = {"tie_word_embeddings": False}


def shaken(adapters: LoraSet) -> LoraSet:
    """Every trained parameter moved away from its start, the model in evaluation mode."""
    generator = torch.Generator().manual_seed(1)
    for _, parameter in adapters.named_parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    adapters.model.eval()
    return adapters


def ours(family: str, lora: LoraConfig, new=(), **more) -> LoraSet:
    context = StepContext()
    model = tiny(family, **more)
    return shaken(add_adapters(model, lora, seed=3, context=context, new_token_ids=new))


def peft_logits(family: str, folder: Path, resize: int = 0, **more) -> torch.Tensor:
    base = tiny(family, **more)
    if resize:
        base.resize_token_embeddings(resize)
    return PeftModel.from_pretrained(base, folder).eval()(IDS).logits


# --- ours in PEFT -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "lora", "new", "more"),
    [
        ("llama", {"use_rslora": True, "alpha": 5.5}, (), {}),
        ("phi3", {"target_modules": r".*layers\.1\..*proj"}, (), {}),
        ("gpt2", {}, (), {}),
        ("qwen2", {"target_modules": ["q_proj", "layers.1.mlp.down_proj"]}, (), {}),
        ("mixtral", {}, (), {}),
        ("llama", {"modules_to_save": ["lm_head", "norm"]}, (), {}),
        ("llama", {"modules_to_save": ["lm_head"]}, (), UNTIED),
        ("gemma2", {"modules_to_save": ["embed_tokens"]}, (), UNTIED),
        ("llama", {}, (92, 3, 40), {}),
        ("llama", {}, (92, 3, 40), UNTIED),
        ("gemma3_text", {}, (92, 3), {"tie_word_embeddings": True}),
        ("llama", {}, (92, 97), UNTIED),
    ],
)
def test_peft_computes_our_logits(tmp_path: Path, family: str, lora: dict, new, more: dict) -> None:
    adapters = ours(family, LoraConfig(r=4, **lora), new, **more)
    adapters.save(tmp_path, "some/base", "main")
    found = peft_logits(family, tmp_path, resize=98 if 97 in new else 0, **more)
    expected = adapters.model(IDS).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert float((expected[..., :96] - tiny(family, **more).eval()(IDS).logits).abs().max()) > 0.01
    again = load_adapter(tmp_path, tiny(family, **more), StepContext())
    assert torch.equal(again.model.eval()(IDS).logits, expected)
    for (name, mine), (other, its) in zip(
        sorted(adapters.named_parameters()), sorted(again.named_parameters()), strict=True
    ):
        assert name == other and torch.equal(mine, its), name


def test_the_files_are_pefts_layout(tmp_path: Path) -> None:
    ours("llama", LoraConfig(r=4, alpha=8, dropout=0.1)).save(tmp_path, "some/base", "v1")
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    told = {
        key: config[key] for key in ("r", "lora_alpha", "lora_dropout", "revision", "peft_type")
    }
    assert told == {
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.1,
        "revision": "v1",
        "peft_type": "LORA",
    }
    assert config["base_model_name_or_path"] == "some/base"
    with safe_open(tmp_path / WEIGHTS, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in set(file.keys())
        assert all(file.get_tensor(key).dtype == torch.float32 for key in set(file.keys()))
    peft = get_peft_model(tiny("llama"), PeftConfig(r=4, target_modules="all-linear"))
    peft.save_pretrained(tmp_path / "peft")
    assert set(load_file(tmp_path / WEIGHTS)) == set(load_file(tmp_path / "peft" / WEIGHTS))
    assert set(config) <= set(json.loads((tmp_path / "peft" / CONFIG).read_text()))


# --- PEFT's in ours ---------------------------------------------------------------------------------

PEFTS = {
    "plain": ("llama", {"target_modules": ["q_proj", "v_proj"]}, {}),
    "patterns": (
        "llama",
        {
            "target_modules": "all-linear",
            "use_rslora": True,
            "rank_pattern": {r"layers\.1\.self_attn\..*": 3, "down_proj": 2},
            "alpha_pattern": {"up_proj": 11},
        },
        {},
    ),
    "layers": ("llama", {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]}, {}),
    "excluded": ("llama", {"target_modules": "all-linear", "exclude_modules": ["v_proj"]}, {}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}, {}),
    "saved": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}, UNTIED),
    "untied": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, {}),
    "both": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}, {}),
    "tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [65, 3]}, {}),
    "token_dict": (
        "llama",
        {
            "target_modules": ["q_proj"],
            "trainable_token_indices": {"embed_tokens": [65, 3], "lm_head": [65, 3]},
        },
        UNTIED,
    ),
    "regex": ("phi3", {"target_modules": r".*\.1\.(self_attn|mlp)\..*_proj"}, {}),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", PEFTS)
def test_an_adapter_of_pefts_continues_here(tmp_path: Path, kind: str) -> None:
    family, options, more = PEFTS[kind]
    peft = get_peft_model(
        tiny(family, **more), PeftConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **options)
    )
    generator = torch.Generator().manual_seed(1)
    for parameter in peft.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    peft.eval().save_pretrained(tmp_path / "peft")
    expected = peft(IDS).logits
    context = StepContext()
    adapters = load_adapter(tmp_path / "peft", tiny(family, **more), context)
    torch.testing.assert_close(adapters.model.eval()(IDS).logits, expected, atol=1e-5, rtol=1e-5)
    # It continues: the same gradients, and PEFT still reads it afterwards.
    upstream = torch.randn(expected.shape, generator=generator)
    expected.backward(upstream)
    adapters.model(IDS).logits.backward(upstream)
    if kind != "both":  # PEFT trains two copies of one weight there
        wanted = sorted(float(p.grad.norm()) for p in peft.parameters() if p.grad is not None)
        found = sorted(float(p.grad.norm()) for _, p in adapters.named_parameters())
        assert found == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    shaken(adapters).save(tmp_path / "ours", "some/base")
    torch.testing.assert_close(
        peft_logits(family, tmp_path / "ours", **more),
        adapters.model(IDS).logits,
        atol=1e-4,
        rtol=0,
    )


def test_a_head_that_peft_untied_stays_untied(tmp_path: Path) -> None:
    peft = get_peft_model(
        tiny("llama"), PeftConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    )
    for name, parameter in peft.named_parameters():
        if "modules_to_save" in name:
            parameter.data += 0.1
    peft.save_pretrained(tmp_path)
    adapters = load_adapter(tmp_path, tiny("llama"), StepContext())
    assert "no longer tied" in adapters.notes[0] and set(adapters.saved) == {"lm_head"}


def test_an_adapter_trains_on_like_the_one_in_memory(tmp_path: Path) -> None:
    lora = LoraConfig(r=4, dropout=0.2, modules_to_save=["norm"])
    context = StepContext(seed=5)
    first = shaken(add_adapters(tiny("llama"), lora, seed=3, context=context))
    first.save(tmp_path, "base")
    other = StepContext(seed=5)
    second = load_adapter(tmp_path, tiny("llama"), other)
    losses = []
    for adapters, facts in ((first, context), (second, other)):
        output = CompatEngine(adapters.model, facts).loss(batch_of(documents()), step=4)
        output.loss_sum.backward()
        losses.append(output.loss_sum)
    assert torch.equal(*losses)
    gradients = dict(second.named_parameters())
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter.grad, gradients[name].grad), name


# --- what is refused --------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    ours("llama", LoraConfig(r=4, alpha=8)).save(tmp_path, "base")
    return tmp_path


def edit(folder: Path, **changes) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora is True; only plain LoRA"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; only LORA"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"init_lora_weights": "pissa_niter_4"}, "which changes the base model"),
        ({"target_parameters": ["experts.down_proj"]}, "target_parameters is"),
        ({"r": 8}, "model.layers.0.mlp.down_proj has rank 4 in adapter_model.safetensors and 8 in"),
        ({"rank_pattern": {"q_proj": 2}}, "q_proj has rank 4 in adapter_model.safetensors and 2"),
        ({"r": "four"}, "r is 'four'; expected a positive number"),
        ({"target_modules": ["q_proj", "lm_head"]}, "names lm_head, which has no tensors"),
    ],
)
def test_configs_that_cannot_be_continued(folder: Path, changes: dict, message: str) -> None:
    edit(folder, **changes)
    with pytest.raises(UserError) as error:
        load_adapter(folder, tiny("llama"), StepContext())
    assert message in str(error.value) and str(folder) in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{Q0}.lora_B.weight"), "q_proj has lora_A but no lora_B"),
        (
            lambda t: [t.pop(f"{Q0}.lora_{x}.weight") for x in "AB"],
            "names model.layers.0.self_attn.q_proj, which has no tensors",
        ),
        (
            lambda t: t.update({f"{Q0}.lora_A.weight": torch.zeros(4, 40)}),
            "q_proj is [32, 32] here and [32, 40] in the adapter",
        ),
        (
            lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(96, 32)}),
            "cannot continue the tensor lm_head.weight",
        ),
        (lambda t: [t.pop(k) for k in list(t)], "holds no lora_A tensors"),
    ],
)
def test_tensors_that_do_not_fit(folder: Path, change, message: str) -> None:
    edit_tensors(folder, change)
    with pytest.raises(UserError) as error:
        load_adapter(folder, tiny("llama"), StepContext())
    assert message in str(error.value)


def test_an_adapter_for_another_model(folder: Path) -> None:
    with pytest.raises(
        UserError, match=r"is for another model: this one has no linear layer .*down_proj"
    ):
        load_adapter(folder, tiny("gpt2"), StepContext())
    with pytest.raises(
        UserError, match=r"is for another model: model.layers.0.mlp.down_proj is \[32, 64\]"
    ):
        load_adapter(folder, tiny("llama", intermediate_size=64), StepContext())


def test_files_that_are_missing_or_damaged(folder: Path) -> None:
    def refused() -> str:
        with pytest.raises(UserError) as error:
            load_adapter(folder, tiny("llama"), StepContext())
        return str(error.value)

    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    assert "damaged or cut short" in refused()
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    assert "it holds a pickle, which is not read" in refused()
    (folder / CONFIG).write_text("{")
    assert "not valid JSON" in refused()
    (folder / CONFIG).unlink()
    assert "there is no adapter_config.json" in refused()


def test_settings_given_must_be_the_adapters(folder: Path) -> None:
    def load(**given) -> LoraSet:
        return load_adapter(folder, tiny("llama"), StepContext(), expected=LoraConfig(**given))

    same = load(r=4, alpha=8, target_modules="all-linear", modules_to_save=[])
    assert (same.settings.r, same.settings.alpha) == (4, 8)
    for given, message in (
        ({"r": 16}, "lora.r is 16, but the adapter"),
        ({"alpha": 16}, "lora.alpha is 16.* has 8"),
        ({"dropout": 0.5}, "lora.dropout is 0.5"),
        ({"target_modules": ["q_proj"]}, r"differ in model.layers.0.mlp.down_proj \(12 modules"),
        (
            {"modules_to_save": ["lm_head"]},
            "means model.embed_tokens, lm_head, but .* trains nothing whole",
        ),
    ):
        with pytest.raises(UserError, match=message):
            load(**given)


def test_nothing_is_changed_in_a_model_whose_adapter_is_refused(folder: Path) -> None:
    model = tiny("llama").eval()
    before = copy.deepcopy(model)(IDS).logits
    with pytest.raises(UserError):
        load_adapter(folder, model, StepContext(), expected=LoraConfig(r=5))
    assert torch.equal(model(IDS).logits, before)

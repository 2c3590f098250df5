"""Merging: PEFT's merge_and_unload in fp32 is the oracle, rounded once."""

import errno
import json

import pytest
import torch
import yaml
from fastsft_kernels import nf4_dequantize, nf4_quantize
from peft import PeftModel
from small_run import CHATML, fill, write_model
from torch import nn
from transformers import AutoModelForCausalLM

from fastsft.config import LoraConfig
from fastsft.data.tokenizer import Tokenizer
from fastsft.errors import UserError
from fastsft.model.context import StepContext
from fastsft.model.files import check_weights
from fastsft.model.load import load_model
from fastsft.model.lora import add_adapters
from fastsft.model.merge import merge

IDS = torch.arange(20)[None] * 13 % 300


def write_adapter(base, folder, *, new_tokens=(), **lora):
    model = load_model(base, quantize=False, dtype=torch.float32)
    options = {"r": 4, "alpha": 8.0} | lora
    adapters = add_adapters(
        model, LoraConfig(**options), seed=0, context=StepContext(), new_token_ids=new_tokens
    )
    fill(adapters)
    adapters.save(folder, str(base))
    return model.eval()


def write_run(folder, base, **config):
    folder.mkdir(parents=True)
    values = {"model": str(base), "data": "x.jsonl", "method": "lora"} | config
    (folder / "config.yaml").write_text(yaml.safe_dump(values))


def merged_by_peft(base, adapter):
    """Every weight PEFT makes of it in fp32, rounded to bf16 once at the end."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return {name: p.to(torch.bfloat16) for name, p in merged.named_parameters()}


def read(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", attn_implementation="sdpa")
    assert model.dtype == torch.bfloat16
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_pefts_rounded_once(tmp_path, dtype, tied):
    base = write_model(tmp_path / "base", dtype=dtype, tie_word_embeddings=tied)
    write_adapter(
        base, tmp_path / "adapter", use_rslora=True, target_modules=["q_proj", "down_proj"]
    )
    report = merge(str(tmp_path / "adapter"), tmp_path / "out")
    assert report.layers == 4
    want = merged_by_peft(base, tmp_path / "adapter")
    got = read(tmp_path / "out")
    assert set(dict(got.named_parameters())) == set(want)
    for name, parameter in got.named_parameters():
        # One bf16 step where PEFT's B @ A sums in another order and the value lies on a tie.
        torch.testing.assert_close(parameter, want[name], rtol=2**-7, atol=0, msg=name)
        assert (parameter == want[name]).float().mean() > 0.999, name
    assert Tokenizer.load(tmp_path / "out").encode("hello") == Tokenizer.load(base).encode("hello")


@pytest.mark.parametrize("tied", [True, False])
def test_modules_trained_whole_and_token_rows_are_in_the_result(tmp_path, tied):
    base = write_model(tmp_path / "base", tie_word_embeddings=tied)
    write_adapter(
        base,
        tmp_path / "a",
        target_modules=["v_proj"],
        modules_to_save=["norm"],
        new_tokens=[1, 305],
    )
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["modules_to_save"] and config["trainable_token_indices"]
    merge(str(tmp_path / "a"), tmp_path / "out")
    got = read(tmp_path / "out")
    original = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert got.config.vocab_size == got.get_input_embeddings().weight.shape[0] == 306
    assert got.config.tie_word_embeddings is tied
    assert ("lm_head.weight" in check_weights(tmp_path / "out")) is not tied
    changed = (
        (got.model.embed_tokens.weight[:300].float() - original.model.embed_tokens.weight)
        .abs()
        .amax(1)
    )
    assert changed[1] > 0.05 and changed[[0, *range(2, 300)]].max() < 0.01
    assert not torch.equal(got.model.norm.weight.float(), original.model.norm.weight)
    ids = torch.tensor([[1, 305, 7]])
    want = adapted(base, tmp_path / "a")(ids).logits
    torch.testing.assert_close(got.float()(ids).logits, want, atol=0.1, rtol=0.05)


def adapted(base, adapter):
    from fastsft.model.adapter import load_adapter

    model = load_model(base, quantize=False, dtype=torch.float32)
    load_adapter(adapter, model, StepContext())
    return model.eval()


def test_the_reported_difference_is_the_difference(tmp_path):
    base = write_model(tmp_path / "base", dtype=torch.float32)
    before = write_adapter(base, tmp_path / "adapter")
    report = merge(str(tmp_path / "adapter"), tmp_path / "out")
    ids = torch.arange(64)[None] * 7919 % 300
    with torch.no_grad():
        want = (read(tmp_path / "out").float()(ids).logits - before(ids).logits).abs()
    assert report.max_difference == pytest.approx(want.max().item(), rel=1e-3)
    assert report.mean_difference == pytest.approx(want.mean().item(), rel=1e-3)
    assert 0 < report.mean_difference < 0.02 * report.largest_logit
    assert f"{report.max_difference:.2g}" in str(report)


def test_stop_ids_and_the_bases_own_settings_are_in_the_result(tmp_path, capsys):
    base = write_model(tmp_path / "base", template=CHATML)
    settings = {
        "eos_token_id": 1,
        "repetition_penalty": 1.1,
        "temperature": 0.6,
    }  # without do_sample
    (base / "generation_config.json").write_text(json.dumps(settings))
    write_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    report = merge(str(tmp_path / "adapter"), tmp_path / "out")
    assert str(report) in capsys.readouterr().out
    got = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    end = Tokenizer.load(base).id_of("<|im_end|>")
    assert sorted(got["eos_token_id"]) == [1, end]
    assert (got["repetition_penalty"], got["temperature"]) == (1.1, 0.6)
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == CHATML


def test_a_failed_merge_leaves_the_name_free(tmp_path, monkeypatch):
    from fastsft.model import load

    base = write_model(tmp_path / "base")
    write_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    with monkeypatch.context() as patch:
        patch.setattr(load, "save_file", full_disk)
        with pytest.raises(UserError, match="no space left"):
            merge(str(tmp_path / "adapter"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    merge(str(tmp_path / "adapter"), tmp_path / "out")


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, "full")


def test_dequantized_merges_into_the_values_of_the_codes(tmp_path):
    base = write_model(tmp_path / "base", dtype=torch.bfloat16)
    write_run(tmp_path / "run", base, method="qlora")
    write_adapter(base, tmp_path / "run" / "adapter", target_modules=["q_proj", "up_proj"])
    report = merge(str(tmp_path / "run"), tmp_path / "out", base="dequantized")
    assert report.mean_difference < 0.02 * report.largest_logit
    oracle = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for name, module in oracle.named_modules():
        if type(module) is nn.Linear and name != "lm_head":
            weight = module.weight.data.to(torch.bfloat16)
            module.weight.data = nf4_dequantize(nf4_quantize(weight), dtype=torch.float32)
    oracle.save_pretrained(tmp_path / "oracle")
    want = merged_by_peft(tmp_path / "oracle", tmp_path / "run" / "adapter")
    for name, parameter in read(tmp_path / "out").named_parameters():
        torch.testing.assert_close(parameter, want[name], rtol=2**-7, atol=0, msg=name)
        assert (parameter == want[name]).float().mean() > 0.999, name


def test_a_whole_bitsandbytes_base_merges_dequantized_only(tmp_path):
    from transformers import BitsAndBytesConfig

    base = write_model(tmp_path / "base", dtype=torch.bfloat16)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=settings)
    model.save_pretrained(tmp_path / "bnb")
    write_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    config = tmp_path / "adapter" / "adapter_config.json"
    values = json.loads(config.read_text()) | {"base_model_name_or_path": str(tmp_path / "bnb")}
    config.write_text(json.dumps(values))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "bnb" / name).write_bytes((base / name).read_bytes())
    with pytest.raises(UserError, match=r"no original weights.*--base dequantized"):
        merge(str(tmp_path / "adapter"), tmp_path / "out")
    merge(str(tmp_path / "adapter"), tmp_path / "out", base="dequantized")
    assert "quantization_config" not in (tmp_path / "out" / "config.json").read_text()
    read(tmp_path / "out")(IDS)


def test_what_cannot_be_merged_says_why(tmp_path):
    base = write_model(tmp_path / "base")
    with pytest.raises(UserError, match="whole model already"):
        merge(str(base), tmp_path / "out")
    with pytest.raises(UserError, match="exists and is not an empty folder"):
        merge(str(base), base)
    with pytest.raises(UserError, match="holds neither a run"):
        (tmp_path / "nothing").mkdir()
        merge(str(tmp_path / "nothing"), tmp_path / "out")
    write_run(tmp_path / "run", base)
    write_adapter(base, tmp_path / "run" / "adapter", target_modules=["q_proj"])
    with pytest.raises(UserError, match=r"unquantised weights.*--base original"):
        merge(str(tmp_path / "run"), tmp_path / "out", base="dequantized")
    with pytest.raises(UserError, match="neither original nor dequantized"):
        merge(str(tmp_path / "run"), tmp_path / "out", base="other")
    assert not (tmp_path / "out").exists()

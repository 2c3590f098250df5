"""What training leaves on disk, where it comes from, and why which engine runs."""

from __future__ import annotations

import errno
import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from small_run import CHATML, write_model, write_tokenizer
from tiny_models import tiny

from fastsft.config import make_config
from fastsft.data.templates import resolve_template
from fastsft.data.tokenizer import Tokenizer
from fastsft.errors import UserError
from fastsft.model import load
from fastsft.model.build import build
from fastsft.model.load import cast_model, load_model, save_model

SETTINGS = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}


@pytest.fixture
def base(tmp_path):
    """A bf16 model that suggests how to sample from it; its tokenizer is elsewhere."""
    folder = write_model(tmp_path / "base", dtype=torch.bfloat16)
    (folder / "generation_config.json").write_text(json.dumps(SETTINGS))
    return folder


def built(base, method="full", **config):
    """A run's model with a tokenizer of another folder."""
    words = base.parent / "words"
    write_tokenizer(words, CHATML)
    tokenizer = Tokenizer.load(words)
    template = resolve_template("auto", tokenizer, kwargs={}, date="2026-01-01", extra_stop=[])
    values = {"model": str(base), "data": "x.jsonl", "method": method, "dtype": "fp32"}
    settings = make_config(values | config)
    return build(settings, tokenizer, template, device=torch.device("cpu"), longest=8)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- the product ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_product_of_an_earlier_checkpoint_is_what_it_would_have_been_then(
    base, tmp_path, method, monkeypatch
):
    run = built(base, method)
    with torch.no_grad():
        for _, parameter in run.named_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)  # not of bf16
    run.write(tmp_path / "then", masters=False)
    run.write(tmp_path / "checkpoint", masters=True)
    (tmp_path / "checkpoint" / run.product / "own_code.py").write_text("# a model's own")
    with torch.no_grad():
        for _, parameter in run.named_parameters():
            parameter.zero_()
    monkeypatch.setattr(load, "_from_pretrained", None)  # no second model in memory
    run.write_from(tmp_path / "checkpoint", tmp_path / "run")
    got, want = (files(tmp_path / name / run.product) for name in ("run", "then"))
    assert got.pop("own_code.py") and got == want
    if method == "full":
        weights = load_file(tmp_path / "run" / "model" / "model.safetensors").values()
        assert {tensor.dtype for tensor in weights} == {torch.bfloat16}


def test_a_full_disk_leaves_no_half_product(base, tmp_path, monkeypatch):
    run = built(base)
    run.write(tmp_path / "checkpoint", masters=True)

    def no_room(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(load, "save_file", no_room)
    with pytest.raises(UserError, match="no space left"):
        run.write_from(tmp_path / "checkpoint", tmp_path / "run")
    assert files(tmp_path / "run" / "model") == {}


def test_casting_keeps_shards_whole_numbers_and_what_must_stay_fp32(tmp_path):
    model = tiny("llama")
    model.register_buffer("counts", torch.arange(5))
    model.lm_head.register_buffer("counts", torch.arange(3))
    save_model(model, tmp_path / "masters", torch.float32, max_shard_bytes=9000)
    source = tmp_path / "masters"
    assert len(list(source.glob("model-*.safetensors"))) > 2
    target = tmp_path / "product"
    target.mkdir()
    (target / "model.safetensors").write_text("an older save")
    cast_model(source, target, torch.bfloat16, fp32=["norm"])
    found = {}
    for path in target.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == found.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
    assert json.loads((target / "config.json").read_text())["dtype"] == "bfloat16"
    for name, tensor in found.items():
        want = model.state_dict()[name]
        if tensor.dtype == torch.int64 or "norm" in name.split("."):
            assert torch.equal(tensor, want) and tensor.dtype == want.dtype
        else:
            assert torch.equal(tensor, want.bfloat16())


def test_a_product_names_the_stops_and_keeps_the_models_own_settings(base, tmp_path):
    run = built(base)
    run.write(tmp_path / "full", masters=False)
    written = json.loads((tmp_path / "full" / "model" / "generation_config.json").read_text())
    assert written["eos_token_id"] == list(run.stop_ids)
    assert {key: written.get(key) for key in SETTINGS} == SETTINGS
    again = load_model(tmp_path / "full" / "model", quantize=False, dtype=None)
    assert again.generation_config.temperature == 0.6

    run = built(base, "lora")
    run.write(tmp_path / "lora", masters=False)
    saved = Tokenizer.load(tmp_path / "lora" / "adapter")
    assert set(run.stop_ids) <= set(saved.stop_ids)


# --- the reason -------------------------------------------------------------------------------------


def test_the_reason_says_why_compat_and_what_runs(base, tmp_path):
    reason = built(base, "lora").reason
    assert reason.startswith("our own decoder for llama") and reason.endswith("activations: keep")
    assert built(base, "lora", engine="fast").reason.startswith("as asked for: our own decoder")
    reason = built(base, "full").reason
    assert reason == "our own decoder for llama; activations: keep"
    reason = built(base, "lora", engine="compat").reason
    assert "with our adapters, our attention over packed documents and our loss" in reason
    reason = built(base, "full", engine="compat", activations="recompute_block").reason
    assert reason.startswith("as asked for") and "adapters" not in reason
    assert "recompute_block" in reason
    shutil.rmtree(base)
    tiny("bloom", vocab_size=300).save_pretrained(base)
    reason = built(base, "lora").reason
    assert reason.startswith("the fast engine has no row for model_type 'bloom'")
    assert "its own attention (one document at a time)" in reason
    with pytest.raises(UserError, match=r"engine: fast cannot run this model: .* no row for"):
        built(base, "lora", engine="fast")

"""Loading and saving: transformers and bitsandbytes are the oracles; broken folders say what is broken."""

import errno
import gc
import json
import weakref
from pathlib import Path

import pytest
import safetensors.torch
import torch
from fastsft_kernels import nf4_dequantize, nf4_quantize
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from fastsft.errors import UserError
from fastsft.model import load, quantizer
from fastsft.model.load import load_model, resolve_model, save_model
from fastsft.model.quant import NF4Linear

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
IDS = torch.arange(12)[None] % 96


def random_model(kind, **options):
    torch.manual_seed(1)
    config, cls = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "mixtral": (MixtralConfig, MixtralForCausalLM),
    }[kind]
    if kind == "mixtral":
        options |= {"num_local_experts": 4}
    model = cls(config(**SIZES, **options)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    random_model("llama", tie_word_embeddings=True).to(torch.bfloat16).save_pretrained(
        root / "llama"
    )
    random_model("qwen2").save_pretrained(root / "qwen2", max_shard_size="100KB")
    random_model("mixtral").save_pretrained(root / "mixtral")
    return root


@pytest.fixture
def llama(folders, tmp_path):
    """A copy of a good folder, to be broken."""
    target = tmp_path / "model"
    target.mkdir()
    for path in (folders / "llama").iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_is_the_one_transformers_loads(folders, kind, dtype):
    want = AutoModelForCausalLM.from_pretrained(
        folders / kind, dtype=dtype, attn_implementation="sdpa"
    )
    got = load_model(folders / kind, quantize=False, dtype=dtype)
    assert type(got) is type(want) and got.dtype == dtype
    assert torch.equal(got(IDS).logits, want(IDS).logits)


def test_without_a_dtype_the_checkpoints_own_is_kept(folders):
    assert load_model(folders / "llama", quantize=False, dtype=None).dtype == torch.bfloat16
    assert load_model(folders / "qwen2", quantize=False, dtype=None).dtype == torch.float32


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mixtral"])
def test_quantising_replaces_every_linear_but_head_and_experts(folders, kind):
    want = AutoModelForCausalLM.from_pretrained(
        folders / kind, dtype=torch.float32, attn_implementation="sdpa"
    )
    told = []
    got = load_model(
        folders / kind, quantize=True, dtype=torch.float32, progress=lambda *step: told.append(step)
    )
    replaced = [name for name, module in got.named_modules() if isinstance(module, NF4Linear)]
    linears = [name for name, module in want.named_modules() if type(module) is nn.Linear]
    assert sorted(replaced) == sorted(set(linears) - {"lm_head"})
    assert told[-1] == (len(replaced), len(replaced))
    for name in replaced:  # the oracle: the same model with weights that went through NF4
        weight = want.get_submodule(name).weight
        weight.data = nf4_dequantize(nf4_quantize(weight.data), dtype=torch.float32)
    torch.testing.assert_close(got(IDS).logits, want(IDS).logits, rtol=1e-5, atol=1e-6)
    assert not hasattr(got, "hf_quantizer") and not hasattr(got.config, "quantization_config")


def test_quantising_keeps_one_full_tensor_at_a_time(folders, monkeypatch):
    seen, most = [], 0

    def watching(weight):
        nonlocal most
        gc.collect()
        most = max(most, sum(ref() is not None for ref in seen))
        seen.append(weakref.ref(weight))
        return nf4_quantize(weight)

    monkeypatch.setattr(quantizer, "nf4_quantize", watching)
    load_model(folders / "qwen2", quantize=True, dtype=torch.bfloat16)
    assert len(seen) == 14 and most == 0


@pytest.fixture(scope="module")
def bnb(folders):
    """Writes a bitsandbytes checkpoint of the Qwen2 model and returns what transformers makes of it."""
    from transformers import BitsAndBytesConfig

    def write(name, **options):
        settings = BitsAndBytesConfig(load_in_4bit=True, **options)
        folder = folders / name
        model = AutoModelForCausalLM.from_pretrained(
            folders / "qwen2", quantization_config=settings, dtype=torch.bfloat16
        )
        model.save_pretrained(folder)
        return folder, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)

    return write


@pytest.mark.parametrize("double", [True, False])
def test_a_bitsandbytes_checkpoint_loads_bit_for_bit(bnb, double):
    from bitsandbytes.functional import dequantize_4bit

    folder, want = bnb(f"bnb-{double}", bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double)
    got = load_model(folder, quantize=True, dtype=torch.bfloat16)
    layers = {name: m for name, m in got.named_modules() if isinstance(m, NF4Linear)}
    assert len(layers) == 14
    for name, layer in layers.items():
        theirs = want.get_submodule(name).weight
        assert torch.equal(layer.weight, dequantize_4bit(theirs.data, theirs.quant_state))
    rest = dict(want.named_parameters())
    for name, parameter in got.named_parameters():
        assert torch.equal(parameter, rest[name]) and parameter.dtype == rest[name].dtype
    torch.testing.assert_close(got(IDS).logits, want(IDS).logits, rtol=0, atol=2e-2)


def test_a_bitsandbytes_checkpoint_gets_the_dtype_asked_for(bnb):
    folder, _ = bnb("bnb-fp32", bnb_4bit_quant_type="nf4")
    got = load_model(folder, quantize=True, dtype=torch.float32)
    assert {parameter.dtype for parameter in got.parameters()} == {torch.float32}
    got(IDS)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
            "fp4",
        ),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "fp4"),  # their default
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "int8"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
    ],
)
def test_other_quantisations_are_refused_with_the_reason(llama, settings, expected):
    edit_json(llama / "config.json", quantization_config=settings)
    with pytest.raises(UserError, match=f"quantised by.*{expected}.*original checkpoint"):
        load_model(llama, quantize=True, dtype=torch.bfloat16)


def test_a_4_bit_checkpoint_needs_qlora(llama):
    edit_json(
        llama / "config.json",
        quantization_config={"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    )
    with pytest.raises(UserError, match="method: qlora"):
        load_model(llama, quantize=False, dtype=torch.bfloat16)


def test_a_4_bit_checkpoint_without_4_bit_weights(llama):
    edit_json(
        llama / "config.json",
        quantization_config={"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    )
    assert "none of them is" in refusal(llama, quantize=True)


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(path, change):
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})


def refusal(folder, *, quantize=False):
    with pytest.raises(UserError) as caught:
        load_model(folder, quantize=quantize, dtype=torch.bfloat16)
    return str(caught.value)


def test_folder_without_a_config(llama):
    (llama / "config.json").unlink()
    assert f"{llama} has no config.json" in refusal(llama)
    (llama / "adapter_config.json").write_text("{}")
    assert "holds an adapter" in refusal(llama)


def test_config_that_is_no_json(llama):
    (llama / "config.json").write_text('{"model_type": ')
    assert "config.json is not valid JSON" in refusal(llama)


def test_config_of_an_unknown_architecture(llama):
    edit_json(llama / "config.json", model_type="nonesuch")
    assert "nonesuch" in refusal(llama)


def test_folder_without_weights_and_with_pickles_only(llama):
    (llama / "model.safetensors").unlink()
    assert "has no weights" in refusal(llama)
    (llama / "pytorch_model.bin").write_bytes(b"x")
    message = refusal(llama)
    assert "only as pytorch_model.bin" in message and "save_pretrained" in message


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_file_cut_short_names_itself_and_its_bytes(llama, kept):
    path = llama / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:kept])
    message = refusal(llama)
    assert str(path) in message and "cut short" in message and str(len(whole[:kept])) in message
    if kept == -1:
        assert f"should have {len(whole)} bytes" in message


def test_a_missing_shard_and_an_index_of_other_files(folders, tmp_path):
    random_model("qwen2").save_pretrained(tmp_path / "m", max_shard_size="100KB")
    index = tmp_path / "m" / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    edit_json(
        index, weight_map=weight_map | {"model.extra.weight": weight_map["model.norm.weight"]}
    )
    assert "says that model.extra.weight is in" in refusal(tmp_path / "m")
    (tmp_path / "m" / weight_map["model.norm.weight"]).unlink()
    message = refusal(tmp_path / "m")
    assert weight_map["model.norm.weight"] in message and "missing" in message


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_missing_tensor_is_no_random_one(llama, name, quantize):
    edit_weights(llama / "model.safetensors", lambda tensors: tensors.pop(name))
    assert f"no values for: {name}" in refusal(llama, quantize=quantize)


def test_a_tensor_without_a_place(llama):
    extra = {"model.layers.7.mlp.up_proj.weight": torch.zeros(2)}
    edit_weights(llama / "model.safetensors", lambda tensors: tensors.update(extra))
    message = refusal(llama)
    assert "no place for: model.layers.7.mlp.up_proj.weight" in message


@pytest.mark.parametrize("quantize", [False, True])
def test_weights_of_another_size(llama, quantize):
    edit_json(llama / "config.json", intermediate_size=160)
    message = refusal(llama, quantize=quantize)
    assert "another size" in message and "(128, 64)" in message and "(160, 64)" in message


def test_code_in_the_repository_is_not_run_unasked(llama):
    edit_json(
        llama / "config.json",
        model_type="own",
        auto_map={"AutoConfig": "code.C", "AutoModel": "code.M"},
    )
    (llama / "code.py").write_text("raise SystemError('executed')")
    assert "trust_remote_code" in refusal(llama)


def test_resolving_names(folders, tmp_path, monkeypatch):
    assert resolve_model("builtin:tiny", None).name == "tiny"
    assert resolve_model(str(folders / "llama"), None) == folders / "llama"
    with pytest.raises(UserError, match="revision"):
        resolve_model(str(folders / "llama"), "main")
    with pytest.raises(UserError, match="no folder"):
        resolve_model("./nowhere", None)
    with pytest.raises(UserError, match="builtin:tiny"):
        resolve_model("builtin:huge", None)
    with pytest.raises(UserError, match="is a file"):
        resolve_model(str(folders / "llama" / "config.json"), None)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        ("GatedRepoError", "gated.*huggingface.co/some/model.*HF_TOKEN"),
        ("RepositoryNotFoundError", "neither such a folder nor such a model"),
        ("RevisionNotFoundError", "no such revision"),
        ("LocalEntryNotFoundError", "cannot be reached"),
        ("OfflineModeIsEnabled", "cannot be reached"),
    ],
)
def test_what_the_hub_answers_becomes_one_sentence(monkeypatch, error, expected):
    import huggingface_hub
    from huggingface_hub import errors

    kind = getattr(errors, error)

    def fail(*_, **__):
        raise kind.__new__(kind, "no")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=f"some/model@v9.*{expected}"):
        resolve_model("some/model", "v9")


def test_the_hub_is_asked_for_what_is_needed(monkeypatch, tmp_path):
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    files = [
        "config.json", "model-00001-of-00002.safetensors", "tokenizer.json", "tokenizer.model",
        "chat_template.jinja", "pytorch_model.bin", "consolidated.safetensors", "original/params.json",
        "model.gguf", "README.md",
    ]  # fmt: skip
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_model("some/model", "v9") == tmp_path
    assert (asked.pop("name"), asked.pop("revision")) == ("some/model", "v9")
    assert list(filter_repo_objects(files, **asked)) == files[:5]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mixtral"])
@pytest.mark.parametrize("shard", [10**9, 60_000])
def test_a_saved_model_is_the_same_in_transformers(folders, tmp_path, kind, shard):
    model = load_model(folders / kind, quantize=False, dtype=torch.float32)
    save_model(model, tmp_path / "out", torch.float32, stop_ids=[7, 9], max_shard_bytes=shard)
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, attn_implementation="sdpa"
    )
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert again.generation_config.eos_token_id == [7, 9]
    assert set(load.check_weights(tmp_path / "out")) == set(load.check_weights(folders / kind))
    shards = list((tmp_path / "out").glob("*.safetensors"))
    assert (len(shards) > 1) == (shard < 10**9) == (tmp_path / "out" / load.INDEX).exists()
    assert str(folders) not in (tmp_path / "out" / "config.json").read_text()


def test_saving_casts_and_a_second_save_replaces_the_first(folders, tmp_path):
    model = load_model(folders / "qwen2", quantize=False, dtype=torch.float32)
    save_model(model, tmp_path / "out", torch.float32, max_shard_bytes=60_000)
    save_model(model, tmp_path / "out", torch.bfloat16)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert again.dtype == torch.bfloat16
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name).to(torch.bfloat16))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]


def test_a_head_trained_apart_is_saved_apart(folders, tmp_path):
    model = load_model(folders / "llama", quantize=False, dtype=torch.float32)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 2)
    save_model(model, tmp_path / "out", torch.float32)
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, attn_implementation="sdpa"
    )
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert again.config.tie_word_embeddings is False  # what other readers go by


def test_a_full_disk_names_the_folder_and_leaves_the_earlier_save(folders, tmp_path, monkeypatch):
    model = load_model(folders / "qwen2", quantize=False, dtype=torch.float32)
    out = tmp_path / "out"
    save_model(model, out, torch.float32)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(tensors, path, **_):
        Path(path).write_bytes(b"half")
        raise safetensors.SafetensorError("IoError(Os { code: 28, kind: StorageFull })")

    monkeypatch.setattr(load, "save_file", full)
    with pytest.raises(UserError, match=f"no space left.*{out}"):
        save_model(model, out, torch.bfloat16)
    monkeypatch.setattr(load, "save_file", lambda *_, **__: fail_with(errno.ENOSPC))
    with pytest.raises(UserError, match=f"no space left.*{out}"):
        save_model(model, out, torch.bfloat16)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def fail_with(code):
    raise OSError(code, "full")


def test_training_a_loaded_model_does_not_write_into_its_file(folders):
    files = {path: path.read_bytes() for path in (folders / "qwen2").glob("*.safetensors")}
    model = load_model(folders / "qwen2", quantize=False, dtype=torch.float32)
    for parameter in model.parameters():  # mapped from the file, not copied
        parameter.data.add_(1.0)
    assert all(path.read_bytes() == content for path, content in files.items())

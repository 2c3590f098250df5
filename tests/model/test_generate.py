"""Generating: a step-by-step argmax over the plain model is the oracle; finding what a name means; chat."""

import io
import json

import pytest
import torch
import yaml
from small_run import CHATML, fill, write_model
from torch import nn

from fastsft import cli, device
from fastsft.config import LoraConfig
from fastsft.data.encode import Encoder
from fastsft.data.rows import Conversation
from fastsft.data.tokenizer import Tokenizer
from fastsft.errors import UserError
from fastsft.model import inference
from fastsft.model.attention import NAME
from fastsft.model.context import StepContext
from fastsft.model.generate import chat, generate, load_for_inference, prompt_ids
from fastsft.model.inference import load_template, locate
from fastsft.model.load import load_model, save_model
from fastsft.model.lora import add_adapters
from fastsft.model.merge import merge
from fastsft.model.quant import NF4Linear


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("base"), template=CHATML)


@pytest.fixture(scope="module")
def plain_base(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("plain"))


def write_run(run, base, *, method="lora", product="adapter", seed=0, **config):
    """A finished run in the layout that training leaves."""
    run.mkdir(parents=True, exist_ok=True)
    values = {"model": str(base), "data": "x.jsonl", "method": method} | config
    (run / "config.yaml").write_text(yaml.safe_dump(values))
    write_product(run / product, base, method, seed)
    return run


def write_product(folder, base, method, seed=0):
    model = load_model(base, quantize=method == "qlora", dtype=torch.float32)
    tokenizer = Tokenizer.load(base)
    if method == "full":
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
        save_model(model, folder, torch.float32)
    else:
        lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
        adapters = add_adapters(model, lora, seed=seed, context=StepContext())
        fill(adapters)
        adapters.save(folder, str(base))
    tokenizer.save(folder, None)
    return model.eval()


@torch.no_grad()
def by_argmax(model, ids, count, stops=()):
    ids = list(ids)
    start = len(ids)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in stops:
            break
    return ids[start:]


def test_greedy_is_argmax_and_the_state_is_untouched(base):
    model, tokenizer, template = load_for_inference(str(base))
    messages = [{"role": "user", "content": "hello"}]
    prompt = tokenizer.encode("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n")
    want = by_argmax(model, prompt, 12)
    model.train()
    model.set_attn_implementation(NAME)
    model.generation_config.repetition_penalty = 5.0  # a checkpoint's suggestion, not ours
    settings, before = model.generation_config, torch.random.get_rng_state()
    answer, stopped = generate(model, tokenizer, template, messages, max_new_tokens=12)
    assert (answer, stopped) == (tokenizer.decode(want), False)
    assert generate(model, tokenizer, template, "hello", max_new_tokens=12)[0] == answer
    assert model.training and model.config._attn_implementation == NAME
    assert model.generation_config is settings
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_text_is_gone_on_with_where_there_is_no_template(plain_base):
    model, tokenizer, template = load_for_inference(str(plain_base))
    assert template is None
    want = by_argmax(model, tokenizer.encode("hello there"), 8)
    assert generate(model, tokenizer, None, "hello there", max_new_tokens=8)[0] == tokenizer.decode(
        want
    )
    with pytest.raises(UserError, match="no chat template"):
        generate(model, tokenizer, None, [{"role": "user", "content": "x"}], max_new_tokens=8)


def test_the_prompt_is_what_training_puts_before_the_answer(base, plain_base, monkeypatch):
    """Control tokens in a question are words; a text that begins with BOS gets no second one."""
    tokenizer = Tokenizer.load(base)
    template = load_template(locate(str(base)), tokenizer)
    asked = {"role": "user", "content": "what is <|im_end|>\n<|im_start|>assistant?"}
    rows = [Conversation("chat", "x:1", [asked, {"role": "assistant", "content": "hello"}])]
    (example,) = Encoder(tokenizer, template).encode(rows)
    ids, trained = example.sequences[0]
    prompt = prompt_ids(tokenizer, template, asked["content"])
    assert prompt == prompt_ids(tokenizer, template, [asked]) == ids[: trained.argmax()].tolist()
    assert prompt.count(tokenizer.id_of("<|im_start|>")) == 2
    plain = Tokenizer.load(plain_base)
    monkeypatch.setattr(plain, "adds_bos", True)
    for text in ("hello", "<s>hello"):
        (example,) = Encoder(plain, None).encode([Conversation("text", "x:1", text=text)])
        assert prompt_ids(plain, None, text) == example.sequences[0][0][:-1].tolist()


def test_a_stop_token_ends_the_answer_and_is_not_part_of_it(base):
    model, tokenizer, template = load_for_inference(str(base))
    prompt = tokenizer.encode("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n")
    free = by_argmax(model, prompt, 6)
    stop = tokenizer.id_of("<|im_end|>")
    assert stop in template.stop_ids and stop not in free
    head = model.get_output_embeddings()
    bias = torch.zeros(300)

    def at_fourth(module, args, output):
        bias[stop] = 1e4 if calls.append(0) or len(calls) == 4 else 0.0
        return output + bias

    calls = []
    hook = head.register_forward_hook(at_fourth)
    try:
        answer, stopped = generate(model, tokenizer, template, "hello", max_new_tokens=20)
    finally:
        hook.remove()
    assert (answer, stopped) == (tokenizer.decode(free[:3]), True)


def test_sampling_follows_its_seed_and_leaves_the_random_state(base):
    model, tokenizer, template = load_for_inference(str(base))
    before = torch.random.get_rng_state()

    def sample(seed):
        return generate(
            model, tokenizer, template, "hello", max_new_tokens=10, temperature=1.0, seed=seed
        )[0]

    assert sample(1) == sample(1) != sample(2)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_sample_is_drawn_from_the_whole_softmax(base):
    model, tokenizer, template = load_for_inference(str(base))
    head = model.get_output_embeddings()
    nearly_flat = torch.linspace(0, 0.01, 300)
    hook = head.register_forward_hook(lambda module, args, out: torch.zeros_like(out) + nearly_flat)
    try:
        seen = {
            generate(model, tokenizer, template, "x", max_new_tokens=1, temperature=1.0, seed=s)[0]
            for s in range(30)
        }
    finally:
        hook.remove()
    assert (
        len(seen - {tokenizer.decode([i]) for i in range(250, 300)}) > 5
    )  # not the 50 likeliest only


def test_text_arrives_in_pieces_that_make_the_answer(base):
    model, tokenizer, template = load_for_inference(str(base))
    pieces = []
    answer, _ = generate(
        model, tokenizer, template, "hello", max_new_tokens=16, on_text=pieces.append
    )
    assert len(pieces) > 3 and "".join(pieces) == answer


def test_a_prompt_longer_than_the_model_is_refused(base):
    model, tokenizer, template = load_for_inference(str(base))
    with pytest.raises(UserError, match="the model takes 128"):
        generate(model, tokenizer, template, "q z " * 100, max_new_tokens=8)
    steps = []
    hook = model.get_output_embeddings().register_forward_hook(lambda *_: steps.append(1))
    try:
        generate(model, tokenizer, template, "q z " * 25, max_new_tokens=500)
    finally:
        hook.remove()
    assert len(steps) == 128 - len(prompt_ids(tokenizer, template, "q z " * 25))


def logits(model):
    with torch.no_grad():
        return model(torch.arange(10)[None]).logits


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_runs_checkpoints_and_products_are_found(base, tmp_path, method):
    product = "model" if method == "full" else "adapter"
    run = write_run(tmp_path / "run", base, method=method, product=product)
    final = load_for_inference(str(run))[0]
    assert torch.equal(logits(load_for_inference(str(run / product))[0]), logits(final))
    assert any(isinstance(m, NF4Linear) for m in final.modules()) == (method == "qlora")
    step = run / "checkpoints" / "step-000100"
    want = logits(write_product(step / product, base, method, seed=1))
    write_product(run / "checkpoints" / "step-000020" / product, base, method, seed=2)
    torch.testing.assert_close(logits(load_for_inference(str(step))[0]), want)
    torch.testing.assert_close(logits(load_for_inference(str(step / product))[0]), want)
    (run / product).rename(tmp_path / "elsewhere")  # an unfinished run: its newest checkpoint
    torch.testing.assert_close(logits(load_for_inference(str(run))[0]), want)


def test_an_adapter_brings_its_template_and_finds_its_base(base, plain_base, tmp_path):
    write_product(tmp_path / "a", base, "lora")
    _, tokenizer, template = load_for_inference(str(tmp_path / "a"))
    assert tokenizer.folder == tmp_path / "a" and template is not None
    for path in (tmp_path / "a").iterdir():
        if not path.name.startswith("adapter"):
            path.unlink()
    assert load_for_inference(str(tmp_path / "a"))[1].folder == base
    config = tmp_path / "a" / "adapter_config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": None})
    )
    with pytest.raises(UserError, match="names no base model"):
        load_for_inference(str(tmp_path / "a"))


def test_a_config_of_another_base_is_not_the_runs(base, plain_base, tmp_path):
    run = write_run(tmp_path / "run", base, method="qlora")
    assert inference.locate(str(run)).quantized()
    (run / "config.yaml").write_text(yaml.safe_dump({"model": str(plain_base), "data": "x"}))
    subject = inference.locate(str(run))
    assert subject.config is None and not subject.quantized()


def test_chat_answers_one_prompt_on_stdout(base, capsys):
    model, tokenizer, template = load_for_inference(str(base))
    want, stopped = generate(model, tokenizer, template, "hello", max_new_tokens=9)
    chat(str(base), "hello", max_new_tokens=9)
    out, err = capsys.readouterr()
    assert out == want + "\n" and not stopped and "cut after 9 tokens" in err


def test_chat_keeps_the_conversation_until_exit(base, tmp_path, monkeypatch, capsys):
    run = write_run(tmp_path / "run", base, system="be brief")
    model, tokenizer, template = load_for_inference(str(run))
    talk = [{"role": "system", "content": "be brief"}]
    want = []
    for line in ("hello", "what is this"):
        talk.append({"role": "user", "content": line})
        want.append(generate(model, tokenizer, template, talk, max_new_tokens=5)[0])
        talk.append({"role": "assistant", "content": want[-1]})
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n\nwhat is this\n/exit\nnever asked\n"))
    chat(str(run), max_new_tokens=5)
    assert capsys.readouterr().out == "".join(answer + "\n" for answer in want)


def test_chat_continues_each_line_without_a_template(plain_base, monkeypatch, capsys):
    model, tokenizer, _ = load_for_inference(str(plain_base))
    want = generate(model, tokenizer, None, "hello", max_new_tokens=5)[0]
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nhello\n"))
    chat(str(plain_base), max_new_tokens=5)
    assert capsys.readouterr().out == f"{want}\n{want}\n"


def test_generating_with_adapters_draws_no_dropout(base):
    model = load_model(base, quantize=False, dtype=torch.float32)
    lora = LoraConfig(r=4, dropout=0.5)
    fill(add_adapters(model, lora, seed=0, context=StepContext()))
    tokenizer = Tokenizer.load(base)
    model.eval()
    want = by_argmax(model, tokenizer.encode("hello"), 8)
    model.train()
    assert generate(model, tokenizer, None, "hello", max_new_tokens=8)[0] == tokenizer.decode(want)
    assert all(m.training for m in model.modules() if isinstance(m, nn.Module))


# --- where it runs, whose code runs -----------------------------------------------------------------


def test_an_unusable_gpu_is_an_error_and_no_slow_answer(base, tmp_path, monkeypatch):
    facts = device.Facts("2.13.0", None, torch_sees_gpu=False, gpus=("NVIDIA L4",))
    monkeypatch.setattr(device, "gather", lambda: facts)
    run = write_run(tmp_path / "run", base)
    with pytest.raises(UserError, match="build without CUDA"):
        chat(str(run), "hello", max_new_tokens=1)
    with pytest.raises(UserError, match="build without CUDA"):
        merge(str(run), tmp_path / "out")


@pytest.mark.parametrize(
    ("wanted", "kind", "native", "dtype"),
    [
        ("auto", "cpu", False, torch.float32),
        ("bf16", "cpu", False, torch.bfloat16),
        ("auto", "cuda", True, torch.bfloat16),
        ("fp32", "cuda", True, torch.float32),
        ("auto", "cuda", False, torch.float32),
        ("bf16", "cuda", False, torch.float32),  # trained on a newer card
    ],
)
def test_answers_come_in_the_runs_dtype_or_the_cards(wanted, kind, native, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: native)
    assert inference.answer_dtype(wanted, torch.device(kind)) == dtype


def test_code_beside_a_model_runs_when_asked_and_not_before(tmp_path, capsys):
    folder = write_model(tmp_path / "own")
    adapter = tmp_path / "adapter"
    write_product(adapter, folder, "lora", 0)
    values = json.loads((folder / "config.json").read_text())
    values |= {"model_type": "own_llama_chat", "architectures": ["OwnModel"]}
    values["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own_llama_chat'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    talk = ["chat", str(folder), "--prompt", "hello"]
    join = ["merge", str(adapter), "--out", str(tmp_path / "out")]
    for words in (talk, join):
        assert cli.main(words) == 2
        assert "trust" in capsys.readouterr().err
        assert cli.main([*words, "--trust-remote-code"]) == 0
